"""Rows of processes and batch sizes, in a single process."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import tiny_config

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.run import check_batch


def test_one_process_owns_every_row():
  mesh = sharding.data_mesh()
  np.testing.assert_array_equal(sharding.local_rows(8 * mesh.size, mesh),
                                np.arange(8 * mesh.size))


def test_round_trip_to_devices():
  mesh = sharding.data_mesh()
  batch = {'image': np.arange(24, dtype=np.uint8).reshape(8, 3), 'valid': np.ones(8, bool)}
  placed = sharding.to_global(batch, mesh, 8)
  assert all(isinstance(x, jax.Array) for x in placed.values())
  jax.tree.map(np.testing.assert_array_equal, sharding.to_host(placed), batch)
  jax.tree.map(np.testing.assert_array_equal, sharding.own_rows(placed), batch)


def test_batch_sizes_that_cannot_be_split():
  mesh = sharding.data_mesh()
  sharding.check_batch_size('train.batch_size', 3 * mesh.size, mesh)
  with pytest.raises(InputError, match=r'train\.batch_size=0 cannot be split'):
    sharding.check_batch_size('train.batch_size', 0, mesh)


def test_own_rows_of_many_processes_are_ascending(monkeypatch):
  # One process plays all: what differs with more is whose devices the rows lie on.
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  mesh = sharding.data_mesh()
  local = np.random.default_rng(0).uniform(size=(8, 3)).astype(np.float32)
  placed = sharding.to_global(local, mesh, 8)
  np.testing.assert_array_equal(sharding.own_rows({'x': placed})['x'], local)


def test_devices_of_a_slice_are_neighbours():
  def devices(*slices):
    return [types.SimpleNamespace(id=i, slice_index=s) for i, s in enumerate(slices)]

  assert [d.id for d in sharding.by_slice(devices(0, 1, 0, 1))] == [0, 2, 1, 3]
  assert [d.id for d in sharding.by_slice([types.SimpleNamespace(id=i) for i in (2, 1)])] == [2, 1]
  with pytest.raises(InputError, match='slices have 2, 1 devices'):
    sharding.by_slice(devices(0, 1, 0))


def test_batch_statistics_do_not_cross_slices(monkeypatch):
  monkeypatch.setattr(sharding, 'num_slices', lambda mesh: 2)

  def check(groups, norm='batch'):
    config = tiny_config().copy_and_resolve_references().unlock()
    config.model.layers.norm_group_size, config.model.layers.norm = groups, norm
    check_batch(config, 'train.batch_size', 16, 1, AbstractMesh((4,), (sharding.AXIS,)))

  check(8)
  check(4)
  check(0, norm='frozen')
  for groups in (0, 16):
    with pytest.raises(InputError, match=r'between 2 slices .* the 8 images .* such as 4, those'):
      check(groups)


def test_an_evaluation_batch_grows_to_what_devices_can_share():
  mesh = AbstractMesh((6,), (sharding.AXIS,))
  assert [sharding.fitting_batch_size(n, mesh) for n in (1, 6, 7, 32)] == [6, 6, 12, 36]
