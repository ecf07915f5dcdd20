"""Who may write a folder: one process at a time, until it ends in whatever way.

In a local folder an OS lock says so, which ends with its process, however that ends. Over NFS the
server gives it back some time after a client's machine has died. A bucket has no locks. There an
object, written anew every few seconds, is a lease: it can be taken over when it stands still.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import psutil

from ppn_jax import storage
from ppn_jax.distributed import coordination
from ppn_jax.errors import InputError, Stopped

BEAT_SECONDS = 15.0  # Between signs of life in a bucket.
LEASE_SECONDS = 60.0  # Without one, after which an owner in a bucket is taken for dead.
_LONG_DEAD_SECONDS = 600.0  # By the clocks of two machines, which may differ.
_DYING_SECONDS = 2.0  # A killed process holds its lock until its memory is freed.


class Process(NamedTuple):
  """Identifies a process, also for other machines.

  Fields:
    host: name of the machine.
    pid: its number there.
    since: when it began what it does, as local time.
    started: when it was started, in ticks after the machine was; 0 where that is not known.
    boot: which start of the machine, and which space of process numbers.
    token: makes it unlike any other.
  """
  host: str
  pid: int
  since: str
  started: int = 0
  boot: str = ''
  token: str = ''

  @classmethod
  def this(cls) -> 'Process':
    """Returns this process, at each call with another token."""
    now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    return cls(socket.gethostname(), os.getpid(), now, _started(os.getpid()), _boot(),
               secrets.token_hex(4))

  @classmethod
  def parse(cls, text: str) -> 'Process | None':
    """Returns the process that `as_json` has described; None where it is something else."""
    try:
      found = json.loads(text)
      return cls(*(cls.__annotations__[name](found[name]) for name in cls._fields))
    except (ValueError, TypeError, KeyError):
      return None

  def as_json(self, **more: Any) -> str:
    return json.dumps({**self._asdict(), **more}) + '\n'

  def is_running(self) -> bool | None:
    """Returns whether it still runs; None where this machine cannot tell."""
    if not self.boot or self.boot != _boot() or self.host != socket.gethostname():
      return None
    with contextlib.suppress(psutil.Error):
      return (psutil.pid_exists(self.pid) and _started(self.pid) == self.started
              and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
    return False

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host}, since {self.since}'


class Ownership:
  """The right to write a folder, as a context manager around the writing.

  It makes the folder if need be, and keeps a hidden file in it meanwhile. Of several processes that
  work together one takes it.

  Args:
    folder: local or in a bucket.
    task: what is done to it, such as 'training'. There is one owner for each task.
    say: told, in a line, that a former owner is waited for.
    wait: seconds to wait for an owner that is alive.
  """

  def __init__(self, folder: storage.Path, task: str, say: Callable[[str], None], *,
               wait: float = 0.0):
    self._wait = wait
    self._folder, self._task, self._say = storage.absolute(folder), task, say
    self._path = self._folder / f'.{task}.lock'
    self._process = Process.this()
    self._lock: int | None = None  # The open file.
    self._made_folder = False
    self._version = 0  # Of the object in a bucket.
    self._beaten = 0.0
    self._lost = False
    self._mutex, self._stop = threading.Lock(), threading.Event()

  def __enter__(self) -> 'Ownership':
    """Takes the right.

    Raises:
      InputError: Another process has it; the message names that one.
    """
    if storage.is_local(self._path):
      self._take_lock()
    else:
      self._take_lease()
      threading.Thread(target=self._beat_on, name='ppn lease', daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    with contextlib.suppress(OSError):  # What cannot be given back runs out.
      if self._lock is not None:
        self._release_lock()
      elif self._version:
        with self._mutex:
          if not self._lost:
            storage.delete_version(self._path, self._version)

  def check(self) -> None:
    """Checks that the right is still this process's; call it before something is overwritten.

    Raises:
      Stopped: Another process has taken over, since this one gave no sign of life for too long.
    """
    if self._version and time.monotonic() - self._beaten > LEASE_SECONDS / 2:
      self._beat()  # Something has held up the thread.
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
      self._say(f'{self._folder} is on a file system without locks; see to it that there is no '
                f'second {self._task} in it')
      return
    with contextlib.suppress(OSError):  # A full disk; it only tells others who this is.
      self._path.write_text(self._process.as_json())

  def _wait_for_lock(self) -> None:
    if self._lock_within(_DYING_SECONDS):
      return
    owner, wait = self._owner(), self._wait
    if owner and owner.host != self._process.host:
      wait = max(wait, LEASE_SECONDS)
    if wait:
      self._say_waiting(owner, wait)
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
    # A file that is open for writing would keep the disk from being made read-only. NFS wants one.
    for mode in (os.O_RDONLY, os.O_RDWR):
      file = os.open(self._path, mode | os.O_CREAT, 0o644)
      try:
        _lock(file)
        # Who owned the folder before may have removed the file meanwhile.
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
      self._path.unlink()  # Who has opened it meanwhile finds that it is gone; see `_try_lock`.
      if self._made_folder and not any(self._folder.iterdir()):
        self._folder.rmdir()  # Nothing has come of it.
    finally:
      os.close(self._lock)

  def _owner(self) -> Process | None:
    try:
      return Process.parse(self._path.read_text())
    except OSError:
      return None

  def _take_lease(self) -> None:
    seen: storage.Versioned | None = None
    begun = since = time.monotonic()
    told = False
    while not self._version:
      there = storage.read_versioned(self._path)
      owner = there and Process.parse(there.text)
      lives = bool(there and seen and there.version != seen.version) or bool(
          owner and owner.is_running())
      if lives and time.monotonic() - begun >= self._wait:
        raise self._refusal(owner)
      if there is None or seen is None or lives:
        seen, since = there, time.monotonic()
      if (there is None or owner is None or owner.is_running() is False
          or time.monotonic() - since >= LEASE_SECONDS or _beaten_long_ago(there.text)):
        self._version = storage.replace_version(
            self._path, self._text(), there.version if there else 0) or 0
        self._beaten = time.monotonic()
        continue
      if not told:
        self._say_waiting(owner, max(self._wait, LEASE_SECONDS))
        told = True
      time.sleep(1)

  def _say_waiting(self, owner: Process | None, seconds: float) -> None:
    self._say(f'{self._folder} belongs to another {self._task}{f", {owner}" if owner else ""}; '
              f'waiting up to {seconds:.0f} seconds for its end')

  def _refusal(self, owner: Process | None) -> InputError:
    kill = f' or end it with `kill {owner.pid}` there,' if owner else ''
    return InputError(f'{self._folder} is in use by another {self._task}'
                      f'{f": {owner}" if owner else ""}. Wait for it,{kill} or give another folder')

  def _text(self) -> str:
    return self._process.as_json(beat=time.time())

  def _beat_on(self) -> None:
    while not self._stop.wait(BEAT_SECONDS) and not self._lost:
      self._beat()

  def _beat(self) -> None:
    with self._mutex, contextlib.suppress(OSError):  # An outage: tried again at the next beat.
      if self._stop.is_set() or self._lost:
        return
      version = storage.replace_version(self._path, self._text(), self._version)
      if version is None:
        # A write that was repeated by the client may have succeeded before.
        there = storage.read_versioned(self._path)
        owner = there and Process.parse(there.text)
        self._lost = owner is None or owner.token != self._process.token
        version = there.version if there else 0
      self._version, self._beaten = version, time.monotonic()


@contextlib.contextmanager
def owned_by_first(ownership: Ownership) -> Iterator[Ownership | None]:
  """Has the first of the processes that work together take a right; None in the others.

  Raises:
    InputError: Another process has it; in all of them.
  """
  with contextlib.ExitStack() as closing:
    error: Exception | None = None
    if jax.process_index() == 0:
      try:
        closing.enter_context(ownership)
      except Exception as e:  # Of any kind: the others wait to be told.
        error = e
    told = coordination.hand_out(str(error or '').encode()).decode()
    if error or told:
      raise error or InputError(told)
    yield None if jax.process_index() else ownership


def _lock(file: int) -> None:
  """Locks an open file; BlockingIOError if another has, ENOSYS where there are no locks."""
  try:
    import fcntl
  except ImportError as e:
    raise OSError(errno.ENOSYS, 'no locks') from e
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _beaten_long_ago(text: str) -> bool:
  with contextlib.suppress(ValueError, TypeError, KeyError):
    return time.time() - float(json.loads(text)['beat']) > LEASE_SECONDS + _LONG_DEAD_SECONDS
  return False


def _started(pid: int) -> int:
  """Returns when a process was started, in ticks after the machine was; 0 where nobody tells.

  Not by psutil, which counts from the epoch: setting the clock would change it.
  """
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    return int(stat.rpartition(')')[2].split()[19])
  except (OSError, ValueError, IndexError):
    return 0


def _boot() -> str:
  """Returns what processes whose numbers can be compared have in common; '' where nobody tells."""
  try:
    start = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{start}/{os.stat("/proc/self/ns/pid").st_ino}'
  except OSError:
    return ''
