"""Ends all processes of a run soon after one fails, with its reason and its exit code.

Otherwise they would wait for it in a collective until its absence is noticed, and be aborted. The
process that fails leaves its reason in the key-value store of the coordination service, where a
thread of each other process looks for it. A process that is killed leaves none: then the devices'
network may notice, and after `sharding.HEARTBEAT_SECONDS` the coordination service does.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ppn_jax.errors import InputError, exit_status

_REASON, _ACKNOWLEDGED = 'ppn_jax/stopped/reason', 'ppn_jax/stopped/heard'
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10  # For all processes to acknowledge.
_MAX_REASON = 2000

_watch: '_Watch | None' = None
_show_stacks: Callable[[], None] = lambda: None


def watch_peers() -> None:
  """Ends this process as soon as another process of the run fails, whatever it is doing.

  Call it once the processes are joined. Does nothing in a process that works alone. Not for
  programs that do other work than this run, since their clean-up does not run.
  """
  global _watch
  import jax

  from ppn_jax.distributed import coordination
  if jax.process_count() > 1 and _watch is None:
    _watch = _Watch(coordination.client(), jax.process_index(), jax.process_count())
    _watch.start()


@atexit.register  # If imported before JAX, as in `ppn`, runs after JAX has waited for the others.
def _stop_watching() -> None:
  if _watch is not None:
    _watch.stop()


def fail(error: BaseException, *, hangs: bool = False) -> None:
  """Reports why this process failed, also to the others, and ends it. Needs `watch_peers`.

  Args:
    error: Why.
    hangs: Whether it is unknown which process is to blame, so that all should show where they are.
  """
  if _watch is not None:
    _watch.fail(error, hangs)


@contextlib.contextmanager
def shows_stacks(show: Callable[[], None]) -> Iterator[None]:
  """Calls `show` if another process ends this one within, because a step hangs somewhere."""
  global _show_stacks
  before, _show_stacks = _show_stacks, show
  try:
    yield
  finally:
    _show_stacks = before


@contextlib.contextmanager
def fail_together(*, except_for: type[BaseException] = GeneratorExit) -> Iterator[None]:
  """Calls `fail` at once on what is raised within: leaving outer contexts may wait for others.

  Args:
    except_for: Raised in all processes alike, and therefore passed through.
  """
  try:
    yield
  except (except_for, SystemExit, GeneratorExit):
    raise
  except BaseException as e:
    fail(e)
    raise


class _Watch:
  """Watches in a thread for failures of other processes, and reports this one's."""

  def __init__(self, client: Any, process: int, count: int):
    self._client, self._process, self._count = client, process, count
    self._ending = threading.Lock()  # Never released: the second thread waits for the end.
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._look, name='ppn peers', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread, which would abort the process if it were inside JAX at interpreter exit."""
    self._done.set()
    self._thread.join(_GRACE_SECONDS)

  def _look(self) -> None:
    while not (failure := self._failure()):
      if self._done.wait(_POLL_SECONDS):
        return
    self._ending.acquire()
    self._repeat(failure)

  def fail(self, error: BaseException, hangs: bool) -> None:
    self._ending.acquire()
    code, line = exit_status(error)
    # A user's mistake is reported by every process that finds it. Other errors may only follow from
    # the failure of another process.
    if (failure := self._failure()) and not isinstance(error, (InputError, KeyboardInterrupt)):
      self._repeat(failure)
    if line:
      _print(line)
    else:
      traceback.print_exception(error)
    reason = line.removeprefix('ppn: ').removeprefix('error: ') if line else (
        f'{type(error).__name__}: {error}')
    failure = {'process': self._process, 'code': code, 'hangs': hangs,
               'reason': ' '.join(reason.split())[:_MAX_REASON]}
    with contextlib.suppress(Exception):  # Another was first, or the service is gone.
      self._client.key_value_set(_REASON, json.dumps(failure))
    self._end(code, hangs)

  def _failure(self) -> dict[str, Any] | None:
    """Returns what the first process that failed has reported; None if none has."""
    try:
      return json.loads(self._client.key_value_try_get(_REASON))
    except Exception:  # None has failed; or the service has ended, which JAX handles itself.
      return None

  def _repeat(self, failure: dict[str, Any]) -> None:
    if failure.get('hangs'):
      with contextlib.suppress(Exception):
        _show_stacks()
    _print(f'ppn: process {failure["process"]} stopped: {failure["reason"]}')
    self._end(failure['code'], failure.get('hangs', False))

  def _end(self, code: int, hangs: bool) -> None:
    """Ends the process without exit handlers: those of JAX wait for the other processes."""
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      self._client.key_value_set(f'{_ACKNOWLEDGED}/{self._process}', '')
      # The first process runs the service, which the others need to read the reason. And where all
      # show their stacks, the first to end would break the collectives that the others are in.
      if self._process == 0 or hangs:
        deadline = time.monotonic() + _GRACE_SECONDS
        while (len(self._client.key_value_dir_get(_ACKNOWLEDGED)) < self._count
               and time.monotonic() < deadline):
          time.sleep(0.1)
        time.sleep(1.0 if self._process == 0 and hangs else 0.2)  # The others are still reading.
    os._exit(code)


def _print(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):
    print(line, file=sys.stderr, flush=True)
