"""Finds out where a run continues: its state, and what its earlier processes have recorded.

All processes call these functions together and get the same results.
"""

import jax
from jax.sharding import Mesh

from ppn_jax import storage
from ppn_jax.checkpoints import retention
from ppn_jax.checkpoints.manager import BEST_METRIC, Checkpoints
from ppn_jax.detector import Detector
from ppn_jax.distributed import coordination, sharding
from ppn_jax.jobs import time_budget
from ppn_jax.jobs.time_budget import TimeBudget
from ppn_jax.run import Ending, Run
from ppn_jax.telemetry import metrics
from ppn_jax.training.optimizer import Optimizer
from ppn_jax.training.state import TrainState
from ppn_jax.training.stopping import EarlyStopping, best_step
from ppn_jax.training.train_step import abstract_state_to_read, jit_first_state


def restore(checkpoints: Checkpoints, earlier: Run | None, abstract: TrainState,
              detector: Detector, optimizer: Optimizer, mesh: Mesh
              ) -> tuple[int, TrainState] | None:
  """Restores the newest undamaged step; returns None if there is none.

  Of an imported run, which has taken no step, only the variables are read, so that it can be
  trained with any optimizer, frozen parameters and moving average.
  """
  if earlier is None or checkpoints.latest() != 0:
    return checkpoints.restore_newest(abstract)
  like = abstract_state_to_read(detector, mesh, average=bool(earlier.config.optim.ema_decay),
                                shard_state=False)
  restored = checkpoints.restore_newest(like)
  return restored and (0, jit_first_state(detector, optimizer, mesh)(restored[1].variables))


def clean_up(run: Run) -> None:
  """Removes files that killed processes have left behind."""
  retention.remove_dead_readers(run.readers)
  for folder in (run.workdir, run.readers, run.workdir / 'evaluation'):
    storage.remove_partial(folder)
  for step in retention.steps_in(run.workdir / 'evaluation'):
    storage.remove_partial(run.workdir / 'evaluation' / str(step))
  time_budget.remove_scratch(run.workdir / time_budget.SCRATCH)


def first_loss(run: Run, start: int) -> float | None:
  """Returns the loss of the run's first step, the same in all processes; None at its start."""
  known = metrics.first_loss(run.workdir) if start and jax.process_index() == 0 else None
  return coordination.broadcast_json(known)


def time_spent(checkpoints: Checkpoints, start: int) -> float:
  """Returns the seconds that the steps up to `start` took, the same in all processes.

  Checkpoints of earlier versions do not say it; their steps count as 0.
  """
  known = checkpoints.notes(start).get(time_budget.SPENT) if (
      start and jax.process_index() == 0) else None
  return coordination.broadcast_json(known or 0.0)


def early_stopping(run: Run, start: int) -> EarlyStopping:
  """Returns the rule of the config with the evaluations up to `start`, in all processes.

  Later evaluations are of steps that will be taken again.
  """
  train, known = run.config.train, {}
  if start and jax.process_index() == 0:
    name = f'eval/{train.stop_metric}'
    known = {line['step']: line[name] for line in metrics.read(run.workdir / 'metrics.jsonl')
             if line['step'] <= start and name in line}
  known = coordination.broadcast_json([*known.items()])
  return EarlyStopping(train.stop_metric, train.patience, train.min_improvement,
                       {int(step): value for step, value in known})


def ending(run: Run, step: int, budget: TimeBudget, stopping: EarlyStopping) -> Ending | None:
  """Returns why training ends at `step`, before its last one; None if it does not.

  All processes call it together.
  """
  if not 0 < step < run.config.train.steps:
    return None
  reason = stopping.reason() if stopping.reached() else (
      budget.reason() if budget.is_spent() else '')
  if not reason:
    return None
  return Ending(step, '; '.join(filter(None, [reason, stopping.describe_best()])))


def note_on_best(stopping: EarlyStopping, checkpoints: Checkpoints) -> str:
  """Returns a note if the checkpoint of the best step has been deleted, else ''."""
  best = best_step(stopping.values)
  if best is None or best.step in checkpoints.steps():
    return ''
  return f', but its checkpoint is deleted: train.keep_best keeps those of highest {BEST_METRIC}'


def lacks_evaluation(run: Run, step: int, at_end: bool) -> bool:
  """Returns whether a run was ended, or failed, when it should have evaluated `step`.

  Args:
    run: The run.
    step: The step.
    at_end: Whether training ends with it, before its last step.
  """
  train = run.config.train
  due = train.evaluate_every and (
      step % train.evaluate_every == 0 or step == train.steps or at_end)
  if not step or not due:
    return False
  # Only the first process writes the file, and others may not see it.
  return sharding.value_of_first(not metrics.has_evaluation(run.workdir, step))
