"""Copies data sets from buckets to this machine, where sources read them as files."""

import fnmatch
import logging
import os
import pathlib
import posixpath
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import platformdirs

from ppn_jax import storage
from ppn_jax.errors import InputError

logger = logging.getLogger(__name__)

_COPIES = 16  # At a time.
# Options of sources that read from buckets themselves, and those that are no paths.
_LEFT_ALONE = ('data_dir', 'names', 'classes', 'name')
_WILDCARDS = '*?['


def with_local_paths(options: Mapping[str, Any]) -> dict[str, Any]:
  """Copies what the options of a source name in buckets, and names the copies instead.

  A path stands for a file, a folder with everything below it, or by wildcards for files of a
  folder; a `.yaml` file for the folder that it is in. Copies are kept in the user's cache folder,
  and made again only of what has changed.

  Args:
    options: Of a source. Values that begin with gs:// are paths, also in lists.

  Raises:
    InputError: If nothing is there, or the bucket cannot be used.
    OSError: If the disk is full, or the bucket cannot be read at the moment.
  """
  def local(value: Any) -> Any:
    if isinstance(value, str) and value.startswith('gs://'):
      return _copy(value)
    if isinstance(value, (list, tuple)):
      return type(value)(map(local, value))
    return value

  return {key: value if key in _LEFT_ALONE else local(value) for key, value in options.items()}


def _copy(path: str) -> str:
  """Copies what a path names, and returns the path of the copy."""
  path = path.rstrip('/')
  above, _, last = path.rpartition('/')
  if any(c in last for c in _WILDCARDS):
    folder, chosen = above, lambda name: fnmatch.fnmatchcase(name, last)
  elif last.endswith(('.yaml', '.yml')):
    folder, chosen = above, lambda name: True
  else:
    folder, chosen = path, lambda name: True
  found = {name: stored for name, stored in storage.stored_objects(
      storage.folder_path(folder, 'the data set')).items() if chosen(name)}
  if not found and folder == path:  # A file.
    siblings = storage.stored_objects(storage.folder_path(above, 'the data set'))
    folder, found = above, {last: siblings[last]} if last in siblings else {}
  found = {name: stored for name, stored in found.items() if name and not name.endswith('/')}
  if not found:
    raise InputError(f'there is nothing at {path}')
  copies = platformdirs.user_cache_path('ppn_jax') / 'data'
  to = copies / folder.removeprefix('gs://')
  stale = {name: stored for name, stored in found.items() if not _is_current(to / name, stored)}
  if stale:
    size = sum(stored.size for stored in stale.values())
    logger.info(f'copying {len(stale):,} files, {size / 1e6:,.1f} MB, from {path} to {to}')
    with futures.ThreadPoolExecutor(_COPIES) as pool:
      list(pool.map(lambda name: _download(folder, name, to, stale[name]), stale))
  if folder == path:
    _remove_others(to, found)
  return os.fspath(copies / path.removeprefix('gs://'))


def _is_current(path: pathlib.Path, stored: storage.StoredObject) -> bool:
  """Returns whether a copy is of the object's version, which its time of modification tells."""
  try:
    found = path.stat()
  except OSError:
    return False
  return (found.st_size, found.st_mtime_ns) == (stored.size, 1000 * stored.generation)


def _download(folder: str, name: str, to: pathlib.Path, stored: storage.StoredObject) -> None:
  path = to / name
  if not path.resolve().is_relative_to(to.resolve()):
    raise InputError(f'{folder}/{name} has a name that leads out of its folder')
  storage.download_file(storage.folder_path(posixpath.join(folder, name)), path)
  os.utime(path, ns=(1000 * stored.generation,) * 2)


def _remove_others(folder: pathlib.Path, kept: Mapping[str, Any]) -> None:
  """Removes copies of what is no longer in the bucket's folder."""
  for inside, folders, names in os.walk(folder):
    folders[:] = [f for f in folders if not f.startswith('.')]  # Another process may be copying.
    for name in names:
      path = pathlib.Path(inside) / name
      if path.relative_to(folder).as_posix() not in kept:
        path.unlink(missing_ok=True)
