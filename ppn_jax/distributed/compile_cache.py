"""Compiled programs kept on disk between starts, bounded in size."""

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable

import filelock
import jax
import platformdirs

# Of one kind of processor; a training step is about a megabyte.
MAX_BYTES = 1 << 30
# Programs that compile sooner are not kept: reading takes about as long.
_MIN_SECONDS = 0.2
_LOCK_SECONDS = 10


def keep_compiled_programs(say: Callable[[str], None]) -> pathlib.Path | None:
  """Lets JAX keep compiled programs in the user's cache folder; call it before the first one.

  JAX's own settings win: JAX_COMPILATION_CACHE_DIR=DIR names another folder (and '' none),
  JAX_ENABLE_COMPILATION_CACHE=false turns it off, JAX_COMPILATION_CACHE_MAX_SIZE bounds it.

  Args:
    say: told in one line if the folder cannot be used; nothing is kept then.

  Returns:
    The folder; None if nothing is kept, or if JAX has been told where.
  """
  chosen = ('JAX_COMPILATION_CACHE_DIR' in os.environ
            or jax.config.jax_compilation_cache_dir)  # pyright: ignore
  if chosen or not jax.config.jax_enable_compilation_cache:  # pyright: ignore
    return None
  folder = platformdirs.user_cache_path('ppn_jax') / 'compiled' / _processor()
  try:
    _prepare(folder)
  except (OSError, NotImplementedError) as e:  # The latter: no locks on this file system.
    say(f'compiled programs are not kept in {folder}: {getattr(e, "strerror", None) or e}; '
        'JAX_COMPILATION_CACHE_DIR=DIR names another folder')
    return None
  jax.config.update('jax_compilation_cache_dir', str(folder))
  for name, value in [('jax_compilation_cache_max_size', MAX_BYTES),
                      ('jax_persistent_cache_min_compile_time_secs', _MIN_SECONDS)]:
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  return folder


def _prepare(folder: pathlib.Path) -> None:
  """Makes the folder, and removes what a kill left half written; OSError if it is not usable."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  # Programs that another user may replace are programs that another user may choose.
  if hasattr(os, 'getuid') and folder.stat().st_uid != os.getuid():
    raise PermissionError(1, 'it belongs to another user')
  with tempfile.TemporaryFile(dir=folder):
    pass
  # JAX writes KEY-cache, then KEY-atime, under this lock. It would neither replace a program
  # without its time nor, having met one, keep any further.
  with (contextlib.suppress(filelock.Timeout),
        filelock.FileLock(folder / '.lockfile', timeout=_LOCK_SECONDS)):
    for program in folder.glob('*-cache'):
      if not program.with_name(f'{program.name.removesuffix("-cache")}-atime').exists():
        program.unlink(missing_ok=True)


def _processor() -> str:
  """A name for processors with the same instructions: homes are shared by unlike machines."""
  flags = platform.processor()
  with contextlib.suppress(OSError):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    flags = next((s for s in lines if s.startswith(('flags', 'Features'))), flags)
  return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}'
