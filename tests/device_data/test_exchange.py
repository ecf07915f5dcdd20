"""Rows reach the devices that need them, whoever holds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.device_data import exchange


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
                      axis_name):
  """Computes what the documentation of `jax.lax.ragged_all_to_all` says, which CPUs lack."""
  operands, starts, sizes, ends = (
      jax.lax.all_gather(a, axis_name)
      for a in (operand, input_offsets, send_sizes, output_offsets))
  me = jax.lax.axis_index(axis_name)
  places = jnp.arange(len(output))
  for sender in range(len(operands)):
    start, size, end = (a[sender, me] for a in (starts, sizes, ends))
    size = jnp.where(size == recv_sizes[sender], size, -10**6)  # Both sides have to agree.
    here = (places >= end) & (places < end + size)
    values = operands[sender].at[places - end + start].get(mode='clip')
    output = jnp.where(here.reshape(-1, *[1] * (output.ndim - 1)), values, output)
  return output


@pytest.mark.parametrize('devices, rows, held, capacity', [
    (1, 4, 9, 100), (4, 3, 5, 100), (4, 3, 5, 2), (3, 1, 1, 1), (2, 5, 1, 3)])
@pytest.mark.parametrize('implementation', ['collect_from_all', 'collect_by_receiver'])
def test_every_device_gets_its_rows(monkeypatch, implementation, devices, rows, held, capacity):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_all_to_all)
  monkeypatch.setattr(exchange, 'send_capacity', lambda rows: capacity)
  collect = functools.partial(getattr(exchange, implementation), rows=rows, axis='i')
  rng = np.random.default_rng(devices * rows)
  data = {'a': np.arange(1, devices * held * 6 + 1, dtype=np.int32).reshape(devices, held, 2, 3),
          'b': rng.random((devices, held), np.float32),
          'c': rng.integers(0, 256, (devices, held, 4), np.uint8),
          'd': rng.random((devices, held, 2)) < 0.5}
  step = jax.jit(jax.vmap(collect, in_axes=(0, None), axis_name='i'))
  every = rng.integers(0, devices * held, (3, devices * rows)).astype(np.int32)
  every[1] = devices * held - 1  # All from one device.
  for indices in every:
    found = step(data, indices)
    for name, array in data.items():
      expected = array.reshape(-1, *array.shape[2:])[indices]
      np.testing.assert_array_equal(
          found[name], expected.reshape(devices, rows, *array.shape[2:]))


def test_a_usual_batch_takes_one_round():
  """Of 256 devices with 128 rows each, none sends more than the capacity."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    owners = rng.permutation(118_000)[:256 * 128] // 461
    assert np.bincount(owners).max() <= exchange.send_capacity(128)
