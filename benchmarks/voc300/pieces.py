"""Work in pieces: what is to be done, what is done already, and when to stop for now.

  WORKDIR/setting.json          what the runs of this folder have in common
  WORKDIR/runs/NAME/            a run on its way; it goes when the run is trained
  WORKDIR/trained/NAME.json     a trained run: its curves, speed, config
  WORKDIR/trained/NAME.npz      what it found on the evaluation data
  WORKDIR/results/NAME.json     a scored run: its figures

Scoring needs no accelerator. To go on elsewhere, carry setting.json, trained/, results/ and, if
its checkpoints are wanted, the folder in runs/ of the run on its way.
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

LEAST_TRAINING = 90.0  # Seconds; less would go to compiling alone.
# What detecting on the evaluation data and scoring may take, until it has been seen.
FIRST_DETECTION, FIRST_SCORING = 45.0, 90.0

Plain = dict[str, Any]  # Plain data for JSON.
Rows = list[dict[str, Any]]  # Detections, as of `coco.to_rows`.


class Diverged(Exception):
  """A run's loss is not finite, and why."""


class RunKey(NamedTuple):
  """One run of the comparison."""
  model: str
  recipe: str
  seed: int

  @property
  def name(self) -> str:
    return f'{self.model}_{self.recipe}_{self.seed}'


class Piece:
  """The time that this call has; a context manager.

  When it is up, or SIGTERM comes, `told` is true. Training hears SIGTERM while it takes steps, so
  from then on one is sent again and again, lest it came a moment before.

  Args:
    minutes: from now; 0 for no limit.
    clock: seconds, rising.
    again: seconds between signals, and how long the end may be late.
  """

  def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic,
               again: float = 1.0):
    self.told, self._clock, self._again = False, clock, again
    self._end = clock() + 60 * minutes if minutes else None
    self._closed = False  # No lock: a handler may interrupt itself.
    self._teller = threading.Thread(target=self._tell, daemon=True)
    self._before: Any = None

  def __enter__(self) -> 'Piece':
    self._before = signal.signal(signal.SIGTERM, self._note)
    self._teller.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._closed = True
    self._teller.join()
    signal.signal(signal.SIGTERM, self._before)

  def _note(self, number: int, frame: FrameType | None) -> None:
    self.told = True

  def _tell(self) -> None:
    while not self._closed:
      if not self.has(0):
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(self._again)

  def has(self, seconds: float) -> bool:
    """Whether something that takes so long may still begin."""
    in_time = self._end is None or self._end - self._clock() >= seconds
    return in_time and not self.told


def work(keys: Sequence[RunKey], folder: 'Folder', piece: Piece, *,
         train: Callable[[RunKey], bool], detect: Callable[[RunKey], tuple[Plain, Rows]],
         score: Callable[[RunKey, Rows], Plain] | None,
         clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = print) -> bool:
  """Does what is left of the runs while there is time; True if nothing is left.

  All are trained before the first is scored, so that an accelerator is not kept waiting.

  Args:
    keys: of all runs, in order.
    folder: where they are.
    piece: the time there is.
    train: goes on with a run; False if it was told to end before the run's last step. Raises
      Diverged.
    detect: of a trained run, what is to be kept of it, and its detections.
    score: their figures; None leaves that to another call.
    clock: seconds, rising.
    say: told what goes on, a line at a time.
  """
  reserve = FIRST_DETECTION
  for number, key in enumerate(keys, start=1):
    if folder.is_trained(key):
      folder.drop_run(key)  # A kill may have come between the two.
      continue
    if not piece.has(LEAST_TRAINING):
      return False
    say(f'run {number} of {len(keys)}: {key.name}')
    try:
      trained = train(key)
    except Diverged as e:  # It would again.
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
  """The workdir. What is in it is there whole or not at all.

  Args:
    path: of the workdir, new or of an earlier piece.
    keep_runs: leaves trained runs where they are, checkpoints and all.
  """

  def __init__(self, path: pathlib.Path, *, keep_runs: bool = False):
    self.path, self._keep_runs = path, keep_runs

  def check_setting(self, setting: Mapping[str, Any]) -> None:
    """Writes down what all runs share; raises InputError if it was something else before.

    To an entry that is a mapping, such as that of recipes to their checksums, more may be added.
    """
    path, wanted = self.path / 'setting.json', json.loads(json.dumps(setting))
    if path.exists():
      there = self._read_setting(path)
    elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
      raise InputError(f'--workdir={self.path} holds something else; give a new folder, or that of '
                       'an earlier piece')
    else:
      there = {}
    for key in dict.fromkeys([*wanted, *there]) if there else ():
      old, new = there.get(key), wanted.get(key)
      if isinstance(old, dict) and isinstance(new, dict):
        wanted[key] = old | new
        key, old, new = next(((f'{key}.{k}', old[k], new[k]) for k in new
                              if old.get(k, new[k]) != new[k]), (key, None, None))
      if old != new:
        raise InputError(f'--workdir={self.path} is of another setting: {key} is {old!r} there '
                         f'and {new!r} here; give a new folder')
    if wanted != there:
      storage.write_text(path, json.dumps(wanted, indent=2) + '\n')

  def _read_setting(self, path: pathlib.Path) -> Plain:
    try:
      return dict(json.loads(storage.read_text(path)))
    except (ValueError, TypeError) as e:
      raise InputError(f'{path} cannot be read: {e}; give a new --workdir') from e

  def run(self, key: RunKey) -> pathlib.Path:
    """The workdir of a run on its way."""
    return self.path / 'runs' / key.name

  def is_trained(self, key: RunKey) -> bool:
    """Whether nothing is left to do of a run but to score it."""
    return self._file('trained', key).is_file() or self.is_scored(key)

  def is_scored(self, key: RunKey) -> bool:
    """Whether a run is done with."""
    return self._file('results', key).is_file()

  def keep_trained(self, key: RunKey, record: Plain, rows: Rows) -> None:
    """Writes what is kept of a trained run, the record last; the rest of it is removed."""
    path = self._file('trained', key)
    storage.write_bytes(path.with_suffix('.npz'), pack(rows))
    storage.write_text(path, json.dumps(key._asdict() | record, allow_nan=False) + '\n')
    self.drop_run(key)

  def drop_run(self, key: RunKey) -> None:
    """Removes a trained run's own folder, unless it is to be kept."""
    if not self._keep_runs:
      shutil.rmtree(self.run(key), ignore_errors=True)

  def read_trained(self, key: RunKey) -> tuple[Plain, Rows]:
    """What `keep_trained` wrote; boxes and scores as float32."""
    path = self._file('trained', key)
    try:
      return json.loads(storage.read_text(path)), unpack(path.with_suffix('.npz').read_bytes())
    except (OSError, ValueError, zipfile.BadZipFile) as e:
      raise _unreadable(path, e) from e

  def keep_scored(self, key: RunKey, result: Plain) -> None:
    """Writes a run's figures."""
    storage.write_text(self._file('results', key), json.dumps(result, allow_nan=False) + '\n')

  def read_scored(self, key: RunKey) -> Plain:
    """What `keep_scored` wrote."""
    path = self._file('results', key)
    try:
      return json.loads(storage.read_text(path))
    except (OSError, ValueError) as e:
      raise _unreadable(path, e) from e

  def megabytes(self) -> float:
    """Of all files."""
    return sum(p.stat().st_size for p in self.path.rglob('*') if p.is_file()) / 1e6

  def _file(self, kind: str, key: RunKey) -> pathlib.Path:
    return self.path / kind / f'{key.name}.json'


def _unreadable(path: pathlib.Path, error: Exception) -> InputError:
  return InputError(f'{path} cannot be read: {error}; remove it to have it made again')


def pack(rows: Rows) -> bytes:
  """Detections as a compressed .npz, a tenth of their JSON; boxes and scores as float32."""
  columns = {'image_id': np.int64, 'category_id': np.int32, 'bbox': np.float32,
             'score': np.float32, 'level': np.uint8}
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **{name: np.array([r[name] for r in rows], dtype)
                                 for name, dtype in columns.items()})
  return buffer.getvalue()


def unpack(data: bytes) -> Rows:
  """The rows that `pack` was given."""
  with np.load(io.BytesIO(data)) as arrays:
    columns = {name: arrays[name].tolist() for name in arrays.files}
  return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
