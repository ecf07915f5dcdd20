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
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union

from ppn_jax.errors import InputError, StoreError, install_command, is_outage

if TYPE_CHECKING:
  from etils import epath

Path = Union[pathlib.Path, 'epath.Path']  # The latter for gs://.

SEND_EVERY = 30.0  # Seconds between copies of a growing file to a bucket.

# Pauses before what a store could not do is tried again.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)

_CHECK_SECONDS = 20.0

_CLASS_NAMES = ('names', 'classes')  # Options of data sets that hold no paths.

# Ends the name of a file that is being written. Its writer holds an OS lock on it, so that nobody
# takes it for what a kill has left behind.
_PARTIAL = '.partial'
_PARTIAL_NAME = re.compile(r'\.(?P<name>.+)\.[a-z0-9_]{8}(?P<locked>\.partial)?')
_PARTIAL_SECONDS = 60.0  # So long it may lack its lock.
_UNLOCKED_SECONDS = 86_400.0  # And so long on file systems without locks, and of earlier versions.

T = TypeVar('T')


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
  from etils import epath  # Not above: what serves an exported file needs no bucket.
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
  return path.absolute() if is_local(path) else path


def read_text(path: Path) -> str:
  """Returns what a file holds. A store that cannot be used is asked again for some seconds.

  Raises:
    OSError: it is not there (FileNotFoundError) or cannot be read.
  """
  with _as_store_error(path):
    return retried(lambda: path.read_text(encoding='utf-8'))


def read_bytes(path: Path) -> bytes:
  """Returns what a file holds, as `read_text` does."""
  with _as_store_error(path):
    return retried(path.read_bytes)


def modified(path: Path) -> float:
  """Returns when a file was last written, in seconds since the epoch.

  Raises:
    OSError: it is not there (FileNotFoundError) or cannot be asked for.
  """
  with _as_store_error(path):
    found = retried(path.stat)
  return found.st_mtime if is_local(path) else float(found.mtime)  # pyright: ignore


def write_text(path: Path, text: str) -> None:
  """Replaces `path` by `text` in one step; its folder is made if need be."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Replaces `path` by `data` in one step; its folder is made if need be.

  Raises:
    OSError: it cannot be written; a StoreError or PermissionError in a bucket.
  """
  if not is_local(path):
    with _as_store_error(path):
      path.write_bytes(data)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', suffix=_PARTIAL,
                                   delete=False) as file:
    try:
      _try_lock(file.fileno())
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(file.name)
      raise


@contextlib.contextmanager
def partial_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a new folder beside `path`, for what is to become it; what stays there is removed.

  So is what was left by others who were to make the same `path` and were killed.
  """
  remove_partial(path.parent, path.name)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.',
                                   suffix=_PARTIAL) as folder:
    file = os.open(folder, os.O_RDONLY)
    try:
      _try_lock(file)
      yield pathlib.Path(folder)
    finally:
      os.close(file)


def remove_partial(folder: Path, name: str | None = None) -> None:
  """Removes what was being written in a local folder, not in those below it, when a kill came.

  What a living process is writing stays: it holds a lock on it.

  Args:
    folder: where to look.
    name: of the file that it was to become; None for all.
  """
  if not is_local(folder) or not folder.is_dir():
    return  # A bucket has no such files.
  for path in folder.iterdir():
    match = _PARTIAL_NAME.fullmatch(path.name)
    if not match or name not in (None, match['name']):
      continue
    with contextlib.suppress(OSError):  # Gone meanwhile, or another user's.
      if _is_abandoned(path, bool(match['locked'])):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: pathlib.Path, locked: bool) -> bool:
  age = time.time() - path.stat().st_mtime
  if age > _UNLOCKED_SECONDS:
    return True
  if not locked or age < _PARTIAL_SECONDS:
    return False
  file = os.open(path, os.O_RDONLY)
  try:
    return _try_lock(file) is True
  finally:
    os.close(file)


def _try_lock(file: int) -> bool | None:
  """Locks an open file until it is closed; None where the system or file system has no locks."""
  try:
    import fcntl
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except (ImportError, OSError):
    return None
  return True


class Versioned(NamedTuple):
  """An object in a bucket, and which of its generations was read."""
  text: str
  version: int


def read_versioned(path: Path) -> Versioned | None:
  """Returns an object of a bucket with its generation, None if there is none.

  Raises:
    OSError: see `write_bytes`.
  """
  from google.api_core import exceptions
  with _as_store_error(path):
    bucket, name = _blob(path)
    while blob := bucket.get_blob(name):
      # Else it was deleted or replaced meanwhile.
      with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
        text = blob.download_as_bytes(if_generation_match=blob.generation).decode()
        return Versioned(text, blob.generation)
    return None


def replace_version(path: Path, text: str, version: int) -> int | None:
  """Writes an object of a bucket if it still is of the generation `version`; 0 is none at all.

  Returns:
    The new generation; None, and nothing is written, if it is of another.

  Raises:
    OSError: see `write_bytes`.
  """
  from google.api_core import exceptions
  with _as_store_error(path):
    bucket, name = _blob(path)
    blob = bucket.blob(name)
    try:
      blob.upload_from_string(text, if_generation_match=version)
    except exceptions.PreconditionFailed:
      return None
    return int(blob.generation)


def delete_version(path: Path, version: int) -> None:
  """Deletes an object of a bucket if it still is of the generation `version`."""
  from google.api_core import exceptions
  with _as_store_error(path):
    bucket, name = _blob(path)
    with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
      bucket.blob(name).delete(if_generation_match=version)


def _blob(path: Path) -> tuple[Any, str]:
  """(bucket, name of the object) for the client that knows generations."""
  bucket, _, name = str(path).removeprefix('gs://').partition('/')
  return _client().bucket(bucket), name


@functools.cache
def _client() -> Any:
  from google.cloud import storage
  return storage.Client()


def move_folder(path: Path, to: Path) -> None:
  """Moves a folder to where nothing is yet; in a bucket object by object."""
  if is_local(path):
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
  else:
    import fsspec
    with _as_store_error(path):
      fsspec.filesystem('gs').mv(str(path), str(to), recursive=True)


def retried(act: Callable[[], T], is_outage: Callable[[BaseException], bool] = is_outage) -> T:
  """Returns what `act` returns, called again after a pause while the store cannot be used.

  A missing permission is not waited for: it does not come back by itself.

  Raises:
    Exception: Whatever `act` raises in the end.
  """
  for pause in RETRY_SECONDS:
    try:
      return act()
    except Exception as e:
      if not is_outage(e) or isinstance(e, PermissionError) or _is_forbidden(e):
        raise
    time.sleep(pause)
  return act()


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
    if is_local(to):
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
    raise InputError(f"gs://{bucket}: gcsfs is not installed; {install_command('gcs')}") from e
  # One client whatever else is installed, which sees what other machines write and delete.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False  # pyright: ignore
  try:
    # Orbax asks the same of it, so that the permission is needed anyway.
    storage.Client().get_bucket(bucket, timeout=_CHECK_SECONDS / 2,
                                retry=storage.retry.DEFAULT_RETRY.with_timeout(_CHECK_SECONDS))  # pyright: ignore
  except exceptions.NotFound as e:
    raise InputError(f'there is no bucket gs://{bucket}; make it first') from e
  except exceptions.ClientError as e:
    raise InputError(f'gs://{bucket} may not be used: {_line(e.message)}; storage.buckets.get is '
                     'needed, and to read, list, create and delete objects') from e
  except Exception as e:  # No credentials, no network: every library has its own.
    raise InputError(f'gs://{bucket} cannot be reached: {_line(e)}') from e


@contextlib.contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
  """Raises PermissionError or StoreError for whatever a client library or a failing disk raises."""
  try:
    yield
  except Exception as e:
    if isinstance(e, (FileNotFoundError, ValueError)):
      raise
    if is_local(path):
      if not is_outage(e) or isinstance(e, PermissionError):
        raise
      raise StoreError(f'{path} cannot be read now: {getattr(e, "strerror", None) or e}') from e
    if _is_forbidden(e):
      raise PermissionError(errno.EACCES, _line(e), str(path)) from e
    raise StoreError(f'{path}: {_line(e) or type(e).__name__}') from e


def is_local(path: Path) -> bool:
  """Returns whether a path is on this machine's file systems, not in a bucket."""
  return isinstance(path, pathlib.Path)


def _is_forbidden(error: BaseException) -> bool:
  return isinstance(error, OSError) and str(error).startswith('Forbidden')


def _line(text: Any) -> str:
  return ' '.join(str(text).split())[:300]
