"""The checkpoint service: saves beside the running step, keeps the last and the best, restores
what is whole."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ppn_jax import storage
from ppn_jax.checkpoints import integrity, orbax
from ppn_jax.checkpoints.background import Background, copied
from ppn_jax.checkpoints.retention import BestScored, Stamp
from ppn_jax.distributed import coordination, sharding
from ppn_jax.errors import InputError, Stopped, StoreError, is_outage
from ppn_jax.training.state import TrainState

T = TypeVar('T')

_policies = ocp.checkpoint_managers

# What the best checkpoint is best in.
BEST_FIGURE = 'AP'

# Where damaged checkpoints are moved to, beside the folder of the whole ones.
ASIDE = 'damaged_checkpoints'

# Orbax's description of a checkpoint, and what our checksums are called in it.
_DESCRIPTION, _CHECKSUMS = '_CHECKPOINT_METADATA', 'checksums'

# Statuses of a store that cannot be reached, which says nothing of what is in it.
_UNREACHABLE = ('PERMISSION_DENIED', 'UNAUTHENTICATED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED',
                'RESOURCE_EXHAUSTED')


class DamagedCheckpoint(InputError):
  """A checkpoint does not give back what was saved."""


class SaveFailed(Stopped):
  """A checkpoint could not be written; the ones before it are untouched."""


class Checkpoints:
  """The steps saved under one folder, one sub-folder each.

  Saving is asynchronous: `save` dispatches a copy of the state in device memory and returns; a
  thread then transfers, checks and writes it. While it does, each device holds the state twice,
  and whole if it is split over processes. Between processes that thread meets others only at
  barriers of JAX's coordination service: a collective could interleave with those of the step in
  another order on another host, and block both.

  A step appears under its final name only when all its files are written, so that whatever a
  killed run leaves behind is either whole or not there. What is damaged later is known by
  checksums of the arrays, which Orbax's description of the step holds. Close it, or use it as a
  context manager, so that the last save is completed.

  Args:
    folder: made if need be.
    keep_last: how many of the newest steps to keep.
    keep_best: how many of the steps with the highest AP to keep besides.
    read_only: for those who look at a run that another process may be writing.
    evaluations: where evaluation jobs leave their figures; see `retention`.
    readers: where they say what they are reading.

  Attributes:
    failures: how many saves have failed since one succeeded.
  """

  def __init__(self, folder: storage.Path, *, keep_last: int = 3, keep_best: int = 1,
               read_only: bool = False, evaluations: storage.Path | None = None,
               readers: storage.Path | None = None):
    if keep_last < 1 or keep_best < 0:
      raise InputError(f'train.keep_last={keep_last} must be at least 1 and '
                       f'train.keep_best={keep_best} at least 0')
    self.failures, self._saving = 0, None
    self._background = Background()
    self._folder, self._read_only = storage.absolute(folder), read_only
    self._keep = _policies.AnyPreservationPolicy([
        _policies.LatestN(keep_last),
        BestScored(keep_best, _rank, evaluations, readers, self.stamp)])
    if not read_only:  # Orbax does not, if it is told who takes part.
      if jax.process_index() == 0:
        self._folder.mkdir(parents=True, exist_ok=True)
      coordination.meet()
    self._manager = self._open()

  def _open(self) -> orbax.Manager:
    return orbax.Manager(
        self._folder, item_handlers={'state': ocp.StandardCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(
            # Orbax writes figures only if it is told what is best; what stays is the policy's say.
            preservation_policy=self._keep, best_fn=_rank, best_mode='max',
            read_only=self._read_only, create=False,
            multiprocessing_options=(orbax.reader() if self._read_only
                                     else orbax.writers()),
            cleanup_tmp_directories=not self._read_only,
            # Threads that wait for a folder which cannot be made would hold up the process's end
            # for ten minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False)))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    # A save that fails must not hide what went wrong first.
    with contextlib.suppress(SaveFailed) if kind else contextlib.nullcontext():
      self.close()

  def steps(self) -> list[int]:
    """The steps that are there, or will be once what is being saved is, ascending."""
    saving = () if self._saving is None else (self._saving,)
    return sorted({*self._manager.all_steps(), *saving})

  def latest(self) -> int | None:
    """The newest of `steps`, or None when there is none."""
    return max(self.steps(), default=None)

  def stamp(self, step: int) -> Stamp | None:
    """Returns what a step is known by, see `read_stamp`."""
    return read_stamp(self._where(step))

  def save(self, step: int, state: TrainState, figures: dict[str, float] | None = None) -> None:
    """Begins to save `state` under `step`, with the figures that it was evaluated to, if it was.

    Blocks until the save before is complete. How this one ends is told by `wait`.

    Raises:
      SaveFailed: the save before could not be written, or there is no memory for a copy; this one
        is not begun.
    """
    self.wait()
    try:
      copy = copied(state)
    except Exception as e:  # Such as no memory.
      raise self._failed(f'step {step:,} could not be saved', e) from e

    def write() -> None:
      sums = integrity.checksums(copy)
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(copy)),
                         metrics=figures, force=True, custom_metadata={_CHECKSUMS: sums})
      self._manager.wait_until_finished()

    self._saving = step
    self._background.start(write)

  def restore(self, like: TrainState | None, step: int) -> TrainState:
    """The state of `step`, with the shapes, types and shardings of `like`.

    Args:
      like: arrays or `jax.ShapeDtypeStruct`s with shardings; None for whatever was saved, whole
        on every device, where the model that it belongs to is not known.
      step: one of `steps()`.

    Raises:
      InputError: there is no such step, or it holds another model.
      DamagedCheckpoint: it does not give back what was saved, here or in another process.
      StoreError: it cannot be read now.
    """
    self.wait()
    try:
      if step not in self.steps():  # In some processes only, while another run deletes it.
        raise InputError(f'{self._manager.directory}: no checkpoint of step {step}; there are '
                         f'{", ".join(map(str, self.steps())) or "none"}')
      state, error = self._read(like, step), None
    except Exception as e:  # Of any kind: the others wait to be told.
      state, error = None, e
    if not sharding.all_say(error is None):
      raise error or DamagedCheckpoint(f'{self._where(step)} is damaged: another process cannot '
                                       'read it')
    return state

  def restore_newest(self, like: TrainState | None, say: Callable[[str], None]
                     ) -> tuple[int, TrainState] | None:
    """The newest step that is whole and its state; None when there is no step at all.

    Damaged steps after it are named and, unless this is read-only, moved to the folder
    `damaged_checkpoints` beside this one, so that these steps can be saved again.

    Raises:
      InputError: all are damaged, or the newest whole one holds another model.
    """
    for step in sorted(self._manager.without_figures):
      say(f'the figures of {self._where(step)} are damaged; it counts as not evaluated')
    damaged = []
    for step in reversed(self.steps()):
      try:
        state = self.restore(like, step)
      except DamagedCheckpoint as e:
        damaged.append((step, str(e)))
        continue
      for bad_step, text in damaged:
        say(f'{text}; going back to step {step:,}')
        if not self._read_only:
          self._set_aside(bad_step)
      return step, state
    if not damaged:
      return None
    raise InputError(f'no checkpoint in {self._folder} is whole: ' + '; '.join(
        text for _, text in damaged) + '. Bring back a copy of one, or use another workdir')

  def _read(self, like: TrainState | None, step: int) -> TrainState:
    where = self._where(step)
    with _as_damage(where):
      tree = _retried(lambda: ocp.StandardCheckpointHandler().metadata(
          self._manager.directory / str(step) / 'state')).tree
      saved = integrity.shapes(tree)
      description = _description(where)
      sums = description.get('custom_metadata', {}).get(_CHECKSUMS)
      if not saved or not description.get('commit_timestamp_nsecs'):
        raise ValueError('its description is incomplete')
      if sums is not None and integrity.described(sums) != saved:
        raise ValueError('its description contradicts itself')
      like = _whole(tree) if like is None else like
    _check_same_tree(saved, integrity.shapes(like), where)
    with _as_damage(where):
      arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
      state = _retried(lambda: self._manager.restore(step, args=arguments)).state  # pyright: ignore
      # Checkpoints of earlier versions have no checksums.
      wrong = sums and integrity.difference(sums, integrity.checksums(state))
      if wrong:
        raise ValueError(f'{wrong} is not what was saved')
    return state

  def _where(self, step: int) -> storage.Path:
    return self._folder / str(step)

  def _set_aside(self, step: int) -> None:
    _move(self._where(step), self._folder.with_name(ASIDE) / str(step))
    sharding.all_say(True)
    self._manager.reload()

  def _failed(self, what: str, error: Exception) -> SaveFailed:
    """Says what failed, after a fresh start: Orbax's books do not survive failures."""
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
    """Blocks until what was saved is on disk.

    Raises:
      SaveFailed: it could not be written.
    """
    try:
      self._background.wait()
    except Exception as e:
      raise self._failed(f'step {self._saving:,} could not be saved', e) from e
    if self._saving is not None:
      self.failures, self._saving = 0, None

  def close(self) -> None:
    """Completes what is being saved. Raises SaveFailed if that fails."""
    try:
      self.wait()
    finally:
      self._background.close()
      self._manager.close()


def _whole(described: dict[str, Any]) -> TrainState:
  """Shapes and types of a state by Orbax's description of it, whole on every device."""
  replicated = sharding.replicated(sharding.data_mesh())
  return TrainState(**jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), described))


def read_stamp(checkpoint: storage.Path) -> Stamp | None:
  """Returns what the checkpoint in a folder is known by, without reading its arrays.

  Checkpoints of versions that kept no checksums are known by when they were saved. None where there
  is no checkpoint, or one that is damaged.

  Raises:
    OSError: It cannot be read now.
  """
  try:
    description = _description(checkpoint)
    saved = description['commit_timestamp_nsecs']
    sums = description.get('custom_metadata', {}).get(_CHECKSUMS)
    return Stamp(integrity.digest(sums) if sums else f'saved at {saved}', saved / 1e9)
  except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
    return None


def _description(checkpoint: storage.Path) -> dict[str, Any]:
  """Returns Orbax's description of a checkpoint; Orbax takes one that it cannot read for empty."""
  return json.loads(storage.read_bytes(checkpoint / _DESCRIPTION))


def _is_outage(error: BaseException) -> bool:
  """As `errors.is_outage`, also of TensorStore, whose errors have statuses and numbers as text."""
  text = str(error)
  number = re.search(r"os_error_code='(\d+)'", text)
  return (is_outage(error) or any(status in text for status in _UNREACHABLE)
          or (number is not None and is_outage(OSError(int(number[1]), ''))))


def _retried(act: Callable[[], T]) -> T:
  return storage.retried(act, _is_outage)


def _rank(figures: dict[str, float | None]) -> float:
  """Returns the metric that the best checkpoint is best in, -inf if there is none.

  None is a metric that does not exist, for which earlier versions wrote -1.
  """
  figure = figures.get(BEST_FIGURE)
  return -math.inf if figure is None or math.isnan(figure) or figure < 0 else figure


@contextlib.contextmanager
def _as_damage(where: storage.Path):
  """Whatever reading a broken file leads to -> DamagedCheckpoint, or StoreError."""
  try:
    yield
  except (PermissionError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:
    reason = ' '.join(str(e).split())
    if _is_outage(e):
      reason = orbax.reason(e)[:300] or 'not enough memory'
      raise StoreError(f'{where} cannot be read now: {reason}; it is left as it is. If that lasts, '
                       'move it away by hand to go back to the checkpoint before it') from e
    if not where.exists():
      reason = 'it was deleted while it was read'
    raise DamagedCheckpoint(f'{where} is damaged: {reason[:200] or type(e).__name__}') from e


def _move(path: storage.Path, to: storage.Path) -> None:
  """Moves `path`, by the first process only, to `to` or the first free `to-N`."""
  if jax.process_index() == 0:
    free, count = to, 0
    while free.exists():
      count += 1
      free = to.with_name(f'{to.name}-{count}')
    storage.move_folder(path, free)


def _check_same_tree(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]],
                     where: storage.Path) -> None:
  """InputError, naming one difference, unless both trees have the same names and shapes."""
  if any(n.startswith('average') for n in there) != any(n.startswith('average') for n in here):
    raise InputError(f'{where} and this config differ in whether an average of the weights is '
                     'kept; optim.ema_decay cannot be turned on or off in a run')
  # Variables before what follows from them.
  for name in sorted(there.keys() | here.keys(), key=lambda n: (not n.startswith('variables'), n)):
    if there.get(name) != here.get(name):
      raise InputError(
          f'{where} is a checkpoint of another model: {name} is {there.get(name, "absent")} '
          f'there and {here.get(name, "absent")} in this one')
