"""Which device holds what: a one-dimensional mesh, global arrays, and the way back to the host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppn_jax.errors import InputError

AXIS = 'data'


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """All devices in a row; batches are split along it, variables are whole on each."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Equal parts of the leading axis on the devices of the mesh, in its order."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
  """Raises InputError unless every device gets the same number of rows, at least one."""
  if batch_size < 1 or batch_size % mesh.size:
    near = max(round(batch_size / mesh.size), 1) * mesh.size
    raise InputError(f'{name}={batch_size} cannot be split over {mesh.size} device'
                     f'{"s" if mesh.size > 1 else ""}; use a multiple, such as {near}')


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """The rows of the global batch that this process has to supply, ascending.

  Derived from the sharding: on TPUs the mesh permutes devices, so they need not be contiguous.
  """
  indices = by_rows(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(local: Any, mesh: Mesh, batch_size: int) -> Any:
  """This process's rows of a tree of NumPy arrays -> global arrays split by rows.

  Args:
    local: arrays whose leading axis is `local_rows(batch_size, mesh)`.
    batch_size: rows of the global batch.
  """
  sharding = by_rows(mesh)
  if jax.process_count() == 1:
    return jax.device_put(local, sharding)
  rows = local_rows(batch_size, mesh)

  def place(array: np.ndarray) -> jax.Array:
    def shard(index):
      first = np.searchsorted(rows, index[0].indices(batch_size)[0])
      return array[first:first + batch_size // mesh.size]
    return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

  return jax.tree.map(place, local)


def to_host(tree: Any) -> Any:
  """Global arrays -> NumPy arrays, whole on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def gather_rows(local: Any, mesh: Mesh, batch_size: int) -> Any:
  """This process's rows of a tree of NumPy arrays -> all rows, NumPy, on every process.

  For what never needs to be on a device, such as 64-bit image ids.
  """
  if jax.process_count() == 1:
    return local

  def gather(array: np.ndarray) -> np.ndarray:
    as_bytes = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    every_row = to_host(to_global(as_bytes, mesh, batch_size))
    return np.ascontiguousarray(every_row).view(array.dtype).reshape(-1, *array.shape[1:])

  return jax.tree.map(gather, local)
