"""Memory of the host: how much is left, and how the C library hands it out."""

import contextlib
import ctypes
import functools
import pathlib
import sys

import psutil

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_PAD_BYTES = 256 << 20


@functools.cache
def keep_freed_memory() -> bool:
  """Tells glibc to reuse freed memory instead of giving it back to the kernel.

  XLA's CPU backend allocates a step's temporary buffers, hundreds of megabytes, on every call.
  By default glibc maps and unmaps them each time, and the page faults cost as much as the
  arithmetic. The price is a process whose memory stays at its peak. Call it before the first
  JAX computation, since threads that already run keep their own pools.

  Returns:
    Whether it took effect; False on systems without glibc, where nothing is changed.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError, TypeError):
    return False
  # One pool: those of other threads cannot hold buffers of this size.
  return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_ARENA_MAX, 1),
              mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_TOP_PAD, _PAD_BYTES)])


def available_memory() -> int:
  """Bytes that this machine can still hand out without swapping."""
  return psutil.virtual_memory().available


def peak_memory() -> int:
  """The most bytes that this process has held at a time; 0 if the system does not tell."""
  # Not by getrusage alone: on Linux a child starts with the peak of its parent.
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(s for s in lines if s.startswith('VmHWM:')).split()[1])
  with contextlib.suppress(ImportError):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak
  return 0
