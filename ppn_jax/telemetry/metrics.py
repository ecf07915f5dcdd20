"""What a run tells while it runs: a progress line, JSON lines and TensorBoard files."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ppn_jax import storage
from ppn_jax.telemetry.append_only import EventFile, GrowingFile

FIRST_LOSS = 'train/first_loss'  # In the first line: of the first step alone.


class MetricsWriter:
  """Scalars to `metrics.jsonl` and to TensorBoard event files, the same in both.

  A line is `{"step": 120, "train/loss": 1.5, ...}`; a figure that does not exist, None, or is not
  a number is null. TensorBoard has no word for the former and does not get it.

  Args:
    workdir: of the run.
    step: the step that the run starts from. What a killed run wrote beyond it is taken out,
      since it will be written again. None if steps come in any order; all is kept then.
    tensorboard: folder of the event files, by default in the workdir.
    keep: of which other steps to keep the lines.
  """

  def __init__(self, workdir: storage.Path, step: int | None,
               tensorboard: storage.Path | None = None,
               keep: Callable[[int], bool] = lambda step: True):
    path = workdir / 'metrics.jsonl'
    lines = list(_lines_up_to(path, step)) if path.exists() else []
    lines = [line for line in lines if keep(json.loads(line)['step'])]
    self._outboxes = storage.Outbox(workdir), storage.Outbox(tensorboard or workdir / 'tensorboard')
    to_lines, to_events = (outbox.folder for outbox in self._outboxes)
    storage.write_text(to_lines / path.name, ''.join(lines))
    self.steps = {json.loads(line)['step'] for line in lines}  # With a line before this start.
    self._lines = GrowingFile(to_lines / path.name)
    self._events = EventFile(to_events, None if step is None else step + 1)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    # What went wrong first counts.
    with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
      self.close()

  def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
    """Records the scalars of one step.

    Raises:
      OSError: the disk does not take them. They are kept, and written with what comes next.
    """
    known = {name: None if value is None or not math.isfinite(value) else float(value)
             for name, value in scalars.items()}
    self._lines.add(f'{json.dumps({"step": step, **known})}\n'.encode())
    self._events.add_scalars(step, {name: value for name, value in scalars.items()
                                    if value is not None})
    self._write_out()
    for outbox in self._outboxes:
      outbox.offer()

  def flush(self) -> None:
    """Returns when all that was written would survive a kill of this process.

    Raises:
      OSError: the disk or bucket does not take it. It can be tried again.
    """
    self._write_out()
    for outbox in self._outboxes:
      outbox.flush()

  def close(self) -> None:
    """Raises OSError if the disk or bucket does not take what is left."""
    with contextlib.ExitStack() as stack:
      for outbox in self._outboxes:
        stack.callback(outbox.close)
      self._write_out()

  def _write_out(self) -> None:
    try:
      self._lines.flush()
    finally:
      self._events.flush()


def evaluated(workdir: storage.Path, step: int) -> bool:
  """Whether metrics.jsonl has the figures of an evaluation of `step`."""
  path = workdir / 'metrics.jsonl'
  lines = [json.loads(line) for line in _lines_up_to(path, step)] if path.exists() else []
  return any(line['step'] == step and any(name.startswith('eval/') for name in line)
             for line in lines)


def read(path: storage.Path) -> list[dict[str, float | None]]:
  """Returns the whole lines of a `metrics.jsonl`, in order of step; none if there is no such file.

  Of lines with the same metrics of the same step the last counts: it was scored again. Metrics of
  an evaluation that do not exist are None, also in files of versions that wrote -1.
  """
  lines = [json.loads(line) for line in _lines_up_to(path, None)] if path.is_file() else []
  for line in lines:
    line.update({name: None for name, value in line.items()
                 if value == -1 and name.startswith('eval/')})
  last = {(line['step'], *line): line for line in lines}
  return sorted(last.values(), key=lambda line: line['step'])


def first_loss(workdir: storage.Path) -> float | None:
  """Returns the loss of a run's first step; None if it has reported none yet.

  Runs of earlier versions did not write it down. Of those it is the mean up to the first report.
  """
  for line in read(workdir / 'metrics.jsonl'):
    if (loss := line.get(FIRST_LOSS, line.get('train/loss'))) is not None:
      return loss
  return None


def _lines_up_to(path: storage.Path, step: int | None) -> Iterator[str]:
  for line in storage.read_text(path).splitlines():
    # A killed run may leave half a line behind, or all but its end.
    with contextlib.suppress(ValueError):
      at = json.loads(line)['step']
      if step is None or at <= step:
        yield f'{line}\n'


class Progress:
  """A line for each report and, on a terminal, a live one below them that tells of each step.

  On stderr, so that results can be piped. On a terminal each takes one row: what does not fit is
  left out, the last first.

  Args:
    steps: of the whole run.
    console: where to write.
    quiet: says nothing; of several processes one speaks.
  """

  def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False):
    self._steps = steps
    self._console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    # Its last state is that of the last report.
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
    """A line that stays."""
    self._console.print(Text(text))

  def report(self, step: int, status: Sequence[str]) -> None:
    """Writes the state of the run after `step`.

    Args:
      step: which.
      status: its parts, from what matters most to what matters least.
    """
    self._status = status
    self.say(self._line(step, status))
    self.advance(step)

  def advance(self, step: int, doing: str = '') -> None:
    """Moves the live line on, for the moment with what the run is `doing`; nothing elsewhere."""
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
  """Where the time of training goes: waiting for data, or stepping.

  Time outside `waiting` and `stepping`, such as evaluation and compiling, does not count.
  """

  def __init__(self):
    self.waited = self.stepped = 0.0
    self.steps = 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  @contextlib.contextmanager
  def stepping(self, steps: int = 1) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.stepped += time.perf_counter() - start
    self.steps += steps

  @property
  def seconds(self) -> float:
    return self.waited + self.stepped

  def rates(self, batch_size: int) -> dict[str, float]:
    """`images_per_second`, and `data_wait`, the share of the time spent waiting, 0 to 1."""
    seconds = max(self.seconds, 1e-9)
    return {'images_per_second': self.steps * batch_size / seconds,
            'data_wait': self.waited / seconds}


def duration(seconds: float) -> str:
  """4000 -> '1h06m', 70 -> '1m10s', 5 -> '5s'."""
  seconds = round(seconds)
  minutes, hours = seconds // 60, seconds // 3600
  if hours:
    return f'{hours}h{minutes % 60:02}m'
  return f'{minutes}m{seconds % 60:02}s' if minutes else f'{seconds}s'
