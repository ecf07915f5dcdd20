"""Time budget of a run, `train.minutes`: how many steps fit, and what has been spent.

How many steps fit is measured once, at the first start, and recorded in the workdir. The run is
then one of so many steps, with their learning-rate schedule: its bits do not depend on time, and
restarts read the same number. The clock only ends a run that has become slower than measured.

What counts is the time of the loop over steps: steps, waiting for data, evaluations and saves, over
all starts. Start-up (opening data, compiling, this measurement) does not count, nor does work that
a kill has lost: each checkpoint says how much time its steps took.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import storage
from ppn_jax.checkpoints.manager import Checkpoints
from ppn_jax.distributed import coordination
from ppn_jax.distributed.compile_cache import compile_with
from ppn_jax.distributed.preemption import PreemptionNotice
from ppn_jax.errors import InputError
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.telemetry.progress import Progress, duration
from ppn_jax.training.input_pipeline import Constant, InputPipeline, Prefetcher
from ppn_jax.training.state import TrainState
from ppn_jax.training.stopping import is_timed, slow_step_seconds, steps_that_fit
from ppn_jax.training.train_step import wait_for_steps

logger = logging.getLogger(__name__)

FILE = 'time_budget.json'

# Note of a checkpoint: seconds that its steps took, over all starts.
SPENT = 'training_seconds'

# Share of the time left that is not planned, for a machine that becomes slower.
RESERVE = 0.1

# Steps are timed for this share of the time left, within these bounds and in chunks of this size.
# The chunks that do not count are more steps than batches are prepared ahead.
_TIMING_SHARE, _TIMING_SECONDS, _STEPS_PER_CHUNK = 0.1, (10.0, 60.0), 4

# Folder in the workdir for the checkpoints that are saved to measure how long it takes.
SCRATCH = 'measuring'

# Steps of a run whose number is not known yet.
_UNKNOWN_STEPS = 10**6


def now() -> float:
  """Returns the time in seconds; replaced in tests."""
  return time.monotonic()


class Plan(NamedTuple):
  """How many steps fit into the budget.

  Fields:
    minutes: The budget that it was made for.
    steps: Last step that fits.
    step_seconds: Measured time of a step.
    evaluation_seconds: Measured time of an evaluation; 0 if there are none.
    save_seconds: Measured time by which a save delays the steps; 0 in plans of earlier versions.
  """
  minutes: float
  steps: int
  step_seconds: float
  evaluation_seconds: float
  save_seconds: float = 0.0

  def describe(self, config: ConfigDict) -> str:
    """Returns a line for the start of the run."""
    fit = f'{self.steps:,} steps fit, {self.step_seconds:.3g} s each'
    if self.evaluation_seconds:
      fit += f', {self.evaluation_seconds:.3g} s for an evaluation'
    if self.save_seconds:
      fit += f', {self.save_seconds:.3g} s for a save'
    planned = config.train.steps
    return f'train.minutes={self.minutes:g}: {fit}; ' + (
        f'train.steps={planned:,} ends the run before' if planned < self.steps else
        'the learning rate is planned for them')


class TimeBudget:
  """Counts the time that a run has spent on training, and tells when its budget is spent.

  Args:
    minutes: The budget; 0 for none.
    spent: Seconds that were spent before this start.

  Attributes:
    minutes: The budget.
    step_seconds: Time of a step, as planned; 0 if it is unknown.
  """

  def __init__(self, minutes: float = 0.0, spent: float = 0.0):
    self.minutes, self.step_seconds = minutes, 0.0
    self._spent, self._since = spent, None

  @contextlib.contextmanager
  def counting(self) -> Iterator[None]:
    """Counts the time within."""
    self._since = now()
    try:
      yield
    finally:
      self._spent, self._since = self.seconds, None

  @property
  def seconds(self) -> float:
    """Seconds spent up to now."""
    return self._spent + (0.0 if self._since is None else now() - self._since)

  @property
  def left(self) -> float:
    """Seconds left; infinite without a budget."""
    return 60 * self.minutes - self.seconds if self.minutes else math.inf

  def is_spent(self) -> bool:
    """Returns whether no time is left, by the clock of the first process.

    All processes call it together.
    """
    return bool(self.minutes) and coordination.broadcast_json(self.left) <= 0

  def over(self, step: int) -> bool:
    """Returns whether to end after `step`, see `is_spent`.

    Several processes, for which it takes a message, look at the clock about once a second.
    """
    alone = jax.process_count() == 1 or not self.step_seconds
    every = 1 if alone else max(round(1 / self.step_seconds), 1)
    return step % every == 0 and self.is_spent()

  def reason(self) -> str:
    """Describes why the run ended."""
    return f'{duration(self.seconds)} are spent (train.minutes={self.minutes:g})'


def recorded_plan(workdir: storage.Path, minutes: float) -> Plan | None:
  """Returns the plan that a run has recorded for this budget, in all processes; None if none."""
  plan, path = None, workdir / FILE
  if minutes and jax.process_index() == 0 and path.is_file():
    try:
      plan = Plan(**json.loads(storage.read_text(path)))
      if type(plan.steps) is not int or plan.steps < 1 or not all(
          math.isfinite(value) and value >= 0 for value in plan):
        raise ValueError(f'{tuple(plan)} is no plan')
    except (ValueError, TypeError) as e:
      raise InputError(f'{path} cannot be read: {e}; delete it to plan the rest of the run '
                       'again') from e
  found = coordination.broadcast_json(plan)
  return Plan(*found) if found and found[0] == minutes else None


def write_plan(workdir: storage.Path, plan: Plan) -> None:
  """Records a plan in the workdir."""
  storage.write_text(workdir / FILE, json.dumps(plan._asdict()) + '\n')


def with_planned_steps(config: ConfigDict, plan: Plan | None) -> ConfigDict:
  """Returns a config whose `train.steps` is what fits into its `train.minutes`.

  Without a plan it is the upper bound that the user gives, or a provisional number if they give
  none.

  Args:
    config: Config of the user. If `train.minutes` is 0 it is returned as it is.
    plan: For this budget, if known.
  """
  train = config.train
  if not train.minutes:
    return config
  # data.resident counts images in 32 bits.
  most = plan.steps if plan else min(_UNKNOWN_STEPS, (2**32 - 1) // train.batch_size)
  config = config.copy_and_resolve_references().unlock()
  config.train.steps = min(train.steps, most) if train.steps else most
  return config.lock()


def make_plan(config: ConfigDict, workdir: storage.Path, budget: TimeBudget, state: TrainState,
              start: int, train_step: Callable, pipeline: InputPipeline,
              evaluator: Evaluator | None, notice: PreemptionNotice, progress: Progress) -> Plan:
  """Measures how many steps fit into the time left. All processes call it together.

  Takes steps, evaluates and saves, and discards the results. Waiting for batches counts.

  Args:
    config: Config of the run.
    workdir: Its folder, for a temporary checkpoint.
    budget: Its budget.
    state: State after step `start`; steps are taken on a copy.
    start: Number of steps taken before.
    train_step: Jitted step: (state, *input) -> (state, StepMetrics).
    pipeline: Input of the steps.
    evaluator: Evaluates; None if the config asks for no evaluation.
    notice: Whether the run was told to end.
    progress: Shows what is done.

  Raises:
    InputError: If no step fits.
    Preempted, Interrupted: If the run was told to end.
  """
  def check_notice(count: int = 0) -> None:
    if notice.reached():
      raise notice.end('no step was taken, the workdir is unchanged')

  logger.info(f'train.minutes={config.train.minutes:g}: measuring how many steps fit, '
              'by compiling the step and the evaluation and running them')
  # Steps donate their state.
  state = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)
  compiled = compile_with(train_step.lower(state, *pipeline.arguments()),
                          config.train.xla_options)
  coordination.wait_for_all()
  least, most = _TIMING_SECONDS
  limit = min(max(_TIMING_SHARE * budget.left, least), most, budget.left)
  with pipeline.open(start, progress) as batches:
    state, step_seconds = _time_steps(compiled, state, batches, limit, check_notice,
                                      pipeline.mesh)
    state, save_seconds = _time_save(compiled, state, batches, step_seconds, workdir / SCRATCH,
                                     check_notice, pipeline.mesh)
  evaluation_seconds = 0.0
  if evaluator:
    evaluator.compile(state.best_variables())
    began = now()
    rows = evaluator.rows(state.best_variables(), on_images=check_notice)
    evaluator.score(rows)
    evaluator.operating_point(rows)
    evaluation_seconds = coordination.broadcast_json(now() - began)
  seconds = coordination.broadcast_json(budget.left)
  fit = steps_that_fit(
      (1 - RESERVE) * seconds, step_seconds=step_seconds, evaluation_seconds=evaluation_seconds,
      evaluate_every=config.train.evaluate_every, save_seconds=save_seconds,
      checkpoint_every=config.train.checkpoint_every, start=start)
  if fit == start:
    needed = step_seconds + evaluation_seconds + save_seconds
    least = config.train.minutes + (needed / (1 - RESERVE) - seconds) / 60
    raise InputError(
        f'train.minutes={config.train.minutes:g} is too short: {seconds:.3g} s are left, and a '
        f'step with {"evaluation and " if evaluator else ""}save takes {needed:.3g} s; give at '
        f'least {math.ceil(100 * least) / 100:g}')
  return Plan(config.train.minutes, min(fit, (2**32 - 1) // config.train.batch_size),
              step_seconds, evaluation_seconds, save_seconds)


def _time_steps(train_step: Callable, state: TrainState, batches: Prefetcher | Constant,
                limit: float, check_notice: Callable[[], None], mesh: Mesh
                ) -> tuple[TrainState, float]:
  """Takes steps for about `limit` seconds; returns the last state and the seconds of a step."""
  chunks: list[float] = []
  while not is_timed(chunks, limit):
    check_notice()
    began = now()
    pending = []
    for _ in range(_STEPS_PER_CHUNK):
      state, metrics = train_step(state, *next(batches))
      pending.append(metrics)
      wait_for_steps(pending, mesh)
    jax.block_until_ready(pending)
    chunks.append(coordination.broadcast_json(now() - began))  # All processes take equally many.
  return state, slow_step_seconds(chunks, _STEPS_PER_CHUNK)


def _time_save(train_step: Callable, state: TrainState, batches: Prefetcher | Constant,
               step_seconds: float, folder: storage.Path, check_notice: Callable[[], None],
               mesh: Mesh) -> tuple[TrainState, float]:
  """Saves a state while steps are taken, as a run does; returns the last state and the delay.

  The first save compiles and is not timed.
  """
  with _removed_at_end(folder), Checkpoints(folder, keep_last=1) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    check_notice()
    began, count = now(), 0
    checkpoints.save(2, state)
    while coordination.broadcast_json(checkpoints.is_saving()):
      state, metrics = train_step(state, *next(batches))
      wait_for_steps([metrics], mesh)
      jax.block_until_ready(metrics)
      count += 1
    checkpoints.wait()
    return state, max(coordination.broadcast_json(now() - began) - count * step_seconds, 0.0)


@contextlib.contextmanager
def _removed_at_end(folder: storage.Path) -> Iterator[None]:
  """Removes a folder, in the first process, when no process needs it any more."""
  try:
    yield
    coordination.wait_for_all()
  finally:
    remove_scratch(folder)


def remove_scratch(folder: storage.Path) -> None:
  """Removes a folder of `make_plan`, which a kill may have left, in the first process."""
  if jax.process_index() == 0:
    epath.Path(folder).rmtree(missing_ok=True)
