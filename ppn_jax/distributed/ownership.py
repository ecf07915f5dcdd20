"""Exclusive ownership of a folder: one process at a time may write it, until that process ends.

A local folder has an OS lock, which is released when its process ends, however it ends. Over NFS
the server releases it some time after a client's machine has died. A bucket has no locks. There
the lease is an object that is rewritten every few seconds, and can be taken over when it no longer
changes.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import psutil

from ppn_jax import storage
from ppn_jax.distributed import coordination
from ppn_jax.errors import InputError, Stopped

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0  # Between heartbeats in a bucket.
LEASE_SECONDS = 60.0  # Without a heartbeat, after which an owner in a bucket counts as dead.
_CLOCK_DIFFERENCE_SECONDS = 600.0  # The most that the clocks of two machines may differ.
_DYING_SECONDS = 2.0  # A killed process holds its lock until its memory is freed.


class Process(NamedTuple):
  """Identifies a process, also for other machines.

  Fields:
    host: Name of the machine.
    pid: Process number there.
    since: When it started its task, as local time.
    started: When the process started, in clock ticks after boot; 0 if unknown.
    boot: Identifies the boot of the machine and the namespace of process numbers.
    token: Random, unique for each object.
  """
  host: str
  pid: int
  since: str
  started: int = 0
  boot: str = ''
  token: str = ''

  @classmethod
  def this(cls) -> 'Process':
    """Returns this process, with a new token at each call."""
    now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    return cls(socket.gethostname(), os.getpid(), now, _started(os.getpid()), _boot(),
               secrets.token_hex(4))

  @classmethod
  def parse(cls, text: str) -> 'Process | None':
    """Parses the result of `as_json`; None if the text is something else."""
    try:
      found = json.loads(text)
      return cls(*(cls.__annotations__[name](found[name]) for name in cls._fields))
    except (ValueError, TypeError, KeyError):
      return None

  def as_json(self, **more: Any) -> str:
    """Returns the fields, and `more` of them, as a line of JSON."""
    return json.dumps({**self._asdict(), **more}) + '\n'

  def is_running(self) -> bool | None:
    """Returns whether it still runs; None if this machine cannot tell."""
    if not self.boot or self.boot != _boot() or self.host != socket.gethostname():
      return None
    with contextlib.suppress(psutil.Error):
      return (psutil.pid_exists(self.pid) and _started(self.pid) == self.started
              and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
    return False

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host}, since {self.since}'


class Ownership:
  """Exclusive right to write a folder, held within this context manager.

  Creates the folder if it does not exist, and keeps a hidden file in it meanwhile. Of several
  processes that work together one takes it, see `owned_by_first`.

  Args:
    folder: Local or in a bucket.
    task: What is done in it, such as 'training'. There is one owner for each task.
    wait: Seconds to wait for an owner that is alive.
  """

  def __init__(self, folder: storage.Path, task: str, *, wait: float = 0.0):
    self._wait = wait
    self._folder, self._task = storage.absolute(folder), task
    self._path = self._folder / f'.{task}.lock'
    self._process = Process.this()
    self._lock: int | None = None  # The open file.
    self._made_folder = False
    self._version = 0  # Generation of the object in a bucket.
    self._last_heartbeat = 0.0
    self._lost = False
    self._mutex, self._stop = threading.Lock(), threading.Event()

  def __enter__(self) -> 'Ownership':
    """Takes ownership.

    Raises:
      InputError: If another process has it; the message names that process.
    """
    if storage.is_local(self._path):
      self._take_lock()
    else:
      self._take_lease()
      threading.Thread(target=self._send_heartbeats, name='ppn lease', daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    with contextlib.suppress(OSError):  # What cannot be released expires.
      if self._lock is not None:
        self._release_lock()
      elif self._version:
        with self._mutex:
          if not self._lost:
            storage.delete_version(self._path, self._version)

  def check(self) -> None:
    """Checks that this process still is the owner; call it before something is overwritten.

    Raises:
      Stopped: If another process has taken over, since this one sent no heartbeat for too long.
    """
    if self._version and time.monotonic() - self._last_heartbeat > LEASE_SECONDS / 2:
      self._send_heartbeat()  # Something has delayed the thread.
    if self._lost:
      raise Stopped(f'another process has taken over {self._folder}, since this one could not '
                    f'reach it for more than {LEASE_SECONDS:.0f} seconds')

  def _take_lock(self) -> None:
    self._made_folder = not self._folder.exists()
    self._folder.mkdir(parents=True, exist_ok=True)
    try:
      self._wait_for_lock()
    except OSError as e:
      if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        raise
      logger.warning(f'{self._folder} is on a file system without locks; make sure that there is '
                     f'no second {self._task} in it')
      return
    with contextlib.suppress(OSError):  # A full disk; the content only informs others.
      self._path.write_text(self._process.as_json())

  def _wait_for_lock(self) -> None:
    if self._lock_within(_DYING_SECONDS):
      return
    owner, wait = self._owner(), self._wait
    if owner and owner.host != self._process.host:
      wait = max(wait, LEASE_SECONDS)
    if wait:
      self._log_waiting(owner, wait)
    if not wait or not self._lock_within(wait):
      raise self._refusal(self._owner())

  def _lock_within(self, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not self._try_lock():
      if time.monotonic() >= deadline:
        return False
      time.sleep(0.05)
    return True

  def _try_lock(self) -> bool:
    # Read-only if possible: a file open for writing prevents remounting a disk as read-only. NFS
    # needs one that is open for writing.
    for mode in (os.O_RDONLY, os.O_RDWR):
      file = os.open(self._path, mode | os.O_CREAT, 0o644)
      try:
        _lock(file)
        # The previous owner may have removed the file meanwhile.
        if os.stat(self._path).st_ino == os.fstat(file).st_ino:
          self._lock, file = file, None
          return True
      except (BlockingIOError, FileNotFoundError):
        return False
      except OSError as e:
        if mode == os.O_RDWR or e.errno != errno.EBADF:
          raise
      finally:
        if file is not None:
          os.close(file)
    return False

  def _release_lock(self) -> None:
    try:
      self._path.unlink()  # Others that have it open find that it is gone; see `_try_lock`.
      if self._made_folder and not any(self._folder.iterdir()):
        self._folder.rmdir()  # Nothing was written.
    finally:
      os.close(self._lock)

  def _owner(self) -> Process | None:
    try:
      return Process.parse(self._path.read_text())
    except OSError:
      return None

  def _take_lease(self) -> None:
    seen: storage.Versioned | None = None
    started = since = time.monotonic()
    has_logged = False
    while not self._version:
      lease = storage.read_versioned(self._path)
      owner = lease and Process.parse(lease.text)
      is_alive = bool(lease and seen and lease.version != seen.version) or bool(
          owner and owner.is_running())
      if is_alive and time.monotonic() - started >= self._wait:
        raise self._refusal(owner)
      if lease is None or seen is None or is_alive:
        seen, since = lease, time.monotonic()
      if (lease is None or owner is None or owner.is_running() is False
          or time.monotonic() - since >= LEASE_SECONDS or _is_long_dead(lease.text)):
        self._version = storage.replace_version(
            self._path, self._text(), lease.version if lease else 0) or 0
        self._last_heartbeat = time.monotonic()
        continue
      if not has_logged:
        self._log_waiting(owner, max(self._wait, LEASE_SECONDS))
        has_logged = True
      time.sleep(1)

  def _log_waiting(self, owner: Process | None, seconds: float) -> None:
    logger.info(f'{self._folder} is in use by another {self._task}{f", {owner}" if owner else ""}; '
                f'waiting up to {seconds:.0f} seconds for it to end')

  def _refusal(self, owner: Process | None) -> InputError:
    kill = f' or end it with `kill {owner.pid}` there,' if owner else ''
    return InputError(f'{self._folder} is in use by another {self._task}'
                      f'{f": {owner}" if owner else ""}. Wait for it,{kill} or give another folder')

  def _text(self) -> str:
    return self._process.as_json(beat=time.time())

  def _send_heartbeats(self) -> None:
    while not self._stop.wait(HEARTBEAT_SECONDS) and not self._lost:
      self._send_heartbeat()

  def _send_heartbeat(self) -> None:
    with self._mutex, contextlib.suppress(OSError):  # An outage: the next heartbeat tries again.
      if self._stop.is_set() or self._lost:
        return
      version = storage.replace_version(self._path, self._text(), self._version)
      if version is None:
        # Perhaps this process's own write, which the client has repeated after it had succeeded.
        lease = storage.read_versioned(self._path)
        owner = lease and Process.parse(lease.text)
        self._lost = owner is None or owner.token != self._process.token
        version = lease.version if lease else 0
      self._version, self._last_heartbeat = version, time.monotonic()


@contextlib.contextmanager
def owned_by_first(ownership: Ownership) -> Iterator[Ownership | None]:
  """Takes ownership in the first of the processes that work together; None in the others.

  Raises:
    InputError: In all processes, if another run has it.
  """
  with contextlib.ExitStack() as closing:
    error: Exception | None = None
    if jax.process_index() == 0:
      try:
        closing.enter_context(ownership)
      except Exception as e:  # Of any kind, since the other processes wait for the result.
        error = e
    message = coordination.broadcast(str(error or '').encode()).decode()
    if error or message:
      raise error or InputError(message)
    yield None if jax.process_index() else ownership


def _lock(file: int) -> None:
  """Locks an open file; BlockingIOError if another has it, ENOSYS if there are no locks."""
  try:
    import fcntl
  except ImportError as e:
    raise OSError(errno.ENOSYS, 'no locks') from e
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_long_dead(text: str) -> bool:
  """Returns whether the last heartbeat of a lease is too old, whatever the clocks of machines."""
  with contextlib.suppress(ValueError, TypeError, KeyError):
    age = time.time() - float(json.loads(text)['beat'])
    return age > LEASE_SECONDS + _CLOCK_DIFFERENCE_SECONDS
  return False


def _started(pid: int) -> int:
  """Returns when a process started, in clock ticks after boot; 0 if the system does not tell.

  Not by psutil, which counts from the epoch: setting the clock would change it.
  """
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    return int(stat.rpartition(')')[2].split()[19])
  except (OSError, ValueError, IndexError):
    return 0


def _boot() -> str:
  """Returns what identifies this boot and namespace of process numbers; '' if unknown."""
  try:
    boot_id = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot_id}/{os.stat("/proc/self/ns/pid").st_ino}'
  except OSError:
    return ''
