"""Creates a run from weights of TensorFlow or Keras."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from ppn_jax import registry, storage
from ppn_jax.config import GIVEN, hard_negative_mining
from ppn_jax.detection.frame import sides_of
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.export.weights_file import is_weights_file
from ppn_jax.models.network import BACKBONES, HEADS, NECKS
from ppn_jax.run import Run, create_run
from ppn_jax.training.state import first_state
from ppn_jax.training.train_step import abstract_state, jit_init
from ppn_jax.weights import folded_norm, importer, labels, names
from ppn_jax.weights.architecture import describe, model_settings
from ppn_jax.weights.initial import AUTO, with_weights
from ppn_jax.weights.postprocessing import compare
from ppn_jax.weights.read import WeightFile, read_weights

KINDS = ('auto', 'detector', 'backbone')
# Configs for the detectors that can be imported, by kind and backbone.
_CONFIGS = ('ppn_mobilenet_v1_coco_reference', 'ssd_mobilenet_v1_coco_reference',
            'ssd_mobilenet_v2_coco_reference')


class Import(NamedTuple):
  """Result of an import.

  Fields:
    run: The new run.
    report: Lines on the variables that were used and on the names of the classes.
  """
  run: Run
  report: str


def read_checkpoint(path: str | pathlib.Path) -> WeightFile:
  """Reads the weights to import, see `weights.read.read_weights`.

  Raises:
    InputError: If they cannot be read, or need no import.
  """
  if is_weights_file(path):
    raise InputError(f'{path} is a weights file, which needs no import; use it as it is by '
                     f'--model, or train from it with --config.init.weights={path}')
  return read_weights(path)


def config_of(file: WeightFile) -> str:
  """Returns the name of the config for a file's detector.

  Raises:
    InputError: If the file holds no whole detector.
  """
  contents = importer.recognise(file)
  _check_known(file)
  importer.check_layers(file)
  name = f'{contents.kind}_{names.NETWORKS[contents.network][2]}_coco_reference'
  if name not in _CONFIGS:
    raise InputError(f'{file.path} looks like {contents.description}, for which there is no '
                     'config; give --config')
  return name


def _check_known(file: WeightFile) -> None:
  """Raises InputError for a network of another kind."""
  contents = importer.recognise(file)
  if contents.kind == 'unknown':
    raise InputError(f'{file.path} looks like {contents.description}; supported: a PPN or SSD '
                     "detector of the TF Object Detection API, slim's or Keras' MobileNet")


def fit_config(config: ConfigDict, file: WeightFile, given: Collection[str] = ()
               ) -> tuple[ConfigDict, str]:
  """Returns a config with what the file tells about its model, and a line on the changes.

  Args:
    config: a config of a model of the same kind.
    file: the weights.
    given: dotted keys, or blocks of them, that stay as they are.

  Raises:
    InputError: If the file is of a detector whose images are not square, and `model.image_size` is
      not given.
  """
  def is_given(key: str) -> bool:
    return any(key == other or key.startswith(f'{other}.') for other in given)

  settings = model_settings({name: tensor.shape for name, tensor in file.tensors.items()})
  is_detector = file.postprocessing is not None or importer.recognise(file).kind in ('ppn', 'ssd')
  if file.postprocessing is not None:
    settings |= _settings_of_detector(file, is_given('model.image_size'))
  elif file.kind == 'checkpoint' and file.image_size and is_detector:
    settings['model.image_size'] = file.image_size
  changed = {}
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for key, value in settings.items():
      block, _, name = key.rpartition('.')
      holder = functools.reduce(lambda inner, part: inner[part], block.split('.'), config)
      options = _defaults(block, holder) | holder.to_dict()
      if not is_given(key) and name in options and options[name] != value:
        with holder.ignore_type():  # Of an image size that is two numbers.
          holder[name] = changed[key] = value
    if config.model.score_activation == 'softmax' and config.loss.name == 'focal' and (
        not is_given('loss.name')):
      hard_negative_mining(config)
      changed['loss.name'] = config.loss.name
    if is_detector and _repeats_1x1(config) and not is_given('model.neck.repeat_1x1'):
      config.model.neck.repeat_1x1 = changed['model.neck.repeat_1x1'] = True
  return config.lock(), f'set from the file: {describe(changed)}' if changed else ''


def _settings_of_detector(file: WeightFile, has_size: bool) -> dict[str, Any]:
  """Returns the config entries that the input and the outputs of an SSD in a TFLite file imply."""
  settings: dict[str, Any] = {}
  if not file.image_size and not has_size:
    raise InputError(f'{file.path} is {file.description}, but detectors here read images of one '
                     'size; choose it with --config.model.image_size=N, or =HEIGHT,WIDTH')
  if file.image_size:
    settings['model.image_size'] = file.image_size
  settings['model.background_column'] = not _has_no_background(file)
  if file.postprocessing and file.postprocessing.score_activation:
    settings['model.score_activation'] = file.postprocessing.score_activation
  return settings


def _has_no_background(file: WeightFile) -> bool:
  """Returns whether a file says that it has as many classes as class columns."""
  options = file.postprocessing.options if file.postprocessing else {}
  return 'num_classes' in options and options['num_classes'] == importer.class_columns(file)


def _defaults(block: str, given: ConfigDict) -> dict[str, Any]:
  """Returns the defaults of the component that a block selects; {} for other blocks."""
  known = {'model.backbone': BACKBONES, 'model.neck': NECKS, 'model.head': HEADS}.get(block)
  if known is None:
    return {}
  component = registry.resolve(block, given.name, known)
  return dict(registry.options_of(component, given=GIVEN).defaults)


def _repeats_1x1(config: ConfigDict) -> bool:
  """Returns whether the neck would have a level after a 1x1 one."""
  neck = config.model.neck
  options = _defaults('model.neck', neck) | neck.to_dict()
  match neck.name:
    case 'pooling_pyramid':
      coarsest, further = options['stride'], options['num_levels'] - 1
    case 'conv_pyramid':
      coarsest, further = max(options['strides']), len(options['depths'])
    case 'feature_pyramid':
      coarsest = max(options['strides'])
      further = options['num_levels'] - len(options['strides'])
    case _:
      return False
  # Each level, and each stride of the backbone, halves the side, rounded up.
  return further > 0 and max(sides_of(config.model.image_size)) <= coarsest * 2 ** (further - 1)


def import_run(checkpoint: str | pathlib.Path | WeightFile, config: ConfigDict,
               workdir: str | pathlib.Path, *, kind: str = 'auto',
               label_map: str | pathlib.Path | None = None,
               average: bool = False) -> Import:
  """Creates a run at step 0 from a file of TensorFlow's or Keras' weights.

  Nothing is written before everything has been checked. Batch norm that was folded into
  convolutions becomes one that only adds the bias; training puts it back, see
  `training.batch_norm`.

  Args:
    checkpoint: the weights, or their path, see `read_checkpoint`.
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
    if config.init.get(key) not in (None, '', AUTO):
      raise InputError(f'init.{key}={config.init[key]} is for new runs of `ppn train`; an import '
                       'reads --checkpoint only')
  _check_new(storage.folder_path(workdir))
  file = checkpoint if isinstance(checkpoint, WeightFile) else read_checkpoint(checkpoint)
  _check_known(file)
  if kind == 'auto':
    kind = 'backbone' if importer.recognise(file).kind in ('slim', 'keras') else 'detector'
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
  lines = [*str(imported.report).splitlines(), line]
  if folded := folded_norm.folded_layers(imported.variables):
    folded_norm.check_epsilon(folded, config.model.layers.norm_epsilon)
    lines.append(f'batch norm of {len(folded)} layers is folded; a training from this run puts it '
                 'back')
  if kind == 'detector' and file.postprocessing is not None:
    lines += compare(file.postprocessing, detector.anchors, config.postprocess)
  run = _with_report(run, lines)
  # The checkpoint is saved before the config: a run without a checkpoint would be trained from
  # random weights.
  with Ownership(run.workdir, 'training'):
    _check_new(run.workdir)  # Training may have started in the meantime.
    with run.checkpoints(read_only=False) as checkpoints:
      checkpoints.save(0, state)
    run.save()
  return Import(run, '\n'.join(lines))


def _with_report(run: Run, lines: list[str]) -> Run:
  """Returns a run whose config tells where its weights come from."""
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.init.update(weights='', report=tuple(line.strip() for line in lines))
  return dataclasses.replace(run, config=config.lock())


def _check_new(workdir: storage.Path) -> None:
  if (workdir / 'config.json').exists() or any((workdir / 'checkpoints').glob('*')):
    raise InputError(f'workdir {workdir} already holds a run; give a new folder')


def _categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                ) -> tuple[tuple[Category, ...], str]:
  """Returns the classes of a whole detector, and a line on their names."""
  count = config.model.num_classes
  if not count and not config.model.background_column and _has_no_background(file):
    count = importer.class_columns(file)
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
  return labels.detector_categories(count, label_map, names=file.labels)


def _fresh_categories(file: WeightFile, config: ConfigDict, label_map: str | pathlib.Path | None
                      ) -> tuple[tuple[Category, ...], str]:
  """Returns the classes for a new head on an imported backbone, and a line on them."""
  if label_map is None:
    raise InputError(
        f'{file.path}: a backbone has no classes to detect; name them with --label_map, or train '
        f'on your data from it with `ppn train --config.init.backbone={file.path}`')
  known = labels.read_label_map(label_map)
  return known, f'{len(known)} classes of {label_map}; head and neck are randomly initialised'
