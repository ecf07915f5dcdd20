"""Progress of a run for people: lines on stderr, a live line, and where the time goes."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
  """Writes a line for each report and, on a terminal, a live line below that follows each step.

  Lines go to stderr, so that results can be piped. On a terminal each takes one row: parts that
  do not fit are left out, the last first.

  Args:
    steps: Number of steps of the whole run.
    console: Where to write.
    quiet: Writes nothing. Of several processes only one writes.
  """

  def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False):
    self._steps = steps
    self._console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    # Transient: on exit it would only repeat the last report.
    self._live = Live(Text(''), console=self._console, auto_refresh=False, transient=True)
    self._status: Sequence[str] = ()

  def __enter__(self) -> 'Progress':
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *_) -> None:
    if self._console.is_terminal:
      self._live.stop()

  def say(self, text: str) -> None:
    """Writes a line that stays."""
    self._console.print(Text(text))

  def report(self, step: int, status: Sequence[str]) -> None:
    """Writes the status of the run after `step`.

    Args:
      step: Number of steps taken.
      status: Parts of the line, the most important first.
    """
    self._status = status
    self.say(self._line(step, status))
    self.advance(step)

  def advance(self, step: int, doing: str = '') -> None:
    """Updates the live line, if there is one: with `doing` if given, else with the last status."""
    if self._console.is_terminal:
      line = Text(self._line(step, [doing] if doing else self._status), no_wrap=True,
                  overflow='ellipsis')
      self._live.update(line, refresh=True)

  def _line(self, step: int, status: Sequence[str]) -> str:
    line = f'step {step:,}/{self._steps:,}'
    for part in status:
      longer = f'{line}  {part}'
      if self._console.is_terminal and len(longer) > self._console.width:
        break
      line = longer
    return line


class Stopwatch:
  """Measures the time that training spends waiting for data and computing steps.

  Time outside `wait` and `compute`, such as evaluation and compiling, does not count.

  Attributes:
    steps: Number of steps so far.
  """

  def __init__(self):
    self._waited = self._computed = 0.0
    self.steps = 0

  @contextlib.contextmanager
  def wait(self) -> Iterator[None]:
    """Counts the time within as waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def compute(self, steps: int = 1) -> Iterator[None]:
    """Counts the time within as spent on so many steps."""
    start = time.perf_counter()
    yield
    self._computed += time.perf_counter() - start
    self.steps += steps

  @property
  def seconds(self) -> float:
    """Seconds that were counted so far."""
    return self._waited + self._computed

  def rates(self, batch_size: int) -> dict[str, float]:
    """Returns `images_per_second` and `data_wait`, the fraction of the time spent waiting."""
    seconds = max(self.seconds, 1e-9)
    return {'images_per_second': self.steps * batch_size / seconds,
            'data_wait': self._waited / seconds}


def duration(seconds: float) -> str:
  """Formats a duration: 4000 -> '1h06m', 70 -> '1m10s', 5 -> '5s'."""
  seconds = round(seconds)
  minutes, hours = seconds // 60, seconds // 3600
  if hours:
    return f'{hours}h{minutes % 60:02}m'
  return f'{minutes}m{seconds % 60:02}s' if minutes else f'{seconds}s'
