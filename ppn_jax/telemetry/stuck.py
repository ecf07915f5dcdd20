"""Notices a step that hangs."""

import collections
import contextlib
import faulthandler
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from ppn_jax.errors import InputError
from ppn_jax.telemetry.progress import duration

# Before any step has been timed: data may have to be brought from far away.
_FIRST_FACTOR = 4
_STEPS = 101  # Whose median counts.
_POLL_SECONDS = 1.0


def check_limits(factor: float, seconds: float) -> None:
  """Raises InputError unless the limits of `StepWatch` are in range."""
  if not factor >= 0 or 0 < factor < 2:
    raise InputError(f'train.stuck_factor={factor:g} must be at least 2, or 0 for no limit')
  if not seconds > 0:
    raise InputError(f'train.stuck_seconds={seconds:g} must be above 0')


class StepWatch:
  """Watches, in a thread, for a step that takes far longer than the ones before.

  A context manager. Time in which the whole process is stopped (Ctrl-Z, a suspended laptop) does
  not count.

  Args:
    factor: Limit for a step, as a multiple of the median of the last ones; 0 watches nothing.
    seconds: Least limit. The first step has four times as long.
    on_stuck: Called once, in that thread, with a line on what is stuck.
  """

  def __init__(self, factor: float, seconds: float, on_stuck: Callable[[str], None]):
    self._factor, self._seconds, self._on_stuck = factor, seconds, on_stuck
    self._durations: collections.deque[float] = collections.deque(maxlen=_STEPS)
    self._step, self._spent = 0, 0.0  # Of the step that is running; 0 between steps.
    self._stop = threading.Event()
    self._poll = min(_POLL_SECONDS, seconds / 4)

  def __enter__(self) -> 'StepWatch':
    if self._factor:
      threading.Thread(target=self._watch, name='ppn step watch', daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()

  @contextlib.contextmanager
  def step(self, number: int, *, timed: bool = True) -> Iterator[None]:
    """Wraps the work of a step: its input, and the wait for the steps before it.

    Args:
      number: of the step.
      timed: whether it is a whole step, whose time counts for the limit of later ones.
    """
    started, self._spent, self._step = time.perf_counter(), 0.0, number
    try:
      yield
    finally:
      self._step = 0
    if timed:
      self._durations.append(time.perf_counter() - started)

  def limit(self) -> float:
    """Seconds that the step may take."""
    if not self._durations:
      return _FIRST_FACTOR * self._seconds
    return max(self._seconds, self._factor * statistics.median(list(self._durations)))

  def _watch(self) -> None:
    last = time.monotonic()
    while not self._stop.wait(self._poll):
      now = time.monotonic()
      self._spent += min(now - last, 2 * self._poll)
      last = now
      if (step := self._step) and self._spent > self.limit():
        usual = (f', {duration(statistics.median(list(self._durations)))} is usual'
                 if self._durations else '')
        self._on_stuck(f'step {step:,} hangs, for {duration(self._spent)} by now{usual}')
        return


def stacks() -> str:
  """Returns where all threads of this process are, as text."""
  with tempfile.TemporaryFile('w+') as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()
