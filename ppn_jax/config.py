"""The one shape of every config: its keys, their defaults, and what is legal in a config file.

Each block is the keyword arguments of one function, named beside it: look there for what a key
means, which values are legal and what the default does. `complete` fills in what a config leaves
out and refuses what does not belong in one.

The functions after it are the named differences from PPN of which the baselines are made. They
change an unlocked config in place and leave data and schedule alone.
"""

import numbers
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ppn_jax.errors import InputError, did_you_mean

# Blocks that name a component by `name` -> the table of the names that are known.
COMPONENTS = {
    'model.backbone': 'ppn_jax.models.network:BACKBONES',
    'model.neck': 'ppn_jax.models.network:NECKS',
    'model.head': 'ppn_jax.models.network:HEADS',
    'loss': 'ppn_jax.detection.losses:LOSSES',
    'data.train': 'ppn_jax.data.source:SOURCES',
    'data.eval': 'ppn_jax.data.source:SOURCES',
    'data.transforms': 'ppn_jax.data.transforms.basic:TRANSFORMS',  # A tuple of blocks.
}

# The function that each other block is the arguments of.
FUNCTIONS = {
    'model': 'ppn_jax.detector:build',
    'model.anchors': 'ppn_jax.detection.anchors:ssd_anchors',
    'model.layers': 'ppn_jax.models.layers:LayerPolicy',
    'matching': 'ppn_jax.detection.matching:assign_targets',
    'postprocess': 'ppn_jax.detection.nms:postprocess',
    'init': 'ppn_jax.weights.initial:initial_weights',
    'optim': 'ppn_jax.training.optimizer:build_optimizer',
}

# Arguments of components that the system supplies, not the user.
GIVEN = frozenset({'anchors_per_cell', 'categories', 'class_spec', 'name', 'num_classes', 'outputs',
                   'parent', 'policy', 'targets'})


def base_config() -> ConfigDict:
  """PPN on MobileNet-v1 at 300 px, with the paper's losses; no data and no schedule yet."""
  config = ConfigDict()
  config.seed = 0  # Of the weights, the order of the data and its augmentation.

  config.model = dict(  # ppn_jax.detector.build
      image_size=300,
      num_classes=0,  # 0: as many as the training data has.
      background_column=False,  # ppn_jax.detection.class_logits.ClassLogitsSpec
      score_activation='sigmoid',
      backbone=dict(name='mobilenet_v1', depth_multiplier=1.0, last_block=11),
      neck=dict(name='pooling_pyramid', stride=16, num_levels=6, projection=0),
      head=dict(name='shared_box_predictor', depth=512, norm_per_level=True,
                prior=0.01),
      anchors=dict(  # ppn_jax.detection.anchors.ssd_anchors
          min_scale=0.15, max_scale=0.95, aspect_ratios=(1.0, 2.0, 0.5, 3.0, 0.3333),
          reduce_lowest_level=False),
      layers=dict(  # ppn_jax.models.layers.LayerPolicy
          dtype='float32', norm_decay=0.97, norm_epsilon=0.001, norm_group_size=0,
          conv_form='auto', kernel_stddev=placeholder(float)))  # None: He's.
  config.matching = dict(  # ppn_jax.detection.matching.assign_targets
      matched_iou=0.5, force_match=True, ignore_crowd=True)
  config.loss = dict(  # ppn_jax.detection.losses.LOSSES
      name='focal', alpha=0.25, gamma=2.0, localization_weight=1.0, group_size=0)
  config.postprocess = dict(  # ppn_jax.detection.nms.postprocess
      score_threshold=1e-8, iou_threshold=0.6, max_per_class=100, max_detections=100)

  config.init = dict(weights='', backbone='', report=())  # ppn_jax.weights.initial.initial_weights
  config.data = dict(
      train=dict(  # ppn_jax.data.source.build_source
          name='',
          cache='',  # 'memory' or a folder: images are decoded once (ppn_jax.data.cache).
          cache_size=0,  # Shorter side of cached images in pixels; 0: as the network's input.
          resident=False,  # The whole set in device memory (ppn_jax.device_data.dataset).
          resident_size=0),  # Side in pixels of what is held there; 0: as the network's input.
      eval=dict(name=''),
      eval_fraction=0.0,  # Share of the training images to evaluate on if `eval` names no data.
      transforms=(  # ppn_jax.data.transforms.basic.build_transforms; of training, before resizing.
          dict(name='ssd_random_crop'),  # Before the flip, which is then of a smaller image.
          dict(name='horizontal_flip', probability=0.5)),
      resize='supersample',  # The `method` of ppn_jax.data.transforms.basic.Resize.
      reduced_decoding=True,  # JPEGs at 1/2, 1/4, 1/8 where that leaves pixels enough.
      on_bad_example='raise',  # An image that cannot be read: 'raise', or 'skip' and name it.
      max_bad_share=0.01,  # Share of the images that may be skipped.
      max_boxes=0,  # Boxes that every image's truth is padded to; 0: as the fullest image has.
      threads=0)  # That decode and augment; 0: one for each processor core.
  config.optim = dict(  # ppn_jax.training.optimizer.build_optimizer
      learning_rate=0.7, rate_batch_size=512, warmup_fraction=0.04,
      warmup_factor=0.1333 / 0.7,  # The reference's 0.1333 beside 0.7.
      momentum=0.9, weight_decay=4e-5, clip_norm=0.0, ema_decay=0.0,
      micro_batches=1, shard_state=False)
  config.train = dict(  # ppn_jax.jobs.train.train
      steps=0,  # Of the whole run; to be set.
      batch_size=0,  # Images a step, over all devices; to be set.
      log_every=100,  # Steps between two lines of metrics.
      checkpoint_every=1000,  # Steps between two checkpoints; the last step is always saved.
      evaluate_every=1000,  # Steps between two evaluations; 0: never, data.eval is not needed.
      keep_last=3,  # How many of the newest checkpoints to keep.
      keep_best=1,  # How many of those of highest AP to keep besides.
      on_save_error='continue')  # A checkpoint that cannot be written: 'continue' or 'stop'.
  config.eval = dict(batch_size=32)  # Images at a time, over all devices.
  return config


def complete(config: Mapping[str, Any], *, unknown: list[str] | None = None) -> ConfigDict:
  """Returns a locked copy of a config with the defaults of all that it leaves out.

  A block that is given anew, such as `config.train = dict(steps=2)`, keeps what it has and takes
  the rest from `base_config`. Options of components are not added: their defaults stand in the
  components' signatures. `optim.warmup_learning_rate` of earlier versions becomes
  `optim.warmup_factor`.

  Args:
    config: of a config file, or what a run has recorded.
    unknown: takes the names of keys that do not exist, which are left out then.

  Raises:
    InputError: If there is a key that does not exist, unless `unknown` takes it, or a value of a
      wrong type.
  """
  given = plain(config)
  if isinstance(given.get('optim'), dict):
    given['optim'] = _with_warmup_factor(given['optim'])
  completed = _complete_block(given, plain(base_config()), '', unknown)
  return ConfigDict(completed).lock()


def component_table(path: str) -> str | None:
  """Returns where the components are listed that a block may name; None if it names none."""
  if path.startswith('data.transforms.'):
    return COMPONENTS['data.transforms']
  return None if path == 'data.transforms' else COMPONENTS.get(path)


def plain(value: Any) -> Any:
  """Returns a config as dicts and tuples, without references."""
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {key: plain(v) for key, v in value.items()}
  return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def _complete_block(given: Any, base: dict[str, Any], path: str, unknown: list[str] | None
                    ) -> dict[str, Any]:
  if not isinstance(given, dict):
    raise InputError(f'config.{path}={given!r} must be a block, dict(key=value, ...)')
  if path in COMPONENTS:
    # Another component than the base's has options of its own.
    same = given.get('name', base['name']) == base['name']
    kept = base if same or path == 'data.train' else {}
    return {**kept, **given}
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
  """Returns a value as the type of its default, None for numbers that need not be given."""
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
      return convert(value)
  raise TypeError(f'default {default!r} of {path}')


def _with_warmup_factor(optim: dict[str, Any]) -> dict[str, Any]:
  """Returns the block `optim` with the rate at step 0 as a factor, so that it follows the rate."""
  optim = dict(optim)
  first = optim.pop('warmup_learning_rate', None)
  if first is None:
    return optim
  rate = optim.get('learning_rate', base_config().optim.learning_rate)
  for key, value in [('learning_rate', rate), ('warmup_learning_rate', first)]:
    _checked(value, 0.0, f'optim.{key}')
  if first and not rate > 0:
    raise InputError(f'config.optim.warmup_learning_rate={first} needs a learning_rate above 0, '
                     f'not {rate}; optim.warmup_factor is the form that follows it')
  return optim | {'warmup_factor': first / rate if first else 0.0}


def ssd(config: ConfigDict) -> None:
  """Vanilla MobileNet SSD: convolutions between scales and a predictor for each."""
  config.model.backbone.last_block = 13
  config.model.neck = dict(name='conv_pyramid', strides=(16, 32), depths=(512, 256, 256, 128))
  config.model.head = dict(name='per_level_box_predictor', side=1, prior=0.01)
  config.model.anchors.min_scale = 0.2
  config.model.anchors.reduce_lowest_level = True


def fpn(config: ConfigDict) -> None:
  """A top-down pyramid in place of the pooled one; head and anchors stay PPN's (section 2.2)."""
  config.model.backbone.last_block = 13
  config.model.neck = dict(name='feature_pyramid', strides=(16, 32), num_levels=6, depth=256)


def hard_negative_mining(config: ConfigDict) -> None:
  """The SSD paper's objective: softmax over classes and background, the hardest negatives."""
  config.model.background_column = True
  config.model.score_activation = 'softmax'
  config.model.head.prior = 0.5  # Biases of zero.
  config.loss = dict(name='hard_negative_mining', negatives_per_positive=3.0,
                     localization_weight=1.0, group_size=0)


def tf_reference(config: ConfigDict) -> None:
  """As the TF Object Detection API's sync configs compute, where we differ (docs/reference.md).

  Its checkpoints need it: they have the background column, and were trained on images resized
  by the legacy kernel.
  """
  config.model.background_column = True
  config.model.layers.kernel_stddev = 0.01
  config.matching.ignore_crowd = False
  config.loss.alpha = 0.75
  config.data.transforms = (dict(name='horizontal_flip', probability=0.5),
                            dict(name='ssd_random_crop'))
  config.data.resize = 'legacy'
