"""Decides which checkpoints to keep, from scores written by the trainer or by evaluation jobs.

The trainer and evaluation jobs on other machines share no lock. They meet in files that are
written whole, one writer each:

  evaluation/STEP/scores.json  the scores of a step, written by an evaluation job, or by the trainer
                               if it saved the step before it could score it
  readers/NAME.json            the step that a reader is using, which must not be deleted now

The trainer reads both each time it decides what to keep; of several processes only the first.
"""

import contextlib
import dataclasses
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ppn_jax import storage
from ppn_jax.distributed import coordination
from ppn_jax.distributed.ownership import Process
from ppn_jax.errors import is_outage

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 60.0  # Between heartbeats of a reader.
DEAD_SECONDS = 600.0  # Without a heartbeat, after which a reader on another machine counts as dead.


class Stamp(NamedTuple):
  """Identifies a checkpoint.

  Fields:
    checkpoint: Hash of its values.
    saved: When it was saved, in seconds since the epoch.
  """
  checkpoint: str
  saved: float


class Record(NamedTuple):
  """The scores of a step.

  Fields:
    metrics: COCO's metrics.
    about: What was scored, by name; empty in records of earlier versions.
    written: When, in seconds since the epoch.
  """
  metrics: dict[str, float | None]
  about: dict[str, Any]
  written: float

  def fits(self, stamp: Stamp | None, **about: Any) -> bool:
    """Returns whether the record is of the checkpoint that `stamp` identifies.

    Records of earlier versions do not say what was scored. They count if they were written after
    the checkpoint was.

    Args:
      stamp: Of the checkpoint; None if there is none, or it cannot be identified.
      **about: What else must be the same; what the record does not mention is not compared.
    """
    if stamp is None or any(self.about.get(name, value) != value for name, value in about.items()):
      return False
    scored = self.about.get('checkpoint')
    return self.written >= stamp.saved if scored is None else scored == stamp.checkpoint


@dataclasses.dataclass(frozen=True)
class BestCheckpoints:
  """Orbax preservation policy that keeps the `n` best checkpoints, and those that are being read.

  Attributes:
    n: Number of best checkpoints to keep.
    rank: Maps metrics to the value that is highest for the best; -inf if they lack it.
    evaluations: Folder of the records; None to use only the metrics saved with checkpoints. If a
      step has both, the record counts, unless it is of another checkpoint.
    readers: Folder of the readers; None if there are none.
    stamp: Maps a step to what identifies its checkpoint.
  """
  n: int
  rank: Callable[[dict[str, float | None]], float]
  evaluations: storage.Path | None = None
  readers: storage.Path | None = None
  stamp: Callable[[int], Stamp | None] = lambda step: None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns, for each checkpoint, whether to keep it.

    Checkpoints without metrics, or whose rank is -inf, are never kept as best. While the records
    cannot be read all are kept, since the best one may be among them.
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
      metrics = self._recorded_metrics(checkpoint.step) or checkpoint.metrics
      if metrics is not None and (rank := self.rank(metrics)) > -math.inf:
        ranks[checkpoint.step] = rank
    by_rank = sorted(ranks, key=lambda step: (ranks[step], step))
    in_use = set() if self.readers is None else steps_being_read(self.readers)
    return {*by_rank[len(by_rank) - min(self.n, len(by_rank)):], *in_use}

  def _recorded_metrics(self, step: int) -> dict[str, float | None] | None:
    found = None if self.evaluations is None else read_record(self.evaluations, step)
    return found.metrics if found and found.fits(self.stamp(step)) else None


@dataclasses.dataclass(frozen=True)
class DecidedByFirst:
  """Orbax preservation policy by which the first of several processes decides for all.

  It is asked in the thread that saves, at the same saves in all processes, so decisions are told
  apart by the newest step and how often it was asked about. A process that gets no decision keeps
  all: only the first deletes anything.

  Attributes:
    policy: Decides, in the first process.
  """
  policy: BestCheckpoints
  _asked: dict[int, int] = dataclasses.field(default_factory=dict)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns, for each checkpoint, whether to keep it."""
    if jax.process_count() == 1 or not checkpoints:
      return self.policy.should_preserve(checkpoints, context=context)
    newest = max(checkpoint.step for checkpoint in checkpoints)
    self._asked[newest] = self._asked.get(newest, 0) + 1
    key = f'ppn_jax/retention/{newest}/{self._asked[newest]}'
    if jax.process_index():
      decision = coordination.find(key)
      dropped = set() if decision is None else set(json.loads(decision))
      return [checkpoint.step not in dropped for checkpoint in checkpoints]
    kept = self.policy.should_preserve(checkpoints, context=context)
    coordination.publish(key, json.dumps([
        checkpoint.step for checkpoint, keep in zip(checkpoints, kept, strict=True)
        if not keep]).encode())
    return kept


def read_record(evaluations: storage.Path, step: int) -> Record | None:
  """Returns the recorded scores of a step, None if it has not been scored.

  Metrics that do not exist are None, also in files of earlier versions, which wrote -1.

  Raises:
    OSError: If the file cannot be read now.
  """
  path = evaluations / str(step) / 'scores.json'
  found = _read(path)
  metrics = found.get('figures') if isinstance(found, dict) else None
  if not isinstance(metrics, dict):
    return None
  metrics = {name: None if value == -1 else value for name, value in metrics.items()}
  about = found.get('scored')
  return Record(metrics, about if isinstance(about, dict) else {}, storage.modified(path))


def steps_in(folder: storage.Path) -> list[int]:
  """Returns the steps that have a sub-folder in `folder`, ascending."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if re.fullmatch(r'\d+', name, re.ASCII))


def steps_being_read(readers: storage.Path) -> set[int]:
  """Returns the steps that living readers are using.

  Raises:
    OSError: If the folder cannot be read now.
  """
  found = (_read(path) for path in _reader_files(readers))
  return {reader['step'] for reader in found if _is_alive(reader)}


def remove_dead_readers(readers: storage.Path) -> None:
  """Removes the files of readers that were killed, as far as possible."""
  with contextlib.suppress(OSError):
    for path in _reader_files(readers):
      if not _is_alive(_read(path)):
        path.unlink(missing_ok=True)


class Reader:
  """Protects one step at a time from deletion, for as long as this process lives.

  Warns once if the folder cannot be written; steps can be read nevertheless.

  Args:
    readers: Folder of all readers.
  """

  def __init__(self, readers: storage.Path):
    self._process = Process.this()
    self._path = readers / '{host}-{pid}-{token}.json'.format(**self._process._asdict())
    self._step: int | None = None
    self._mutex, self._stop = threading.Lock(), threading.Event()
    self._has_warned = False
    remove_dead_readers(readers)
    threading.Thread(target=self._send_heartbeats, name='ppn reader', daemon=True).start()

  def hold(self, step: int | None) -> None:
    """Protects a step, and no other; None protects none."""
    with self._mutex:
      self._step = step
      self._write()

  def close(self) -> None:
    """Protects nothing any more."""
    self._stop.set()
    self.hold(None)

  def _send_heartbeats(self) -> None:
    while not self._stop.wait(HEARTBEAT_SECONDS):
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
      if not self._has_warned:
        logger.warning(f'{self._path.parent} cannot be written ({e.strerror or e}), so a training '
                       'may delete checkpoints while they are evaluated')
      self._has_warned = True


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
  """Returns the content of a JSON file, None if there is none or it is not JSON."""
  try:
    return json.loads(storage.read_text(path))
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None
