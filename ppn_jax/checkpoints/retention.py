"""Decides which checkpoints to keep, from scores written by the trainer or by evaluation jobs.

The trainer and evaluation jobs on other machines share no lock. They meet in files that are
written whole, one writer each:

  evaluation/STEP/scores.json  by a job: what a step is worth; by the trainer where it saved a step
                               before it could score it
  readers/NAME.json            by a reader of its own name: the step that it is at, which must not
                               be deleted now

The trainer reads both each time that it decides what to keep.
"""

import contextlib
import dataclasses
import json
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ppn_jax import storage
from ppn_jax.distributed.ownership import Process
from ppn_jax.errors import is_outage

BEAT_SECONDS = 60.0  # Between signs of life of a reader.
DEAD_SECONDS = 600.0  # Without one, after which a reader on another machine is taken for dead.


class Stamp(NamedTuple):
  """What a checkpoint is known by.

  Fields:
    checkpoint: of the values that it holds.
    saved: when, in seconds since the epoch.
  """
  checkpoint: str
  saved: float


class Record(NamedTuple):
  """The scores of a step.

  Fields:
    metrics: COCO's.
    about: what was scored, by name; empty in records of earlier versions.
    written: when, in seconds since the epoch.
  """
  metrics: dict[str, float | None]
  about: dict[str, Any]
  written: float

  def fits(self, stamp: Stamp | None, **about: Any) -> bool:
    """Returns whether it is of the checkpoint that `stamp` is of.

    A record of an earlier version does not say what was scored. It counts if it was written after
    the checkpoint was.

    Args:
      stamp: None where there is no checkpoint, or one that cannot be told from others.
      about: what else must be as it is now; what the record does not mention is not compared.
    """
    if stamp is None or any(self.about.get(name, value) != value for name, value in about.items()):
      return False
    scored = self.about.get('checkpoint')
    return self.written >= stamp.saved if scored is None else scored == stamp.checkpoint


@dataclasses.dataclass(frozen=True)
class BestScored:
  """Orbax's preservation policy: the `n` best checkpoints, and those that are being evaluated.

  Attributes:
    n: how many.
    rank: metrics -> what is best where it is highest, -inf if they do not have it.
    evaluations: folder of the records; None to go by the figures saved with checkpoints alone.
      Where a step has both, the record counts, unless it is of another checkpoint.
    readers: folder of those who are reading; None if nobody is.
    stamp: step -> what its checkpoint is known by.
  """
  n: int
  rank: Callable[[dict[str, float | None]], float]
  evaluations: storage.Path | None = None
  readers: storage.Path | None = None
  stamp: Callable[[int], Stamp | None] = lambda step: None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns, for each checkpoint, whether to keep it; without metrics, or without a rank, it is
    never kept as best.

    While the records cannot be read all are kept: the best one may be among them.
    """
    del context
    try:
      kept = self._kept(checkpoints)
    except Exception as e:
      if not is_outage(e):
        raise
      return [True] * len(checkpoints)
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def _kept(self, checkpoints: Sequence[Any]) -> set[int]:
    ranks = {}
    for checkpoint in checkpoints:
      metrics = self._record(checkpoint.step) or checkpoint.metrics
      if metrics is not None and (rank := self.rank(metrics)) > -math.inf:
        ranks[checkpoint.step] = rank
    by_rank = sorted(ranks, key=lambda step: (ranks[step], step))
    being = set() if self.readers is None else being_read(self.readers)
    return {*by_rank[len(by_rank) - min(self.n, len(by_rank)):], *being}

  def _record(self, step: int) -> dict[str, float | None] | None:
    found = None if self.evaluations is None else record(self.evaluations, step)
    return found.metrics if found and found.fits(self.stamp(step)) else None


def record(evaluations: storage.Path, step: int) -> Record | None:
  """Returns what is on record of a step, None if it has not been scored.

  Metrics that do not exist are None, also in files of versions that wrote -1.

  Raises:
    OSError: It cannot be read now.
  """
  path = evaluations / str(step) / 'scores.json'
  found = _read(path)
  metrics = found.get('figures') if isinstance(found, dict) else None
  if not isinstance(metrics, dict):
    return None
  metrics = {name: None if value == -1 else value for name, value in metrics.items()}
  about = found.get('scored')
  return Record(metrics, about if isinstance(about, dict) else {}, storage.modified(path))


def numbered(folder: storage.Path) -> list[int]:
  """Returns the steps that have a folder of their own in `folder`, ascending."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if re.fullmatch(r'\d+', name, re.ASCII))


def being_read(readers: storage.Path) -> set[int]:
  """Returns the steps that living readers are at.

  Raises:
    OSError: It cannot be read now.
  """
  found = (_read(path) for path in _reader_files(readers))
  return {reader['step'] for reader in found if _is_alive(reader)}


def remove_dead_readers(readers: storage.Path) -> None:
  """Removes what readers that were killed have left; what cannot be removed stays."""
  with contextlib.suppress(OSError):
    for path in _reader_files(readers):
      if not _is_alive(_read(path)):
        path.unlink(missing_ok=True)


class Reader:
  """Asks for steps not to be deleted, one at a time, for as long as this process lives.

  Args:
    readers: folder of all who do so.
    say: told, once, if the folder does not take it; the steps can be read all the same.
  """

  def __init__(self, readers: storage.Path, say: Callable[[str], None]):
    self._process, self._say = Process.this(), say
    self._path = readers / '{host}-{pid}-{token}.json'.format(**self._process._asdict())
    self._step: int | None = None
    self._mutex, self._stop = threading.Lock(), threading.Event()
    self._said = False
    remove_dead_readers(readers)
    threading.Thread(target=self._beat_on, name='ppn reader', daemon=True).start()

  def hold(self, step: int | None) -> None:
    """Asks for a step; None asks for nothing."""
    with self._mutex:
      self._step = step
      self._write()

  def close(self) -> None:
    """Asks for nothing any more."""
    self._stop.set()
    self.hold(None)

  def _beat_on(self) -> None:
    while not self._stop.wait(BEAT_SECONDS):
      with self._mutex:
        if self._step is not None:
          self._write()

  def _write(self) -> None:
    try:
      if self._step is None:
        self._path.unlink(missing_ok=True)
      else:
        storage.write_text(self._path, self._process.as_json(step=self._step, beat=time.time()))
    except OSError as e:
      if not self._said:
        self._say(f'{self._path.parent} cannot be written ({e.strerror or e}), so a training may '
                  'delete checkpoints while they are evaluated')
      self._said = True


def _reader_files(readers: storage.Path) -> list[storage.Path]:
  return sorted(readers.glob('*.json')) if readers.is_dir() else []


def _is_alive(reader: Any) -> bool:
  if not isinstance(reader, dict) or not isinstance(reader.get('step'), int):
    return False
  process = Process.parse(json.dumps(reader))
  beat = reader.get('beat')
  if process is None or process.is_running() is False or not isinstance(beat, (int, float)):
    return False
  return bool(process.is_running()) or abs(time.time() - beat) < DEAD_SECONDS


def _read(path: storage.Path) -> Any:
  """Returns what a JSON file holds, None if there is none or it is no JSON."""
  try:
    return json.loads(storage.read_text(path))
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None
