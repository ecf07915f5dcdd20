"""Creates a run from weights of TensorFlow or Keras."""

import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ppn_jax import storage
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.export.weights_file import is_weights_file
from ppn_jax.run import Run, create_run
from ppn_jax.training.state import first_state
from ppn_jax.training.train_step import abstract_state, jit_init
from ppn_jax.weights import importer, labels, names
from ppn_jax.weights.initial import with_weights
from ppn_jax.weights.read import WeightFile, read_weights

KINDS = ('auto', 'detector', 'backbone')


class Import(NamedTuple):
  """Result of an import.

  Fields:
    run: The new run.
    report: Lines on the variables that were used and on the names of the classes.
  """
  run: Run
  report: str


def import_run(checkpoint: str | pathlib.Path, config: ConfigDict, workdir: str | pathlib.Path, *,
               kind: str = 'auto', label_map: str | pathlib.Path | None = None,
               average: bool = False) -> Import:
  """Creates a run at step 0 from a TensorFlow checkpoint, a frozen graph or a Keras file.

  Nothing is written before everything has been checked.

  Args:
    checkpoint: path of the weights, see `weights.read.read_weights`.
    config: config of the model; `model.num_classes` 0 uses the number of classes in the file.
    workdir: a new folder.
    kind: 'detector' imports every variable; 'backbone' only the backbone's and initialises the
      others from `config.seed`; 'auto' imports what the file holds.
    label_map: file with the names of the classes, see `labels.read_label_map`.
    average: whether to use the moving averages of the weights, which some checkpoints have.

  Raises:
    InputError: If a file cannot be read or does not fit the config, or the workdir is in use.
  """
  if kind not in KINDS:
    raise InputError(f'kind={kind!r}; {did_you_mean(str(kind), KINDS)}')
  for key in ('weights', 'backbone'):
    if config.init.get(key):
      raise InputError(f'init.{key}={config.init[key]} is for new runs of `ppn train`; an import '
                       'reads --checkpoint only')
  _check_new(storage.folder_path(workdir))
  if is_weights_file(checkpoint):
    raise InputError(f'{checkpoint} is a weights file, which needs no import; use it as it is by '
                     f'--model, or train from it with --config.init.weights={checkpoint}')
  file = read_weights(checkpoint)
  contents = names.recognise(file.tensors)
  if contents.kind == 'unknown':
    raise InputError(f'{file.path} looks like {contents.description}; supported: a PPN or SSD '
                     "detector of the TF Object Detection API, slim's or Keras' MobileNet-v1")
  if kind == 'auto':
    kind = 'backbone' if contents.kind in ('slim', 'keras') else 'detector'
  categories, line = (_categories if kind == 'detector' else _fresh_categories)(
      file, config, label_map)
  run = create_run(workdir, config, categories)
  detector, optimizer, mesh = run.detector(), run.optimizer(), sharding.data_mesh()
  like = abstract_state(detector, optimizer, mesh).variables
  if kind == 'detector':
    imported = importer.import_detector(file, like, average=average)
    state = first_state(jax.device_put(imported.variables, sharding.replicated(mesh)), optimizer)
  else:
    imported = importer.import_backbone(file, like, average=average)
    state = with_weights(jit_init(detector, optimizer, mesh)(config.seed), imported.variables)
  # The checkpoint is saved before the config: a run without a checkpoint would be trained from
  # random weights.
  with Ownership(run.workdir, 'training'):
    _check_new(run.workdir)  # Training may have started in the meantime.
    with run.checkpoints(read_only=False) as checkpoints:
      checkpoints.save(0, state)
    run.save()
  return Import(run, f'{imported.report}\n{line}')


def _check_new(workdir: storage.Path) -> None:
  if (workdir / 'config.json').exists() or any((workdir / 'checkpoints').glob('*')):
    raise InputError(f'workdir {workdir} already holds a run; give a new folder')


def _categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                ) -> tuple[tuple[Category, ...], str]:
  """Returns the classes of a whole detector, and a line on their names."""
  count = config.model.num_classes
  if not count:
    if not config.model.background_column:
      columns = importer.class_columns(file)
      raise InputError(
          f'{file.path} has {columns} class columns, the first of which is the background in '
          'checkpoints of the TF Object Detection API: set model.background_column=True, or '
          f'model.num_classes={columns} if this one has no background')
    count = importer.class_columns(file) - 1
    if count < 1:
      raise InputError(f'{file.path} has no class column other than the background')
  return labels.detector_categories(count, label_map)


def _fresh_categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                      ) -> tuple[tuple[Category, ...], str]:
  """Returns the classes for a new head on an imported backbone, and a line on them."""
  if label_map is None:
    raise InputError(
        f'{file.path}: a backbone has no classes to detect; name them with --label_map, or train '
        f'on your data from it with `ppn train --config.init.backbone={file.path}`')
  known = labels.read_label_map(label_map)
  return known, f'{len(known)} classes of {label_map}; head and neck are randomly initialised'
