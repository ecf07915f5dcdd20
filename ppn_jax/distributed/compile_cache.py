"""Cache of compiled programs: on this machine's disk, bounded in size, or shared by hosts."""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import socket
import tempfile
from collections.abc import Sequence

import filelock
import jax
import platformdirs

from ppn_jax import storage
from ppn_jax.distributed import coordination
from ppn_jax.errors import InputError
from ppn_jax.processor import processor_flags

logger = logging.getLogger(__name__)

# For each kind of processor; a training step is about a megabyte.
MAX_BYTES = 1 << 30
# Programs that compile faster are not cached: reading them takes about as long.
_MIN_SECONDS = 0.2
_LOCK_SECONDS = 10
_EVENTS = '/jax/compilation_cache/'


def keep_compiled_programs(workdir: str | os.PathLike = '') -> storage.Path | None:
  """Makes JAX keep compiled programs in the user's cache folder, or in a workdir.

  A workdir is used if there are processes on several hosts, all of which see it: of several
  processes JAX lets only the first write, so that folders of their own would stay empty on the
  other hosts. All processes call this together, before the first compilation. If the user's folder
  cannot be used, it warns and nothing is cached. JAX's own settings take precedence:
  JAX_COMPILATION_CACHE_DIR=DIR names another folder ('' for none),
  JAX_ENABLE_COMPILATION_CACHE=false turns it off, JAX_COMPILATION_CACHE_MAX_SIZE bounds it.

  Args:
    workdir: Folder of a run that is the user's own, since programs in it are executed.

  Returns:
    The folder; None if nothing is cached, or if JAX's settings name a folder.

  Raises:
    InputError: If the workdir is in a bucket that cannot be used.
  """
  chosen = ('JAX_COMPILATION_CACHE_DIR' in os.environ
            or jax.config.jax_compilation_cache_dir)  # pyright: ignore
  if chosen or not jax.config.jax_enable_compilation_cache:  # pyright: ignore
    return None
  if workdir and _are_on_several_hosts():
    # Without a bound, JAX takes no locks and writes nothing when it reads, as a bucket needs.
    shared = storage.absolute(storage.folder_path(workdir)) / 'compiled' / _processor()
    _use(shared, max_bytes=-1)
    return shared
  folder = platformdirs.user_cache_path('ppn_jax') / 'compiled' / _processor()
  try:
    _prepare(folder)
  except (OSError, NotImplementedError) as e:  # The latter if the file system has no locks.
    reason = getattr(e, 'strerror', None) or e
    logger.warning(f'compiled programs are not kept in {folder}: {reason}; '
                   'set JAX_COMPILATION_CACHE_DIR=DIR to use another folder')
    return None
  _use(folder, MAX_BYTES)
  return folder


def _use(folder: storage.Path, max_bytes: int) -> None:
  jax.config.update('jax_compilation_cache_dir', str(folder))
  for name, value in [('jax_compilation_cache_max_size', max_bytes),
                      ('jax_persistent_cache_min_compile_time_secs', _MIN_SECONDS)]:
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def _are_on_several_hosts() -> bool:
  """Returns whether the processes of the run are on more than one machine, in all of them."""
  hosts = coordination.gather(socket.gethostname().encode())
  return coordination.broadcast_json(len(set(hosts)) > 1)


class CacheUse:
  """Context manager that counts programs that were found in JAX's cache, and that were added to it.

  Attributes:
    found, added: Numbers of programs.
  """

  def __init__(self):
    self.found = self.added = 0

  def __enter__(self) -> 'CacheUse':
    jax.monitoring.register_event_listener(self._count)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_listener(self._count)

  def __str__(self) -> str:
    """Describes the use in one line, '' if there is no cache."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore
    if not folder or not jax.config.jax_enable_compilation_cache:  # pyright: ignore
      return ''
    return f'compiled programs: {self.found} found in {folder}, {self.added} added'

  def _count(self, event: str, **_) -> None:
    self.found += event == f'{_EVENTS}cache_hits'
    self.added += event == f'{_EVENTS}cache_misses'


def parse_xla_options(options: Sequence[str]) -> dict[str, str | bool]:
  """Returns options of XLA, each 'NAME=VALUE', by name.

  Raises:
    InputError: If one is malformed.
  """
  values: dict[str, str | bool] = {}
  for option in options:
    name, equals, value = str(option).partition('=')
    if not equals or not name.startswith('xla'):
      raise InputError(f'train.xla_options: {option!r} must be NAME=VALUE, such as '
                       'xla_tpu_scoped_vmem_limit_kib=65536')
    values[name] = {'true': True, 'false': False}.get(value.lower(), value)
  return values


def compile_with(lowered: jax.stages.Lowered, options: Sequence[str]) -> jax.stages.Compiled:
  """Compiles a program with options of XLA, each 'NAME=VALUE'.

  Raises:
    InputError: If an option is malformed, unknown, or has a value of another type.
  """
  values = parse_xla_options(options)
  try:
    return lowered.compile(compiler_options=values or None)
  except jax.errors.JaxRuntimeError as e:
    if values and ('compile option' in str(e) or 'setting option' in str(e)):
      raise InputError(f'train.xla_options: {" ".join(str(e).split())}') from e
    raise


def _prepare(folder: pathlib.Path) -> None:
  """Creates the folder and removes incomplete programs; OSError if the folder is not usable."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  # Whoever can replace these programs can run code as this user.
  if hasattr(os, 'getuid') and folder.stat().st_uid != os.getuid():
    raise PermissionError(1, 'it belongs to another user')
  with tempfile.TemporaryFile(dir=folder):
    pass
  remove_incomplete_programs(folder)


def remove_incomplete_programs(folder: pathlib.Path) -> None:
  """Removes programs that killed processes have left in JAX's cache without their time of use.

  JAX writes KEY-cache, then KEY-atime, under a lock. A kill between the two leaves a program that
  JAX never replaces, and that stops it from caching more.
  """
  with (contextlib.suppress(filelock.Timeout),
        filelock.FileLock(folder / '.lockfile', timeout=_LOCK_SECONDS)):
    for program in folder.glob('*-cache'):
      if not program.with_name(f'{program.name.removesuffix("-cache")}-atime').exists():
        program.unlink(missing_ok=True)


def _processor() -> str:
  """Returns a name for processors with the same instructions, since machines may share a home."""
  return f'{platform.machine()}-{hashlib.sha256(processor_flags().encode()).hexdigest()[:12]}'
