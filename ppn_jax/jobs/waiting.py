"""Waiting for what training, on another machine, is to write."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

from ppn_jax.errors import InputError
from ppn_jax.run import Run, is_run, open_run
from ppn_jax.telemetry.progress import duration

SAY_EVERY = 600.0  # Seconds between lines that say that nothing happens.


class Clock(NamedTuple):
  """Time, in seconds."""
  now: Callable[[], float] = time.monotonic
  sleep: Callable[[float], object] = time.sleep


@dataclasses.dataclass(frozen=True)
class Patience:
  """How to wait for what another process is to write.

  Attributes:
    poll: seconds between looks, above 0.
    timeout: seconds without anything new after which to give up; 0 is never.
    clock: what tells and passes the time.
  """
  poll: float = 10.0
  timeout: float = 0.0
  clock: Clock = dataclasses.field(default_factory=Clock)

  def __post_init__(self):
    if not self.poll > 0 or not self.timeout >= 0:
      raise InputError(f'--poll={self.poll:g} must be above 0 seconds and '
                       f'--timeout={self.timeout:g} at least 0')


class Waiting:
  """Sleeps, speaks now and then, and knows when it has been too long."""

  def __init__(self, patience: Patience, say: Callable[[str], None]):
    self._patience, self._say = patience, say
    self.reset()

  def reset(self) -> None:
    """Something has happened."""
    self._since, self._said = self._patience.clock.now(), None

  def is_over(self) -> bool:
    timeout = self._patience.timeout
    return bool(timeout) and self._patience.clock.now() - self._since >= timeout

  def wait(self, reason: str) -> None:
    now = self._patience.clock.now()
    if self._said is None or now - self._said >= SAY_EVERY:
      self._say(reason if self._said is None else f'{reason}, for {duration(now - self._since)}')
      self._said = now
    self._patience.clock.sleep(self._patience.poll)


def wait_for_run(workdir: str | pathlib.Path, patience: Patience, say: Callable[[str], None]
                 ) -> Run:
  """The run in `workdir`, as soon as training has begun there.

  Raises:
    InputError: it has not within `patience.timeout`, or the run cannot be read.
  """
  waiting = Waiting(patience, say)
  while not is_run(workdir):
    if waiting.is_over():
      raise InputError(f'workdir {workdir} has not become a run within --timeout='
                       f'{patience.timeout:g} seconds; is it the --workdir of the training?')
    waiting.wait(f'waiting for training to begin in {workdir}')
  return open_run(workdir)
