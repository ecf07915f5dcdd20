"""Progress of a run for people: log lines, a live line, and where the time goes."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rich.console import Console
  from rich.live import Live

logger = logging.getLogger(__name__)


class Progress:
  """Logs a line for each report and, at level DEBUG, one for each step.

  The records have an attribute `parts`, from which `LiveHandler` makes lines that fit a terminal.

  Args:
    steps: Number of steps of the whole run.
  """

  def __init__(self, steps: int):
    self._steps = steps
    self._status: Sequence[str] = ()

  def report(self, step: int, status: Sequence[str]) -> None:
    """Logs the status of the run after `step`.

    Args:
      step: Number of steps taken.
      status: Parts of the line, the most important first.
    """
    self._status = status
    self._log(logging.INFO, step, status)
    self.advance(step)

  def advance(self, step: int, doing: str = '') -> None:
    """Updates the live line, if there is one: with `doing` if given, else with the last status."""
    self._log(logging.DEBUG, step, [doing] if doing else self._status)

  def _log(self, level: int, step: int, status: Sequence[str]) -> None:
    if logger.isEnabledFor(level):
      parts = (f'step {step:,}/{self._steps:,}', *status)
      logger.log(level, '  '.join(parts), extra={'parts': parts})


class LiveHandler(logging.Handler):
  """Handler that prints lines to stderr and, on a terminal, a live line below for each step.

  The live line needs level DEBUG; other records of that level are not shown. On a terminal each
  record of `Progress` takes one row: parts that do not fit are left out, the last first.

  Args:
    console: Where to write; by default stderr.
  """

  def __init__(self, console: 'Console | None' = None):
    super().__init__()
    self._console = console
    self._live: Live | None = None

  def emit(self, record: logging.LogRecord) -> None:
    parts = getattr(record, 'parts', ())
    if parts and self._console is None and sys.stderr.isatty():
      from rich.console import Console
      self._console = Console(stderr=True, highlight=False, soft_wrap=True)
    live = bool(parts) and self._console is not None and self._console.is_terminal
    line = self._fitting(parts) if live else self.format(record)
    if record.levelno > logging.DEBUG:
      self._print(line)
    elif live:
      self._show(line)

  def close(self) -> None:
    """Removes the live line, which would only repeat the last report."""
    if self._live is not None:
      self._live.stop()
      self._live = None
    super().close()

  def _fitting(self, parts: Sequence[str]) -> str:
    line = parts[0]
    for part in parts[1:]:
      longer = f'{line}  {part}'
      if len(longer) > self._console.width:
        break
      line = longer
    return line

  def _print(self, line: str) -> None:
    if self._console is None:
      print(line, file=sys.stderr, flush=True)
    else:
      from rich.text import Text
      self._console.print(Text(line))

  def _show(self, line: str) -> None:
    from rich.live import Live
    from rich.text import Text
    if self._live is None:
      self._live = Live(Text(''), console=self._console, auto_refresh=False, transient=True)
      self._live.start()
    self._live.update(Text(line, no_wrap=True, overflow='ellipsis'), refresh=True)


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
