"""Evaluates many steps of a run: those that are saved already, or each as training saves it.

A step counts as evaluated if it has a `scores.json`, which is written last and atomically. Nothing
else is remembered, so that a job can be killed at any time and started again.
"""

import dataclasses
import logging
import pathlib
import re
import time
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
from ppn_jax.jobs.evaluate import EvaluationJob
from ppn_jax.metrics import coco
from ppn_jax.run import Run, is_run, open_run
from ppn_jax.telemetry.metrics import MetricsWriter
from ppn_jax.telemetry.progress import duration

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # To read a step that exists but cannot be read, one poll apart.
REMIND_SECONDS = 600.0  # Between messages that it is still waiting.
_END, _TIMEOUT, _WAIT = -1, -2, -3  # Returned in place of a step.


class Outcome(NamedTuple):
  """Results of the evaluation of many steps.

  Fields:
    metrics: step -> COCO's metrics, of all selected steps that are evaluated, ascending.
    deleted: steps that were seen, but deleted before they were evaluated.
    unreadable: step -> why it could not be read.
    complete: False if the timeout passed before training ended.
  """
  metrics: dict[int, dict[str, float | None]]
  deleted: tuple[int, ...]
  unreadable: dict[int, str]
  complete: bool


class Clock(NamedTuple):
  """Source of time, in seconds; replaced in tests."""
  now: Callable[[], float] = time.monotonic
  sleep: Callable[[float], object] = time.sleep


@dataclasses.dataclass(frozen=True)
class Polling:
  """Options of waiting for files that another process is to write.

  Attributes:
    interval: seconds between looks, above 0.
    timeout: seconds without anything new after which to give up; 0 for never.
    clock: source of time.
  """
  interval: float = 10.0
  timeout: float = 0.0
  clock: Clock = dataclasses.field(default_factory=Clock)

  def __post_init__(self):
    if not self.interval > 0 or not self.timeout >= 0:
      raise InputError(f'--poll={self.interval:g} must be above 0 seconds and '
                       f'--timeout={self.timeout:g} at least 0')


class _Poller:
  """Sleeps between looks, reports from time to time that it waits, and detects the timeout."""

  def __init__(self, polling: Polling):
    self._polling = polling
    self.reset()

  def reset(self) -> None:
    """Starts the timeout again, since something new has happened."""
    self._since, self._reported = self._polling.clock.now(), None

  def timed_out(self) -> bool:
    timeout = self._polling.timeout
    return bool(timeout) and self._polling.clock.now() - self._since >= timeout

  def wait(self, reason: str) -> None:
    now = self._polling.clock.now()
    if self._reported is None or now - self._reported >= REMIND_SECONDS:
      first = self._reported is None
      logger.info(reason if first else f'{reason}, for {duration(now - self._since)}')
      self._reported = now
    self._polling.clock.sleep(self._polling.interval)


def wait_for_run(workdir: str | pathlib.Path, polling: Polling) -> Run:
  """Opens the run in `workdir` as soon as training has begun there.

  Raises:
    InputError: If it has not begun within `polling.timeout`, or the run cannot be read.
  """
  poller = _Poller(polling)
  while not is_run(workdir):
    if poller.timed_out():
      raise InputError(f'no training has begun in workdir {workdir} within --timeout='
                       f'{polling.timeout:g} seconds; is it the --workdir of the training?')
    poller.wait(f'waiting for training to begin in {workdir}')
  return open_run(workdir)


def parse_steps(text: str) -> Callable[[int], bool]:
  """Parses a range of steps and returns whether a step is in it, as a function.

  Args:
    text: 'all', 'A:B' or 'A:B:C': steps from A to B, B included, every C-th counted from A. Each
      may be left out: '::500' selects multiples of 500, '20000:' all steps from 20,000 on.

  Raises:
    InputError: If `text` is anything else.
  """
  if text == 'all':
    return lambda step: True
  match = re.fullmatch(r'(\d*):(\d*)(?::(\d*))?', text, re.ASCII)
  first, last, every = (int(group) if group else None for group in (
      match.groups() if match else ('1', '0', '0')))
  first, every = first or 0, 1 if every is None else every
  if every < 1 or (last is not None and last < first):
    raise InputError(f'--steps={text} is not a range of steps; write FIRST:LAST or '
                     'FIRST:LAST:EVERY, each of which may be left out, or all')
  return lambda step: (first <= step and (last is None or step <= last)
                       and (step - first) % every == 0)


def format_steps(metrics: Mapping[int, Mapping[str, float | None]]) -> str:
  """Formats metrics by step as aligned text, a line for each step, the best marked."""
  scored = {step: of_step['AP'] for step, of_step in metrics.items() if of_step['AP'] is not None}
  best = max(scored, key=scored.get, default=None)
  lines = [f'{"step":>10}     AP   AP50   AP75']
  for step, of_step in sorted(metrics.items()):
    values = '  '.join(f'{coco.format_metric(of_step[name]):>5}' for name in ('AP', 'AP50', 'AP75'))
    lines.append(f'{step:>10,}  {values}{"  best" if step == best else ""}')
  return '\n'.join(lines)


def score_steps(job: EvaluationJob, root: storage.Path | None = None, *,
                selected: Callable[[int], bool] = lambda step: True,
                polling: Polling | None = None) -> Outcome:
  """Evaluates all selected steps of a run that are not evaluated yet, the oldest first.

  Results of a step go to `root/STEP`, curves to `root/metrics.jsonl` and to TensorBoard, as a
  separate run next to that of training. All processes call it together.

  Args:
    job: of the run.
    root: by default `job.root`.
    selected: step -> whether to evaluate it.
    polling: waits for new steps until the last step of training is evaluated; None does not wait.

  Raises:
    InputError: If a checkpoint is of another model, or another process evaluates to this folder.
  """
  if not isinstance(job.run, Run):
    raise InputError(f'{job.run.name} is a weights file, which holds one step; leave out --steps '
                     'and --follow')
  root = root or job.root
  with owned_by_first(Ownership(root, 'evaluation')):
    follower = _Follower(job, root, selected, polling)
    try:
      return follower.run()
    finally:
      follower.close()


class _Follower:
  """State of `score_steps`. The first process decides what to do, all evaluate."""

  def __init__(self, job: EvaluationJob, root: storage.Path, selected: Callable[[int], bool],
               polling: Polling | None):
    self._job, self._root, self._selected, self._polling = job, root, selected, polling
    assert isinstance(job.run, Run)
    self._run = job.run
    self._poller = _Poller(polling or Polling())
    self._metrics: dict[int, dict[str, float | None]] = {}
    self._pending: set[int] = set()  # Seen, but not evaluated yet.
    self._deleted: list[int] = []
    self._problems: dict[int, list[str]] = {}
    self._curves = self._reader = None
    if jax.process_index() == 0:
      storage.remove_partial(root)
      self._curves = self._open_curves()
      self._reader = retention.Reader(self._run.readers)

  def run(self) -> Outcome:
    while (step := self._agreed_next()) not in (_END, _TIMEOUT):
      if step == _WAIT:
        self._poller.wait(f'waiting for a new checkpoint in {self._run.workdir}')
      elif not self._evaluate(step):
        self._poller.wait(f'step {step:,} could not be read; trying again')
    unreadable = {s: p[-1] for s, p in self._problems.items() if len(p) >= ATTEMPTS}
    # A step that was set aside as damaged may have been saved again.
    deleted = tuple(s for s in self._deleted if s not in self._metrics)
    return Outcome(dict(sorted(self._metrics.items())), deleted, unreadable, step == _END)

  def close(self) -> None:
    if self._curves:
      self._reader.close()
      self._curves.close()

  def _agreed_next(self) -> int:
    """Returns the decision of the first process to all of them."""
    step = np.int32(self._next_if_reached() if jax.process_index() == 0 else 0)
    return int(step if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(step))

  def _next_if_reached(self) -> int:
    """Returns `_next`, or waits if the workdir cannot be reached at the moment."""
    try:
      return self._next()
    except Exception as e:
      if self._polling is None or isinstance(e, PermissionError) or not storage.is_outage(e):
        raise
      logger.warning(f'{self._run.workdir} cannot be reached, trying again: '
                     f'{" ".join(str(e).split())[:200]}')
      return _TIMEOUT if self._poller.timed_out() else _WAIT

  def _next(self) -> int:
    """Returns the step to evaluate now, or _END, _TIMEOUT or _WAIT."""
    saved = self._saved()
    for step in filter(self._selected, saved):
      self._look_up(step)
      if step not in self._metrics and step not in self._pending:
        self._pending.add(step)
        self._poller.reset()
    for step in sorted(self._pending.difference(saved)):
      self._drop(step)
    readable = [s for s in self._pending if len(self._problems.get(s, ())) < ATTEMPTS]
    if readable:
      return min(readable)
    if self._polling is None or self._training_has_ended(saved):
      return _END
    return _TIMEOUT if self._poller.timed_out() else _WAIT

  def _look_up(self, step: int) -> None:
    """Reuses recorded scores of a step, and forgets those of another checkpoint."""
    found = retention.read_record(self._root, step)
    fits = found and found.fits(self._run.stamp(step), **self._job.conditions())
    if fits and step not in self._metrics:
      self._record(step, found.metrics)
    elif not fits and (found or step in self._metrics):
      if self._metrics.pop(step, None) or step not in self._pending:
        logger.info(f'the recorded scores of step {step:,} are of another checkpoint or other '
                    'data; scoring it again')
      if self._curves:
        self._curves.steps.discard(step)

  def _saved(self) -> list[int]:
    with self._run.checkpoints(read_only=True) as checkpoints:
      return checkpoints.steps()

  def _training_has_ended(self, saved: list[int]) -> bool:
    """Returns whether the last step, which training always saves, is there.

    The config and the reason of an early end are read again each time, since a run may be resumed
    with more steps or time.
    """
    if not saved:
      return False
    run = open_run(self._run.workdir)
    ending = run.ending()
    return saved[-1] >= run.config.train.steps or (
        ending is not None and saved[-1] == ending.step)

  def _evaluate(self, step: int) -> bool:
    """Evaluates a step; returns False if it cannot be read."""
    if self._reader:
      self._reader.hold(step)
    variables = self._load(step)
    if variables is None:
      return False
    evaluation = self._job.evaluate(step, variables, self._root / str(step))
    self._record(step, evaluation.metrics)
    logger.info(f'step {step:,}: {coco.format_headline(evaluation.metrics)}')
    self._poller.reset()
    return True

  def _load(self, step: int) -> Variables | None:
    """Returns the step's variables, or None on every process if one could not read them."""
    variables, error = None, None
    try:
      _, variables = self._job.load(step)
    except Exception as e:  # Files may vanish at any moment, and every library has its own error.
      error = e
    if sharding.all_true(error is None):
      return variables
    # Waiting cures deletion, damage and an outage, but no mistake such as another model. While
    # storage cannot be reached, it is unknown whether the step exists.
    exists = (error is not None and storage.is_outage(error)) or step in self._saved()
    mistake = isinstance(error, InputError) and not isinstance(error, DamagedCheckpoint)
    if sharding.all_true(mistake and exists):
      raise error
    if exists:
      problems = self._problems.setdefault(step, [])
      problems.append(' '.join(str(error or 'on another host').split())[:300])
      if len(problems) == ATTEMPTS:
        logger.warning(f'step {step:,} cannot be read and is skipped: {problems[-1]}')
    return None

  def _record(self, step: int, metrics: dict[str, float | None]) -> None:
    self._metrics[step] = metrics
    self._pending.discard(step)
    if self._curves and step not in self._curves.steps:
      self._curves.write(step, {f'eval/{name}': value for name, value in metrics.items()})
      self._curves.steps.add(step)

  def _drop(self, step: int) -> None:
    logger.warning(f'step {step:,} was deleted before it was scored and is skipped')
    self._pending.discard(step)
    self._problems.pop(step, None)
    self._deleted.append(step)

  def _open_curves(self) -> MetricsWriter:
    """Opens files of its own, since those of training have their own writer."""
    workdir = self._run.workdir
    tensorboard = None
    if self._root.parent == workdir:
      tensorboard = workdir / 'tensorboard' / self._root.name
    return MetricsWriter(self._root, None, tensorboard,
                         keep=lambda step: self._run.is_current(self._root, step))
