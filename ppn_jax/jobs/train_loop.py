"""The training loop: steps, and the reports, evaluations and checkpoints between them."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax.checkpoints.manager import Checkpoints, SaveFailed
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.distributed import coordination, status
from ppn_jax.distributed.compile_cache import CacheUse, compile_with
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.distributed.preemption import Interrupted, Preempted, PreemptionNotice
from ppn_jax.errors import Stopped
from ppn_jax.jobs import class_report
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.jobs.time_budget import SPENT, TimeBudget
from ppn_jax.metrics.coco import Scores, format_headline, write_scores
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.run import OPERATING_POINT, Run
from ppn_jax.telemetry import profiling
from ppn_jax.telemetry.goodput import Timeline
from ppn_jax.telemetry.metrics import FIRST_LOSS, MetricsWriter
from ppn_jax.telemetry.progress import Progress, Stopwatch, duration
from ppn_jax.telemetry.stuck import StepWatch
from ppn_jax.training.input_pipeline import Constant, InputPipeline, Prefetcher
from ppn_jax.training.state import TrainState
from ppn_jax.training.stopping import EarlyStopping
from ppn_jax.training.train_step import StepMetrics, wait_for_steps

logger = logging.getLogger(__name__)

# After this many failed saves in a row a run stops, whatever train.on_save_error says: later steps
# would probably be lost too.
MAX_FAILED_SAVES = 5

# A run has diverged if its loss stays above this factor of its first loss for this many steps in a
# row. A first loss below 1, as in a run that starts from good weights, counts as 1.
DIVERGED_FACTOR, DIVERGED_STEPS = 1000.0, 10


class TrainingDiverged(Stopped):
  """Raised if a loss or gradient is not finite, or the loss explodes; the message has a remedy."""


@dataclasses.dataclass
class TrainLoop:
  """The loop over steps, with the reports, evaluations and checkpoints between them.

  Attributes:
    run: The run.
    mesh: Its devices.
    checkpoints: Its checkpoint service.
    progress: Logs its steps.
    writer: Writes its metrics; of the first process only.
    evaluator: Scores a state; None if the config asks for no evaluation.
    notice: Whether the run was told to end.
    trace: Traces some of the steps.
    owner: Ownership of the workdir; of the first process only.
    first_loss: Loss of the run's first step; None before it.
    stopping: Whether a metric has stopped improving.
    budget: How much time is left.
    last_step: Step that the run ends with: `train.steps`, or an earlier one as soon as it is known.
    num_exploded: How many of the last steps in a row had a loss far above the first one.
    pending: Steps that have not been reported yet, and their metrics.
    stopwatch: Times them.
    timeline: What the time is spent on.
    watch: Notices a step that hangs.
    statuses: Tells the first process how long each waits for data.
    cache_use: Counts programs that were found in the cache; None if nobody counts.
    warned: Whether the user knows that metrics cannot be written at the moment.
    point: Thresholds of the last evaluation; None before it, and in other processes.
  """
  run: Run
  mesh: Mesh
  checkpoints: Checkpoints
  progress: Progress
  writer: MetricsWriter | None
  evaluator: Evaluator | None
  notice: PreemptionNotice
  trace: profiling.StepTrace
  owner: Ownership | None = None
  first_loss: float | None = None
  stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
  budget: TimeBudget = dataclasses.field(default_factory=TimeBudget)
  last_step: int = 0
  num_exploded: int = 0
  pending: list[tuple[int, StepMetrics]] = dataclasses.field(default_factory=list)
  stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
  timeline: Timeline = dataclasses.field(default_factory=Timeline)
  watch: StepWatch = dataclasses.field(default_factory=lambda: StepWatch(0, 1, print))
  statuses: status.StatusExchange = dataclasses.field(default_factory=status.StatusExchange)
  cache_use: CacheUse | None = None
  warned: bool = False
  point: OperatingPoint | None = None

  def __post_init__(self):
    self.last_step = self.last_step or self.run.config.train.steps

  def run_steps(self, state: TrainState, start: int, train_step: Callable, pipeline: InputPipeline
                ) -> Scores | None:
    """Runs the steps after `start` and returns the scores of the last evaluation.

    Args:
      state: State after step `start`.
      start: Number of steps taken before.
      train_step: Jitted step: (state, *input) -> (state, StepMetrics).
      pipeline: Input of the steps.
    """
    train = self.run.config.train
    train_step = self._compile(train_step, state, pipeline)
    scores = None
    if self.notice.given():
      raise self.notice.end(f'no step was taken, and {self.run.workdir} is unchanged')
    with (pipeline.open(start, self.progress) as batches, self.trace, self.budget.counting(),
          self.watch, self.statuses, self.timeline.during('steps')):
      for step in range(start + 1, train.steps + 1):
        with self.watch.step(step):
          batch = self._next(batches)
          with self.trace.step(step, self.pending), self.stopwatch.compute():
            state, metrics = train_step(state, *batch)
            self.pending.append((step, metrics))
            wait_for_steps(self.pending, self.mesh)
        self.progress.advance(step)
        self.timeline.reached(step)

        if self.budget.over(step):
          self.last_step = step
        last = step == self.last_step
        due = self.evaluator and (last or step % train.evaluate_every == 0)
        ending = self.notice.reached() and (due or not last)
        saving = due or last or ending or step % train.checkpoint_every == 0
        if saving or step % train.log_every == 0:
          self._report(step)  # Raises, before anything is saved, if a state is not finite.
          self._report_bad_examples(pipeline.bad, wait=bool(saving))
        evaluating = due and not ending and not self.num_exploded
        if evaluating:
          scores = self._evaluate_or_save(step, state)
          if self.stopping.reached():
            self.last_step = step
        if saving and self.num_exploded:
          logger.warning(f'step {step:,} is not saved: its loss is more than '
                         f'{DIVERGED_FACTOR:,.0f} times the first, {self.first_loss:.4g}')
        elif saving:
          with self.timeline.during('save'):
            self._save(step, state, scores.metrics if evaluating else None)
        if ending:
          with self.timeline.during('save'):
            self._end_early(step, 'is not saved' if self.num_exploded else 'could not be saved')
        if step == self.last_step:
          break
    with self.timeline.during('save'):
      self._complete_save(step, state, scores)
    return scores

  def _save(self, step: int, state: TrainState, metrics: dict[str, float | None] | None = None
            ) -> None:
    """Starts a save once the previous one is complete; reports what fails, or raises it."""
    if self.owner:
      self.owner.check()
    if self.writer:  # A run that resumes from this step does not write earlier metrics again.
      with self._tolerate_write_errors():
        self.writer.flush()
    for act in (self.checkpoints.wait, lambda: self._start_save(step, state, metrics)):
      try:
        act()
      except SaveFailed as e:
        # Several processes would first have to agree that it failed; restarting the run does that.
        if (self.run.config.train.on_save_error == 'stop' or jax.process_count() > 1
            or self.checkpoints.failures >= MAX_FAILED_SAVES):
          raise
        logger.warning(f'{e}; training continues, the next save is tried as usual')

  def _start_save(self, step: int, state: TrainState, metrics: dict[str, float | None] | None
                  ) -> None:
    notes = {SPENT: self.budget.seconds}
    if metrics is not None and self.point is not None:
      notes[OPERATING_POINT] = self.point.describe()
    self.checkpoints.save(step, state, metrics, notes)

  def _complete_save(self, step: int, state: TrainState, scores: Scores | None) -> None:
    """Waits until the last step is on disk. No other save follows, so it is tried twice."""
    try:
      self.checkpoints.wait()
    except SaveFailed as e:
      if jax.process_count() > 1:
        raise
      logger.warning(f'{e}; trying again')
    if self.checkpoints.latest() != step:
      self._start_save(step, state, scores.metrics if scores else None)
      self.checkpoints.wait()

  def _end_early(self, step: int, unsaved: str = 'could not be saved') -> NoReturn:
    """Waits for the save of `step`, and raises the exception that ends the run."""
    try:
      self.checkpoints.wait()
    except SaveFailed as e:
      if jax.process_count() > 1:  # It may fail in one only, and the others have to be told.
        raise
      raise self.notice.end(f'{e}; start again to resume from there') from e
    if (newest := self.checkpoints.latest()) != step:
      raise self.notice.end(f'step {step:,} {unsaved}; start again to resume '
                            f'from step {newest or 0:,} in {self.run.workdir}')
    raise self.notice.end(f'step {step:,} is saved in {self.run.workdir}, start again to resume '
                          'from there')

  def _next(self, batches: Prefetcher | Constant) -> tuple[Any, ...]:
    """Returns the next input; waiting for it counts only while the devices have no work."""
    if not batches.ready():
      with self.stopwatch.compute(steps=0):
        jax.block_until_ready(self.pending[-1:])
    with self.stopwatch.wait(), self.timeline.during('data'):
      return next(batches)

  def _compile(self, train_step: Callable, state: TrainState, pipeline: InputPipeline
               ) -> Callable:
    started = time.perf_counter()
    logger.info('compiling the training step (once per start; about a minute on a TPU)')
    with self.timeline.during('compile'):
      compiled = compile_with(train_step.lower(state, *pipeline.arguments()),
                              self.run.config.train.xla_options)
      logger.info(f'compiled in {duration(time.perf_counter() - started)}')
      if self.cache_use and (use := str(self.cache_use)):
        logger.info(use)
      coordination.wait_for_all()
    logger.info(profiling.describe(compiled))
    return compiled

  def _report(self, step: int) -> None:
    """Checks and averages the metrics since the last report, then writes and shows them."""
    # The last steps are still running.
    with self.watch.step(step, timed=False), self.stopwatch.compute(steps=0):
      steps, metrics = zip(*jax.device_get(self.pending), strict=True)
    self.pending.clear()
    series = StepMetrics(*(np.array(values) for values in zip(*metrics, strict=True)))
    self._check_finite(steps, series)
    first = self.first_loss is None
    self._check_explosion(steps, series.loss)
    means = {name: float(np.mean(values)) for name, values in series._asdict().items()}
    means['learning_rate'] = float(series.learning_rate[-1])
    means |= self.stopwatch.rates(self.run.config.train.batch_size) | profiling.peak_memory()
    means, slowest = self._with_slowest(means)
    left = (self.last_step - step) * self.stopwatch.seconds / self.stopwatch.steps
    self.stopwatch = Stopwatch()
    if self.writer:
      with self._tolerate_write_errors():
        self.writer.write(step, {f'train/{name}': value for name, value in means.items()} |
                          ({FIRST_LOSS: self.first_loss} if first else {}))
    self.progress.report(step, [f'left {duration(left)}', *(part.format(**means) for part in (
        'loss {loss:.4g}', '{images_per_second:,.1f} images/s', 'rate {learning_rate:.3g}',
        'data {data_wait:.0%}' + slowest, 'class {classification:.4g}', 'box {localization:.4g}',
        'decay {regularization:.3g}')), f'memory {profiling.format_peaks(means)}'])

  def _with_slowest(self, means: dict[str, float]) -> tuple[dict[str, float], str]:
    """Returns the metrics with those of the process that waits longest for data, and its name.

    In the first of several processes, from its second report on; the others, and one that works
    alone, have no more to say.
    """
    found = self.statuses.exchange(data_wait=means['data_wait'])
    if not found:
      return means, ''
    slowest = max(found, key=lambda process: found[process]['data_wait'])
    wait = found[slowest]['data_wait']
    return (means | {'slowest_process': slowest, 'slowest_data_wait': wait},
            f' (most {wait:.0%}, process {slowest} on {found[slowest]["host"]})')

  def _report_bad_examples(self, bad: BadExamples, *, wait: bool = True) -> None:
    """Reports what any process could not read since the last time, also in the workdir.

    Args:
      bad: Knows what this process could not read.
      wait: Whether to wait for the other processes, so that nothing is missing; otherwise theirs
        may be reported later.
    """
    if wait or jax.process_count() == 1:
      reasons = status.collect_all(bad.new_reasons())
    else:
      status.post(bad.new_reasons())
      reasons = status.collect() if self.writer else []
    for reason in dict.fromkeys(reasons):
      logger.warning(f'skipped: {reason}')
      if self.writer:
        with self._tolerate_write_errors():
          self.run.note_bad_example(reason)

  @contextlib.contextmanager
  def _tolerate_write_errors(self) -> Iterator[None]:
    """Reports a write error once instead of raising it, for files that only inform."""
    try:
      yield
      self.warned = False
    except OSError as e:
      if not self.warned:
        what = f'{e.filename}: {e.strerror}' if e.filename else f'{self.run.workdir}: {e}'
        logger.warning(f'{what}; training continues, the metrics are kept to be written later')
      self.warned = True

  def _check_finite(self, steps: tuple[int, ...], series: StepMetrics) -> None:
    finite = np.isfinite(np.stack(series))  # [quantities, steps]
    if finite.all():
      return
    at = int(np.argmin(finite.all(axis=0)))
    quantity = StepMetrics._fields[int(np.argmin(finite[:, at]))]
    self._diverge(f'{quantity} is {float(series[StepMetrics._fields.index(quantity)][at])} at '
                  f'step {steps[at]:,}')

  def _check_explosion(self, steps: tuple[int, ...], losses: np.ndarray) -> None:
    """Counts the last steps in a row with an exploded loss, and ends the run at too many."""
    if self.first_loss is None:
      self.first_loss = float(losses[0])
    limit = DIVERGED_FACTOR * max(self.first_loss, 1.0)
    for step, loss in zip(steps, losses, strict=True):
      self.num_exploded = self.num_exploded + 1 if loss > limit else 0
      last = step == self.last_step
      if self.num_exploded >= DIVERGED_STEPS or (self.num_exploded and last):
        since = step - self.num_exploded + 1
        self._diverge(f'loss is {loss:.4g} at step {step:,}, more than {DIVERGED_FACTOR:,.0f} '
                      f'times the first, {self.first_loss:.4g}, since step {since:,}')

  def _diverge(self, what: str) -> NoReturn:
    with contextlib.suppress(SaveFailed):  # The save in progress is of a good state.
      self.checkpoints.wait()
    good = self.checkpoints.latest()
    raise TrainingDiverged(
        f'{what}; ' + (f'the last good checkpoint is step {good:,}' if good else
                       'there is no checkpoint before it') +
        f' in {self.run.workdir}. A lower optim.learning_rate or optim.clip_norm=10 may help')

  def _evaluate_or_save(self, step: int, state: TrainState) -> Scores:
    """Evaluates a step before it is saved with its scores; saves it if the evaluation fails."""
    try:
      return self.evaluate(step, state)
    except BaseException as e:
      told_to_end = isinstance(e, (Preempted, Interrupted))  # All processes at the same batch.
      # Of several, one that fails alone would wait for the others.
      if told_to_end or jax.process_count() == 1:
        self._save(step, state)
      if told_to_end:
        self._end_early(step)
      raise

  def evaluate_saved(self, step: int, state: TrainState) -> Scores:
    """Evaluates a step that was saved without scores, and records them for `retention`."""
    with self.budget.counting():
      scores = self.evaluate(step, state)
    if self.writer:
      with self._tolerate_write_errors():
        stamp = self.checkpoints.stamp(step)
        folder = self.run.evaluations(raw=False) / str(step)
        scored = {'checkpoint': stamp and stamp.checkpoint,
                  'average': bool(self.run.config.optim.ema_decay), 'images': scores.num_images}
        write_scores(folder / 'scores.json', scores, scored)
        class_report.write_operating_point(folder, self.point, scored)
    return scores

  def evaluate(self, step: int, state: TrainState) -> Scores:
    """Evaluates the state, and writes and reports its scores."""
    started = time.perf_counter()
    total = len(self.evaluator.source)

    def on_images(count: int) -> None:
      if self.notice.reached():
        raise self.notice.end(f'step {step:,} is saved in {self.run.workdir}, start again to '
                              'evaluate it and continue')
      self.progress.advance(step, f'evaluating: {count:,}/{total:,} images')

    with self.timeline.during('evaluate'):
      rows = self.evaluator.rows(state.best_variables(), on_images=on_images)
      self._report_bad_examples(self.evaluator.bad)
      scores = self.evaluator.score(rows)
      self.point = self.evaluator.operating_point(rows)
    self.stopping.values[step] = scores.metrics[self.stopping.metric]
    if self.writer:
      with self._tolerate_write_errors():
        self.writer.write(step, {f'eval/{name}': value for name, value in scores.metrics.items()})
    logger.info(
        f'evaluated step {step:,}: {format_headline(scores.metrics)}  on {scores.num_images:,} '
        f'images in {duration(time.perf_counter() - started)}')
    return scores
