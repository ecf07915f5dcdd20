"""A run on disk: its config, its classes and its results.

  WORKDIR/config.json       the config, with the number of classes filled in
  WORKDIR/categories.json   label k is its k-th category
  WORKDIR/checkpoints/      a folder for each saved step
  WORKDIR/metrics.jsonl     and tensorboard/: the curves
  WORKDIR/evaluation/       a folder for each evaluated step
  WORKDIR/readers/          steps that are being read, so that they are not deleted
  WORKDIR/.training.lock    the process that trains; see `distributed.ownership`
  WORKDIR/bad_examples.txt  images that could not be read, if some were skipped
  WORKDIR/time_budget.json  how many steps fit into train.minutes, if it is set
  WORKDIR/ended.json        why training ended before train.steps, if it did

Evaluation, detection and export need nothing but the workdir.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from ppn_jax import detector as detector_lib
from ppn_jax import registry, storage, zoo
from ppn_jax.checkpoints.manager import Checkpoints, read_notes, read_stamp
from ppn_jax.checkpoints.retention import Stamp, read_record, steps_in
from ppn_jax.config import GIVEN, complete, plain
from ppn_jax.data.source import check_categories
from ppn_jax.detection.batch_groups import check_group_size
from ppn_jax.detection.class_weights import by_name, resolve_class_weights
from ppn_jax.detection.losses import LOSSES
from ppn_jax.detection.structures import Category
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError, StoreError
from ppn_jax.export.weights_file import is_weights_file
from ppn_jax.metrics import operating_point
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.models.network import BACKBONES, HEADS, NECKS
from ppn_jax.telemetry import metrics
from ppn_jax.trained_model import (
  TrainedModel,
  build_detector,  # noqa: F401 (beside `optimizer_of` for those who build both)
  open_weights_file,
  trusted_config,
)
from ppn_jax.training.optimizer import Optimizer, build_optimizer
from ppn_jax.training.train_step import abstract_state_to_read

# File of an evaluated step, see `jobs.class_report`, and key of the notes of a checkpoint.
THRESHOLDS, OPERATING_POINT = 'thresholds.json', 'operating_point'


class Ending(NamedTuple):
  """Successful end of a training before its `train.steps`.

  Fields:
    step: Its last step.
    reason: Why it ended, as text.
  """
  step: int
  reason: str


@dataclasses.dataclass(frozen=True)
class Run(TrainedModel):
  """A workdir with a config in it.

  Attributes:
    workdir: The folder, local or in a bucket.
    config: Its config, locked, with `config.model.num_classes` set.
    categories: Categories of the training data, in order of label.
    unknown_keys: Keys of config.json that this version does not have, and ignores.
  """
  workdir: storage.Path
  config: ConfigDict
  categories: tuple[Category, ...]
  unknown_keys: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """Name of the workdir."""
    return storage.absolute(self.workdir).name

  def load_variables(self, detector: Detector, mesh: Mesh, *, step: int | None = None,
                     ema: bool | None = None) -> tuple[int, Variables]:
    """See `run.load_variables`."""
    return load_variables(self, detector, mesh, step=step, ema=ema)

  def save(self) -> None:
    """Writes config and categories to the workdir, which is created if it does not exist."""
    categories = [c._asdict() for c in self.categories]
    storage.write_text(self.workdir / 'categories.json', json.dumps(categories, indent=2) + '\n')
    storage.write_text(_config_path(self.workdir),
                     json.dumps(self.config.to_dict(), indent=2) + '\n')

  def note_bad_example(self, reason: str) -> None:
    """Adds a line to bad_examples.txt, unless it is there already."""
    file = self.workdir / 'bad_examples.txt'
    known = storage.read_text(file).splitlines() if file.exists() else []
    if reason not in known:
      storage.write_text(file, '\n'.join([*known, reason]) + '\n')

  def ending(self) -> Ending | None:
    """Returns why training ended before `train.steps`; None if it did not, or continues."""
    try:
      ending = Ending(**json.loads(storage.read_text(self.workdir / 'ended.json')))
    except (FileNotFoundError, ValueError, TypeError):
      return None
    # Training writes it again, if something else is there.
    return ending if type(ending.step) is int and isinstance(ending.reason, str) else None

  def note_ending(self, ending: Ending | None) -> None:
    """Writes why training ended before `train.steps`; None if it continues."""
    file = self.workdir / 'ended.json'
    if ending is None:
      file.unlink(missing_ok=True)
    elif ending != self.ending():
      storage.write_text(file, json.dumps(ending._asdict()) + '\n')

  def metrics(self) -> list[dict[str, float | None]]:
    """Returns the metrics of training and of evaluation jobs, in order of step."""
    evaluation = self.workdir / 'evaluation'
    scored = [line for line in metrics.read(evaluation / 'metrics.jsonl')
              if self.is_current(evaluation, line['step'])]
    return sorted([*metrics.read(self.workdir / 'metrics.jsonl'), *scored],
                  key=lambda line: line['step'])

  def is_current(self, evaluations: storage.Path, step: int) -> bool:
    """Returns whether recorded scores are of this run, not of an earlier attempt in its workdir.

    Scores of steps that training has deleted since are current. Scores of steps after the newest
    one are not, unless all checkpoints are gone.
    """
    saved = self.saved_steps()
    if step not in saved:
      return not saved or step < max(saved)
    found = read_record(evaluations, step)
    return found is None or found.fits(self.stamp(step))

  def operating_point(self, step: int, *, ema: bool | None = None) -> OperatingPoint | None:
    """Returns the thresholds and calibration of a step.

    They are those of its evaluation by `ppn evaluate`, or else of the evaluation in training.

    Args:
      step: a saved step.
      ema: False for the weights themselves, otherwise those of the average if the run keeps one.

    Raises:
      InputError: If they are damaged.
    """
    raw = ema is False and bool(self.config.optim.ema_decay)
    folder = self.evaluations(raw) / str(step)
    names, stamp = [c.name for c in self.categories], self.stamp(step)
    if stamp is None:
      return None
    try:
      found = json.loads(storage.read_text(folder / THRESHOLDS))
      if found['scored']['checkpoint'] == stamp.checkpoint:
        return operating_point.parse(found, names)
    except (FileNotFoundError, NotADirectoryError):
      pass
    except (ValueError, KeyError, TypeError) as e:
      raise InputError(f'{folder / THRESHOLDS} is damaged ({e!r}); evaluate the step again') from e
    noted = {} if raw else read_notes(self.workdir / 'checkpoints' / str(step))
    return operating_point.parse(noted.get(OPERATING_POINT), names)

  def evaluations(self, raw: bool) -> storage.Path:
    """Returns the folder of evaluated steps.

    Raw weights of a run that keeps an average have a separate one, since the trainer decides which
    checkpoints to keep by the scores in `evaluation`.
    """
    return self.workdir / ('evaluation_raw' if raw else 'evaluation')

  def saved_steps(self) -> set[int]:
    """Returns the steps that have a checkpoint."""
    return {*steps_in(self.workdir / 'checkpoints')}

  def optimizer(self) -> Optimizer:
    """Builds the optimizer of the config."""
    train = self.config.train
    return optimizer_of(self.config, steps=train.steps, batch_size=train.batch_size)

  def check_average(self, ema: bool | None, option: str) -> None:
    """Raises InputError, naming `option`, if `ema` is True and the run keeps no moving average."""
    if ema and not self.config.optim.ema_decay:
      raise InputError(f'workdir {self.workdir} keeps no moving average of the weights '
                       f'(optim.ema_decay=0.0); omit {option}')

  def checkpoints(self, *, read_only: bool) -> Checkpoints:
    """Opens the run's checkpoints; with `read_only` another process may be writing them."""
    train = self.config.train
    return Checkpoints(self.workdir / 'checkpoints', keep_last=train.keep_last,
                       keep_best=train.keep_best, read_only=read_only,
                       evaluations=self.workdir / 'evaluation', readers=self.readers)

  @property
  def readers(self) -> storage.Path:
    """Returns the folder in which readers name the checkpoints that they are using."""
    return self.workdir / 'readers'

  def stamp(self, step: int) -> Stamp | None:
    """Returns what identifies the checkpoint of a step; None if there is none."""
    return read_stamp(self.workdir / 'checkpoints' / str(step))


def optimizer_of(config: ConfigDict, *, steps: int, batch_size: int) -> Optimizer:
  """Builds the optimizer of a config for a run of so many steps and images per step.

  Raises:
    InputError: See `build_optimizer`.
  """
  return registry.bind('optim', build_optimizer, config.optim.to_dict(),
                       given=['steps', 'batch_size'])(steps=steps, batch_size=batch_size)


def check_batch(config: ConfigDict, name: str, batch_size: int, micro_batches: int,
                mesh: Mesh | AbstractMesh, slices: int = 0) -> None:
  """Checks that a batch can be split equally over the devices and into groups.

  Between TPU slices there is only the data centre's network. Gradients cross it once a step, but
  batch statistics would cross it in every layer, so their groups must be within a slice.

  Args:
    config: Config that sets the size of groups.
    name: Name of the batch size, for the message.
    batch_size: Number of images, over all devices.
    micro_batches: See `Optimizer`.
    mesh: The devices.
    slices: Number of TPU slices that they are in; 0 for those of the mesh.

  Raises:
    InputError: If it cannot.
  """
  sharding.check_batch_size(name, batch_size, mesh, micro_batches)
  for key, block in [('model.layers.norm_group_size', config.model.layers),
                     ('loss.group_size', config.loss)]:
    # A user's own loss may have no groups.
    group_size = block.get(key.rpartition('.')[-1], 0)
    check_group_size(key, group_size, batch_size // micro_batches)
    slices = slices or sharding.num_slices(mesh)
    images = batch_size // micro_batches // slices
    if slices > 1 and block is config.model.layers and block.norm == 'batch' and (
        not group_size or images % group_size):
      raise InputError(f'{key}={group_size}: batch statistics would be exchanged between '
                       f'{slices} slices in every layer; give a divisor of the {images} images of '
                       f'a slice, such as {images * slices // mesh.size}, those of a chip')


def create_run(workdir: str | pathlib.Path, config: ConfigDict,
               categories: Sequence[Category]) -> Run:
  """Returns a new run, or an earlier run with a new config. Writes nothing (`Run.save` does).

  Nothing is built from an earlier run's config, so that its components need not be allowed. The
  new config may differ from it in how to continue (steps, rates, data folders), but not in the
  model, its classes and the optimizer, which the checkpoints depend on.

  Args:
    workdir: A new folder, or that of an earlier run; local, or gs://BUCKET/FOLDER.
    config: Its config. `model.num_classes=0` means as many as there are categories,
      `model.neck.num_levels=0` as many as the image size allows.
    categories: Categories of the training data.

  Raises:
    InputError: If the workdir is a file, cannot be used, or holds a run of another model; the
      message names the difference.
  """
  workdir = storage.folder_path(workdir)
  config = _with_num_levels(resolve_classes(config, categories))
  if workdir.exists() and not workdir.is_dir():  # pyright: ignore
    raise InputError(f'workdir {workdir} is a file; give a folder, new or of an earlier run')
  if _config_path(workdir).exists():
    earlier = open_run(workdir)
    _check_same_model(earlier, config, categories)
    _check_same_optimizer(earlier, config)
  elif any((workdir / 'checkpoints').glob('*')):
    raise InputError(f'workdir {workdir} has checkpoints but no config.json, so what they hold is '
                     'unknown; give a new folder')
  return Run(workdir, config, tuple(categories))


def is_run(workdir: str | pathlib.Path) -> bool:
  """Returns whether `workdir` holds a run."""
  return _config_path(storage.folder_path(workdir)).is_file()


def open_run(workdir: str | pathlib.Path, *, allow: Sequence[str] = ()) -> Run:
  """Opens the run in `workdir`.

  Components of its config that are given by a dotted path may be anybody's code: they can be
  inspected, but not built, unless `allow` names them.

  Args:
    workdir: Workdir of `ppn train` or `ppn import-tf`.
    allow: Packages, modules or components that may be imported, see `registry.block_imports`.

  Raises:
    InputError: If there is no run, or its files cannot be read.
  """
  workdir = storage.folder_path(workdir)
  if not _config_path(workdir).is_file():
    raise InputError(f'workdir {workdir} is not a run: it has no config.json; '
                     'give the --workdir of a `ppn train`')
  unknown: list[str] = []
  try:
    written = json.loads(storage.read_text(_config_path(workdir)))
    config = trusted_config(written, allow, str(_config_path(workdir)), unknown)
    categories = json.loads(storage.read_text(workdir / 'categories.json'))
    return Run(workdir, config, tuple(Category(**c) for c in categories), tuple(unknown))
  except StoreError:
    raise
  # Whatever a file with unexpected content leads to.
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
    raise InputError(f'workdir {workdir} cannot be read as a run: {e}') from e


def open_model(path: str | pathlib.Path, *, allow: Sequence[str] = ()) -> TrainedModel:
  """Opens the run in a workdir, or a weights file.

  Args:
    path: workdir of a run, a file of `ppn export --format=weights`, or the name of a model that
      comes with the package.
    allow: see `open_run`.

  Raises:
    InputError: If it is neither, or cannot be read; see `open_run` and `open_weights_file`.
  """
  path = zoo.find(path)
  if is_weights_file(path):
    return open_weights_file(path, allow=allow)
  if '://' not in str(path) and storage.local_path(path).is_file():
    raise InputError(f'{path} is neither the workdir of a run nor a weights file, which '
                     '`ppn export --format=weights` writes')
  return open_run(path, allow=allow)


def resolve_classes(config: ConfigDict, categories: Sequence[Category]) -> ConfigDict:
  """Returns a locked copy of `config` with `model.num_classes` set to the number of categories.

  Class weights that `loss.class_weights` gives by name become one for each category.

  Raises:
    InputError: If the config asks for another number, or names a class that does not exist.
  """
  asked = config.model.num_classes
  if asked not in (0, len(categories)):
    raise InputError(f'model.num_classes={asked}, but the training data has {len(categories)} '
                     'categories; set it to 0 to use their number')
  config = plain(config)
  config['model']['num_classes'] = len(categories)
  # The option of a user's own loss may mean anything else.
  if by_name(config['loss'].get('class_weights')) and config['loss'].get('name') in LOSSES:
    config['loss']['class_weights'] = resolve_class_weights(
        config['loss']['class_weights'], [c.name for c in categories])
  return complete(config)


def without_class_weights(config: ConfigDict) -> ConfigDict:
  """Returns `config` without the class weights of its loss, to build detectors of other classes."""
  if not config.loss.get('class_weights') or config.loss.get('name') not in LOSSES:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.loss.class_weights = ()
  return config


def _with_num_levels(config: ConfigDict) -> ConfigDict:
  """Returns `config` with the number of pyramid levels that `num_levels=0` stands for."""
  model = plain(config.model)
  if model['neck'].get('name') not in NECKS or model['neck'].get('num_levels') != 0:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.neck.num_levels = len(detector_lib.configured_grid_sizes(**{
        key: model[key] for key in ('image_size', 'backbone', 'neck', 'head', 'layers')}))
  return config


def _check_same_model(run: Run, config: ConfigDict, categories: Sequence[Category]) -> None:
  """Raises InputError if a run is of another model or has other classes than `config`."""
  here_model, there_model = plain(config.model), plain(run.config.model)
  for block, known in [('backbone', BACKBONES), ('neck', NECKS), ('head', HEADS)]:
    here, there = here_model[block], there_model[block]
    if here.get('name') == there.get('name'):
      # An option that is missing in one of them has its default there.
      defaults = registry.options_of(registry.resolve(block, here['name'], known),
                                     given=GIVEN).defaults
      here_model[block], there_model[block] = defaults | here, defaults | there
  for key, there, here in _differences(there_model, here_model):
    raise InputError(f'workdir {run.workdir} holds a run of another model: model.{key} is {there} '
                     f'there and {here} in this config; use another workdir')
  check_categories('training data', categories, run.categories)


def _check_same_optimizer(run: Run, config: ConfigDict) -> None:
  """Raises InputError if a run has been trained with another optimizer than that of `config`."""
  there, here = run.config.optim.optimizer.get('name'), config.optim.optimizer.get('name')
  if there != here and run.saved_steps() - {0}:
    raise InputError(
        f'workdir {run.workdir} was trained with optim.optimizer.name={there!r}, which cannot be '
        f'changed to {here!r} within a run; start another workdir from it with '
        f'init.weights={run.workdir}')


def _differences(there: Any, here: Any, key: str = '') -> Iterator[tuple[str, Any, Any]]:
  """Yields (dotted key, value there, value here) for every leaf in which two blocks differ."""
  if isinstance(there, dict) and isinstance(here, dict):
    for name in sorted(there.keys() | here.keys()):
      dotted = f'{key}.{name}' if key else name
      yield from _differences(there.get(name, 'absent'), here.get(name, 'absent'), dotted)
  elif plain(there) != plain(here):
    yield key, there, here


def _config_path(workdir: storage.Path) -> storage.Path:
  return workdir / 'config.json'


def load_variables(run: Run, detector: Detector, mesh: Mesh, *, step: int | None = None,
                   ema: bool | None = None) -> tuple[int, Variables]:
  """Restores the variables of a saved step onto the mesh; the optimizer's state is not read.

  Args:
    run: The run.
    detector: Its detector.
    mesh: Devices that get the variables.
    step: The step; None is the newest that is undamaged.
    ema: True or None for the moving average of the variables if the run keeps one, False for the
      variables themselves.

  Returns:
    (step, variables).

  Raises:
    InputError: If the run has no checkpoint, or not this one, or it is damaged or of another model.
  """
  optim = run.config.optim
  like = abstract_state_to_read(detector, mesh, average=bool(optim.ema_decay),
                                shard_state=optim.shard_state)
  # If it fails in one process, the others must not start to read.
  with sharding.all_or_none(lambda: run.checkpoints(read_only=True)) as checkpoints:
    if step is not None:
      state = checkpoints.restore(like, step)
    elif newest := checkpoints.restore_newest(like):
      step, state = newest
    else:
      raise InputError(f'workdir {run.workdir} has no checkpoint yet')
  return step, state.variables if ema is False else state.best_variables()
