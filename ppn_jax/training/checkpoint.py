"""The checkpoint service: saves beside the running step, keeps the last and the best, restores."""

import logging
import math
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState

_policies = ocp.checkpoint_managers

# What the best checkpoint is best in.
BEST_FIGURE = 'AP'


class Checkpoints:
  """The steps saved under one folder, one sub-folder each.

  Saving is asynchronous: `save` returns once the arrays are copied off the device. A step
  appears under its final name only when all its files are written, so that whatever a killed
  run leaves behind is either whole or not there. Close it, or use it as a context manager, so
  that the last save is completed.

  Args:
    folder: made if need be.
    keep_last: how many of the newest steps to keep.
    keep_best: how many of the steps with the highest AP to keep besides.
    read_only: for those who look at a run that another process may be writing.
  """

  def __init__(self, folder: pathlib.Path, *, keep_last: int = 3, keep_best: int = 1,
               read_only: bool = False):
    if keep_last < 1 or keep_best < 0:
      raise InputError(f'train.keep_last={keep_last} must be at least 1 and '
                       f'train.keep_best={keep_best} at least 0')
    # Orbax speaks of each of its steps at levels that users take for trouble.
    logging.getLogger('absl').setLevel(logging.ERROR)
    keep = _policies.AnyPreservationPolicy([
        _policies.LatestN(keep_last),
        _policies.BestN(get_metric_fn=_rank, n=keep_best,
                        keep_checkpoints_without_metrics=False)])
    self._manager = ocp.CheckpointManager(
        folder.absolute(), item_handlers={'state': ocp.StandardCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(
            # Orbax writes figures only if it is told what is best; what stays is the policy's say.
            preservation_policy=keep, best_fn=_rank, best_mode='max',
            read_only=read_only, create=not read_only, cleanup_tmp_directories=not read_only))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The steps that are whole, or will be once what is being saved is, ascending."""
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The newest of `steps`, or None when there is none."""
    return max(self.steps(), default=None)

  def save(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
    """Saves `state` under `step`, with the figures that it was evaluated to, if it was."""
    self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)),
                       metrics=figures, force=True)

  def restore(self, like: TrainState, step: int) -> TrainState:
    """The state of `step`, with the shapes, types and shardings of `like`.

    Args:
      like: arrays or `jax.ShapeDtypeStruct`s with shardings.
      step: one of `steps()`.

    Raises:
      InputError: there is no such step, or it holds another model.
    """
    self.wait()
    if step not in self.steps():
      raise InputError(f'{self._manager.directory}: no checkpoint of step {step}; there are '
                       f'{", ".join(map(str, self.steps())) or "none"}')
    saved = self._manager.item_metadata(step).state
    _check_same_tree(saved, like, self._manager.directory / str(step))
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    return self._manager.restore(step, args=arguments).state

  def wait(self) -> None:
    """Blocks until what was saved is on disk, and raises what went wrong there."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Completes what is being saved."""
    self._manager.close()


def _rank(figures: dict[str, float]) -> float:
  figure = figures.get(BEST_FIGURE, math.nan)
  return -math.inf if math.isnan(figure) else figure


def _check_same_tree(saved: Any, wanted: Any, where: pathlib.Path) -> None:
  """InputError, naming one difference, unless both trees have the same names and shapes."""
  there, here = _shapes(saved), _shapes(wanted)
  if any(n.startswith('average') for n in there) != any(n.startswith('average') for n in here):
    raise InputError(f'{where} and this config differ in whether an average of the weights is '
                     'kept; optim.ema_decay cannot be turned on or off in a run')
  # Variables before what follows from them.
  for name in sorted(there.keys() | here.keys(), key=lambda n: (not n.startswith('variables'), n)):
    if there.get(name) != here.get(name):
      raise InputError(
          f'{where} is a checkpoint of another model: {name} is {there.get(name, "absent")} '
          f'there and {here.get(name, "absent")} in this one')


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """'variables/params/...' -> shape; the same for a state and for Orbax's description of one."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
