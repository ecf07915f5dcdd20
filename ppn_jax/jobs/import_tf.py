"""Makes a run of somebody else's weights."""

import pathlib
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from ppn_jax import storage
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.run import Run, create_run
from ppn_jax.training.state import first_state
from ppn_jax.training.train_step import abstract_state, jit_init
from ppn_jax.weights import importer, labels, names
from ppn_jax.weights.initial import with_weights
from ppn_jax.weights.read import WeightFile, read_weights

KINDS = ('auto', 'detector', 'backbone')


def import_run(checkpoint: str | pathlib.Path, config: ConfigDict, workdir: str | pathlib.Path, *,
               kind: str = 'auto', label_map: str | pathlib.Path | None = None,
               average: bool = False, say: Callable[[str], None] = print) -> Run:
  """A run at step 0 with the weights of a TensorFlow checkpoint, a frozen graph or a Keras file.

  Nothing is written before all is known to be right.

  Args:
    checkpoint: see `files.read_weights`.
    config: of the model; `model.num_classes` 0 takes a detector's own number.
    workdir: a new folder.
    kind: 'detector' fills every variable; 'backbone' the backbone's, others are fresh, from
      `config.seed`; 'auto' is whichever the file holds.
    label_map: names of the classes, see `labels.read_label_map`.
    average: take the moving averages of the weights, which some checkpoints have beside them.
    say: told what was found, a line at a time.

  Raises:
    InputError: a file that cannot be read or does not fit the config, or a workdir in use.
  """
  if kind not in KINDS:
    raise InputError(f'kind={kind!r}; {did_you_mean(str(kind), KINDS)}')
  for key in ('weights', 'backbone'):
    if config.init.get(key):
      raise InputError(f'init.{key}={config.init[key]} is for new runs of `ppn train`; here '
                       '--checkpoint says what to read')
  _check_new(storage.folder_path(workdir))
  file = read_weights(checkpoint)
  contents = names.recognise(file.tensors)
  if contents.kind == 'unknown':
    raise InputError(f'{file.path} looks like {contents.description}; legal: a PPN or SSD detector '
                     "of the TF Object Detection API, slim's or Keras' MobileNet-v1")
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
  # First: a run without a checkpoint would be trained from random weights.
  with Ownership(run.workdir, 'training', say):
    _check_new(run.workdir)  # A training may have begun meanwhile.
    with run.checkpoints(read_only=False) as checkpoints:
      checkpoints.save(0, state)
    run.save()
  say(str(imported.report))
  say(line)
  return run


def _check_new(workdir: storage.Path) -> None:
  if (workdir / 'config.json').exists() or any((workdir / 'checkpoints').glob('*')):
    raise InputError(f'workdir {workdir} holds a run already; give a new folder')


def _categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                ) -> tuple[tuple[Category, ...], str]:
  """The classes of a whole detector."""
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
      raise InputError(f'{file.path} has no class column besides the background')
  return labels.detector_categories(count, label_map)


def _fresh_categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                      ) -> tuple[tuple[Category, ...], str]:
  """The classes that a new head on somebody's backbone is for."""
  if label_map is None:
    raise InputError(
        f'{file.path}: a backbone has no classes to detect; name them with --label_map, or train '
        f'on your data from it with `ppn train --config.init.backbone={file.path}`')
  known = labels.read_label_map(label_map)
  return known, f'{len(known)} classes of {label_map}; head and neck are fresh'
