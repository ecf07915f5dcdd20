"""Which process and device holds what: joining the processes of a run, a one-dimensional mesh,
global arrays, and the way back to the host."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppn_jax.errors import InputError

AXIS = 'data'

# How long processes wait for each other at the start: hosts of a pod come up minutes apart.
JOIN_SECONDS = 300


def join_processes(*, distributed: str = '', coordinator: str | None = None,
                   num_processes: int | None = None, process_id: int | None = None,
                   local_devices: int = 0, timeout: int = JOIN_SECONDS) -> None:
  """Makes this process one of those that train or evaluate together.

  Call it before anything touches a JAX backend. Without arguments the process works alone.

  Args:
    distributed: 'auto' asks the surroundings for the three below, as `jax.distributed` does: the
      metadata of a Cloud TPU slice, GKE, Slurm. '' uses what is given.
    coordinator: 'HOST:PORT' of process 0, a free port there.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    local_devices: rehearse on so many virtual CPU devices in this process; 0 leaves the choice
      of devices to JAX.
    timeout: seconds to wait for the others. After it the process ends, with exit code 2 where
      the coordinator was given, since it may be wrong, and 1 where it was found.

  Raises:
    InputError: arguments that do not go together, nothing found by 'auto', a port in use.
  """
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  explicit = _check_processes(distributed, given, local_devices, timeout)
  if local_devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', local_devices)
  if not explicit and not distributed:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  arguments = ({'coordinator_address': coordinator, 'num_processes': num_processes,
                'process_id': process_id} if explicit else {})
  where = f'at {coordinator}' if explicit else 'of this slice'
  try:
    with _deadline(timeout, f'not all processes {where} have come together within {timeout} s',
                   exit_code=2 if explicit else 1):
      # JAX's own patience must not end before ours: it ends in an abort.
      jax.distributed.initialize(**arguments, initialization_timeout=2 * timeout)
  except jax.errors.JaxRuntimeError as e:
    raise InputError(f'process {process_id} cannot serve or join {coordinator}: {e}') from e
  except (ValueError, OSError, ImportError) as e:
    if explicit:
      raise
    raise InputError('--distributed=auto finds no TPU slice or cluster around this process '
                     f'({e}); leave it out for one process, or give --coordinator, '
                     '--num_processes and --process_id') from e


def _check_processes(distributed: str, given: dict[str, Any], local_devices: int,
                     timeout: int) -> bool:
  """Whether the processes are given explicitly; InputError if they are given badly."""
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if distributed not in ('', 'auto'):
    raise InputError(f"--distributed={distributed!r} is unknown; legal: 'auto', or leave it out")
  if 0 < len(missing) < 3:
    raise InputError(f'{", ".join(missing)} missing; --coordinator=HOST:PORT, --num_processes '
                     'and --process_id go together')
  if distributed and not missing:
    raise InputError('give either --distributed=auto or --coordinator, not both')
  if local_devices < 0 or timeout < 1:
    raise InputError(f'--local_devices={local_devices} must be at least 0 and '
                     f'--join_timeout={timeout} at least 1')
  if local_devices and 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    raise InputError('give either --local_devices or XLA_FLAGS with '
                     '--xla_force_host_platform_device_count, not both')
  if missing:
    return False
  count, number = given['num_processes'], given['process_id']
  if not 0 <= number < count:
    raise InputError(f'--process_id={number} must lie between 0 and --num_processes={count} less 1')
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
    raise InputError(f'--coordinator={given["coordinator"]} is not HOST:PORT, such as '
                     'localhost:8476')
  return True


@contextlib.contextmanager
def _deadline(seconds: float, message: str, exit_code: int) -> Iterator[None]:
  """Ends the process with one line after `seconds`: what runs meanwhile cannot be interrupted."""
  def end():
    print(f'ppn: error: {message}', file=sys.stderr, flush=True)
    os._exit(exit_code)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


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


def first_says(yes: bool) -> bool:
  """What the first process says, in all of them."""
  if jax.process_count() == 1:
    return yes
  return bool(multihost_utils.broadcast_one_to_all(np.array(yes)))


def all_say(yes: bool) -> bool:
  """Whether every process says so, in all of them."""
  if jax.process_count() == 1:
    return yes
  return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


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
