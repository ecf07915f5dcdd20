"""Base config: all keys and their defaults, and the checks of a config file.

Each block holds the keyword arguments of one function, which is named beside it. Its docstring says
what a key means, which values are legal and what the default does. `complete` adds the keys that a
config leaves out and rejects those that do not exist.

The functions at the end turn PPN's config into that of a baseline. They change an unlocked config
in place and leave data and schedule alone.
"""

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from ppn_jax.errors import InputError, did_you_mean

# Blocks that select a component by `name` -> the table of known names.
COMPONENTS = {
    'model.backbone': 'ppn_jax.models.network:BACKBONES',
    'model.neck': 'ppn_jax.models.network:NECKS',
    'model.head': 'ppn_jax.models.network:HEADS',
    'loss': 'ppn_jax.detection.losses:LOSSES',
    'optim.optimizer': 'ppn_jax.training.update_rules:OPTIMIZERS',
    'optim.schedule': 'ppn_jax.training.schedules:SCHEDULES',
    'data.train': 'ppn_jax.data.source:SOURCES',
    'data.eval': 'ppn_jax.data.source:SOURCES',
    'data.transforms': 'ppn_jax.data.transforms.basic:TRANSFORMS',  # A tuple of blocks.
}

# Other blocks -> the function whose keyword arguments they hold. Several functions read `data`,
# `train` and `eval`.
FUNCTIONS = {
    'model': 'ppn_jax.detector:build',
    'model.anchors': 'ppn_jax.detection.anchors:ssd_anchors',
    'model.layers': 'ppn_jax.models.layers:LayerPolicy',
    'data.cache': 'ppn_jax.data.cache:cache_source',
    'matching': 'ppn_jax.detection.matching:assign_targets',
    'postprocess': 'ppn_jax.detection.nms:postprocess',
    'init': 'ppn_jax.weights.initial:initial_weights',
    'optim': 'ppn_jax.training.optimizer:build_optimizer',
}

# Blocks whose keys are the user's own -> a legal value.
MAPPINGS = {'optim.rate_scale': 1.0}

# Keys whose value is a whole number, or two that differ: (height, width).
SIZES = ('model.image_size',)

# Keys of earlier versions -> where they are now. Configs and the command line may use them.
RENAMED = {
    'data.train.cache': 'data.cache.where',
    'data.train.cache_size': 'data.cache.size',
    'data.train.resident': 'data.resident.enabled',
    'data.train.resident_size': 'data.resident.size',
    'optim.momentum': 'optim.optimizer.momentum',
}

# Arguments of components that are supplied by the system and cannot be set by the user.
GIVEN = frozenset({'anchors', 'anchors_per_cell', 'categories', 'class_spec', 'learning_rate',
                   'mask', 'name', 'num_classes', 'outputs', 'parent', 'policy', 'steps', 'targets',
                   'warmup_factor', 'warmup_steps', 'weight_decay', 'weight_decay_mask'})


def base_config() -> ConfigDict:
  """Returns PPN on MobileNet-v1 at 300 px with the paper's losses, without data and schedule."""
  config = ConfigDict()
  config.seed = 0  # Seeds the weights, the order of the data and its augmentation.

  config.model = dict(  # ppn_jax.detector.build
      image_size=FieldReference(300, field_type=object),  # An integer or two.
      num_classes=0,  # 0: the number of classes of the training data.
      background_column=False,  # ppn_jax.detection.class_logits.ClassLogitsSpec
      score_activation='sigmoid',
      backbone=dict(name='mobilenet_v1', depth_multiplier=1.0, last_block=11, min_depth=8),
      neck=dict(name='pooling_pyramid', stride=16, num_levels=6, projection=0),
      head=dict(name='shared_box_predictor', depth=512, norm_per_level=True,
                prior=0.01),
      anchors=dict(  # ppn_jax.detection.anchors.ssd_anchors
          min_scale=0.15, max_scale=0.95, aspect_ratios=(1.0, 2.0, 0.5, 3.0, 0.3333),
          reduce_lowest_level=False),
      layers=dict(  # ppn_jax.models.layers.LayerPolicy
          dtype='float32', matmul_dtype='same', norm='batch', norm_decay=0.97, norm_epsilon=0.001,
          norm_group_size=0, conv_form='auto', kernel_stddev=placeholder(float)))  # None: He.
  config.matching = dict(  # ppn_jax.detection.matching.assign_targets
      matched_iou=0.5, force_match=True, ignore_crowd=True)
  config.loss = dict(  # ppn_jax.detection.losses.LOSSES
      name='focal', alpha=0.25, gamma=2.0, localization_weight=1.0, group_size=0)
  config.postprocess = dict(  # ppn_jax.detection.nms.postprocess
      score_threshold=1e-8, iou_threshold=0.6, cross_class_iou=1.0, max_per_class=100,
      max_detections=100)

  config.init = dict(  # ppn_jax.weights.initial.initial_weights
      weights='', backbone='', class_names=(), norm_images=256, report=())
  config.data = dict(
      train=dict(name=''),  # ppn_jax.data.source.build_source
      eval=dict(name=''),
      eval_fraction=0.0,  # Share of the training images to evaluate on if `eval` names no data.
      cache=dict(where='', size=0),  # ppn_jax.data.cache.cache_source
      resident=dict(  # ppn_jax.device_data.dataset
          enabled=False,  # Holds the whole training set in device memory.
          size=0),  # Side in pixels of the images held there; 0: that of the network's input.
      transforms=(  # ppn_jax.data.transforms.basic.build_transforms; of training, before resizing.
          dict(name='ssd_random_crop'),  # Before the flip, which then handles a smaller image.
          dict(name='horizontal_flip', probability=0.5)),
      repeat_threshold=0.0,  # Share of the images below which a class is shown more often; 0: none.
      resize='supersample',  # The `method` of ppn_jax.data.transforms.basic.Resize.
      resize_mode='stretch',  # Or 'letterbox', which keeps aspect ratios; of the same function.
      reduced_decoding=True,  # Decodes JPEGs at 1/2, 1/4 or 1/8 where that leaves enough pixels.
      on_bad_example='raise',  # For an image that cannot be read: 'raise', or 'skip' and report it.
      max_bad_share=0.01,  # Largest share of the images that may be skipped; one always may.
      max_boxes=0,  # Boxes that each image's ground truth is padded to; 0: the largest number.
      workers='auto',  # Decode and augment: 'threads', 'processes'; 'auto': by their number.
      threads=0)  # Number of these threads or processes; 0: one for each processor core.
  config.optim = dict(  # ppn_jax.training.optimizer.build_optimizer
      optimizer=dict(name='sgd', momentum=0.9, nesterov=False),
      schedule=dict(name='cosine'),
      learning_rate=0.7, rate_batch_size=512, rate_batch_exponent=1.0, warmup_fraction=0.04,
      warmup_factor=0.1333 / 0.7,  # The reference's 0.1333 beside 0.7.
      weight_decay=4e-5, clip_norm=0.0, ema_decay=0.0, freeze=(), rate_scale=dict(),
      micro_batches=1, shard_state=False)
  config.train = dict(  # ppn_jax.jobs.train.train
      steps=0,  # Steps of the whole run; must be set. With `minutes` the largest number; 0: any.
      minutes=0.0,  # Time budget: the run takes as many steps as fit; 0: none.
      batch_size=0,  # Images per step, over all devices; must be set.
      log_every=100,  # Steps between two lines of metrics.
      checkpoint_every=1000,  # Steps between two checkpoints; the last step is always saved.
      evaluate_every=1000,  # Steps between two evaluations; 0: never, data.eval is not needed.
      stop_metric='AP',  # Metric of the evaluations that `patience` is about.
      patience=0,  # Evaluations in a row without an improvement after which to end; 0: never.
      min_improvement=0.0,  # Gain in `stop_metric` above which an evaluation is an improvement.
      keep_last=3,  # Number of newest checkpoints to keep.
      keep_best=1,  # Number of checkpoints of highest AP to keep in addition.
      loggers=(),  # Beside TensorBoard: 'wandb', 'mlflow', a dotted path, or dict(name=NAME, ...).
      on_save_error='continue',  # If a checkpoint cannot be written: 'continue' or 'stop'.
      stuck_factor=100.0,  # A step of so many times the usual length has hung; 0: wait for ever.
      stuck_seconds=300.0,  # The least time after which a step has hung.
      xla_options=())  # Compiler options of the step, as 'NAME=VALUE'.
  config.eval = dict(batch_size=32)  # Images per batch; as many more as all devices can share.
  return config


def complete(config: Mapping[str, Any], *, unknown: list[str] | None = None) -> ConfigDict:
  """Returns a locked copy of a config with the defaults of everything that it leaves out.

  A block that a config replaces, as by `config.train = dict(steps=2)`, takes the keys that it lacks
  from `base_config`. Options of components are not added, since their defaults are those of the
  components' signatures. Keys of earlier versions are replaced: those of `RENAMED`, and
  `optim.warmup_learning_rate` by `optim.warmup_factor`.

  Args:
    config: The config of a config file, or the one that a run has recorded.
    unknown: If given, collects the names of keys that do not exist, which are then left out.

  Raises:
    InputError: If a value has the wrong type or a key does not exist, unless `unknown` collects it.
  """
  given = _with_current_keys(plain(config))
  if isinstance(given.get('optim'), dict):
    given['optim'] = _with_warmup_factor(given['optim'])
  loss = given.get('loss')
  if isinstance(loss, dict) and isinstance(loss.get('class_weights'), dict):
    # Names may have dots, which a ConfigDict does not take as keys.
    given['loss'] = loss | {'class_weights': tuple(loss['class_weights'].items())}
  completed = _complete_block(given, plain(base_config()), '', unknown)
  return ConfigDict(completed).lock()


def component_table(path: str) -> str | None:
  """Returns the dotted path of the table of components for a block, None if it selects none."""
  if path.startswith('data.transforms.'):
    return COMPONENTS['data.transforms']
  return None if path == 'data.transforms' else COMPONENTS.get(path)


def plain(value: Any) -> Any:
  """Converts a config to dicts and tuples and resolves references."""
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {key: plain(v) for key, v in value.items()}
  return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def _with_current_keys(given: dict[str, Any]) -> dict[str, Any]:
  """Moves the entries of `RENAMED` to where they are now."""
  base = plain(base_config())
  for old, new in RENAMED.items():
    path, _, key = old.rpartition('.')
    block = _block_at(given, path)
    if block is None or key not in block:
      continue
    value = block.pop(key)
    path, _, key = new.rpartition('.')
    default, target = _block_at(base, path)[key], _block_at(given, path, create=True)
    if target is None:
      continue  # The check of its type follows.
    if target.get(key, value) not in (value, default):
      raise InputError(f'config.{old}={value!r} is now called config.{new}, which is '
                       f'{target[key]!r}; give one of the two')
    target[key] = value
  return given


def _block_at(block: Any, path: str, *, create: bool = False) -> Any:
  """Returns the block at a dotted path, None if something else or nothing is there."""
  for name in path.split('.'):
    if not isinstance(block, dict):
      return None
    block = block.setdefault(name, {}) if create else block.get(name)
  return block if isinstance(block, dict) else None


def _complete_block(given: Any, base: dict[str, Any], path: str, unknown: list[str] | None
                    ) -> dict[str, Any]:
  """Returns a block with the keys of `base` that it lacks, after checking those that it has."""
  if not isinstance(given, dict):
    raise InputError(f'config.{path}={given!r} must be a block, dict(key=value, ...)')
  if path in MAPPINGS:
    for key in given:
      if '.' in str(key):  # A ConfigDict takes no such keys.
        raise InputError(f"config.{path}[{key!r}] has a '.', which no parameter's name has")
    return {str(key): _checked(value, MAPPINGS[path], f'{path}[{key!r}]')
            for key, value in given.items()}
  if path in COMPONENTS:
    # A component other than the base's has other options.
    same = given.get('name', base['name']) == base['name']
    return {**base, **given} if same else given
  completed = dict(base)
  for key, value in given.items():
    dotted = f'{path}.{key}' if path else str(key)
    if key not in base:
      if unknown is None:
        raise InputError(f'unknown config key config.{dotted}; {did_you_mean(str(key), base)}')
      unknown.append(dotted)
    elif isinstance(base[key], dict):
      completed[key] = _complete_block(value, base[key], dotted, unknown)
    else:
      completed[key] = _checked(value, base[key], dotted)
  return completed


def _checked(value: Any, default: Any, path: str) -> Any:
  """Returns a value converted to the type of its default; None stays if the default is None."""
  if path in SIZES and isinstance(value, tuple):
    if len(value) != 2 or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool)
                                  for n in value):
      raise InputError(f'config.{path}={value!r} must be a whole number, or two of them')
    height, width = map(int, value)
    return height if height == width else (height, width)
  optional = default is None
  if optional and value is None:
    return None
  for kind, legal, words, convert in [
      (bool, bool, 'True or False', bool), (int, numbers.Integral, 'a whole number', int),
      ((float, type(None)), numbers.Real, 'a number', float),
      (str, (str, os.PathLike), 'text', os.fspath), (tuple, tuple, 'a tuple', tuple)]:
    if isinstance(default, kind):
      if not isinstance(value, legal) or (isinstance(value, bool) and kind is not bool):
        words += ' or None' if optional else ''
        raise InputError(f'config.{path}={value!r} must be {words}')
      if isinstance(value, numbers.Real) and not math.isfinite(value):
        raise InputError(f'config.{path}={value!r} must be a finite number')
      return convert(value)
  raise TypeError(f'default {default!r} of {path}')


def _with_warmup_factor(optim: dict[str, Any]) -> dict[str, Any]:
  """Returns the block `optim` with the initial rate as a factor of the learning rate."""
  optim = dict(optim)
  first = optim.pop('warmup_learning_rate', None)
  if first is None:
    return optim
  rate = optim.get('learning_rate', base_config().optim.learning_rate)
  for key, value in [('learning_rate', rate), ('warmup_learning_rate', first)]:
    _checked(value, 0.0, f'optim.{key}')
  if first and not rate > 0:
    raise InputError(f'config.optim.warmup_learning_rate={first} needs a learning_rate above 0, '
                     f'not {rate}; use optim.warmup_factor, which is a multiple of it')
  return optim | {'warmup_factor': first / rate if first else 0.0}


def ssd(config: ConfigDict) -> None:
  """Changes a config to MobileNet SSD: convolutions between scales, one predictor per scale."""
  _to_stride_32(config)
  config.model.neck = dict(name='conv_pyramid', strides=(16, 32), depths=(512, 256, 256, 128))
  config.model.head = dict(name='per_level_box_predictor', side=1, prior=0.01)
  config.model.anchors.min_scale = 0.2
  config.model.anchors.reduce_lowest_level = True


def fpn(config: ConfigDict) -> None:
  """Changes a config to a top-down pyramid with the head and anchors of PPN (section 2.2)."""
  _to_stride_32(config)
  config.model.neck = dict(name='feature_pyramid', strides=(16, 32), num_levels=6, depth=256)


def _to_stride_32(config: ConfigDict) -> None:
  """Lets a backbone of this package end with its map of stride 32."""
  if config.model.backbone.name in ('mobilenet_v2', 'mobilenet_v3_small'):
    config.model.backbone.last_stride = 32
  else:
    config.model.backbone.last_block = 13


def hard_negative_mining(config: ConfigDict) -> None:
  """Changes a config to SSD's loss: softmax with background, and the hardest negatives."""
  config.model.background_column = True
  config.model.score_activation = 'softmax'
  config.model.head.prior = 0.5  # Biases of zero.
  config.loss = dict(name='hard_negative_mining', negatives_per_positive=3.0,
                     localization_weight=1.0, group_size=0)


def tf_reference(config: ConfigDict) -> None:
  """Changes a config to compute as the TF Object Detection API does (docs/reference.md).

  Its checkpoints need this: they have a background column and were trained on images resized by the
  legacy kernel.
  """
  config.model.background_column = True
  config.model.layers.kernel_stddev = 0.01
  config.matching.ignore_crowd = False
  config.loss.alpha = 0.75
  config.data.transforms = (dict(name='horizontal_flip', probability=0.5),
                            dict(name='ssd_random_crop'))
  config.data.resize = 'legacy'
