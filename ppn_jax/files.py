"""Files of a run, in a local folder or in a bucket of Google Cloud Storage: the one place that
knows the difference.

A kill leaves the old file or the new one, never a piece. In a bucket that is the store's own
promise, and its price is that nothing can be added to what is there (`Outbox`).
"""

import contextlib
import errno
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

from etils import epath

from ppn_jax.errors import STORE_CLIENTS, InputError, StoreError

Path = pathlib.Path | epath.Path  # The latter for gs://.

SEND_EVERY = 30.0  # Seconds between copies of a growing file to a bucket.

_CHECK_SECONDS = 20.0

_CLASS_NAMES = ('names', 'classes')  # Options of data sets that hold no paths.


def folder_path(text: str | os.PathLike, what: str = 'workdir') -> Path:
  """The folder that a user names, local or gs://BUCKET/FOLDER; it need not be there.

  Raises:
    InputError: another scheme, or a bucket that does not exist or cannot be used.
  """
  scheme, remote, rest = str(text).partition('://')
  if not remote:
    return local_path(text)
  bucket = rest.partition('/')[0]
  if scheme != 'gs' or not bucket:
    raise InputError(f'{what} {text}: legal: a local folder, or gs://BUCKET/FOLDER')
  _check_bucket(bucket)
  return epath.Path(text)


def local_path(text: str | os.PathLike) -> pathlib.Path:
  """Returns the local file or folder that a user names, `~` standing for the home folder."""
  return pathlib.Path(expand_home(os.fspath(text)))


def expand_home(value: Any) -> Any:
  """Returns a string that begins with `~` with the home folder in its place, as a shell would.

  Shells leave `--output=~/x` and the strings of config files as they are. Dicts, lists and tuples
  are looked through; names of classes, other values and `~name` of an unknown user stay.

  Raises:
    InputError: If the home folder is not known.
  """
  if isinstance(value, str) and value.startswith('~'):
    path = os.path.expanduser(value)
    if path == '~' or path.startswith('~/'):
      raise InputError(f'{value}: your home folder is not known; set HOME, or give the whole path')
    return path
  if isinstance(value, Mapping):
    return {key: entry if key in _CLASS_NAMES else expand_home(entry)
            for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(expand_home, value)) if type(value) in (list, tuple) else value
  return value


def absolute(path: Path) -> Path:
  """`path` from the root, links kept."""
  return path.absolute() if _is_local(path) else path


def read_text(path: Path) -> str:
  """What a file holds.

  Raises:
    OSError: it is not there (FileNotFoundError) or cannot be read.
  """
  with _as_store_error(path):
    return path.read_text(encoding='utf-8')


def write_text(path: Path, text: str) -> None:
  """Replaces `path` by `text` in one step; its folder is made if need be."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Replaces `path` by `data` in one step; its folder is made if need be.

  Raises:
    OSError: it cannot be written; a StoreError or PermissionError in a bucket.
  """
  if not _is_local(path):
    with _as_store_error(path):
      path.write_bytes(data)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
    try:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def move_folder(path: Path, to: Path) -> None:
  """Moves a folder to where nothing is yet; in a bucket object by object."""
  if _is_local(path):
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
  else:
    import fsspec
    with _as_store_error(path):
      fsspec.filesystem('gs').mv(str(path), str(to), recursive=True)


def is_outage(error: BaseException) -> bool:
  """Whether an error in reading tells of a store that cannot be used, not of what is in it."""
  return (isinstance(error, (StoreError, PermissionError, ConnectionError, TimeoutError))
          or type(error).__module__.startswith(STORE_CLIENTS) or _is_forbidden(error))


class Outbox:
  """A local folder for files that grow, copied to a bucket as whole objects; in another folder
  than a bucket's, the folder itself.

  Copies are made beside the caller's work, now and then, so that a kill costs the bucket what was
  written since the last; `flush` where that must not be.

  Args:
    to: the folder that the files belong to.
    every: seconds between copies, at least.

  Attributes:
    folder: where to write.
  """

  def __init__(self, to: Path, every: float = SEND_EVERY):
    self._to, self._every = to, every
    self._sent: dict[pathlib.Path, int] = {}
    self._sending: futures.Future | None = None
    self._last = time.monotonic()
    if _is_local(to):
      to.mkdir(parents=True, exist_ok=True)
      self.folder, self._own, self._sender = to, None, None
    else:
      self._own, self._sender = tempfile.TemporaryDirectory(), futures.ThreadPoolExecutor(1)
      self.folder = pathlib.Path(self._own.name)

  def offer(self) -> None:
    """Begins a copy of what has grown, if it is time. One that fails is made up for later."""
    if self._own and time.monotonic() - self._last >= self._every and (
        self._sending is None or self._sending.done()):
      self._last = time.monotonic()
      self._sending = self._sender.submit(self._send)

  def flush(self) -> None:
    """Copies what has grown, and returns when it is there.

    Raises:
      OSError: see `write_bytes`.
    """
    if self._own:
      if self._sending:
        self._sending.exception()  # Waits.
      self._send()

  def close(self) -> None:
    """Flushes, after which nothing can be written."""
    try:
      self.flush()
    finally:
      if self._own:
        self._sender.shutdown()
        self._own.cleanup()

  def _send(self) -> None:
    for file in sorted(p for p in self.folder.rglob('*') if p.is_file()):
      data = file.read_bytes()
      if len(data) != self._sent.get(file):
        write_bytes(self._to / file.relative_to(self.folder).as_posix(), data)
        self._sent[file] = len(data)


@functools.cache
def _check_bucket(bucket: str) -> None:
  """Raises InputError unless the bucket can be used, and sees to it that it is seen as it is."""
  try:
    import fsspec
    import gcsfs  # noqa: F401
    from google.api_core import exceptions
    from google.cloud import storage
  except ImportError as e:
    raise InputError(f"gs://{bucket}: gcsfs is not installed; pip install 'ppn_jax[gcs]'") from e
  # One client whatever else is installed, which sees what other machines write and delete.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  try:
    # Orbax asks the same of it, so that the permission is needed anyway.
    storage.Client().get_bucket(bucket, timeout=_CHECK_SECONDS / 2,
                                retry=storage.retry.DEFAULT_RETRY.with_timeout(_CHECK_SECONDS))
  except exceptions.NotFound as e:
    raise InputError(f'there is no bucket gs://{bucket}; make it first') from e
  except exceptions.ClientError as e:
    raise InputError(f'gs://{bucket} may not be used: {_line(e.message)}; storage.buckets.get is '
                     'needed, and to read, list, create and delete objects') from e
  except Exception as e:  # No credentials, no network: every library has its own.
    raise InputError(f'gs://{bucket} cannot be reached: {_line(e)}') from e


@contextlib.contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
  """Whatever a client library raises -> PermissionError or StoreError."""
  try:
    yield
  except Exception as e:
    if _is_local(path) or isinstance(e, (FileNotFoundError, ValueError)):
      raise
    if _is_forbidden(e):
      raise PermissionError(errno.EACCES, _line(e), str(path)) from e
    raise StoreError(f'{path}: {_line(e) or type(e).__name__}') from e


def _is_local(path: Path) -> bool:
  return isinstance(path, pathlib.Path)


def _is_forbidden(error: BaseException) -> bool:
  return isinstance(error, OSError) and str(error).startswith('Forbidden')


def _line(text: Any) -> str:
  return ' '.join(str(text).split())[:300]
