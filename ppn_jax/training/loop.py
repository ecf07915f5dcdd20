"""`train(config, workdir)`: from a config to a trained, evaluated run."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import registry
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.sources import Source, build_source, split_train_block
from ppn_jax.errors import InputError
from ppn_jax.evaluation.coco import Scores
from ppn_jax.evaluation.evaluator import Evaluator, build_evaluator
from ppn_jax.host_memory import keep_freed_memory
from ppn_jax.run import Run, create_run, open_run
from ppn_jax.training import partition
from ppn_jax.training.checkpoint import Checkpoints, SaveFailed
from ppn_jax.training.feeds import Feed, build_feed
from ppn_jax.training.metrics import MetricsWriter, Progress, Stopwatch, duration, evaluated
from ppn_jax.training.preemption import Preempted, PreemptionNotice
from ppn_jax.training.prefetch import Prefetcher, Unchanging
from ppn_jax.training.state import TrainState
from ppn_jax.training.step import StepMetrics, abstract_state, jit_init
from ppn_jax.weights.initial import initial_weights, with_weights

# How many steps may be under way on the device: enough to keep it busy, few enough that their
# batches do not fill its memory.
STEPS_IN_FLIGHT = 2

# After so many saves that failed in a row a run stops, whatever train.on_save_error says: what it
# would compute from then on is more likely lost than not.
MAX_FAILED_SAVES = 5


class TrainingDiverged(RuntimeError):
  """A loss or gradient is not finite; the message names step, quantity and the way back."""


def train(config: ConfigDict, workdir: str | pathlib.Path) -> Scores | None:
  """Trains the detector that `config` describes, from where `workdir` stands.

  The same config and seed give the same run, bit for bit on one machine, whether or not it was
  killed and started again in between.

  Args:
    config: as those in configs/.
    workdir: a new folder, or that of an earlier run of the same model, which is gone on with.

  Returns:
    The figures of the last evaluation, or None if the config asks for none.

  Raises:
    InputError: anything wrong with config, data or workdir. It is found before the first
      compile, and nothing is overwritten.
    TrainingDiverged: a loss or gradient is not finite.
    Preempted: SIGTERM came, or on a TPU notice of maintenance, and the step is saved.
    SaveFailed: the last step could not be saved, or others and train.on_save_error='stop'.
  """
  keep_freed_memory()
  # 1. Everything that can be wrong with the user's input, before anything is written.
  _check_numbers(config)
  mesh = partition.data_mesh()
  partition.check_batch_size('train.batch_size', config.train.batch_size, mesh)
  earlier = _earlier_run(workdir)
  train_block, _ = split_train_block(config.data.train.to_dict())
  source, eval_source = build_source(train_block,
                                     categories=earlier.categories if earlier else None), None
  if config.train.evaluate_every:
    eval_source = build_source(config.data.eval.to_dict(), categories=source.categories)
  run = create_run(workdir, config, source.categories)
  detector, optimizer, evaluator = run.detector(), run.optimizer(), None
  if eval_source is not None:
    evaluator = build_evaluator(run, detector, mesh, source=eval_source)
  feed = build_feed(config, source, mesh)
  abstract = abstract_state(detector, optimizer, mesh)
  initialise = registry.bind('init', initial_weights, config.init.to_dict(), given=['like'])
  with run.checkpoints(read_only=True) as checkpoints:
    latest = checkpoints.latest()
  initial = initialise(like=abstract.variables) if latest is None else None
  if latest is not None and earlier:
    run = _with_init_of(earlier, run)
  with (Progress(config.train.steps, quiet=jax.process_index() != 0) as progress,
        PreemptionNotice() as notice, run.checkpoints(read_only=False) as checkpoints):
    start, state = checkpoints.restore_newest(abstract, progress.say) or (0, None)
    owed = _owes_evaluation(run, start)
    if start >= config.train.steps and not owed:
      progress.say(f'nothing to do: {run.workdir} is trained to step {start:,} already')
      return None
    progress.say(_describe(run, abstract, source, mesh))
    for bad_boxes in filter(None, (getattr(s, 'bad_boxes', None) for s in (source, eval_source))):
      progress.say(str(bad_boxes))
    # 2. The state: the newest whole checkpoint, or a fresh one.
    if state is not None:
      progress.say(f'resuming {run.workdir} from step {start:,}')
      if config.init.backbone not in ('', run.config.init.backbone):
        progress.say(f'init.backbone={config.init.backbone} is not read: the run has its weights')
    else:
      state = jit_init(detector, optimizer, mesh)(config.seed)
    if initial is not None:
      progress.say(f'starting from {initial.report}')
      state = with_weights(state, initial.variables)
    # 3. The steps.
    writer = None
    if jax.process_index() == 0:
      run.save()
      writer = MetricsWriter(run.workdir, start)
    steps = _Steps(run, mesh, checkpoints, progress, writer, evaluator, notice)
    scores = steps.evaluate(start, state) if owed else None
    if start < config.train.steps:
      scores = steps.take(state, start, feed.jit_step(detector, optimizer), feed)
    if writer:
      writer.close()
    return scores


def _earlier_run(workdir: str | pathlib.Path) -> Run | None:
  """The run that is to be gone on with, if there is one."""
  return open_run(workdir) if (pathlib.Path(workdir) / 'config.json').is_file() else None


def _owes_evaluation(run: Run, step: int) -> bool:
  """Whether a run was told to end, or failed, when it should have evaluated `step`."""
  train = run.config.train
  due = train.evaluate_every and (step % train.evaluate_every == 0 or step == train.steps)
  if not step or not due:
    return False
  # The first process writes the file, and others may not have it.
  return partition.first_says(not evaluated(run.workdir, step))


def _with_init_of(earlier: Run, run: Run) -> Run:
  """`run` with what its weights started from on record, whatever the config says now."""
  config = run.config.copy_and_resolve_references().unlock()
  config.init = earlier.config.init
  return dataclasses.replace(run, config=config.lock())


@dataclasses.dataclass
class _Steps:
  """The loop over steps, and what happens between them."""
  run: Run
  mesh: Mesh
  checkpoints: Checkpoints
  progress: Progress
  writer: MetricsWriter | None  # Of the first process only.
  evaluator: Evaluator | None
  notice: PreemptionNotice
  pending: list[tuple[int, StepMetrics]] = dataclasses.field(default_factory=list)
  watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)

  def take(self, state: TrainState, start: int, train_step: Callable, feed: Feed
           ) -> Scores | None:
    """Takes the steps after `start`; returns the last evaluation's figures."""
    train = self.run.config.train
    train_step = self._compile(train_step, state, feed)
    scores = None
    if self.notice.given():
      raise Preempted(f'told to end before a step was taken; {self.run.workdir} is as it was')
    with feed.open(start, self.progress) as batches:
      for step in range(start + 1, train.steps + 1):
        batch = self._next(batches)
        with self.watch.stepping():
          state, metrics = train_step(state, *batch)
          self.pending.append((step, metrics))
          if len(self.pending) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - STEPS_IN_FLIGHT])
        self.progress.advance(step)

        last = step == train.steps
        due = self.evaluator and (last or step % train.evaluate_every == 0)
        ending = self.notice.reached(step) and (due or not last)
        evaluating = due and not ending
        saving = due or last or ending or step % train.checkpoint_every == 0
        if saving or step % train.log_every == 0:
          self._report(step)  # Also what keeps a state that is not finite from being saved.
          self._tell(feed.bad)
        if evaluating:
          scores = self._evaluate_or_save(step, state)
        if saving:
          self._save(step, state, scores.figures if evaluating else None)
        if ending:
          self._end_early(step)
    self._complete_save(step, state, scores)
    return scores

  def _save(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
    """Begins a save when the one before is complete; says what fails, or raises it."""
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
      self.checkpoints.save(step, state, scores.figures if scores else None)
      self.checkpoints.wait()

  def _end_early(self, step: int) -> None:
    try:
      self.checkpoints.wait()
    except SaveFailed as e:
      raise Preempted(f'told to end, but {e}; start again to go on from there') from e
    raise Preempted(f'told to end; step {step:,} is saved in {self.run.workdir}, start again to '
                    'go on from there')

  def _next(self, batches: Prefetcher | Unchanging) -> tuple[Any, ...]:
    """What the next step takes; waiting for it counts only while the devices have no work."""
    if not batches.ready():
      with self.watch.stepping(steps=0):
        jax.block_until_ready(self.pending[-1:])
    with self.watch.waiting():
      return next(batches)

  def _compile(self, train_step: Callable, state: TrainState, feed: Feed) -> Callable:
    self.progress.say('compiling the training step (once a start; a minute or so on a TPU)')
    started = time.perf_counter()
    compiled = train_step.lower(state, *feed.arguments()).compile()
    self.progress.say(f'compiled in {duration(time.perf_counter() - started)}')
    return compiled

  def _report(self, step: int) -> None:
    """Checks and averages the metrics since the last report, then writes and shows them."""
    with self.watch.stepping(steps=0):  # The last steps are still under way.
      taken, metrics = zip(*jax.device_get(self.pending), strict=True)
    self.pending.clear()
    columns = StepMetrics(*(np.array(column) for column in zip(*metrics, strict=True)))
    self._check_finite(taken, columns)
    means = {name: float(np.mean(column)) for name, column in columns._asdict().items()}
    means['learning_rate'] = float(columns.learning_rate[-1])
    means |= self.watch.rates(self.run.config.train.batch_size)
    left = (self.run.config.train.steps - step) * self.watch.seconds / self.watch.steps
    self.watch = Stopwatch()
    if self.writer:
      self.writer.write(step, {f'train/{name}': value for name, value in means.items()})
    self.progress.report(step, (
        'loss {loss:.4g} (class {classification:.4g}, box {localization:.4g}, decay '
        '{regularization:.3g})  rate {learning_rate:.3g}  {images_per_second:,.1f} images/s  '
        'data {data_wait:.0%}  ').format(**means) + f'left {duration(left)}')

  def _tell(self, bad: BadExamples) -> None:
    """Names what could not be read since the last time, here and in the workdir."""
    for reason in bad.news():
      self.progress.say(f'skipped: {reason}')
      if self.writer:
        self.run.note_bad_example(reason)

  def _check_finite(self, steps: tuple[int, ...], columns: StepMetrics) -> None:
    finite = np.isfinite(np.stack(columns))  # [quantities, steps]
    if finite.all():
      return
    at = int(np.argmin(finite.all(axis=0)))
    quantity = StepMetrics._fields[int(np.argmin(finite[:, at]))]
    good = self.checkpoints.latest()
    raise TrainingDiverged(
        f'{quantity} is {float(columns[StepMetrics._fields.index(quantity)][at])} at step '
        f'{steps[at]:,}; ' + (f'the last good checkpoint is step {good:,}' if good else
                              'there is no checkpoint before it') +
        f' in {self.run.workdir}. A lower optim.learning_rate or optim.clip_norm=10 may help')

  def _evaluate_or_save(self, step: int, state: TrainState) -> Scores:
    """A checkpoint waits for its figures, but must not be lost with them."""
    try:
      return self.evaluate(step, state)
    except BaseException:
      self._save(step, state)
      raise

  def evaluate(self, step: int, state: TrainState) -> Scores:
    """Scores the state, and writes and says the figures."""
    started = time.perf_counter()
    total = len(self.evaluator.source)

    def on_images(count: int) -> None:
      if self.notice.given():
        raise Preempted(f'told to end; step {step:,} is saved in {self.run.workdir}, start again '
                        'to evaluate it and go on')
      self.progress.advance(step, f'evaluating: {count:,}/{total:,} images')

    rows = self.evaluator.rows(state.best_variables(), on_images=on_images)
    self._tell(self.evaluator.bad)
    scores = self.evaluator.score(rows)
    if self.writer:
      self.writer.write(step, {f'eval/{name}': value for name, value in scores.figures.items()})
    figures = scores.figures
    self.progress.say(
        f'evaluated step {step:,}: AP {figures["AP"]:.4f}  AP50 {figures["AP50"]:.4f}  AP75 '
        f'{figures["AP75"]:.4f}  on {scores.num_images:,} images in '
        f'{duration(time.perf_counter() - started)}')
    return scores


def _describe(run: Run, state: TrainState, source: Source, mesh: Mesh) -> str:
  config = run.config
  count = sum(p.size for p in jax.tree.leaves(state.variables['params']))
  device = mesh.devices.flat[0].device_kind
  return (f'{config.model.neck.name} on {config.model.backbone.name}, {count:,} parameters, '
          f'{len(run.categories)} classes, {config.model.image_size} px; {len(source):,} images, '
          f'batch {config.train.batch_size}, on {mesh.size} x {device}')


def _check_numbers(config: ConfigDict) -> None:
  if config.train.on_save_error not in ('continue', 'stop'):
    raise InputError(f"train.on_save_error={config.train.on_save_error!r} is unknown; legal: "
                     "'continue', 'stop'")
  if not 0 <= config.seed < 2**31:
    raise InputError(f'seed={config.seed} must be at least 0 and below 2**31')
  for name, least in [('steps', 1), ('batch_size', 1), ('log_every', 1), ('checkpoint_every', 1),
                      ('evaluate_every', 0)]:
    if config.train[name] < least:
      raise InputError(f'train.{name}={config.train[name]} must be at least {least}')
