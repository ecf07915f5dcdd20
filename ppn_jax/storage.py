"""Files in a local folder or a bucket of Google Cloud Storage, behind the same functions.

A kill leaves the old file or the new one, never a part. A bucket guarantees that itself, but
nothing can be appended to its objects, see `Outbox`.
"""

import base64
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

# Pauses before an operation that failed is tried again.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)

_CHECK_SECONDS = 20.0

_CLASS_NAMES = ('names', 'classes')  # Options of data sets that are not paths.

# Suffix of a file that is being written. Its writer holds an OS lock on it, to distinguish it from
# one that a killed process has left.
_PARTIAL = '.partial'
_PARTIAL_NAME = re.compile(r'\.(?P<name>.+)\.[a-z0-9_]{8}(?P<locked>\.partial)?')
_PARTIAL_SECONDS = 60.0  # Age below which it may not be locked yet.
_UNLOCKED_SECONDS = 86_400.0  # The same on file systems without locks, and for earlier versions.

T = TypeVar('T')


def folder_path(text: str | os.PathLike, what: str = 'workdir') -> Path:
  """Returns the folder that a user names, local or gs://BUCKET/FOLDER; it need not exist.

  Raises:
    InputError: If the scheme is another one, or the bucket does not exist or cannot be used.
  """
  scheme, remote, rest = str(text).partition('://')
  if not remote:
    return local_path(text)
  bucket = rest.partition('/')[0]
  if scheme != 'gs' or not bucket:
    raise InputError(f'{what} {text} must be a local folder or gs://BUCKET/FOLDER')
  _check_bucket(bucket)
  from etils import epath  # Imported here, since serving an exported file needs no bucket.
  return epath.Path(text)


def local_path(text: str | os.PathLike) -> pathlib.Path:
  """Returns the local path that a user names, with `~` expanded."""
  return pathlib.Path(expand_home(os.fspath(text)))


def expand_home(value: Any) -> Any:
  """Expands `~` at the start of a string to the home folder, as a shell would.

  Shells do not expand `--output=~/x` and the strings of config files. Strings inside dicts, lists
  and tuples are expanded too; class names, other values and `~name` of an unknown user are
  returned unchanged.

  Raises:
    InputError: If the home folder is not known.
  """
  if isinstance(value, str) and value.startswith('~'):
    path = os.path.expanduser(value)
    if path == '~' or path.startswith('~/'):
      raise InputError(f'{value}: your home folder is not known; set HOME, or give the full path')
    return path
  if isinstance(value, Mapping):
    return {key: entry if key in _CLASS_NAMES else expand_home(entry)
            for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(expand_home, value)) if type(value) in (list, tuple) else value
  return value


def absolute(path: Path) -> Path:
  """Returns the absolute path, without resolving links."""
  return path.absolute() if is_local(path) else path


def read_text(path: Path) -> str:
  """Returns the text of a file, retrying for some seconds while the store cannot be used.

  Raises:
    OSError: If the file does not exist (FileNotFoundError) or cannot be read.
  """
  with _as_store_error(path):
    return retried(lambda: path.read_text(encoding='utf-8'))


def read_bytes(path: Path) -> bytes:
  """Returns the bytes of a file; see `read_text`."""
  with _as_store_error(path):
    return retried(path.read_bytes)


def modified(path: Path) -> float:
  """Returns when a file was last written, in seconds since the epoch.

  Raises:
    OSError: If the file does not exist (FileNotFoundError) or the store cannot be used.
  """
  with _as_store_error(path):
    found = retried(path.stat)
  return found.st_mtime if is_local(path) else float(found.mtime)  # pyright: ignore


def write_text(path: Path, text: str) -> None:
  """Writes `text` to `path` atomically; the folder is created if it does not exist."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Writes `data` to `path` atomically; the folder is created if it does not exist.

  Raises:
    OSError: If it cannot be written; in a bucket, a StoreError or PermissionError.
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
  """Yields a new folder beside `path`, for files to be moved to `path`; removes it at the end.

  Also removes what killed processes have left of earlier attempts to write the same `path`.
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
  """Removes incomplete files of killed processes from a local folder, not from its sub-folders.

  Files that a living process is writing stay: it holds a lock on them.

  Args:
    folder: The folder.
    name: Final name of the file; None for all files.
  """
  if not is_local(folder) or not folder.is_dir():
    return  # A bucket has no incomplete files.
  for path in folder.iterdir():
    match = _PARTIAL_NAME.fullmatch(path.name)
    if not match or name not in (None, match['name']):
      continue
    with contextlib.suppress(OSError):  # Removed meanwhile, or another user's.
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
  """Locks an open file until it is closed; None if the system or file system has no locks."""
  try:
    import fcntl
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except (ImportError, OSError):
    return None
  return True


class Versioned(NamedTuple):
  """Text of an object in a bucket, and the generation that was read."""
  text: str
  version: int


def read_versioned(path: Path) -> Versioned | None:
  """Returns an object of a bucket with its generation, None if it does not exist.

  Raises:
    OSError: See `write_bytes`.
  """
  from google.api_core import exceptions
  with _as_store_error(path):
    bucket, name = _blob(path)
    while blob := bucket.get_blob(name):
      # On these exceptions it was deleted or replaced meanwhile.
      with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
        text = blob.download_as_bytes(if_generation_match=blob.generation).decode()
        return Versioned(text, blob.generation)
    return None


def replace_version(path: Path, text: str, version: int) -> int | None:
  """Writes an object of a bucket if its generation still is `version`; 0 if it must not exist.

  Returns:
    The new generation; None if the generation was another one, and nothing is written.

  Raises:
    OSError: See `write_bytes`.
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
  """Deletes an object of a bucket if its generation still is `version`."""
  from google.api_core import exceptions
  with _as_store_error(path):
    bucket, name = _blob(path)
    with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
      bucket.blob(name).delete(if_generation_match=version)


def upload_file(file: pathlib.Path, to: Path) -> None:
  """Copies a local file of any size to an object of a bucket, which appears when it is complete.

  Raises:
    OSError: If the file cannot be read, or a StoreError or PermissionError of the bucket.
  """
  with _as_store_error(to):
    bucket, name = _blob(to)
    bucket.blob(name).upload_from_filename(os.fspath(file), checksum='md5')  # It retries.


class StoredObject(NamedTuple):
  """What a bucket says about an object.

  Attributes:
    size: In bytes.
    generation: Its version, which each write changes.
    md5: Hexadecimal digits; '' for an object that other tools have written in parts.
  """
  size: int
  generation: int
  md5: str


def stored_objects(folder: Path) -> dict[str, StoredObject]:
  """Returns {path within the folder: its object} of a folder in a bucket.

  Raises:
    OSError: See `write_bytes`.
  """
  with _as_store_error(folder):
    bucket, name = _blob(folder)
    prefix = f'{name.rstrip("/")}/' if name else ''
    return {blob.name.removeprefix(prefix): _stored(blob)
            for blob in _client().list_blobs(bucket, prefix=prefix)}


def stored_object(path: Path) -> StoredObject | None:
  """Returns an object of a bucket, None if there is none; see `stored_objects`."""
  with _as_store_error(path):
    bucket, name = _blob(path)
    blob = bucket.get_blob(name) if name else None
    return blob and _stored(blob)


def _stored(blob: Any) -> StoredObject:
  return StoredObject(int(blob.size), int(blob.generation),
                      base64.b64decode(blob.md5_hash or '').hex())


def stored_md5s(folder: Path) -> dict[str, str]:
  """Returns {path within the folder: MD5} of `stored_objects`."""
  return {name: found.md5 for name, found in stored_objects(folder).items()}


def download_file(path: Path, name: str, stored: StoredObject, to: pathlib.Path,
                  scratch: pathlib.Path) -> None:
  """Copies an object of a bucket to a local file, which appears when it is complete.

  Args:
    path: The folder of the object in the bucket.
    name: Its name in the folder.
    stored: Its version, which the time of modification of the file will tell, see `is_copy`.
    to: The file.
    scratch: A folder of the same file system for the file while it is copied.

  Raises:
    OSError: If the file cannot be written, or a StoreError or PermissionError of the bucket, also
      if the object has another version by now.
  """
  to.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=scratch, prefix='.copy.', delete=False) as partial:
    pass
  try:
    with _as_store_error(path):
      bucket, folder = _blob(path)
      blob = bucket.blob(f'{folder.rstrip("/")}/{name}' if folder else name)
      blob.download_to_filename(partial.name, if_generation_match=stored.generation)  # It retries.
    os.utime(partial.name, ns=(_nanoseconds(stored),) * 2)
    os.replace(partial.name, to)
  finally:
    pathlib.Path(partial.name).unlink(missing_ok=True)


def is_copy(path: pathlib.Path, stored: StoredObject) -> bool:
  """Returns whether `download_file` has copied this version of an object to a file."""
  try:
    return path.is_file() and path.stat().st_mtime_ns == _nanoseconds(stored)
  except OSError:
    return False


def _nanoseconds(stored: StoredObject) -> int:
  return 1000 * stored.generation  # Generations are times in microseconds.


def _blob(path: Path) -> tuple[Any, str]:
  """Returns (bucket, object name) for the client library that supports generations."""
  bucket, _, name = str(path).removeprefix('gs://').partition('/')
  return _client().bucket(bucket), name


@functools.cache
def _client() -> Any:
  from google.cloud import storage
  return storage.Client(project=None)  # Buckets need none, and credentials may know none.


def move_folder(path: Path, to: Path) -> None:
  """Moves a folder to a path that does not exist yet; in a bucket object by object."""
  if is_local(path):
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
  else:
    import fsspec
    with _as_store_error(path):
      fsspec.filesystem('gs').mv(str(path), str(to), recursive=True)


def retried(act: Callable[[], T], is_outage: Callable[[BaseException], bool] = is_outage) -> T:
  """Returns `act()`, which is repeated after a pause while the store cannot be used.

  A missing permission is raised at once: it does not come back by itself.

  Raises:
    Exception: Whatever the last call of `act` raises.
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
  """Local folder for files that grow, which are copied to a bucket as whole objects.

  If the destination is local, it is the destination itself. Copies are made in a thread from time
  to time, so that a kill loses what was written since the last copy; `flush` to avoid that.

  Args:
    to: Destination of the files.
    every: Minimum number of seconds between copies.

  Attributes:
    folder: Local folder to write to.
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
    """Starts to copy what has grown, if it is time. A later copy makes up for one that fails."""
    if self._own and time.monotonic() - self._last >= self._every and (
        self._sending is None or self._sending.done()):
      self._last = time.monotonic()
      self._sending = self._sender.submit(self._send)

  def flush(self) -> None:
    """Copies what has grown, and waits until it is done.

    Raises:
      OSError: See `write_bytes`.
    """
    if self._own:
      if self._sending:
        self._sending.exception()  # Waits.
      self._send()

  def close(self) -> None:
    """Flushes; nothing can be written afterwards."""
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
  """Raises InputError unless the bucket can be used; turns off caches that hide its changes."""
  try:
    import fsspec
    import gcsfs  # noqa: F401
    from google.api_core import exceptions
    from google.cloud import storage
  except ImportError as e:
    raise InputError(f"gs://{bucket}: gcsfs is not installed; {install_command('gcs')}") from e
  # Global settings, but without them what other machines write and delete is not seen: the same
  # client whatever else is installed, and no cache of listings. epath and Orbax share them.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False  # pyright: ignore
  try:
    # Orbax makes the same request, so the permission is needed anyway.
    storage.Client(project=None).get_bucket(
        bucket, timeout=_CHECK_SECONDS / 2,
        retry=storage.retry.DEFAULT_RETRY.with_timeout(_CHECK_SECONDS))  # pyright: ignore
  except exceptions.NotFound as e:
    raise InputError(f'there is no bucket gs://{bucket}; create it first') from e
  except exceptions.ClientError as e:
    raise InputError(f'gs://{bucket} may not be used: {_line(e.message)}; the permission '
                     'storage.buckets.get is needed, and those to read, list, create and delete '
                     'objects') from e
  except Exception as e:  # No credentials, no network: each library has its own exceptions.
    raise InputError(f'gs://{bucket} cannot be reached: {_line(e)}') from e


@contextlib.contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
  """Turns what a client library or a failing disk raises into PermissionError or StoreError."""
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
  return ((isinstance(error, OSError) and str(error).startswith('Forbidden'))
          or getattr(error, 'code', None) == 403)  # Of gcsfs, of google-cloud-storage.


def _line(text: Any) -> str:
  return ' '.join(str(text).split())[:300]
