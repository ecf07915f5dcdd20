"""Rows reach the devices that need them, whoever holds them."""

import collections
import functools

import jax
import numpy as np
import pytest

from ppn_jax.device_data import dataset
from ppn_jax.device_data.exchange import Grid, choose_grid, collect_rows


@pytest.mark.parametrize('grid, rows, held', [
    (Grid(1, 1, 0, 4), 4, 9), (Grid(4, 1, 0, 3), 3, 5), (Grid(4, 1, 0, 2), 3, 5),
    (Grid(3, 1, 0, 1), 1, 1), (Grid(2, 2, 6, 3), 3, 5), (Grid(2, 2, 2, 1), 3, 5),
    (Grid(3, 2, 1, 2), 4, 7), (Grid(2, 4, 3, 2), 5, 3), (Grid(1, 3, 2, 4), 4, 2)])
def test_every_device_gets_its_rows(grid, rows, held):
  devices = grid.height * grid.width
  rng = np.random.default_rng(devices * rows)
  data = {'a': np.arange(1, devices * held * 6 + 1, dtype=np.int32).reshape(devices, held, 2, 3),
          'b': rng.random((devices, held), np.float32),
          'c': rng.integers(0, 256, (devices, held, 4), np.uint8),
          'd': rng.random((devices, held, 2)) < 0.5}
  collect = functools.partial(collect_rows, rows=rows, grid=grid, axes=('i', 'j'))
  step = jax.jit(jax.vmap(jax.vmap(collect, in_axes=(0, None), axis_name='j'),
                          in_axes=(0, None), axis_name='i'))
  every = rng.integers(0, devices * held, (4, devices * rows)).astype(np.int32)
  every[1] = devices * held - 1  # All from one device.
  every[2] = np.repeat(every[2, :devices] // held * held, rows)  # All that one has to one.
  for indices in every:
    found = step(jax.tree.map(
        lambda a: a.reshape(grid.height, grid.width, *a.shape[1:]), data), indices)
    for name, array in data.items():
      expected = array.reshape(-1, *array.shape[2:])[indices]
      np.testing.assert_array_equal(found[name].reshape(expected.shape), expected)


@pytest.mark.parametrize('devices, rows, most', [
    (1, 128, 1), (2, 128, 2), (8, 128, 2.5), (16, 128, 3.5), (64, 128, 7), (256, 128, 7),
    (1024, 128, 9), (256, 32, 14), (8, 1, 8), (7, 64, 3.3)])
def test_rows_exchanged_grow_slowly_with_the_number_of_devices(devices, rows, most):
  grid = choose_grid(rows, devices)
  assert grid.height * grid.width == devices
  assert grid.exchanged <= most * rows, grid
  if devices <= 64:
    assert grid.width == 1


@pytest.mark.parametrize('devices, rows, images', [
    (8, 128, 118_287), (64, 16, 118_287), (256, 128, 118_287), (256, 128, 40_000), (8, 16, 520)])
def test_a_usual_batch_takes_one_round(devices, rows, images):
  grid, rng = choose_grid(rows, devices), np.random.default_rng(0)
  mesh = collections.namedtuple('Mesh', 'size')(devices)
  held = dataset._rows(collections.namedtuple('Spec', 'num_images')(images), mesh)
  for _ in range(20):
    owners = rng.permutation(-(-devices * rows // images) * images)[:devices * rows]
    owners = owners % images // held
    receivers = np.arange(devices * rows) // rows
    second = owners // grid.width * devices + receivers
    assert np.bincount(second).max() <= grid.along_columns
    if grid.width > 1:
      first = owners * grid.width + receivers % grid.width
      assert np.bincount(first).max() <= grid.along_rows
