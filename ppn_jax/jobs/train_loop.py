"""The steps of a run, and what happens between them: reports, evaluations, saves, an early end."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax.checkpoints.manager import Checkpoints, SaveFailed
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.distributed import coordination
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.distributed.preemption import Interrupted, Preempted, PreemptionNotice
from ppn_jax.errors import Stopped
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.metrics.coco import Scores, format_headline, write_scores
from ppn_jax.run import Run
from ppn_jax.telemetry import profiling
from ppn_jax.telemetry.metrics import FIRST_LOSS, MetricsWriter, Progress, Stopwatch, duration
from ppn_jax.training.input_pipeline import Feed
from ppn_jax.training.prefetch import Prefetcher, Unchanging
from ppn_jax.training.state import TrainState
from ppn_jax.training.train_step import StepMetrics

# How many steps may be under way on the device: enough to keep it busy, few enough that their
# batches do not fill its memory.
STEPS_IN_FLIGHT = 2

# After so many saves that failed in a row a run stops, whatever train.on_save_error says: what it
# would compute from then on is more likely lost than not.
MAX_FAILED_SAVES = 5


# A run has plainly diverged when its loss stays above so many times its first one for so many steps
# in a row. A first loss below 1, as of a run that starts from good weights, counts as 1.
DIVERGED_FACTOR, DIVERGED_STEPS = 1000.0, 10


class TrainingDiverged(Stopped):
  """A loss or gradient is not finite or the loss has exploded; the message says how to go on."""


@dataclasses.dataclass
class Steps:
  """The loop over steps, and what happens between them."""
  run: Run
  mesh: Mesh
  checkpoints: Checkpoints
  progress: Progress
  writer: MetricsWriter | None  # Of the first process only.
  evaluator: Evaluator | None
  notice: PreemptionNotice
  trace: profiling.StepTrace
  owner: Ownership | None = None  # Of the first process only.
  first_loss: float | None = None  # Of the run; None before its first step.
  exploded: int = 0  # How many of the last steps in a row had a loss far above it.
  pending: list[tuple[int, StepMetrics]] = dataclasses.field(default_factory=list)
  watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
  mute: bool = False  # It has been said that figures cannot be written.

  def take(self, state: TrainState, start: int, train_step: Callable, feed: Feed
           ) -> Scores | None:
    """Takes the steps after `start`; returns the last evaluation's figures."""
    train = self.run.config.train
    train_step = self._compile(train_step, state, feed)
    scores = None
    if self.notice.given():
      raise self.notice.end(f'no step was taken, {self.run.workdir} is as it was')
    with feed.open(start, self.progress) as batches, self.trace:
      for step in range(start + 1, train.steps + 1):
        batch = self._next(batches)
        with self.trace.step(step, self.pending), self.watch.stepping():
          state, metrics = train_step(state, *batch)
          self.pending.append((step, metrics))
          if len(self.pending) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - STEPS_IN_FLIGHT])
        self.progress.advance(step)

        last = step == train.steps
        due = self.evaluator and (last or step % train.evaluate_every == 0)
        ending = self.notice.reached(step) and (due or not last)
        saving = due or last or ending or step % train.checkpoint_every == 0
        if saving or step % train.log_every == 0:
          self._report(step)  # Also what keeps a state that is not finite from being saved.
          self._tell(feed.bad)
        evaluating = due and not ending and not self.exploded
        if evaluating:
          scores = self._evaluate_or_save(step, state)
        if saving and self.exploded:
          self.progress.say(f'step {step:,} is not saved: its loss is more than '
                            f'{DIVERGED_FACTOR:,.0f} times the first, {self.first_loss:.4g}')
        elif saving:
          self._save(step, state, scores.metrics if evaluating else None)
        if ending:
          self._end_early(step, 'is not saved' if self.exploded else 'could not be saved')
    self._complete_save(step, state, scores)
    return scores

  def _save(self, step: int, state: TrainState, figures: dict[str, float | None] | None = None
            ) -> None:
    """Begins a save when the one before is complete; says what fails, or raises it."""
    if self.owner:
      self.owner.check()
    if self.writer:  # A run that goes on from this step does not write its figures again.
      with self._informing():
        self.writer.flush()
    for act in (self.checkpoints.wait, lambda: self.checkpoints.save(step, state, figures)):
      try:
        act()
      except SaveFailed as e:
        # Several processes would first have to agree that it failed; a new start does that.
        if (self.run.config.train.on_save_error == 'stop' or jax.process_count() > 1
            or self.checkpoints.failures >= MAX_FAILED_SAVES):
          raise
        self.progress.say(f'{e}; going on, and trying again at the next save')

  def _complete_save(self, step: int, state: TrainState, scores: Scores | None) -> None:
    """Waits for the last step to be on disk. It has no next save, so it is tried twice."""
    try:
      self.checkpoints.wait()
    except SaveFailed as e:
      if jax.process_count() > 1:
        raise
      self.progress.say(f'{e}; trying again')
    if self.checkpoints.latest() != step:
      self.checkpoints.save(step, state, scores.metrics if scores else None)
      self.checkpoints.wait()

  def _end_early(self, step: int, unsaved: str = 'could not be saved') -> None:
    try:
      self.checkpoints.wait()
    except SaveFailed as e:
      if jax.process_count() > 1:  # Where it fails in one only, the others have to be told.
        raise
      raise self.notice.end(f'{e}; start again to resume from there') from e
    if (newest := self.checkpoints.latest()) != step:
      raise self.notice.end(f'step {step:,} {unsaved}; start again to resume '
                            f'from step {newest or 0:,} in {self.run.workdir}')
    raise self.notice.end(f'step {step:,} is saved in {self.run.workdir}, start again to resume '
                          'from there')

  def _next(self, batches: Prefetcher | Unchanging) -> tuple[Any, ...]:
    """What the next step takes; waiting for it counts only while the devices have no work."""
    if not batches.ready():
      with self.watch.stepping(steps=0):
        jax.block_until_ready(self.pending[-1:])
    with self.watch.waiting():
      return next(batches)

  def _compile(self, train_step: Callable, state: TrainState, feed: Feed) -> Callable:
    started = time.perf_counter()
    self.progress.say('compiling the training step (once a start; a minute or so on a TPU)')
    compiled = train_step.lower(state, *feed.arguments()).compile()
    self.progress.say(f'compiled in {duration(time.perf_counter() - started)}')
    coordination.meet()
    self.progress.say(profiling.describe(compiled))
    return compiled

  def _report(self, step: int) -> None:
    """Checks and averages the metrics since the last report, then writes and shows them."""
    with self.watch.stepping(steps=0):  # The last steps are still under way.
      taken, metrics = zip(*jax.device_get(self.pending), strict=True)
    self.pending.clear()
    columns = StepMetrics(*(np.array(column) for column in zip(*metrics, strict=True)))
    self._check_finite(taken, columns)
    first = self.first_loss is None
    self._check_explosion(taken, columns.loss)
    means = {name: float(np.mean(column)) for name, column in columns._asdict().items()}
    means['learning_rate'] = float(columns.learning_rate[-1])
    means |= self.watch.rates(self.run.config.train.batch_size) | profiling.peak_memory()
    left = (self.run.config.train.steps - step) * self.watch.seconds / self.watch.steps
    self.watch = Stopwatch()
    if self.writer:
      with self._informing():
        self.writer.write(step, {f'train/{name}': value for name, value in means.items()} |
                          ({FIRST_LOSS: self.first_loss} if first else {}))
    self.progress.report(step, [f'left {duration(left)}', *(part.format(**means) for part in (
        'loss {loss:.4g}', '{images_per_second:,.1f} images/s', 'rate {learning_rate:.3g}',
        'data {data_wait:.0%}', 'class {classification:.4g}', 'box {localization:.4g}',
        'decay {regularization:.3g}')), f'memory {profiling.format_peaks(means)}'])

  def _tell(self, bad: BadExamples) -> None:
    """Names what could not be read since the last time, in any process and in the workdir."""
    for reason in dict.fromkeys(coordination.gather_lines(bad.new_reasons())):
      self.progress.say(f'skipped: {reason}')
      if self.writer:
        with self._informing():
          self.run.note_bad_example(reason)

  @contextlib.contextmanager
  def _informing(self) -> Iterator[None]:
    """What only informs does not end a run where it cannot be written; that is said once."""
    try:
      yield
      self.mute = False
    except OSError as e:
      if not self.mute:
        what = f'{e.filename}: {e.strerror}' if e.filename else f'{self.run.workdir}: {e}'
        self.progress.say(f'{what}; going on, the figures are kept to be written later')
      self.mute = True

  def _check_finite(self, steps: tuple[int, ...], columns: StepMetrics) -> None:
    finite = np.isfinite(np.stack(columns))  # [quantities, steps]
    if finite.all():
      return
    at = int(np.argmin(finite.all(axis=0)))
    quantity = StepMetrics._fields[int(np.argmin(finite[:, at]))]
    self._diverge(f'{quantity} is {float(columns[StepMetrics._fields.index(quantity)][at])} at '
                  f'step {steps[at]:,}')

  def _check_explosion(self, steps: tuple[int, ...], losses: np.ndarray) -> None:
    """Counts the last steps whose loss is beyond all measure, and ends the run at too many."""
    if self.first_loss is None:
      self.first_loss = float(losses[0])
    limit = DIVERGED_FACTOR * max(self.first_loss, 1.0)
    for step, loss in zip(steps, losses, strict=True):
      self.exploded = self.exploded + 1 if loss > limit else 0
      last = step == self.run.config.train.steps
      if self.exploded >= DIVERGED_STEPS or (self.exploded and last):
        since = step - self.exploded + 1
        self._diverge(f'loss is {loss:.4g} at step {step:,}, more than {DIVERGED_FACTOR:,.0f} '
                      f'times the first, {self.first_loss:.4g}, since step {since:,}')

  def _diverge(self, what: str) -> NoReturn:
    with contextlib.suppress(SaveFailed):  # What is being saved is good, and must get there.
      self.checkpoints.wait()
    good = self.checkpoints.latest()
    raise TrainingDiverged(
        f'{what}; ' + (f'the last good checkpoint is step {good:,}' if good else
                       'there is no checkpoint before it') +
        f' in {self.run.workdir}. A lower optim.learning_rate or optim.clip_norm=10 may help')

  def _evaluate_or_save(self, step: int, state: TrainState) -> Scores:
    """A checkpoint waits for its figures, but must not be lost with them."""
    try:
      return self.evaluate(step, state)
    except BaseException as e:
      if jax.process_count() == 1:  # Else one that fails alone would wait for the others.
        self._save(step, state)
        if isinstance(e, (Preempted, Interrupted)):
          self._end_early(step)
      raise

  def evaluate_owed(self, step: int, state: TrainState) -> Scores:
    """Scores a step that was saved without figures, and leaves them where retention looks."""
    scores = self.evaluate(step, state)
    if self.writer:
      with self._informing():
        stamp = self.checkpoints.stamp(step)
        write_scores(self.run.workdir / 'evaluation' / str(step) / 'scores.json', scores, {
            'checkpoint': stamp and stamp.checkpoint,
            'average': bool(self.run.config.optim.ema_decay), 'images': scores.num_images})
    return scores

  def evaluate(self, step: int, state: TrainState) -> Scores:
    """Scores the state, and writes and says the figures."""
    started = time.perf_counter()
    total = len(self.evaluator.source)

    def on_images(count: int) -> None:
      if self.notice.given():
        raise self.notice.end(f'step {step:,} is saved in {self.run.workdir}, start again to '
                              'evaluate it and go on')
      self.progress.advance(step, f'evaluating: {count:,}/{total:,} images')

    rows = self.evaluator.rows(state.best_variables(), on_images=on_images)
    self._tell(self.evaluator.bad)
    scores = self.evaluator.score(rows)
    if self.writer:
      with self._informing():
        self.writer.write(step, {f'eval/{name}': value for name, value in scores.metrics.items()})
    self.progress.say(
        f'evaluated step {step:,}: {format_headline(scores.metrics)}  on {scores.num_images:,} '
        f'images in {duration(time.perf_counter() - started)}')
    return scores
