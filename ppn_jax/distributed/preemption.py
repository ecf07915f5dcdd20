"""Early end of a run: by SIGTERM, by notice that the machine will be taken away, or by Ctrl-C."""

import contextlib
import datetime
import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ppn_jax.distributed.interrupts import InterruptWatch, write_line

# EX_TEMPFAIL of sysexits.h, which launchers take as "start again".
EXIT_CODE = 75

_ADDRESS = '169.254.169.254'  # On every VM of Google Cloud.
_HEADERS = {'Metadata-Flavor': 'Google'}
_POLL_SECONDS = 1.0  # A spot VM has 30 s left after the notice.
_TIMEOUT = 2.0
_ATTEMPTS = 3

# Values that announce the end of the machine. Other maintenance migrates VMs while they run.
_NOTICES = {'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE', 'preempted': 'TRUE'}
_UPCOMING = 'upcoming-maintenance?alt=json'
# Before the window of upcoming maintenance, which is known for days: time enough to save.
IMMINENT_SECONDS = 180.0


class Preempted(RuntimeError):
  """Raised when the run was told to end and has saved; the message says where it will resume."""


class Interrupted(KeyboardInterrupt):
  """Raised when Ctrl-C has ended the run, after saving; the message says what was saved."""


class PreemptionNotice:
  """Records whether the run has been told to end; a context manager around its steps.

  A process that works alone handles SIGTERM itself. With several processes, JAX's preemption
  service receives SIGTERM in any of them and makes all agree on a step that none has reached yet.
  A second SIGTERM changes nothing, so that it cannot break the save that follows the first. Notice
  that a VM of Google Cloud will be taken away counts as SIGTERM.

  The first Ctrl-C of a process that works alone is only recorded: an exception could be swallowed,
  or crash the process, in callbacks of native code. The second ends `ppn` at once, even while a
  step is compiled; in other programs it raises KeyboardInterrupt.
  """

  def __init__(self):
    self._terminated = False  # Without a lock: a handler may interrupt itself.
    self._interrupted = False
    self._calls = 0  # Of `reached`.
    self._before: Any = None
    self._interrupts = InterruptWatch(self._on_interrupt)
    self._maintenance = MaintenanceWatch(self._on_maintenance)

  def __enter__(self) -> 'PreemptionNotice':
    # Python delivers signals in the main thread only; in other threads the caller handles them.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
      self._interrupts.__enter__()
    self._maintenance.__enter__()
    return self

  def __exit__(self, *_: Any) -> None:
    self._maintenance.__exit__()
    if self._before is not None:
      self._interrupts.__exit__()
      signal.signal(signal.SIGTERM, self._before)

  def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
    self._terminated = True

  def _on_interrupt(self, count: int) -> None:
    self._interrupted = True
    if count == 1:
      write_line('interrupted: ending after this step, which is saved first; press Ctrl-C again '
                 'to end at once')
    else:
      self._interrupts.pass_on(count)

  def _on_maintenance(self) -> None:
    if jax.process_count() == 1:
      self._terminated = True
    else:  # The only way to notify JAX's service, which handles SIGTERM in this process.
      os.kill(os.getpid(), signal.SIGTERM)

  def given(self) -> bool:
    """Returns whether a process that works alone was told to end; False with several processes."""
    return self._terminated or self._interrupted

  def end(self, what: str) -> Preempted | Interrupted:
    """Returns the exception to raise when the run ends early; `what` says what was saved."""
    return Interrupted(what) if self._interrupted else Preempted(f'told to end; {what}')

  def reached(self) -> bool:
    """Returns whether to end now, the same in all processes.

    All processes have to call it equally often, such as after each step and after each batch of an
    evaluation; their calls of the same number get the same answer. It takes about a microsecond.
    """
    if jax.process_count() == 1:
      return self.given()
    self._calls += 1  # JAX compares these for equality, so none may be left out.
    return multihost_utils.reached_preemption_sync_point(self._calls)


class MaintenanceWatch:
  """Polls Google Cloud's metadata server for notice that this machine will be taken away.

  A context manager; it polls each second in a thread, which ends by itself if there is no such
  server. JAX's preemption service receives SIGTERM only, which comes when a VM is already being
  shut down; maintenance of a TPU's host is announced before, and so is the end of a spot VM. See
  https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice. Maintenance that is
  scheduled is announced days before its window: it counts when it is ongoing, or the window opens
  within `IMMINENT_SECONDS`. Machines that are migrated while they run are not concerned.

  The environment variables are those of google-auth: GCE_METADATA_HOST names another server,
  NO_GCE_CHECK=true turns it off.

  Args:
    on_notice: Called once, in that thread. Notices from before the start are ignored: a run that
      has ended because of one, and is started again on the same machine, continues until SIGTERM.
  """

  def __init__(self, on_notice: Callable[[], None]):
    self._on_notice, self._stop = on_notice, threading.Event()
    self._host = os.environ.get('GCE_METADATA_HOST') or _ADDRESS

  def __enter__(self) -> 'MaintenanceWatch':
    if os.environ.get('NO_GCE_CHECK', '').lower() != 'true':
      threading.Thread(target=self._watch, name='ppn maintenance', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()

  def _watch(self) -> None:
    before = self._first_notices()
    if before is None:
      return
    while not self._stop.wait(_POLL_SECONDS):
      now = self._notices()
      if now is None:
        continue
      if now - before and not self._stop.is_set():
        self._on_notice()
        return
      before = now

  def _first_notices(self) -> set[str] | None:
    for _ in range(_ATTEMPTS):
      if (notices := self._notices()) is not None or self._stop.wait(_POLL_SECONDS):
        return notices
    return None

  def _notices(self) -> set[str] | None:
    """Returns names of current notices; None if no metadata server answers."""
    try:
      notices = {key for key, value in _NOTICES.items() if self._read(key) == value}
      upcoming = upcoming_notices(self._read(_UPCOMING))
      # 'MIGRATE' for machines that do not notice their maintenance.
      if upcoming and self._read('scheduling/on-host-maintenance') == 'MIGRATE':
        upcoming = set()
      return notices | upcoming
    except (OSError, http.client.HTTPException):
      return None

  def _read(self, key: str) -> str:
    connection = http.client.HTTPConnection(self._host, timeout=_TIMEOUT)
    with contextlib.closing(connection):
      connection.request('GET', f'/computeMetadata/v1/instance/{key}', headers=_HEADERS)
      answer = connection.getresponse()
      text = answer.read(10_000).decode('ascii', 'replace').strip()
    if answer.headers.get('Metadata-Flavor') != 'Google':
      raise ConnectionError(f'{self._host} is not a metadata server of Google Cloud')
    return text if answer.status == 200 else ''


def upcoming_notices(text: str, now: datetime.datetime | None = None) -> set[str]:
  """Returns names of the maintenance that is ongoing or about to begin.

  Args:
    text: The metadata server's `upcoming-maintenance`, as JSON: an object with
      `maintenance_status` (PENDING or ONGOING) and `window_start_time`, or nothing.
    now: The time; by default that of this machine's clock.

  Returns:
    A name for each, which differs between a window that is imminent and one that has begun.
  """
  now = now or datetime.datetime.now(datetime.UTC)
  try:
    events = list(_events(json.loads(text or '{}')))
  except (ValueError, RecursionError):
    return set()  # 'NONE', or a server that cannot tell.
  found = set()
  for event in events:
    start = _time_of(event.get('windowstarttime'))
    if event.get('maintenancestatus') == 'ONGOING':
      found.add(f'ongoing maintenance {start}')
    elif start and (start - now).total_seconds() <= IMMINENT_SECONDS:
      found.add(f'imminent maintenance {start}')
  return found


def _events(value: Any) -> Iterator[dict[str, Any]]:
  """Yields the objects that describe maintenance, however deep they are.

  Google's documentation writes names as `window_start_time` and as `windowStartTime`; those of the
  result have neither capitals nor underscores.
  """
  if isinstance(value, dict):
    event = {key.replace('_', '').lower(): entry for key, entry in value.items()}
    if event.keys() & {'windowstarttime', 'maintenancestatus'}:
      yield event
    else:
      for entry in value.values():
        yield from _events(entry)
  elif isinstance(value, list):
    for entry in value:
      yield from _events(entry)


def _time_of(text: Any) -> datetime.datetime | None:
  """Returns a time in RFC 3339; None if it is not one."""
  try:
    found = datetime.datetime.fromisoformat(text)
  except (TypeError, ValueError):
    return None
  return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
