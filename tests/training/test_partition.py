"""Rows of processes and batch sizes, without more than one process."""

import jax
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.training import partition


def test_one_process_owns_every_row():
  mesh = partition.data_mesh()
  np.testing.assert_array_equal(partition.local_rows(8 * mesh.size, mesh),
                                np.arange(8 * mesh.size))


def test_there_and_back():
  mesh = partition.data_mesh()
  batch = {'image': np.arange(24, dtype=np.uint8).reshape(8, 3), 'valid': np.ones(8, bool)}
  placed = partition.to_global(batch, mesh, 8)
  assert all(isinstance(x, jax.Array) for x in placed.values())
  jax.tree.map(np.testing.assert_array_equal, partition.to_host(placed), batch)
  assert partition.gather_rows(batch, mesh, 8) is batch


def test_batch_sizes_that_cannot_be_split():
  mesh = partition.data_mesh()
  partition.check_batch_size('train.batch_size', 3 * mesh.size, mesh)
  with pytest.raises(InputError, match=r'train\.batch_size=0 cannot be split'):
    partition.check_batch_size('train.batch_size', 0, mesh)


def test_rows_of_many_processes_go_through_devices_byte_by_byte(monkeypatch):
  # One process plays all: what differs with more is whose devices the rows lie on.
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(partition, 'to_host', jax.device_get)
  mesh = partition.data_mesh()
  rng = np.random.default_rng(0)
  local = (rng.integers(-2**62, 2**62, 8), rng.integers(0, 9999, (8, 2)).astype(np.int32),
           rng.uniform(size=8) < 0.5)
  gathered = partition.gather_rows(local, mesh, 8)
  for there, back in zip(local, gathered, strict=True):
    assert there.dtype == back.dtype
    np.testing.assert_array_equal(there, back)
