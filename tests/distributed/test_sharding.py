"""Rows of processes and batch sizes, in a single process."""

import jax
import numpy as np
import pytest

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError


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
