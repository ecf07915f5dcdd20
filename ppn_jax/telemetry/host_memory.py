"""Memory of the host: how much is available, and how the C library allocates it."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import sys
from importlib import metadata

import psutil

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_PAD_BYTES = 256 << 20


def expects_cpu() -> bool:
  """Returns whether JAX is going to compute on the CPU, without starting its backend.

  True if JAX_PLATFORMS begins with cpu, or names nothing and no plugin for an accelerator is
  installed. With one installed it is False, although JAX may find no accelerator.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms:
    return platforms.split(',')[0].strip() == 'cpu'
  return not (importlib.util.find_spec('libtpu') or importlib.util.find_spec('jax_plugins')
              or metadata.entry_points(group='jax_plugins'))


@functools.cache
def keep_freed_memory() -> bool:
  """Makes glibc reuse freed memory instead of returning it to the kernel.

  XLA's CPU backend allocates a step's temporary buffers, hundreds of megabytes, on every call.
  By default glibc maps and unmaps them each time, and the page faults cost as much as the
  arithmetic. The price is that the process keeps its peak memory, and that all threads share one
  pool, so it is for that backend only. Call this while the process has one thread, thus before
  anything like `jax.devices()`: a second thread gets a pool of its own, which later threads share,
  and buffers of such a pool are mapped and unmapped as before.

  Returns:
    True if it took effect; False on systems without glibc, where nothing is changed.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError, TypeError):
    return False
  # A single arena: those of other threads cannot hold buffers of this size.
  return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_ARENA_MAX, 1),
              mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_TOP_PAD, _PAD_BYTES)])


def keep_freed_memory_on_cpu() -> None:
  """Calls `keep_freed_memory` unless JAX has an accelerator, whose input workers it would hold up.

  Asking for the backend starts it, after which the call has less effect, so that comes second.
  """
  import jax
  if expects_cpu() or jax.default_backend() == 'cpu':
    keep_freed_memory()


def available_memory() -> int:
  """Returns how many bytes this machine can still allocate without swapping."""
  return psutil.virtual_memory().available


def peak_memory() -> int:
  """Returns the peak memory of this process in bytes; 0 if the system does not report it."""
  # Not getrusage on Linux, where a child starts with the peak of its parent.
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(s for s in lines if s.startswith('VmHWM:')).split()[1])
  with contextlib.suppress(ImportError):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak
  return 0
