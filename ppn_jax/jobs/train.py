"""`train(config, workdir)`: trains and evaluates the detector of a config."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import registry, storage
from ppn_jax.checkpoints import retention
from ppn_jax.config import complete
from ppn_jax.data.report import check_learnable, report
from ppn_jax.data.source import Source
from ppn_jax.data.splits import check_data, describe_fraction, open_splits
from ppn_jax.distributed import coordination, failures, sharding
from ppn_jax.distributed.ownership import Ownership, owned_by_first
from ppn_jax.distributed.preemption import Preempted, PreemptionNotice
from ppn_jax.errors import InputError
from ppn_jax.jobs.evaluator import build_evaluator
from ppn_jax.jobs.train_loop import TrainLoop
from ppn_jax.metrics.coco import Scores
from ppn_jax.run import Run, check_batch, create_run, is_run, open_run
from ppn_jax.telemetry import profiling
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.telemetry.metrics import MetricsWriter, first_loss, has_evaluation
from ppn_jax.telemetry.progress import Progress
from ppn_jax.training.input_pipeline import build_input_pipeline
from ppn_jax.training.optimizer import Optimizer
from ppn_jax.training.parameter_paths import trainable
from ppn_jax.training.state import TrainState
from ppn_jax.training.train_step import abstract_state, jit_init
from ppn_jax.weights.initial import initial_weights, with_weights
from ppn_jax.weights.transfer import TransferredWeights

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | pathlib.Path, *,
          profile: str = '') -> Scores | None:
  """Trains the detector of a config, or resumes its training.

  The same config and seed give the same run, bit for bit on one machine, whether or not it was
  killed and started again in between.

  Args:
    config: A config like those in configs/.
    workdir: A new folder, or that of an earlier run of the same model, which is resumed.
    profile: 'START:STOP' traces these steps, both included, to the workdir's TensorBoard folder.

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
  keep_freed_memory()
  # 1. Check all of the user's input before anything is written.
  config = complete(config)
  check_data(config)
  _check_numbers(config)
  traced = profiling.parse_steps(profile, config.train.steps)
  mesh = sharding.data_mesh()
  earlier = _earlier_run(workdir)
  if earlier:
    _check_fraction(earlier, config)
  splits = ('train', 'eval') if config.train.evaluate_every else ('train',)
  sources = open_splits(config, splits, categories=earlier.categories if earlier else None)
  source, eval_source = sources['train'], sources.get('eval')
  found = report(source, 'data.train', image_size=config.model.image_size,
                 ignore_crowd=config.matching.ignore_crowd)
  check_learnable(found)
  run = create_run(workdir, config, source.categories)
  detector, optimizer, evaluator = run.detector(), run.optimizer(), None
  check_batch(config, 'train.batch_size', config.train.batch_size, optimizer.micro_batches, mesh)
  if eval_source is not None:
    evaluator = build_evaluator(run, detector, mesh, source=eval_source)
  pipeline = build_input_pipeline(config, source, mesh)
  abstract = abstract_state(detector, optimizer, mesh)
  initialize = registry.bind('init', initial_weights, config.init.to_dict(),
                             given=['like', 'categories'])
  with (owned_by_first(Ownership(run.workdir, 'training')) as owner,
        contextlib.nullcontext(_latest_or_initial(run, initialize, abstract)) as (latest, initial),
        PreemptionNotice() as notice, run.checkpoints(read_only=False) as checkpoints,
        failures.fail_together(except_for=Preempted), contextlib.ExitStack() as closing):
    if latest is None:
      run = _with_init(run, config.init, report=initial.report.lines() if initial else ())
    elif earlier:  # Its weights started from this, whatever the config says now.
      run = _with_init(run, earlier.config.init)
    if owner:
      _clean_up(run)
    start, state = checkpoints.restore_newest(abstract) or (0, None)
    must_evaluate = _lacks_evaluation(run, start)
    if start >= config.train.steps and not must_evaluate:
      logger.info(f'nothing to do: {run.workdir} is trained to step {start:,} already')
      return None
    logger.info(_describe(run, abstract, optimizer, source, mesh))
    if optimizer.freeze and latest is None and initial is None:
      logger.warning(f'optim.freeze={optimizer.freeze} freezes random values, since neither '
                     'init.weights nor init.backbone is given')
    if kept_back := describe_fraction(config, source):
      logger.info(kept_back)
    for line in dict.fromkeys([*found.lines, *(
        report(eval_source, 'data.eval').lines if eval_source else ())]):
      logger.info(line)
    # 2. The state: of the newest undamaged checkpoint, or a new one.
    if state is not None:
      logger.info(f'resuming {run.workdir} from step {start:,}')
      for key in ('weights', 'backbone'):
        if config.init.get(key, '') not in ('', run.config.init.get(key, '')):
          logger.warning(f'init.{key}={config.init[key]} is ignored: the run has weights already')
    else:
      state = jit_init(detector, optimizer, mesh)(config.seed)
    if initial is not None:
      logger.info(f'starting from {initial.report}')
      state = with_weights(state, initial.variables, initial.partial)
    # 3. The steps.
    writer = None
    if jax.process_index() == 0:
      run.save()
      writer = closing.enter_context(MetricsWriter(run.workdir, start))
    if traced and traced[-1] <= start:
      logger.warning(f'--profile={profile}: these steps were taken before, nothing is traced')
    trace = profiling.StepTrace(traced if writer else range(0), run.workdir / 'tensorboard')
    loop = TrainLoop(run, mesh, checkpoints, Progress(config.train.steps), writer, evaluator,
                     notice, trace, owner, _first_loss(run, start))
    scores = loop.evaluate_saved(start, state) if must_evaluate else None
    if start < config.train.steps:
      scores = loop.run_steps(state, start, pipeline.jit_step(detector, optimizer), pipeline)
    return scores


def _earlier_run(workdir: str | pathlib.Path) -> Run | None:
  """Returns the run to resume, if there is one."""
  return open_run(workdir) if is_run(workdir) else None


def _latest_or_initial(run: Run, initialize: Callable, abstract: TrainState
                       ) -> tuple[int | None, TransferredWeights | None]:
  """Returns the newest step, or else the weights that the run starts from."""
  with run.checkpoints(read_only=True) as checkpoints:
    latest = checkpoints.latest()
  if latest is not None:
    return latest, None
  return None, initialize(like=abstract.variables, categories=run.categories)


def _clean_up(run: Run) -> None:
  """Removes files that killed processes have left behind."""
  retention.remove_dead_readers(run.readers)
  for folder in (run.workdir, run.readers, run.workdir / 'evaluation'):
    storage.remove_partial(folder)
  for step in retention.steps_in(run.workdir / 'evaluation'):
    storage.remove_partial(run.workdir / 'evaluation' / str(step))


def _first_loss(run: Run, start: int) -> float | None:
  """Returns the loss of the run's first step, the same in all processes; None at its start."""
  known = first_loss(run.workdir) if start and jax.process_index() == 0 else None
  return json.loads(coordination.broadcast(json.dumps(known).encode()))


def _lacks_evaluation(run: Run, step: int) -> bool:
  """Returns whether a run was ended, or failed, when it should have evaluated `step`."""
  train = run.config.train
  due = train.evaluate_every and (step % train.evaluate_every == 0 or step == train.steps)
  if not step or not due:
    return False
  # Only the first process writes the file, and others may not see it.
  return sharding.value_of_first(not has_evaluation(run.workdir, step))


def _with_init(run: Run, init: ConfigDict, **changes: Any) -> Run:
  """Returns `run` with this block `init` in its config, with changes."""
  config = run.config.copy_and_resolve_references().unlock()
  config.init = {**init.to_dict(), **changes}
  return dataclasses.replace(run, config=config.lock())


def _check_fraction(earlier: Run, config: ConfigDict) -> None:
  """Raises InputError if images that the run was trained on would be held out from now on."""
  then, now = earlier.config, config
  if now.data.eval_fraction and (then.data.eval_fraction, then.seed) != (
      now.data.eval_fraction, now.seed):
    raise InputError(
        f'workdir {earlier.workdir} was started with data.eval_fraction={then.data.eval_fraction} '
        f'and seed={then.seed}; with data.eval_fraction={now.data.eval_fraction} and '
        f'seed={now.seed} it would be evaluated on images that it was trained on; use another '
        'workdir, or --config.train.evaluate_every=0 --config.data.eval_fraction=0')


def _describe(run: Run, state: TrainState, optimizer: Optimizer, source: Source, mesh: Mesh
              ) -> str:
  config, params = run.config, state.variables['params']
  count, trained = (sum(p.size for p in jax.tree.leaves(tree))
                    for tree in (params, trainable(params, optimizer.freeze)))
  of_them = f' ({trained:,} trained)' if trained < count else ''
  device = mesh.devices.flat[0].device_kind
  return (f'{config.model.neck.name} on {config.model.backbone.name}, '
          f'{count:,} parameters{of_them}, {len(run.categories)} classes, '
          f'{config.model.image_size} px; {len(source):,} images, '
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
