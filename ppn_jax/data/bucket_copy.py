"""Copies data sets from buckets to this machine, where sources read them as files."""

import contextlib
import fnmatch
import logging
import os
import pathlib
import posixpath
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import platformdirs

from ppn_jax import storage
from ppn_jax.errors import InputError, StoreError, is_outage

logger = logging.getLogger(__name__)

_COPIES = 16  # At a time.
# Options of sources that read from buckets themselves, and those that are no paths.
_LEFT_ALONE = ('data_dir', 'names', 'classes', 'name')
_WILDCARDS = '*?['
_DAY = 86_400.0  # Seconds.


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
  path = 'gs://' + path.removeprefix('gs://').rstrip('/')
  bucket, _, inside = path.removeprefix('gs://').partition('/')
  if not bucket or any(c in bucket for c in _WILDCARDS):
    raise InputError(f'{path}: legal: gs://BUCKET/PATH, with wildcards in the last part only')
  above, _, last = path.rpartition('/')
  folder, chosen = path, lambda name: True
  if any(c in last for c in _WILDCARDS):
    folder, chosen = above, lambda name: '/' not in name and fnmatch.fnmatchcase(name, last)
  elif last.endswith(('.yaml', '.yml')):
    folder = above
  elif inside and (stored := storage.stored_object(storage.folder_path(path, 'the data set'))):
    return os.fspath(_update(above, {last: stored}, lambda name: name == last) / last)
  found = {name: stored for name, stored in storage.stored_objects(
      storage.folder_path(folder, 'the data set')).items()
      if chosen(name) and name and not name.endswith('/')}  # Consoles make objects of folders.
  if not found:
    raise InputError(f'there is nothing at {path}')
  copies = _update(folder, found, chosen)
  return os.fspath(copies if folder == path else copies / last)


def _update(folder: str, found: Mapping[str, storage.StoredObject], chosen: Callable[[str], bool]
            ) -> pathlib.Path:
  """Makes the copies of a folder those of the bucket, and returns their folder.

  Args:
    folder: The folder in the bucket.
    found: Name -> object, those to copy.
    chosen: Whether a name is one of those that are wanted; such copies are removed if their
      objects are gone.
  """
  for name in found:
    if posixpath.normpath(name) != name or name.startswith(('/', '../')) or '\0' in name:
      raise InputError(f'{folder}/{name}: a name that no file can have; rename the object')
  root = platformdirs.user_cache_path('ppn_jax') / 'data'
  to = root / folder.removeprefix('gs://')
  try:
    root.mkdir(parents=True, exist_ok=True)
    _remove_remains(root)
    _remove_others(to, found, chosen)
    stale = {name: stored for name, stored in found.items()
             if not storage.is_copy(to / name, stored)}
    if stale:
      size = sum(stored.size for stored in stale.values())
      logger.info(f'copying {len(stale):,} files, {size / 1e6:,.1f} MB, from {folder} to {to}')
      bucket = storage.folder_path(folder, 'the data set')
      with futures.ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(lambda name: storage.download_file(
            bucket, name, stale[name], to / name, root), stale))
  except OSError as e:
    if isinstance(e, (StoreError, PermissionError)) or is_outage(e):
      raise
    raise InputError(f'{folder} cannot be copied to {to}: {e.strerror or e}') from e
  return to


def _remove_others(folder: pathlib.Path, kept: Mapping[str, Any], chosen: Callable[[str], bool]
                   ) -> None:
  """Removes copies of what is gone, and what is in the way of new ones.

  Args:
    folder: The folder of copies.
    kept: Names of what is in the bucket.
    chosen: Whether a name may be removed.
  """
  if folder.is_file():
    folder.unlink()
  for inside, _, names in os.walk(folder, topdown=False):
    emptied = False
    for name in names:
      path = pathlib.Path(inside) / name
      relative = path.relative_to(folder).as_posix()
      # An object that was a folder before: its copies are in the way.
      blocked = any(parent.as_posix() in kept for parent in pathlib.PurePosixPath(relative).parents)
      if relative not in kept and (chosen(relative) or blocked):
        path.unlink(missing_ok=True)
        emptied = True
    if emptied:
      with contextlib.suppress(OSError):  # Others are in it.
        os.rmdir(inside)


def _remove_remains(root: pathlib.Path) -> None:
  """Removes what killed processes have left a day ago."""
  for path in root.glob('.copy.*'):
    with contextlib.suppress(OSError):
      if path.stat().st_mtime < time.time() - _DAY:
        path.unlink()
