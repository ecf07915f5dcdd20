"""Where the time of a run goes, over all its starts: the share of it that is steps is its goodput.

Each start writes WORKDIR/logs/NAME.json about once a second (in a bucket, every half minute), so
that a kill loses little. What the steps after the last checkpoint took is known at the next start,
which repeats them.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ppn_jax import storage
from ppn_jax.telemetry.progress import duration
from ppn_jax.telemetry.run_log import FOLDER

# Of a start, in order: imports and joining the other processes, opening data and restoring the
# state, compiling, steps, waiting for data, waiting for saves, evaluations.
KINDS = ('start', 'prepare', 'compile', 'steps', 'data', 'save', 'evaluate')
_EVERY_SECONDS = 1.0


class Start(NamedTuple):
  """What one start of a run took.

  Fields:
    began, ended: Seconds since the epoch; `ended` is when it was last known to be alive.
    first_step, last_step: Steps before it and at its end.
    seconds: By kind, see `KINDS`.
    note: What else to know about the start, such as XLA's options.
  """
  began: float
  ended: float
  first_step: int
  last_step: int
  seconds: dict[str, float]
  note: dict[str, Any]


class Goodput(NamedTuple):
  """Time of a run over all its starts, in seconds.

  Fields:
    wall: From the first start until it was last alive.
    starts: Number of starts.
    seconds: By kind, see `KINDS`; 'repeated' are steps that were lost and taken again, 'down' the
      time between starts.
  """
  wall: float
  starts: int
  seconds: dict[str, float]

  @property
  def share(self) -> float:
    """Share of the time that was steps whose result was kept."""
    return self.seconds['steps'] / max(self.wall, 1e-9)

  def describe(self) -> str:
    """Returns a line for people."""
    parts = [f'{duration(s)} {kind}' for kind, s in sorted(
        self.seconds.items(), key=lambda item: -item[1]) if s >= 0.5 and kind != 'steps']
    times = f'{self.starts:,} start{"s" if self.starts > 1 else ""}'
    return (f'goodput {self.share:.0%}: {duration(self.seconds["steps"])} of steps in '
            f'{duration(self.wall)}, {times}' + (f'; {", ".join(parts)}' if parts else ''))


class Timeline:
  """Attributes the time of this start to what is being done.

  A context manager; only the process that calls `open` writes.

  Args:
    began: When the start began, in seconds since the epoch; by default now.
  """

  def __init__(self, began: float | None = None):
    now = time.time()
    self._began = began or now
    self._seconds = dict.fromkeys(KINDS, 0.0)
    self._seconds['start'] = now - self._began
    self._kind, self._since = 'prepare', time.monotonic()
    self._first_step = self._last_step = 0
    self._note: dict[str, Any] = {}
    self._path: storage.Path | None = None
    self._mutex, self._stop = threading.Lock(), threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> 'Timeline':
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    if self._thread:
      self._thread.join()
      self._write()

  def open(self, workdir: storage.Path, name: str, step: int, **note: Any) -> None:
    """Writes to WORKDIR/logs/NAME from now on; `step` is that after which the run continues."""
    self._first_step = self._last_step = step
    self._note, self._path = note, workdir / FOLDER / name
    self._write()
    self._thread = threading.Thread(target=self._write_often, name='ppn goodput', daemon=True)
    self._thread.start()

  @contextlib.contextmanager
  def during(self, kind: str) -> Iterator[None]:
    """Attributes the time within to `kind`, except for what an inner call claims."""
    outer = self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def reached(self, step: int) -> None:
    """Records the last step that was taken."""
    self._last_step = step

  def _switch(self, kind: str) -> str:
    with self._mutex:
      now, outer = time.monotonic(), self._kind
      self._seconds[outer] += now - self._since
      self._kind, self._since = kind, now
      return outer

  def result(self) -> Start:
    """Returns what was recorded until now."""
    self._switch(self._kind)
    with self._mutex:
      return Start(self._began, time.time(), self._first_step, self._last_step,
                   {kind: round(s, 3) for kind, s in self._seconds.items()}, self._note)

  def _write_often(self) -> None:
    every = _EVERY_SECONDS if storage.is_local(self._path) else storage.SEND_EVERY
    while not self._stop.wait(every):
      self._write()

  def _write(self) -> None:
    text = json.dumps(self.result()._asdict()) + '\n'
    with contextlib.suppress(OSError):  # The file only informs.
      if storage.is_local(self._path):
        # Without `write_text`, which waits for the disk: losing a second does not matter.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f'.{self._path.name}.partial')
        partial.write_text(text)
        os.replace(partial, self._path)
      else:
        storage.write_text(self._path, text)


def read(workdir: storage.Path) -> list[Start]:
  """Returns what the starts of a run took, in their order; [] if none was recorded."""
  folder, found = workdir / FOLDER, []
  for path in folder.glob('*.json') if folder.is_dir() else ():
    with contextlib.suppress(OSError, ValueError, TypeError):
      found.append(Start(**json.loads(storage.read_text(path))))
  return sorted(found, key=lambda start: start.began)


def summarize(starts: Sequence[Start]) -> Goodput | None:
  """Adds up what the starts of a run took; None without any.

  Steps that a start took after the checkpoint from which the next one continued are repeated, at
  the mean time of a step of that start.
  """
  if not starts:
    return None
  seconds = dict.fromkeys((*KINDS, 'repeated', 'down'), 0.0)
  for start, following in zip(starts, [*starts[1:], None], strict=True):
    for kind, value in start.seconds.items():
      seconds[kind] += value
    if following is None:
      continue
    seconds['down'] += max(following.began - start.ended, 0.0)
    taken = start.last_step - start.first_step
    lost = min(max(start.last_step - following.first_step, 0), taken)
    if taken:
      repeated = start.seconds['steps'] * lost / taken
      seconds['steps'] -= repeated
      seconds['repeated'] += repeated
  return Goodput(starts[-1].ended - starts[0].began, len(starts), seconds)
