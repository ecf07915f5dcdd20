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
  with pytest.raises(InputError, match='train.batch_size=0 cannot be split'):
    partition.check_batch_size('train.batch_size', 0, mesh)
