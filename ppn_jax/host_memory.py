"""Memory of the host: how much is left, and how the C library hands it out."""

import ctypes
import functools

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
