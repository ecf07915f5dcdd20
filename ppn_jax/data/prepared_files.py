"""Where the files of a prepared data set go: a local folder, or a bucket.

TFDS writes local files only. For a bucket they are made in a temporary folder and uploaded shard by
shard while the next one is written, so that the disk holds two of them at most. dataset_info.json,
without which TFDS and the source 'tfds' find no data set, comes last.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ppn_jax import storage
from ppn_jax.errors import InputError

logger = logging.getLogger(__name__)

# An object of a bucket that says that the others are of a `ppn prepare` that has not ended.
_UNFINISHED = 'unfinished.json'
_INFO = 'dataset_info.json'


@contextlib.contextmanager
def locked(folder: storage.Path) -> Iterator[bool]:
  """Locks a folder against other calls; yields False on file systems without locks.

  Raises:
    InputError: If another call has the lock.
  """
  if not storage.is_local(folder):
    from ppn_jax.distributed.ownership import Ownership  # It imports jax.
    with Ownership(folder, 'preparation'):
      yield True
    return
  handle, has_lock = os.open(folder, os.O_RDONLY), True
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise InputError(f'{folder}: another `ppn prepare` is writing there') from e
    except OSError:
      has_lock = False
    yield has_lock
  finally:
    os.close(handle)


def exists(folder: storage.Path) -> bool:
  """Returns whether a folder holds anything but what a stopped upload has left.

  Raises:
    OSError: If a bucket cannot be used.
  """
  if storage.is_local(folder):
    return folder.exists()
  found = storage.stored_md5s(folder)
  return bool(found) and (_INFO in found or _UNFINISHED not in found)


class Upload:
  """Copies the files of a data set to a bucket while it is made.

  Objects that a stopped call has left are kept if they have the same content.

  Args:
    to: Folder of the bucket.

  Attributes:
    md5: {name: MD5 in hexadecimal digits} of the files of `add`.
  """

  def __init__(self, to: storage.Path):
    self.md5: dict[str, str] = {}
    self._to, self._found = to, storage.stored_md5s(to)
    self._sender = concurrent.futures.ThreadPoolExecutor(1)
    self._last: concurrent.futures.Future | None = None
    storage.write_text(to / _UNFINISHED, '{}\n')

  def __enter__(self) -> 'Upload':
    return self

  def __exit__(self, *_: Any) -> None:
    self._sender.shutdown(cancel_futures=True)

  def add_shard(self, path: pathlib.Path) -> None:
    """Uploads a file in the background, and frees its space on the disk; its size stays visible."""
    if self._last:
      self._last.result()

    def send() -> None:
      self._send(path)
      size = path.stat().st_size
      os.truncate(path, 0)
      os.truncate(path, size)

    self._last = self._sender.submit(send)

  def wait(self) -> dict[str, str]:
    """Waits for the upload of the shards, and returns their MD5."""
    if self._last:
      self._last.result()
    return dict(self.md5)

  def finish(self, folder: pathlib.Path) -> None:
    """Uploads all other files, and removes what else is in the bucket's folder.

    Raises:
      OSError: If the bucket cannot be used.
    """
    self.wait()
    names = sorted({path.name for path in folder.iterdir()} - self.md5.keys() - {_INFO})
    for name in names:
      self._send(folder / name)
    for name in self._found.keys() - self.md5.keys() - {_UNFINISHED}:
      (self._to / name).unlink(missing_ok=True)
    self._send(folder / _INFO)
    (self._to / _UNFINISHED).unlink(missing_ok=True)
    if kept := sum(self._found.get(name) == md5 for name, md5 in self.md5.items()):
      logger.info(f'{kept} of {len(self.md5)} files were in {self._to} already')

  def _send(self, path: pathlib.Path) -> None:
    md5 = _digest_of(path, 'md5')
    if self._found.get(path.name) != md5:
      storage.upload_file(path, self._to / path.name)
    self.md5[path.name] = md5


def sha256_of(path: storage.Path) -> str:
  """Returns the SHA-256 of a file, '' if it does not exist."""
  return _digest_of(path, 'sha256')


def find_changed(folder: storage.Path, prepared: Mapping[str, Any],
                 pool: concurrent.futures.Executor) -> storage.Path | None:
  """Returns a file of a finished data set that is missing or has changed, None if there is none.

  Files in a bucket are compared by the bucket's own MD5 if possible, and read otherwise.

  Args:
    folder: Folder of the data set.
    prepared: Content of prepared.json.
    pool: Executor for reading files.
  """
  sha256s, made, found = dict(prepared['sha256']), dict(prepared.get('md5', {})), {}
  if not storage.is_local(folder):
    found = storage.stored_md5s(folder)
    if missing := sha256s.keys() - found.keys():
      return folder / min(missing)
    if _UNFINISHED in found:  # The call that wrote it was stopped at the very end.
      (folder / _UNFINISHED).unlink(missing_ok=True)
  by_md5 = [name for name in sha256s if made.get(name) and found.get(name)]
  changed = [name for name in by_md5 if made[name] != found[name]]
  if changed:
    return folder / changed[0]
  return _first_changed(folder, [name for name in sha256s if name not in by_md5], sha256s, pool)


def _first_changed(folder: storage.Path, names: Iterable[str], sha256s: Mapping[str, str],
                   pool: concurrent.futures.Executor) -> storage.Path | None:
  paths = [folder / name for name in names]
  for path, found in zip(paths, pool.map(sha256_of, paths), strict=True):
    if found != sha256s[path.name]:
      return path
  return None


def read_prepared(folder: storage.Path) -> Any:
  """Returns the content of prepared.json.

  Raises:
    OSError, ValueError: If it cannot be read.
  """
  return json.loads(storage.read_text(folder / 'prepared.json'))


def _digest_of(path: storage.Path, algorithm: str) -> str:
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, algorithm).hexdigest()  # pyright: ignore
  except FileNotFoundError:
    return ''
