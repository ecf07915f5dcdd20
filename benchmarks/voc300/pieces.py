"""Splits the runs of a comparison over several calls: remaining and finished work, and time limits.

  WORKDIR/setting.json          the settings that all runs in this folder share
  WORKDIR/runs/NAME/            an unfinished run, a workdir for each phase; removed once trained
  WORKDIR/trained/NAME.json     a trained run: its curves, speed and config
  WORKDIR/trained/NAME.npz      its detections on the evaluation data
  WORKDIR/results/NAME.json     a scored run: its metrics

Scoring needs no accelerator. To continue on another machine, copy setting.json, trained/, results/
and, to keep its checkpoints, the folder of the unfinished run in runs/.
"""

import io
import json
import os
import pathlib
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from ppn_jax import storage
from ppn_jax.errors import InputError

LEAST_TRAINING = 90.0  # Seconds; a shorter time would be spent on compiling alone.
# Seconds reserved for detection on the evaluation data and for scoring, until they are measured.
FIRST_DETECTION, FIRST_SCORING = 45.0, 90.0

Plain = dict[str, Any]  # Plain data for JSON.
Rows = list[dict[str, Any]]  # Detections, as from `coco.to_rows`.


class Diverged(Exception):
  """Raised if the loss of a run diverges; the message says how."""


class RunKey(NamedTuple):
  """Identifies a run of the comparison."""
  model: str
  recipe: str
  seed: int

  @property
  def name(self) -> str:
    return f'{self.model}_{self.recipe}_{self.seed}'


class Piece:
  """Context manager for the time limit of a call.

  `stopping` becomes true when the time is up or SIGTERM arrives. Training handles SIGTERM only
  while it takes steps, so the signal is then repeated, in case it arrived just before.

  Args:
    minutes: time limit from now; 0 for none.
    clock: returns monotonic seconds.
    interval: seconds between signals, and how late the end may be noticed.
  """

  def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic,
               interval: float = 1.0):
    self.stopping, self._clock, self._interval = False, clock, interval
    self._end = clock() + 60 * minutes if minutes else None
    self._closed = False  # Without a lock, since a signal handler may interrupt itself.
    self._signaller = threading.Thread(target=self._signal, daemon=True)
    self._previous_handler: Any = None

  def __enter__(self) -> 'Piece':
    self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
    self._signaller.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._closed = True
    self._signaller.join()
    signal.signal(signal.SIGTERM, self._previous_handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.stopping = True

  def _signal(self) -> None:
    while not self._closed:
      if not self.has(0):
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(self._interval)

  def has(self, seconds: float) -> bool:
    """Returns whether there is time left to start something of this duration."""
    in_time = self._end is None or self._end - self._clock() >= seconds
    return in_time and not self.stopping


def work(keys: Sequence[RunKey], folder: 'Folder', piece: Piece, *,
         train: Callable[[RunKey], bool], detect: Callable[[RunKey], tuple[Plain, Rows]],
         score: Callable[[RunKey, Rows], Plain] | None,
         clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = print) -> bool:
  """Continues the runs while there is time; returns whether everything is finished.

  All runs are trained before the first is scored, so that an accelerator does not idle.

  Args:
    keys: all runs, in order.
    folder: the workdir.
    piece: the time limit.
    train: continues a run; returns False if it was stopped before the last step. Raises Diverged.
    detect: returns the record of a trained run and its detections.
    score: returns the metrics of detections; None leaves scoring to another call.
    clock: returns monotonic seconds.
    say: called with each line of progress.
  """
  reserve = FIRST_DETECTION
  for number, key in enumerate(keys, start=1):
    if folder.is_trained(key):
      folder.drop_run(key)  # An earlier call may have been killed before it removed the run.
      continue
    if not piece.has(LEAST_TRAINING):
      return False
    say(f'run {number} of {len(keys)}: {key.name}')
    try:
      trained = train(key)
    except Diverged as e:  # It would diverge again.
      folder.keep_trained(key, {'stopped': str(e)}, [])
      continue
    if not trained or not piece.has(reserve):
      return False
    started = clock()
    folder.keep_trained(key, *detect(key))
    reserve = 1.2 * (clock() - started)

  reserve = FIRST_SCORING
  for key in keys if score else ():
    if folder.is_scored(key):
      continue
    if not piece.has(reserve):
      return False
    say(f'scoring {key.name}')
    started, (record, rows) = clock(), folder.read_trained(key)
    folder.keep_scored(key, record if 'stopped' in record else record | score(key, rows))
    reserve = 1.2 * (clock() - started)
  return True


class Folder:
  """Workdir of the comparison, whose files are written atomically.

  Args:
    path: path of the workdir, new or from an earlier call.
    keep_runs: keeps the workdirs of trained runs, including checkpoints.
  """

  def __init__(self, path: pathlib.Path, *, keep_runs: bool = False):
    self.path, self._keep_runs = path, keep_runs

  def check_setting(self, setting: Mapping[str, Any]) -> None:
    """Records the settings that all runs share; raises InputError if they were different before.

    Mappings, such as that of recipes to their checksums, may get further entries.
    """
    path, merged = self.path / 'setting.json', json.loads(json.dumps(setting))
    if path.exists():
      there = self._read_setting(path)
    elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
      raise InputError(f'--workdir={self.path} holds something else; give a new folder, or the '
                       'workdir of an earlier call')
    else:
      there = {}
    for key in dict.fromkeys([*merged, *there]) if there else ():
      old, new = there.get(key), merged.get(key)
      if isinstance(old, dict) and isinstance(new, dict):
        merged[key] = old | new
        key, old, new = next(((f'{key}.{k}', old[k], new[k]) for k in new
                              if old.get(k, new[k]) != new[k]), (key, None, None))
      if old != new:
        raise InputError(f'--workdir={self.path} has different settings: {key} is {old!r} there '
                         f'and {new!r} here; give a new folder')
    if merged != there:
      storage.write_text(path, json.dumps(merged, indent=2) + '\n')

  def _read_setting(self, path: pathlib.Path) -> Plain:
    try:
      return dict(json.loads(storage.read_text(path)))
    except (ValueError, TypeError) as e:
      raise InputError(f'{path} cannot be read: {e}; give a new --workdir') from e

  def run(self, key: RunKey) -> pathlib.Path:
    """Returns the folder of an unfinished run, which has a workdir for each phase."""
    return self.path / 'runs' / key.name

  def is_trained(self, key: RunKey) -> bool:
    """Returns whether a run is trained, so that only scoring may be left."""
    return self._file('trained', key).is_file() or self.is_scored(key)

  def is_scored(self, key: RunKey) -> bool:
    """Returns whether a run is finished."""
    return self._file('results', key).is_file()

  def keep_trained(self, key: RunKey, record: Plain, rows: Rows) -> None:
    """Writes the detections and then the record of a trained run, and removes its workdir."""
    path = self._file('trained', key)
    storage.write_bytes(path.with_suffix('.npz'), pack(rows))
    storage.write_text(path, json.dumps(key._asdict() | record, allow_nan=False) + '\n')
    self.drop_run(key)

  def drop_run(self, key: RunKey) -> None:
    """Removes the workdir of a trained run, unless `keep_runs` is set."""
    if not self._keep_runs:
      shutil.rmtree(self.run(key), ignore_errors=True)

  def read_trained(self, key: RunKey) -> tuple[Plain, Rows]:
    """Reads the files of `keep_trained`; boxes and scores are float32."""
    path = self._file('trained', key)
    try:
      return json.loads(storage.read_text(path)), unpack(path.with_suffix('.npz').read_bytes())
    except (OSError, ValueError, zipfile.BadZipFile) as e:
      raise _unreadable(path, e) from e

  def keep_scored(self, key: RunKey, result: Plain) -> None:
    """Writes the metrics of a run."""
    storage.write_text(self._file('results', key), json.dumps(result, allow_nan=False) + '\n')

  def read_scored(self, key: RunKey) -> Plain:
    """Reads the file of `keep_scored`."""
    path = self._file('results', key)
    try:
      return json.loads(storage.read_text(path))
    except (OSError, ValueError) as e:
      raise _unreadable(path, e) from e

  def megabytes(self) -> float:
    """Returns the total size of all files in MB."""
    return sum(p.stat().st_size for p in self.path.rglob('*') if p.is_file()) / 1e6

  def _file(self, kind: str, key: RunKey) -> pathlib.Path:
    return self.path / kind / f'{key.name}.json'


def _unreadable(path: pathlib.Path, error: Exception) -> InputError:
  return InputError(f'{path} cannot be read: {error}; remove it, and it will be made again')


def pack(rows: Rows) -> bytes:
  """Packs detections as a compressed .npz, a tenth the size of JSON, with float32 values."""
  columns = {'image_id': np.int64, 'category_id': np.int32, 'bbox': np.float32,
             'score': np.float32, 'level': np.uint8}
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **{name: np.array([r[name] for r in rows], dtype)
                                 for name, dtype in columns.items()})
  return buffer.getvalue()


def unpack(data: bytes) -> Rows:
  """Returns the rows that `pack` was given."""
  with np.load(io.BytesIO(data)) as arrays:
    columns = {name: arrays[name].tolist() for name in arrays.files}
  return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
