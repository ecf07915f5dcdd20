"""Scoring many steps of a run: those that are there, or each as training saves it.

That a step is done is on record in its `scores.json`, which is written last and whole. All else
follows from the records, so that a job can be killed anywhere and started again.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ppn_jax import storage
from ppn_jax.checkpoints import retention
from ppn_jax.checkpoints.manager import DamagedCheckpoint
from ppn_jax.detector import Variables
from ppn_jax.distributed import sharding
from ppn_jax.distributed.ownership import Ownership, owned_by_first
from ppn_jax.errors import InputError
from ppn_jax.jobs.evaluate import Job
from ppn_jax.jobs.waiting import Patience, Waiting
from ppn_jax.metrics import coco
from ppn_jax.run import open_run
from ppn_jax.telemetry.metrics import MetricsWriter

ATTEMPTS = 3  # At a step that cannot be read although it is there, a poll apart.
_END, _TIMEOUT, _WAIT = -1, -2, -3  # In place of a step.


class Outcome(NamedTuple):
  """What came of many steps.

  Fields:
    figures: step -> COCO's figures, of all steps asked for that are on record, ascending.
    deleted: steps that were seen, but deleted before they were scored.
    unreadable: step -> why it could not be read.
    complete: False if patience ran out before training ended.
  """
  figures: dict[int, dict[str, float | None]]
  deleted: tuple[int, ...]
  unreadable: dict[int, str]
  complete: bool


def parse_steps(text: str) -> Callable[[int], bool]:
  """'all', or 'A:B' or 'A:B:C': steps from A up to B, B included, each C-th counted from A.

  Each may be left out: '::500' is those that 500 divides, '20000:' all from there on.

  Raises:
    InputError: anything else.
  """
  if text == 'all':
    return lambda step: True
  match = re.fullmatch(r'(\d*):(\d*)(?::(\d*))?', text, re.ASCII)
  first, last, every = (int(group) if group else None for group in (
      match.groups() if match else ('1', '0', '0')))
  first, every = first or 0, 1 if every is None else every
  if every < 1 or (last is not None and last < first):
    raise InputError(f'--steps={text} is no range of steps; write FIRST:LAST, FIRST:LAST:EVERY, '
                     'each of which may be left out, or all')
  return lambda step: (first <= step and (last is None or step <= last)
                       and (step - first) % every == 0)


def format_steps(figures: Mapping[int, Mapping[str, float | None]]) -> str:
  """A line for each step, the best marked; plain text."""
  scored = {step: of_step['AP'] for step, of_step in figures.items() if of_step['AP'] is not None}
  best = max(scored, key=scored.get, default=None)
  lines = [f'{"step":>10}     AP   AP50   AP75']
  for step, of_step in sorted(figures.items()):
    columns = '  '.join(f'{coco.format_metric(of_step[name]):>5}'
                        for name in ('AP', 'AP50', 'AP75'))
    lines.append(f'{step:>10,}  {columns}{"  best" if step == best else ""}')
  return '\n'.join(lines)


def score_steps(job: Job, root: storage.Path | None = None, *,
                wanted: Callable[[int], bool] = lambda step: True,
                patience: Patience | None = None) -> Outcome:
  """Scores all steps of a run that have no scores yet, the oldest first.

  Each goes to `root/STEP`; the curves go to `root/metrics.jsonl` and to TensorBoard, as a run of
  their own beside training's. All processes call it together.

  Args:
    job: of the run.
    root: by default `job.root`.
    wanted: which steps.
    patience: waits for more until the last step of training is scored; None does not wait.

  Raises:
    InputError: a checkpoint of another model, or another process does the same in this folder.
  """
  root = root or job.root
  with owned_by_first(Ownership(root, 'evaluation', job.say)):
    following = _Following(job, root, wanted, patience)
    try:
      return following.run()
    finally:
      following.close()


class _Following:
  """The state of `score_steps`. The first process decides, all evaluate."""

  def __init__(self, job: Job, root: storage.Path, wanted: Callable[[int], bool],
               patience: Patience | None):
    self._job, self._root, self._wanted, self._patience = job, root, wanted, patience
    self._waiting = Waiting(patience or Patience(), job.say)
    self._figures: dict[int, dict[str, float | None]] = {}
    self._seen: set[int] = set()  # Not scored yet.
    self._deleted: list[int] = []
    self._problems: dict[int, list[str]] = {}
    self._curves = self._reader = None
    if jax.process_index() == 0:
      storage.remove_partial(root)
      self._curves = self._open_curves()
      self._reader = retention.Reader(job.run.readers, job.say)

  def run(self) -> Outcome:
    while (step := self._agreed_next()) not in (_END, _TIMEOUT):
      if step == _WAIT:
        self._waiting.wait(f'waiting for a new checkpoint in {self._job.run.workdir}')
      elif not self._evaluate(step):
        self._waiting.wait(f'step {step:,} could not be read; looking again')
    unreadable = {s: p[-1] for s, p in self._problems.items() if len(p) >= ATTEMPTS}
    # A step that was set aside as damaged may have been saved anew.
    deleted = tuple(s for s in self._deleted if s not in self._figures)
    return Outcome(dict(sorted(self._figures.items())), deleted, unreadable, step == _END)

  def close(self) -> None:
    if self._curves:
      self._reader.close()
      self._curves.close()

  def _agreed_next(self) -> int:
    step = np.int32(self._next_if_reached() if jax.process_index() == 0 else 0)
    return int(step if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(step))

  def _next_if_reached(self) -> int:
    """See `_next`; a store that cannot be reached for a while is waited for as a step is."""
    try:
      return self._next()
    except Exception as e:
      if self._patience is None or isinstance(e, PermissionError) or not storage.is_outage(e):
        raise
      self._job.say(f'{self._job.run.workdir} cannot be reached, looking again: '
                    f'{" ".join(str(e).split())[:200]}')
      return _TIMEOUT if self._waiting.is_over() else _WAIT

  def _next(self) -> int:
    """The step to evaluate now, or what else to do."""
    saved = self._saved()
    for step in filter(self._wanted, saved):
      self._look_up(step)
      if step not in self._figures and step not in self._seen:
        self._seen.add(step)
        self._waiting.reset()
    for step in sorted(self._seen.difference(saved)):
      self._drop(step)
    still_open = [s for s in self._seen if len(self._problems.get(s, ())) < ATTEMPTS]
    if still_open:
      return min(still_open)
    if self._patience is None or self._training_has_ended(saved):
      return _END
    return _TIMEOUT if self._waiting.is_over() else _WAIT

  def _look_up(self, step: int) -> None:
    """Takes over what is on record of a step; forgets it where it is of another checkpoint."""
    found = retention.read_record(self._root, step)
    fits = found and found.fits(self._job.run.stamp(step), **self._job.about())
    if fits and step not in self._figures:
      self._record(step, found.metrics)
    elif not fits and (found or step in self._figures):
      if self._figures.pop(step, None) or step not in self._seen:
        self._job.say(f'the scores on record of step {step:,} are of another checkpoint or other '
                      'data; scoring it again')
      if self._curves:
        self._curves.steps.discard(step)

  def _saved(self) -> list[int]:
    with self._job.run.checkpoints(read_only=True) as checkpoints:
      return checkpoints.steps()

  def _training_has_ended(self, saved: list[int]) -> bool:
    """Training always saves its last step. A run may be gone on with to a later one."""
    return bool(saved) and saved[-1] >= open_run(self._job.run.workdir).config.train.steps

  def _evaluate(self, step: int) -> bool:
    """Scores a step; False if it cannot be read."""
    if self._reader:
      self._reader.hold(step)
    variables = self._load(step)
    if variables is None:
      return False
    evaluation = self._job.evaluate(step, variables, self._root / str(step))
    self._record(step, evaluation.scores.figures)
    self._job.say(f'step {step:,}: {coco.format_headline(evaluation.scores.figures)}')
    self._waiting.reset()
    return True

  def _load(self, step: int) -> Variables | None:
    """The step's variables, or None on every process if one could not read them."""
    variables, error = None, None
    try:
      _, variables = self._job.load(step)
    except Exception as e:  # Files may go at any moment, and every library has its own error.
      error = e
    if sharding.all_true(error is None):
      return variables
    # A mistake, such as another model, is not cured by waiting; deletion and damage are none.
    # A store that cannot be reached says nothing of what is there.
    there = (error is not None and storage.is_outage(error)) or step in self._saved()
    mistake = isinstance(error, InputError) and not isinstance(error, DamagedCheckpoint)
    if sharding.all_true(mistake and there):
      raise error
    if there:
      problems = self._problems.setdefault(step, [])
      problems.append(' '.join(str(error or 'on another host').split())[:300])
      if len(problems) == ATTEMPTS:
        self._job.say(f'step {step:,} cannot be read and is skipped: {problems[-1]}')
    return None

  def _record(self, step: int, figures: dict[str, float | None]) -> None:
    self._figures[step] = figures
    self._seen.discard(step)
    if self._curves and step not in self._curves.steps:
      self._curves.write(step, {f'eval/{name}': value for name, value in figures.items()})
      self._curves.steps.add(step)

  def _drop(self, step: int) -> None:
    self._job.say(f'step {step:,} was deleted before it was scored and is skipped')
    self._seen.discard(step)
    self._problems.pop(step, None)
    self._deleted.append(step)

  def _open_curves(self) -> MetricsWriter:
    """Training's writers stay its own: another event file, another `metrics.jsonl`."""
    workdir = self._job.run.workdir
    tensorboard = None
    if self._root.parent == workdir:
      tensorboard = workdir / 'tensorboard' / self._root.name
    return MetricsWriter(self._root, None, tensorboard,
                         keep=lambda step: self._job.run.is_current(self._root, step))
