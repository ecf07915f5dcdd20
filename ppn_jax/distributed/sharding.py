"""Processes and devices: joins the processes of a run, and places arrays on a mesh and back."""

import collections
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ppn_jax.errors import InputError, Stopped, StoreError

T = TypeVar('T')

AXIS = 'data'

# How long processes wait for each other at the start: hosts of a pod come up minutes apart.
JOIN_SECONDS = 300

# After this long without a heartbeat a process counts as dead, and JAX aborts the others. Native
# threads send heartbeats, whatever Python does; JAX's default is 100.
HEARTBEAT_SECONDS = 30

# How long a finished process waits for the others, such as the first, which may have much to write.
# One that has died is noticed by its missing heartbeat before that.
SHUTDOWN_SECONDS = 3600


def join_processes(*, distributed: str = '', coordinator: str | None = None,
                   num_processes: int | None = None, process_id: int | None = None,
                   local_devices: int = 0, timeout: int = JOIN_SECONDS,
                   hear_sigterm: bool = True) -> None:
  """Makes this process one of those that train or evaluate together.

  Call it before anything touches a JAX backend. Without arguments the process works alone.

  Args:
    distributed: 'auto' finds the next three arguments as `jax.distributed` does, from the metadata
      of a Cloud TPU slice, GKE or Slurm. '' uses the arguments.
    coordinator: 'HOST:PORT' of process 0, with a port that is free there.
    num_processes: Number of processes.
    process_id: Index of this process, from 0.
    local_devices: Number of virtual CPU devices to use in this process, to rehearse; 0 leaves the
      choice of devices to JAX.
    timeout: Seconds to wait for the others. After that the process ends, with exit code 2 if the
      coordinator was given, since it may be wrong, and 1 if it was found.
    hear_sigterm: Whether JAX's preemption service handles SIGTERM, for `PreemptionNotice`;
      otherwise it ends the process, like one that works alone.

  Raises:
    InputError: If arguments do not fit together, 'auto' finds nothing, the port is in use, or
      the name of this machine has no address.
    Stopped: If the processes that 'auto' has found cannot be joined.
  """
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  explicit = _check_processes(distributed, given, local_devices, timeout)
  if local_devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', local_devices)
  if not explicit and not distributed:
    return
  _check_host_name(socket.gethostname())
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', hear_sigterm)
  arguments = ({'coordinator_address': coordinator, 'num_processes': num_processes,
                'process_id': process_id} if explicit else {})
  where = f'at {coordinator}' if explicit else 'of this slice'
  try:
    with _deadline(timeout, f'not all processes {where} have joined within {timeout} s',
                   exit_code=2 if explicit else 1):
      # JAX's own timeout must be longer than ours, since it aborts the process.
      jax.distributed.initialize(**arguments, initialization_timeout=2 * timeout,
                                 heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                 shutdown_timeout_seconds=SHUTDOWN_SECONDS)
  except jax.errors.JaxRuntimeError as e:
    if not explicit:
      raise Stopped(f'the processes of this slice cannot be joined: {e}') from e
    raise InputError(f'process {process_id} cannot serve or join {coordinator}: {e}') from e
  except (ValueError, OSError, ImportError) as e:
    if explicit:
      raise
    raise InputError('--distributed=auto finds no TPU slice or cluster around this process '
                     f'({e}); omit it for one process, or give --coordinator, '
                     '--num_processes and --process_id') from e


def _check_processes(distributed: str, given: dict[str, Any], local_devices: int,
                     timeout: int) -> bool:
  """Returns whether the processes are given explicitly; InputError if arguments do not fit."""
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if distributed not in ('', 'auto'):
    raise InputError(f"--distributed={distributed!r} is unknown; legal: 'auto', or omit it")
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
    raise InputError(f'--process_id={number} must be at least 0 and below --num_processes={count}')
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
    raise InputError(f'--coordinator={given["coordinator"]} is not HOST:PORT, such as '
                     'localhost:8476')
  return True


def _check_host_name(name: str) -> None:
  """Raises InputError unless the name of this machine has an address, which Gloo looks up."""
  try:
    socket.getaddrinfo(name, None)
  except OSError as e:
    raise InputError(f"this machine's name {name!r} has no address ({e}), by which the other "
                     'processes could reach it; add a line for it to /etc/hosts') from e


@contextlib.contextmanager
def _deadline(seconds: float, message: str, exit_code: int) -> Iterator[None]:
  """Ends the process with one line after `seconds`, since the code within cannot be interrupted."""
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
  """Returns a one-dimensional mesh of all devices; batches are split along it.

  Devices of a TPU slice are neighbours, so that a batch's rows are split over slices, and then over
  the chips of each.

  Raises:
    InputError: If slices differ in size.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(by_slice(devices)), (AXIS,), axis_types=(AxisType.Auto,))


def as_grid(mesh: Mesh, shape: tuple[int, int], names: tuple[str, str]) -> Mesh:
  """Returns a one-dimensional mesh's devices as a mesh of two dimensions, in row-major order."""
  return Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * 2)


def by_slice(devices: Sequence[jax.Device]) -> list[jax.Device]:
  """Returns devices in the order of their TPU slices; their order within a slice stays.

  Raises:
    InputError: If slices differ in size.
  """
  sizes = collections.Counter(map(slice_of, devices))
  if len(set(sizes.values())) > 1:
    raise InputError(f'the slices have {", ".join(map(str, sizes.values()))} devices; use slices '
                     'of one type')
  return sorted(devices, key=slice_of)


def slice_of(device: jax.Device) -> int:
  """Returns the number of the TPU slice that a device belongs to; 0 for other devices."""
  return getattr(device, 'slice_index', None) or 0


def num_slices(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of TPU slices in a mesh."""
  if isinstance(mesh, AbstractMesh):
    return 1
  return len({slice_of(device) for device in mesh.devices.flat})


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that has the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the leading axis over the devices of the mesh."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def by_largest_axis(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the largest axis that the devices divide, if there is one.

  Of equally large axes the last is split. Without any the array is replicated.
  """
  axes = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
  if not axes:
    return replicated(mesh)
  largest = max(axes, key=lambda axis: (shape[axis], axis))
  return NamedSharding(mesh, PartitionSpec(*([None] * largest), AXIS))


def check_batch_size(name: str, batch_size: int, mesh: Mesh | AbstractMesh,
                     micro_batches: int = 1) -> None:
  """Raises InputError unless all devices get equally many rows of each part, at least one."""
  share = mesh.size * micro_batches
  if batch_size < 1 or batch_size % share:
    near = max(round(batch_size / share), 1) * share
    parts = f' in {micro_batches} micro-batches' if micro_batches > 1 else ''
    raise InputError(f'{name}={batch_size} cannot be split over {mesh.size} device'
                     f'{"s" if mesh.size > 1 else ""}{parts}; use a multiple, such as {near}')


def fitting_batch_size(batch_size: int, mesh: Mesh | AbstractMesh) -> int:
  """Returns the smallest batch of at least `batch_size` rows that the devices can share."""
  return -(-batch_size // mesh.size) * mesh.size


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Returns the rows of the global batch that this process has to supply, ascending.

  Derived from the sharding: on TPUs the mesh permutes devices, so they need not be contiguous.
  """
  indices = by_rows(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(local: Any, mesh: Mesh, batch_size: int) -> Any:
  """Turns this process's rows of a tree of NumPy arrays into global arrays split by rows.

  Args:
    local: Arrays whose leading axis is `local_rows(batch_size, mesh)`.
    mesh: Devices to place them on.
    batch_size: Number of rows of the global batch.
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


def value_of_first(value: bool) -> bool:
  """Returns the value that the first process passes, in all processes."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def all_true(value: bool) -> bool:
  """Returns whether every process passes True, in all processes."""
  if jax.process_count() == 1:
    return value
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def all_or_none(act: Callable[[], T]) -> T:
  """Returns `act()`; all processes call this together, and all raise if `act` raises in one."""
  try:
    result, error = act(), None
  except Exception as e:
    result, error = None, e
  if not all_true(error is None):
    raise error or StoreError('another process has failed')
  return result


def to_host(tree: Any) -> Any:
  """Returns global arrays as NumPy arrays, whole in every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def own_rows(tree: Any) -> Any:
  """Returns this process's rows, `local_rows`, of global arrays split by rows, as NumPy arrays."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def own(array: jax.Array) -> np.ndarray:
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])

  return jax.tree.map(own, tree)
