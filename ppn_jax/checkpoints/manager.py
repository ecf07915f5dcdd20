"""The checkpoint service: saves while training continues, keeps the last and the best steps, and
restores the newest one that is undamaged."""

import contextlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from ppn_jax import storage
from ppn_jax.checkpoints import integrity, orbax
from ppn_jax.checkpoints.retention import BestCheckpoints, DecidedByFirst, Stamp
from ppn_jax.distributed import coordination, sharding
from ppn_jax.errors import InputError, Stopped, StoreError, is_outage
from ppn_jax.training.state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar('T')

_policies = ocp.checkpoint_managers

# The metric that the best checkpoint is highest in.
BEST_METRIC = 'AP'

# Folder that damaged checkpoints are moved to, beside that of the others.
DAMAGED_FOLDER = 'damaged_checkpoints'

# Orbax's metadata file of a checkpoint, and the key of our checksums in it.
_DESCRIPTION, _CHECKSUMS = '_CHECKPOINT_METADATA', 'checksums'

# Key of the notes that a caller adds to a checkpoint, beside the checksums.
_NOTES = 'notes'

# Statuses of a store that cannot be used now; they say nothing about its content.
_UNREACHABLE = ('PERMISSION_DENIED', 'UNAUTHENTICATED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED',
                'RESOURCE_EXHAUSTED')


class DamagedCheckpoint(InputError):
  """Raised if a checkpoint does not restore what was saved."""


class SaveFailed(Stopped):
  """Raised if a checkpoint could not be written. Earlier ones are untouched."""


class Checkpoints:
  """The checkpoints in a folder, a sub-folder for each step.

  Saving is asynchronous: `save` dispatches a copy of the state in device memory and returns; a
  thread then transfers, checksums and writes it. Meanwhile each device holds the state twice, and
  whole if it is split over processes. The threads of several processes synchronise only at
  barriers of JAX's coordination service: a collective could run in another order than those of
  the step on another host, and deadlock both.

  A step appears under its final name only when all its files are written, so that a killed run
  leaves complete checkpoints only. Later damage is detected by checksums of the arrays, which are
  kept in Orbax's metadata of the step. Close it, or use it as a context manager, so that the last
  save is completed.

  Args:
    folder: Created if it does not exist.
    keep_last: Number of newest steps to keep.
    keep_best: Number of steps with the highest AP to keep in addition.
    read_only: Set it to look at a run that another process may be writing.
    evaluations: Folder of the scores of evaluation jobs; see `retention`.
    readers: Folder in which readers name the steps they are using; see `retention`.

  Attributes:
    failures: Number of failed saves since the last successful one.
  """

  def __init__(self, folder: storage.Path, *, keep_last: int = 3, keep_best: int = 1,
               read_only: bool = False, evaluations: storage.Path | None = None,
               readers: storage.Path | None = None):
    if keep_last < 1 or keep_best < 0:
      raise InputError(f'train.keep_last={keep_last} must be at least 1 and '
                       f'train.keep_best={keep_best} at least 0')
    self.failures, self._saving = 0, None
    self._pool = ThreadPoolExecutor(1, thread_name_prefix='ppn checkpoint')
    self._write: Future | None = None
    self._folder, self._read_only = storage.absolute(folder), read_only
    self._keep = _policies.AnyPreservationPolicy([
        _policies.LatestN(keep_last),
        DecidedByFirst(BestCheckpoints(keep_best, _rank, evaluations, readers, self.stamp))])
    if not read_only:  # Orbax does not do this if the active processes are named.
      if jax.process_index() == 0:
        self._folder.mkdir(parents=True, exist_ok=True)
      coordination.wait_for_all()
    self._manager = self._open()

  def _open(self) -> orbax.Manager:
    with orbax.without_routine_warnings():
      return orbax.Manager(
          self._folder, item_handlers={'state': ocp.StandardCheckpointHandler()},
          options=ocp.CheckpointManagerOptions(
              # Orbax writes metrics only if it has a best_fn; the policy decides what is kept.
              preservation_policy=self._keep, best_fn=_rank, best_mode='max',
              read_only=self._read_only, create=False,
              multiprocessing_options=(orbax.reader_options() if self._read_only
                                       else orbax.writer_options()),
              cleanup_tmp_directories=not self._read_only,
              # Otherwise threads that wait for a folder which cannot be created keep the process
              # from ending for ten minutes.
              async_options=ocp.AsyncOptions(create_directories_asynchronously=False)))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    # A failing save must not hide the error that came first.
    with contextlib.suppress(SaveFailed) if kind else contextlib.nullcontext():
      self.close()

  def steps(self) -> list[int]:
    """Returns the saved steps, including the one that is being saved, ascending."""
    saving = () if self._saving is None else (self._saving,)
    return sorted({*self._manager.all_steps(), *saving})

  def latest(self) -> int | None:
    """Returns the newest of `steps`, or None if there is none."""
    return max(self.steps(), default=None)

  def stamp(self, step: int) -> Stamp | None:
    """Returns what identifies the checkpoint of a step, see `read_stamp`."""
    return read_stamp(self._folder_of(step))

  def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None,
           notes: Mapping[str, Any] | None = None) -> None:
    """Starts to save `state` under `step`, with its metrics if it was evaluated.

    Blocks until the previous save is complete. `wait` raises what goes wrong in this one. `notes`
    are JSON values that the checkpoint keeps; of several processes, those of the first.

    Raises:
      SaveFailed: If the previous save failed, or there is no memory for a copy; this save is not
        started then.
    """
    self.wait()
    try:
      copy = _copy(state)
    except Exception as e:  # Out of memory, for example.
      raise self._failed(f'step {step:,} could not be saved', e) from e

    def write() -> None:
      sums = integrity.checksums(copy)
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(copy)),
                         metrics=metrics, force=True,
                         custom_metadata={_CHECKSUMS: sums, _NOTES: dict(notes or {})})
      self._manager.wait_until_finished()

    self._saving = step
    self._write = self._pool.submit(write)

  def is_saving(self) -> bool:
    """Returns whether a save is in progress."""
    return self._write is not None and not self._write.done()

  def notes(self, step: int) -> dict[str, Any]:
    """Returns the notes of a saved step; {} for one of an earlier version."""
    return _retried(lambda: read_notes(self._folder_of(step)))

  def restore(self, like: TrainState | None, step: int) -> TrainState:
    """Restores the state of `step`, with the shapes, types and shardings of `like`.

    Args:
      like: Arrays or `jax.ShapeDtypeStruct`s with shardings. With `opt_state=None` the optimizer's
        state is neither read nor checked. None is for callers that do not know the model: it
        restores whatever was saved except the optimizer's state, replicated on every device.
      step: One of `steps()`.

    Raises:
      InputError: If there is no such step, or it is of another model.
      DamagedCheckpoint: If it does not restore what was saved, here or in another process.
      StoreError: If it cannot be read now.
    """
    self.wait()
    try:
      if step not in self.steps():  # May differ between processes while another run deletes it.
        raise InputError(f'{self._manager.directory}: no checkpoint of step {step}; there are '
                         f'{", ".join(map(str, self.steps())) or "none"}')
      state, error = self._read(like, step), None
    except Exception as e:  # Of any kind, since the other processes wait for the result.
      state, error = None, e
    if not sharding.all_true(error is None):
      raise error or DamagedCheckpoint(f'{self._folder_of(step)} is damaged: another process '
                                       'cannot read it')
    return state

  def restore_newest(self, like: TrainState | None) -> tuple[int, TrainState] | None:
    """Restores the newest undamaged step: (step, state); None if there are no steps at all.

    Warns of damaged steps after it and, unless this is read-only, moves them to the folder
    `damaged_checkpoints` beside this one, so that these steps can be saved again.

    Args:
      like: See `restore`.

    Raises:
      InputError: If all are damaged, or the newest undamaged one is of another model.
    """
    for line in self.lost_metrics():
      logger.warning(line)
    found = self.newest_undamaged(like)
    if found is None:
      return None
    step, state, damaged = found
    for bad_step, line in damaged.items():
      logger.warning(line)
      if not self._read_only:
        self._set_aside(bad_step)
    return step, state

  def lost_metrics(self) -> list[str]:
    """Returns a line for each step whose metrics cannot be read."""
    return [f'the metrics of {self._folder_of(step)} are damaged; it counts as not evaluated'
            for step in sorted(self._manager.steps_without_metrics)]

  def newest_undamaged(self, like: TrainState | None
                       ) -> tuple[int, TrainState, dict[int, str]] | None:
    """Returns (step, state, a line for each damaged step after it); None if there are no steps.

    See `restore_newest`, which also logs these lines.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        state = self.restore(like, step)
      except DamagedCheckpoint as e:
        damaged.append((step, str(e)))
        continue
      return step, state, {bad_step: f'{text}; going back to step {step:,}'
                           for bad_step, text in damaged}
    if not damaged:
      return None
    raise InputError(f'every checkpoint in {self._folder} is damaged: ' + '; '.join(
        text for _, text in damaged) + '. Restore one from a backup, or use another workdir')

  def _read(self, like: TrainState | None, step: int) -> TrainState:
    where = self._folder_of(step)
    folder = self._manager.directory / str(step) / 'state'
    with _as_damage(where):
      tree = _retried(lambda: ocp.PyTreeCheckpointHandler().metadata(folder)).tree
      saved = integrity.shapes(tree)
      description = _description(where)
      sums = description.get('custom_metadata', {}).get(_CHECKSUMS)
      if not saved or not description.get('commit_timestamp_nsecs'):
        raise ValueError('its metadata is incomplete')
      if sums is not None and integrity.shapes_of_checksums(sums) != saved:
        raise ValueError('its metadata contradicts itself')
      like = _abstract_state(tree) if like is None else like
    if like.opt_state is None:
      saved, sums = _without_optimizer(saved), sums and _without_optimizer(sums)
    _check_same_tree(saved, integrity.shapes(like), where)
    with _as_damage(where):
      state = _retried(lambda: _restore_arrays(folder, like))
      # Checkpoints of earlier versions have no checksums.
      wrong = sums and integrity.first_difference(sums, integrity.checksums(state))
      if wrong:
        raise ValueError(f'{wrong} is not what was saved')
    return state

  def _folder_of(self, step: int) -> storage.Path:
    return self._folder / str(step)

  def _set_aside(self, step: int) -> None:
    """Moves a damaged step out of the way, in the first process only."""
    if jax.process_index() == 0:
      to = self._folder.with_name(DAMAGED_FOLDER)
      names = itertools.chain([str(step)], (f'{step}-{n}' for n in itertools.count(1)))
      free = next(path for path in map(to.joinpath, names) if not path.exists())
      storage.move_folder(self._folder_of(step), free)
    sharding.all_true(True)  # The others wait.
    self._manager.reload()

  def _failed(self, what: str, error: Exception) -> SaveFailed:
    """Returns the error to raise, after reopening Orbax, whose state does not survive failures."""
    self.failures, self._saving = self.failures + 1, None
    with contextlib.suppress(Exception):
      self._manager.close()
    with contextlib.suppress(Exception):
      self._manager = self._open()
    reason = orbax.reason(error)[:300] or type(error).__name__
    newest = self.latest()
    return SaveFailed(f'{what}: {reason}; the newest checkpoint in {self._folder} is ' +
                      ('none' if newest is None else f'step {newest:,}'))

  def wait(self) -> None:
    """Blocks until the last save is on disk.

    Raises:
      SaveFailed: If it could not be written.
    """
    try:
      if self._write is not None:
        try:
          self._write.result()
        finally:
          if self._write.done():  # An interrupt leaves it running.
            self._write = None
    except Exception as e:
      raise self._failed(f'step {self._saving:,} could not be saved', e) from e
    if self._saving is not None:
      self.failures, self._saving = 0, None

  def close(self) -> None:
    """Completes the last save. Raises SaveFailed if that fails."""
    try:
      self.wait()
    finally:
      self._pool.shutdown()
      self._manager.close()


def _copy(tree: Any) -> Any:
  """Dispatches a copy of a tree of arrays, which a step that donates them cannot overwrite.

  Arrays that are split over processes become replicated, so that a thread can read them without a
  collective. All processes must call this at the same place in their program.
  """
  def readable(leaf: jax.Array) -> jax.sharding.Sharding:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
      return leaf.sharding
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())  # pyright: ignore

  return jax.jit(_copy_leaves, out_shardings=jax.tree.map(readable, tree))(tree)


def _copy_leaves(tree: Any) -> Any:  # Not nested, so that JAX finds its compiled program again.
  return jax.tree.map(jnp.copy, tree)


def _abstract_state(metadata: dict[str, Any]) -> TrainState:
  """Returns shapes and types of a state from Orbax's metadata, replicated, without optimizer."""
  replicated = sharding.replicated(sharding.data_mesh())
  return TrainState(**jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
      {**metadata, 'opt_state': None}))


def _without_optimizer(by_name: dict[str, T]) -> dict[str, T]:
  return {name: value for name, value in by_name.items() if name.split('/')[0] != 'opt_state'}


def _restore_arrays(folder: Any, like: TrainState) -> TrainState:
  """Reads the arrays of `like`, and no others."""
  partial = like.opt_state is None
  item = {name: value for name, value in like._asdict().items() if jax.tree.leaves(value)} if (
      partial) else like
  found = ocp.PyTreeCheckpointHandler().restore(folder, args=ocp.args.PyTreeRestore(
      item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=partial))
  return like._replace(**found) if partial else found


def read_stamp(checkpoint: storage.Path) -> Stamp | None:
  """Returns what identifies the checkpoint in a folder, without reading its arrays.

  Checkpoints of earlier versions, without checksums, are identified by when they were saved. None
  if there is no checkpoint, or it is damaged.

  Raises:
    OSError: If it cannot be read now.
  """
  try:
    description = _description(checkpoint)
    saved = description['commit_timestamp_nsecs']
    sums = description.get('custom_metadata', {}).get(_CHECKSUMS)
    return Stamp(integrity.digest(sums) if sums else f'saved at {saved}', saved / 1e9)
  except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
    return None


def read_notes(checkpoint: storage.Path) -> dict[str, Any]:
  """Returns the notes of the checkpoint in a folder; {} for one of an earlier version."""
  return _description(checkpoint).get('custom_metadata', {}).get(_NOTES, {})


def _description(checkpoint: storage.Path) -> dict[str, Any]:
  """Returns Orbax's metadata of a checkpoint. Orbax's own reader hides that it is unreadable."""
  return json.loads(storage.read_bytes(checkpoint / _DESCRIPTION))


def _is_outage(error: BaseException) -> bool:
  """Extends `errors.is_outage` to TensorStore, whose errors have statuses and numbers as text."""
  text = str(error)
  number = re.search(r"os_error_code='(\d+)'", text)
  return (is_outage(error) or any(status in text for status in _UNREACHABLE)
          or (number is not None and is_outage(OSError(int(number[1]), ''))))


def _retried(act: Callable[[], T]) -> T:
  return storage.retried(act, _is_outage)


def _rank(metrics: dict[str, float | None]) -> float:
  """Returns the metric that decides which checkpoint is best, -inf if it does not exist.

  Earlier versions wrote -1 for a metric that does not exist.
  """
  value = metrics.get(BEST_METRIC)
  return -math.inf if value is None or math.isnan(value) or value < 0 else value


@contextlib.contextmanager
def _as_damage(where: storage.Path):
  """Turns whatever reading a broken file raises into DamagedCheckpoint or StoreError."""
  try:
    yield
  except (PermissionError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:
    reason = ' '.join(str(e).split())
    if _is_outage(e):
      reason = orbax.reason(e)[:300] or 'not enough memory'
      raise StoreError(f'{where} cannot be read now: {reason}; it is left as it is. If this '
                       'persists, move it away by hand to use the checkpoint before it') from e
    if not where.exists():
      reason = 'it was deleted while it was read'
    raise DamagedCheckpoint(f'{where} is damaged: {reason[:200] or type(e).__name__}') from e


def _check_same_tree(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]],
                     where: storage.Path) -> None:
  """Raises InputError, naming one difference, unless both trees have the same names and shapes."""
  if any(n.startswith('average') for n in there) != any(n.startswith('average') for n in here):
    raise InputError(f'{where} and this config differ in whether a moving average of the '
                     'weights is kept; optim.ema_decay cannot be turned on or off within a run')
  # Variables first: the rest follows from them.
  for name in sorted(there.keys() | here.keys(), key=lambda n: (not n.startswith('variables'), n)):
    if there.get(name) != here.get(name):
      found = (f'{name} is {there.get(name, "absent")} there and {here.get(name, "absent")} '
               'in this one')
      if name.startswith('opt_state'):
        raise InputError(f'{where} is a checkpoint of another optimizer: {found}; optim.optimizer '
                         'and optim.freeze cannot be changed within a run; start another workdir '
                         f'from it with init.weights={where.parent.parent}')
      raise InputError(f'{where} is a checkpoint of another model: {found}')
