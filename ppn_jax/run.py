"""A run on disk: what it was asked to do, for which classes, and what came of it.

  WORKDIR/config.json       the config, with the number of classes filled in
  WORKDIR/categories.json   label k is its k-th category
  WORKDIR/checkpoints/      a folder for each saved step
  WORKDIR/metrics.jsonl     and tensorboard/: the curves
  WORKDIR/evaluation/       a folder for each evaluated step
  WORKDIR/readers/          who is reading which step, so that it is not deleted meanwhile
  WORKDIR/.training.lock    who is training; see `training.ownership`
  WORKDIR/bad_examples.txt  images that could not be read, if some were skipped

Evaluation, detection and export need the workdir and nothing else.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import detector as detector_lib
from ppn_jax import registry, storage
from ppn_jax.checkpoints.manager import Checkpoints, read_stamp
from ppn_jax.checkpoints.retention import Stamp, numbered, record
from ppn_jax.config import GIVEN, complete, plain
from ppn_jax.data.source import check_categories
from ppn_jax.detection.batch_groups import check_group_size
from ppn_jax.detection.structures import Category
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError, StoreError
from ppn_jax.models.network import BACKBONES, HEADS, NECKS
from ppn_jax.telemetry import metrics
from ppn_jax.training.optimizer import Optimizer, build_optimizer
from ppn_jax.training.train_step import abstract_state


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir with a config in it.

  Attributes:
    workdir: the folder, local or in a bucket.
    config: locked, `config.model.num_classes` set.
    categories: of the training data, in order of label.
    unknown_keys: of config.json, which this version does not have and leaves aside.
  """
  workdir: storage.Path
  config: ConfigDict
  categories: tuple[Category, ...]
  unknown_keys: tuple[str, ...] = ()

  def save(self) -> None:
    """Writes config and categories to the workdir, which is made if need be."""
    categories = [c._asdict() for c in self.categories]
    storage.write_text(self.workdir / 'categories.json', json.dumps(categories, indent=2) + '\n')
    storage.write_text(_config_path(self.workdir),
                     json.dumps(self.config.to_dict(), indent=2) + '\n')

  def note_bad_example(self, reason: str) -> None:
    """Adds a line to bad_examples.txt, unless it is there."""
    file = self.workdir / 'bad_examples.txt'
    known = storage.read_text(file).splitlines() if file.exists() else []
    if reason not in known:
      storage.write_text(file, '\n'.join([*known, reason]) + '\n')

  def metrics(self) -> list[dict[str, float | None]]:
    """The curves of training, and of steps scored by a job of its own, in order of step."""
    evaluation = self.workdir / 'evaluation'
    scored = [line for line in metrics.read(evaluation / 'metrics.jsonl')
              if self.is_current(evaluation, line['step'])]
    return sorted([*metrics.read(self.workdir / 'metrics.jsonl'), *scored],
                  key=lambda line: line['step'])

  def is_current(self, evaluations: storage.Path, step: int) -> bool:
    """Returns whether scores on record are of this run, not of an earlier attempt in its workdir.

    Those of steps that training has deleted since are. Those of steps that it has yet to come to
    are not, unless all checkpoints are gone.
    """
    saved = self.saved_steps()
    if step not in saved:
      return not saved or step < max(saved)
    found = record(evaluations, step)
    return found is None or found.fits(self.stamp(step))

  def saved_steps(self) -> set[int]:
    """Returns the steps that have a folder of a checkpoint."""
    return {*numbered(self.workdir / 'checkpoints')}

  def detector(self) -> Detector:
    """The detector that the config describes."""
    return build_detector(self.config)

  def optimizer(self) -> Optimizer:
    """The optimizer that the config describes."""
    train = self.config.train
    return optimizer_of(self.config, steps=train.steps, batch_size=train.batch_size)

  def check_average(self, ema: bool | None, option: str) -> None:
    """Raises InputError, naming `option`, if an average is asked for that the run does not keep."""
    if ema and not self.config.optim.ema_decay:
      raise InputError(f'workdir {self.workdir} keeps no moving average of the weights '
                       f'(optim.ema_decay=0.0); leave out {option}')

  def checkpoints(self, *, read_only: bool) -> Checkpoints:
    """The run's checkpoints; with `read_only` another process may be writing them."""
    train = self.config.train
    return Checkpoints(self.workdir / 'checkpoints', keep_last=train.keep_last,
                       keep_best=train.keep_best, read_only=read_only,
                       evaluations=self.workdir / 'evaluation', readers=self.readers)

  @property
  def readers(self) -> storage.Path:
    """The folder of those who are reading checkpoints, whatever they make of them."""
    return self.workdir / 'readers'

  def stamp(self, step: int) -> Stamp | None:
    """Returns what the checkpoint of a step is known by; None if there is none."""
    return read_stamp(self.workdir / 'checkpoints' / str(step))


def optimizer_of(config: ConfigDict, *, steps: int, batch_size: int) -> Optimizer:
  """The optimizer of a config for a run of so many steps and images a step.

  Raises:
    InputError: see `optim.build_optimizer`.
  """
  return registry.bind('optim', build_optimizer, config.optim.to_dict(),
                       given=['steps', 'batch_size'])(steps=steps, batch_size=batch_size)


def build_detector(config: ConfigDict) -> Detector:
  """The detector of a config whose `model.num_classes` is set.

  Raises:
    InputError: see `detector.build`.
  """
  given = {block: config[block].to_dict() for block in ('matching', 'loss', 'postprocess')}
  return registry.bind('model', detector_lib.build, config.model.to_dict(), given=given)(**given)


def check_batch(config: ConfigDict, name: str, batch_size: int, micro_batches: int,
                mesh: Mesh) -> None:
  """Raises InputError unless a batch falls into equal parts on devices and equal groups.

  Args:
    config: whose groups they are.
    name: of the batch, for the message.
    batch_size: images, over all devices.
    micro_batches: see `Optimizer`.
    mesh: the devices.
  """
  sharding.check_batch_size(name, batch_size, mesh, micro_batches)
  for key, block in [('model.layers.norm_group_size', config.model.layers),
                     ('loss.group_size', config.loss)]:
    # An objective of the user's own may have no groups.
    check_group_size(key, block.get(key.rpartition('.')[-1], 0), batch_size // micro_batches)


def create_run(workdir: str | pathlib.Path, config: ConfigDict,
               categories: Sequence[Category]) -> Run:
  """The run that `workdir` is to hold, or holds already; writes nothing (`Run.save` does).

  Nothing is built from an earlier run's config, so that its components need not be allowed. This
  one may differ from an earlier one in how to go on (steps, rates, data folders), not in
  the model or its classes, which the checkpoints belong to.

  Args:
    workdir: new, or of an earlier run; local, or gs://BUCKET/FOLDER.
    config: `model.num_classes` 0 means as many as there are categories, `model.neck.num_levels` 0
      as many as the image size allows.
    categories: of the training data.

  Raises:
    InputError: the workdir is a file, cannot be used, or holds another model's run; the
      difference is named.
  """
  workdir = storage.folder_path(workdir)
  config = _with_num_levels(resolve_classes(config, categories))
  if workdir.exists() and not workdir.is_dir():  # pyright: ignore
    raise InputError(f'workdir {workdir} is a file; give a folder, new or of an earlier run')
  if _config_path(workdir).exists():
    _check_same_model(open_run(workdir), config, categories)
  elif any((workdir / 'checkpoints').glob('*')):
    raise InputError(f'workdir {workdir} has checkpoints but no config.json, so what they hold is '
                     'unknown; give a new folder')
  return Run(workdir, config, tuple(categories))


def is_run(workdir: str | pathlib.Path) -> bool:
  """Whether training has begun in `workdir`."""
  return _config_path(storage.folder_path(workdir)).is_file()


def open_run(workdir: str | pathlib.Path, *, allow: Sequence[str] = ()) -> Run:
  """The run in `workdir`.

  Components of its config that are given by a dotted path are code of others: they cannot be
  built, only looked at, unless `allow` names them.

  Args:
    workdir: of `ppn train` or `ppn import-tf`.
    allow: packages, modules or components that may be imported, see `registry.block_imports`.

  Raises:
    InputError: there is none, or its files cannot be read.
  """
  workdir = storage.folder_path(workdir)
  if not _config_path(workdir).is_file():
    raise InputError(f'workdir {workdir} is not a run: it has no config.json; '
                     'give the --workdir of a `ppn train`')
  unknown: list[str] = []
  try:
    written = json.loads(storage.read_text(_config_path(workdir)))
    config = complete(written, unknown=unknown)
    config = registry.block_imports(plain(config), _listed(allow), str(_config_path(workdir)))
    categories = json.loads(storage.read_text(workdir / 'categories.json'))
    return Run(workdir, ConfigDict(config).lock(), tuple(Category(**c) for c in categories),
               tuple(unknown))
  except StoreError:
    raise
  # Whatever a file of another shape leads to.
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
    raise InputError(f'workdir {workdir} cannot be read as a run: {e}') from e


def _listed(allow: Sequence[str]) -> Sequence[str]:
  return (allow,) if isinstance(allow, str) else allow


def resolve_classes(config: ConfigDict, categories: Sequence[Category]) -> ConfigDict:
  """A locked copy of `config` in which `model.num_classes` is the number of categories.

  Raises:
    InputError: the config asks for another number.
  """
  asked = config.model.num_classes
  if asked not in (0, len(categories)):
    raise InputError(f'model.num_classes={asked}, but the training data has {len(categories)} '
                     'categories; set it to 0 to take theirs')
  config = plain(config)
  config['model']['num_classes'] = len(categories)
  return complete(config)


def _with_num_levels(config: ConfigDict) -> ConfigDict:
  """`config` with the number of pyramid levels that `num_levels=0` leads to, for the record."""
  model = plain(config.model)
  if model['neck'].get('name') not in NECKS or model['neck'].get('num_levels') != 0:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.neck.num_levels = len(detector_lib.configured_grid_sizes(**{
        key: model[key] for key in ('image_size', 'backbone', 'neck', 'head', 'layers')}))
  return config


def _check_same_model(run: Run, config: ConfigDict, categories: Sequence[Category]) -> None:
  here_model, there_model = plain(config.model), plain(run.config.model)
  for block, known in [('backbone', BACKBONES), ('neck', NECKS), ('head', HEADS)]:
    here, there = here_model[block], there_model[block]
    if here.get('name') == there.get('name'):
      # An option that one of them leaves out has its default there.
      defaults = registry.options_of(registry.resolve(block, here['name'], known),
                                     given=GIVEN).defaults
      here_model[block], there_model[block] = defaults | here, defaults | there
  for key, there, here in _differences(there_model, here_model):
    raise InputError(f'workdir {run.workdir} holds a run of another model: model.{key} is {there} '
                     f'there and {here} in this config; use another workdir')
  check_categories('training data', categories, run.categories)


def _differences(there: Any, here: Any, key: str = '') -> Iterator[tuple[str, Any, Any]]:
  """(dotted key, value there, value here) of every leaf in which two blocks differ."""
  if isinstance(there, dict) and isinstance(here, dict):
    for name in sorted(there.keys() | here.keys()):
      dotted = f'{key}.{name}' if key else name
      yield from _differences(there.get(name, 'absent'), here.get(name, 'absent'), dotted)
  elif plain(there) != plain(here):
    yield key, there, here


def _config_path(workdir: storage.Path) -> storage.Path:
  return workdir / 'config.json'


def _to_stderr(text: str) -> None:
  print(text, file=sys.stderr)


def load_variables(run: Run, detector: Detector, mesh: Mesh, *, step: int | None = None,
                   ema: bool | None = None, say: Callable[[str], None] = _to_stderr
                   ) -> tuple[int, Variables]:
  """Restores the variables of a saved step onto the mesh.

  Without `step` the newest that is whole; `say` is told of damaged ones after it.

  Raises:
    InputError: the run has no checkpoint, not this one, one of another model, or a damaged one.
  """
  like = abstract_state(detector, run.optimizer(), mesh)
  # Where one process cannot, the others must not go on to read together.
  with sharding.all_or_none(lambda: run.checkpoints(read_only=True)) as checkpoints:
    if step is not None:
      state = checkpoints.restore(like, step)
    elif newest := checkpoints.restore_newest(like, say):
      step, state = newest
    else:
      raise InputError(f'workdir {run.workdir} has no checkpoint yet')
  return step, state.variables if ema is False else state.best_variables()
