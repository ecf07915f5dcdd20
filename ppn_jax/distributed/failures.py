"""When one process of a run fails the others end too: soon, with its reason and its exit code.

Else they would wait for it in a collective until it is missed, and be aborted. The one that fails
leaves its reason in the key-value store of the coordination service, where a thread of each of the
others looks for it. One that is killed leaves none: there the devices' network may notice, and
after `partition.HEARTBEAT_SECONDS` the coordination service does.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from ppn_jax.errors import InputError, exit_status

_REASON, _HEARD = 'ppn_jax/stopped/reason', 'ppn_jax/stopped/heard'
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10  # For all to have heard.
_MAX_REASON = 2000

_watch: '_Watch | None' = None


def watch() -> None:
  """Ends this process as soon as another of the run has failed, whatever it is doing.

  Call it once the processes are joined. Nothing happens in one that works alone. Not for programs
  that have other things to do than this run: nothing of what they clean up is cleaned up.
  """
  global _watch
  import jax

  from ppn_jax.distributed import coordination
  if jax.process_count() > 1 and _watch is None:
    _watch = _Watch(coordination.client(), jax.process_index(), jax.process_count())
    _watch.start()


@atexit.register  # Imported before JAX, as by `ppn`, this runs after JAX has waited for the others.
def _stop_watching() -> None:
  if _watch is not None:
    _watch.stop()


def fail(error: BaseException) -> None:
  """Says why this process has failed, tells the others and ends; nothing without `watch`."""
  if _watch is not None:
    _watch.fail(error)


@contextlib.contextmanager
def failing_together(*, besides: type[BaseException] = GeneratorExit) -> Iterator[None]:
  """Calls `fail` on what is raised within, at once: leaving what lies around may wait for others.

  Args:
    besides: raised in all processes alike, and let through.
  """
  try:
    yield
  except (besides, SystemExit, GeneratorExit):
    raise
  except BaseException as e:
    fail(e)
    raise


class _Watch:
  """What one process knows of the others' ends."""

  def __init__(self, client: Any, process: int, count: int):
    self._client, self._process, self._count = client, process, count
    self._ending = threading.Lock()  # Never released: who comes second waits for the end.
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._look, name='ppn peers', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """A thread that is inside JAX when the interpreter ends would abort the process."""
    self._done.set()
    self._thread.join(_GRACE_SECONDS)

  def _look(self) -> None:
    while not (told := self._told()):
      if self._done.wait(_POLL_SECONDS):
        return
    self._ending.acquire()
    self._repeat(told)

  def fail(self, error: BaseException) -> None:
    self._ending.acquire()
    code, line = exit_status(error)
    # A mistake is told by all who meet it. Other failures may be what another's end led to.
    if (told := self._told()) and not isinstance(error, (InputError, KeyboardInterrupt)):
      self._repeat(told)
    if line:
      _say(line)
    else:
      traceback.print_exception(error)
    reason = line.removeprefix('ppn: ').removeprefix('error: ') if line else (
        f'{type(error).__name__}: {error}')
    told = {'process': self._process, 'code': code,
            'reason': ' '.join(reason.split())[:_MAX_REASON]}
    with contextlib.suppress(Exception):  # Another was first, or the service is gone.
      self._client.key_value_set(_REASON, json.dumps(told))
    self._end(code)

  def _told(self) -> dict[str, Any] | None:
    try:
      return json.loads(self._client.key_value_try_get(_REASON))
    except Exception:  # Nobody has failed; or the service has ended, which JAX answers by itself.
      return None

  def _repeat(self, told: dict[str, Any]) -> None:
    _say(f'ppn: process {told["process"]} stopped: {told["reason"]}')
    self._end(told['code'])

  def _end(self, code: int) -> None:
    """Without the ways of leaving a program: those of JAX wait for the others."""
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      self._client.key_value_set(f'{_HEARD}/{self._process}', '')
      if self._process == 0:  # Its end is that of the service, by which the others are to hear.
        deadline = time.monotonic() + _GRACE_SECONDS
        while (len(self._client.key_value_dir_get(_HEARD)) < self._count
               and time.monotonic() < deadline):
          time.sleep(0.1)
        time.sleep(0.2)
    os._exit(code)


def _say(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):
    print(line, file=sys.stderr, flush=True)
