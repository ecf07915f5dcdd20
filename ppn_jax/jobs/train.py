"""`train(config, workdir)`: trains and evaluates the detector of a config."""

import contextlib
import dataclasses
import datetime
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import registry
from ppn_jax.config import complete, plain
from ppn_jax.data.repeats import describe_repeats
from ppn_jax.data.report import check_learnable, report
from ppn_jax.data.source import Source
from ppn_jax.data.sources import scans
from ppn_jax.data.splits import check_data, describe_fraction, open_splits
from ppn_jax.detection.frame import show_size
from ppn_jax.distributed import coordination, failures, sharding
from ppn_jax.distributed.compile_cache import CacheUse
from ppn_jax.distributed.ownership import Ownership, owned_by_first
from ppn_jax.distributed.preemption import Preempted, PreemptionNotice
from ppn_jax.jobs import hangs, resuming, time_budget
from ppn_jax.jobs.evaluator import build_evaluator
from ppn_jax.jobs.shared_scans import SharedScans
from ppn_jax.jobs.time_budget import TimeBudget
from ppn_jax.jobs.train_check import check_fraction, check_numbers, earlier_run
from ppn_jax.jobs.train_loop import TrainLoop
from ppn_jax.metrics.coco import Scores
from ppn_jax.run import Run, check_batch, create_run
from ppn_jax.telemetry import profiling
from ppn_jax.telemetry.goodput import Timeline
from ppn_jax.telemetry.host_memory import keep_freed_memory_on_cpu
from ppn_jax.telemetry.loggers import Loggers, check_loggers
from ppn_jax.telemetry.metrics import MetricsWriter
from ppn_jax.telemetry.progress import Progress, duration
from ppn_jax.telemetry.run_log import RunLog
from ppn_jax.training.batch_norm import restore_batch_norm
from ppn_jax.training.input_pipeline import build_input_pipeline, sample_images
from ppn_jax.training.optimizer import Optimizer
from ppn_jax.training.parameter_paths import trainable
from ppn_jax.training.state import TrainState
from ppn_jax.training.train_step import abstract_state, jit_init
from ppn_jax.weights.folded_norm import check_epsilon, folded_layers
from ppn_jax.weights.initial import AUTO, initial_weights, with_weights
from ppn_jax.weights.transfer import TransferredWeights

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | pathlib.Path, *, profile: str = '',
          process_started: float | None = None) -> Scores | None:
  """Trains the detector of a config, or resumes its training.

  The same config and seed give the same run, bit for bit on one machine, whether or not it was
  killed and started again in between.

  Args:
    config: A config like those in configs/.
    workdir: A new folder, or that of an earlier run of the same model, which is resumed.
    profile: 'START:STOP' traces these steps, both included, to the workdir's TensorBoard folder.
    process_started: When this process started, in seconds since the epoch, if it exists for this
      training only, as in `ppn train`. Then a step that hangs ends it with exit code 1; otherwise
      the hang is only logged.

  Returns:
    The scores of the last evaluation, or None if the config asks for none.

  Raises:
    InputError: If config, data or workdir are wrong, for example if another process trains in the
      workdir. Raised before the first compilation, and nothing is overwritten.
    TrainingDiverged: If a loss or gradient is not finite, or the loss stays a thousand times above
      the first one.
    Interrupted: On Ctrl-C, after the step is saved.
    Preempted: On SIGTERM, or notice of maintenance of a TPU, after the step is saved.
    SaveFailed: If the last step could not be saved, or any with train.on_save_error='stop'.
  """
  keep_freed_memory_on_cpu()
  timeline = Timeline(process_started)
  # 1. Check all of the user's input before anything is written.
  config = complete(config)
  check_data(config)
  check_numbers(config)
  if jax.process_index() == 0:  # The only one that logs.
    check_loggers(config.train.loggers)
  traced = profiling.parse_steps(profile, config.train.steps or sys.maxsize)
  mesh = sharding.data_mesh()
  earlier = earlier_run(workdir)
  plan = time_budget.recorded_plan(earlier.workdir, config.train.minutes) if earlier else None
  asked, config = config, time_budget.with_planned_steps(config, plan)
  if earlier:
    check_fraction(earlier, config)
  splits = ('train', 'eval') if config.train.evaluate_every else ('train',)
  kept_scans = SharedScans(workdir)
  with scans.kept_by(kept_scans):
    sources = open_splits(config, splits, categories=earlier.categories if earlier else None)
  source, eval_source = sources['train'], sources.get('eval')
  found = report(source, 'data.train', image_size=config.model.image_size,
                 resize_mode=config.data.resize_mode, ignore_crowd=config.matching.ignore_crowd)
  check_learnable(found)
  run = create_run(workdir, config, source.categories)
  detector, optimizer, evaluator = run.detector(), run.optimizer(), None
  check_batch(config, 'train.batch_size', config.train.batch_size, optimizer.micro_batches, mesh)
  if eval_source is not None:
    evaluator = build_evaluator(run, detector, mesh, source=eval_source)
    if config.train.patience:
      evaluator.check_metric(config.train.stop_metric, 'train.stop_metric')
  pipeline = build_input_pipeline(config, source, mesh)
  abstract = abstract_state(detector, optimizer, mesh)
  initialize = registry.bind('init', initial_weights, config.init.to_dict(),
                             given=['like', 'categories'])
  with (RunLog() as run_log, timeline, CacheUse() as cache_use,
        owned_by_first(Ownership(run.workdir, 'training')) as owner,
        contextlib.nullcontext(_latest_or_initial(run, initialize, abstract)) as (latest, initial),
        PreemptionNotice() as notice, run.checkpoints(read_only=False) as checkpoints,
        failures.shows_stacks(lambda: hangs.show_stacks(run_log)),
        failures.fail_together(except_for=Preempted), contextlib.ExitStack() as closing):
    if initial:
      check_epsilon(folded_layers(initial.variables), config.model.layers.norm_epsilon)
    if latest is None:
      run = _with_init(run, config.init, report=initial.report.lines() if initial else ())
    elif earlier:  # Its weights started from this, whatever the config says now.
      run = _with_init(run, earlier.config.init)
    if owner:
      resuming.clean_up(run)
    restored = resuming.restore(checkpoints, earlier, abstract, detector, optimizer, mesh)
    start, state = restored or (0, None)
    budget = TimeBudget(config.train.minutes, resuming.time_spent(checkpoints, start))
    stopping = resuming.early_stopping(run, start)
    ending = resuming.ending(run, start, budget, stopping)
    must_evaluate = resuming.lacks_evaluation(run, start, at_end=ending is not None)
    if (ending or start >= config.train.steps) and not must_evaluate:
      logger.info(f'nothing to do: {run.workdir} ' + (
          f'ended at step {start:,}, since {ending.reason}; change train.patience or '
          'train.minutes to continue' if ending else f'is trained to step {start:,} already'))
      if owner and ending:
        run.note_ending(ending)
      return None
    logger.info(_describe(run, abstract, optimizer, source, mesh))
    if optimizer.freeze and latest is None and initial is None:
      logger.warning(f'optim.freeze={optimizer.freeze} freezes random values, since neither '
                     'init.weights nor init.backbone is given')
    if kept_back := describe_fraction(config, source):
      logger.info(kept_back)
    if repeated := describe_repeats(source, config.data.repeat_threshold):
      logger.info(repeated)
    for line in dict.fromkeys([*found.lines, *(
        report(eval_source, 'data.eval').lines if eval_source else ())]):
      logger.info(line)
    # 2. The state: of the newest undamaged checkpoint, or a new one.
    if state is not None:
      logger.info(f'resuming {run.workdir} from step {start:,}')
      for key in ('weights', 'backbone'):
        if config.init.get(key, '') not in ('', AUTO, run.config.init.get(key, '')):
          logger.warning(f'init.{key}={config.init[key]} is ignored: the run has weights already')
    if initial is not None:
      logger.info(f'starting from {initial.report}')
    if state is None:
      state = _first_state(jit_init(detector, optimizer, mesh), config.seed, initial)
    if not start:
      run, state = _with_batch_norm(run, state, source, config.init.norm_images)
    if config.train.minutes and not plan:
      if ending or start >= config.train.steps:
        plan = time_budget.Plan(config.train.minutes, start, 0.0, 0.0)
      else:
        plan = time_budget.make_plan(
            config, run.workdir, budget, state, start, pipeline.jit_step(detector, optimizer),
            pipeline, evaluator, notice, Progress(config.train.steps))
      config = time_budget.with_planned_steps(asked, plan)
      run = _with_steps(run, config.train.steps)
      optimizer = run.optimizer()
    if plan:
      budget.step_seconds = plan.step_seconds
    if plan and start < config.train.steps and not ending:
      logger.info(plan.describe(config) + (
          f'; {duration(budget.seconds)} are spent' if start else ''))
    # 3. The steps.
    writer = None
    name = coordination.broadcast_json(f'{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}')
    run_log.open(run.workdir, f'{name}-process-{jax.process_index()}.log')
    if jax.process_index() == 0:
      if plan:
        time_budget.write_plan(run.workdir, plan)
      run.save()
      kept_scans.save()
      writer = closing.enter_context(MetricsWriter(run.workdir, start, loggers=Loggers(
          config.train.loggers, run.workdir, plain(config))))
      timeline.open(run.workdir, f'{name}.json', start, processes=jax.process_count(),
                    devices=mesh.size, xla_options=list(config.train.xla_options))
    if traced and traced[-1] <= start:
      logger.warning(f'--profile={profile}: these steps were taken before, nothing is traced')
    trace = profiling.StepTrace(traced if writer else range(0), run.workdir / 'tensorboard')
    loop = TrainLoop(run, mesh, checkpoints, Progress(config.train.steps), writer, evaluator,
                     notice, trace, owner, resuming.first_loss(run, start), stopping, budget,
                     timeline=timeline, watch=hangs.step_watch(config, run_log,
                                                               ends=process_started is not None),
                     cache_use=cache_use)
    scores = loop.evaluate_saved(start, state) if must_evaluate else None
    ending = resuming.ending(run, start, budget, stopping)
    if start < config.train.steps and not ending:
      if owner:
        run.note_ending(None)
      scores = loop.run_steps(state, start, pipeline.jit_step(detector, optimizer), pipeline)
      ending = resuming.ending(run, loop.last_step, budget, stopping)
    if ending:
      logger.info(f'ended at step {ending.step:,} of {config.train.steps:,}: {ending.reason}'
                  f'{resuming.note_on_best(stopping, checkpoints)}')
      if owner:
        run.note_ending(ending)
    elif plan:
      logger.info(f'took {duration(budget.seconds)} of train.minutes={plan.minutes:g}')
    return scores


def _latest_or_initial(run: Run, initialize: Callable, abstract: TrainState
                       ) -> tuple[int | None, TransferredWeights | None]:
  """Returns the newest step, or else the weights that the run starts from."""
  with run.checkpoints(read_only=True) as checkpoints:
    latest = checkpoints.latest()
  if latest is not None:
    return latest, None
  return None, initialize(like=abstract.variables, categories=run.categories)


def _first_state(initialize: Callable[[int], TrainState], seed: int,
                 initial: TransferredWeights | None) -> TrainState:
  """Returns the state before the first step."""
  state = initialize(seed)
  return state if initial is None else with_weights(state, initial.variables, initial.partial)


def _with_steps(run: Run, steps: int) -> Run:
  """Returns `run` with this number of steps in its config."""
  config = run.config.copy_and_resolve_references().unlock()
  config.train.steps = steps
  return dataclasses.replace(run, config=config.lock())


def _with_batch_norm(run: Run, state: TrainState, source: Source, count: int
                     ) -> tuple[Run, TrainState]:
  """Puts batch norm back into layers that it is folded into; returns the run with a report of it.

  Args:
    run: The run.
    state: Its state before the first step.
    source: Training data.
    count: Number of training images to take the statistics from; 0 changes nothing.

  Raises:
    InputError: If images cannot be read.
  """
  layers = folded_layers(state.variables)
  if not layers:
    return run, state
  what = f'batch norm of {len(layers)} layers was folded into their kernels'
  check_epsilon(layers, run.config.model.layers.norm_epsilon)
  if not count:
    if run.config.model.layers.norm != 'frozen':
      logger.warning(f'{what}, and with init.norm_images=0 batch statistics will rescale them')
    return run, state
  exact = run.detector(dtype='float32', matmul_dtype='same')
  restored = restore_batch_norm(exact, state.variables, layers,
                                sample_images(run.config, source, count))
  line = (f'{what}: put back from {count:,} training images; {restored.still:,} of '
          f'{restored.channels:,} channels never move')
  logger.info(line)
  report = tuple(run.config.init.report)
  if line not in report:  # It is there after a kill before the first checkpoint.
    run = _with_init(run, run.config.init, report=(*report, line))
  return run, with_weights(state, restored.variables)


def _with_init(run: Run, init: ConfigDict, **changes: Any) -> Run:
  """Returns `run` with this block `init` in its config, with changes."""
  config = run.config.copy_and_resolve_references().unlock()
  config.init = {**init.to_dict(), **changes}
  return dataclasses.replace(run, config=config.lock())


def _describe(run: Run, state: TrainState, optimizer: Optimizer, source: Source, mesh: Mesh
              ) -> str:
  config, params = run.config, state.variables['params']
  count, trained = (sum(p.size for p in jax.tree.leaves(tree))
                    for tree in (params, trainable(params, optimizer.freeze)))
  of_them = f' ({trained:,} trained)' if trained < count else ''
  device = mesh.devices.flat[0].device_kind
  return (f'{config.model.neck.name} on {config.model.backbone.name}, '
          f'{count:,} parameters{of_them}, {len(run.categories)} classes, '
          f'{show_size(config.model.image_size)} px; {len(source):,} images, '
          f'batch {config.train.batch_size}, on {mesh.size} x {device}')
