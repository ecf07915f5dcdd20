"""Configs of the comparison, made from a profile (size and duration), a model and a recipe.

A recipe has what may be tuned: augmentation, optimizer and loss. All models of a comparison share
the recipe, the budget and the data. They differ by the named differences of `ppn_jax.config`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ppn_jax.config import fpn, ssd
from ppn_jax.config_files import load_config

MODELS = ('ppn', 'ssd', 'fpn')
# Recipes are chosen on a seed that is not reported, and on training images that are held out.
TUNING_SEED, TUNING_FRACTION = 100, 0.125
_SHIPPED = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'coco_json.py'


class Phase(NamedTuple):
  """Part of a run at one image size. Each phase starts from the weights of the one before.

  Fields:
    image_size: side of the images in pixels.
    share: share of the run's epochs.
    rate: factor of the recipe's learning rate.
    model: entries of `config.model` by dotted key for each model, in addition to the profile's.
  """
  image_size: int
  share: float = 1.0
  rate: float = 1.0
  model: Mapping[str, Mapping[str, Any]] = {}


@dataclasses.dataclass(frozen=True)
class Profile:
  """Size and duration of the runs.

  Attributes:
    reduced: warning that every output shows for a reduced comparison; '' for the full one.
    phases: the parts of a run, in order.
    epochs, tune_epochs: epochs of a reported run, and of one that compares recipes.
    batch_size: images per step.
    recipe: default recipe of the reported runs.
    seeds: seeds of the reported runs.
    model: entries of `config.model` by dotted key, for each model.
    dtype: dtype of the activations.
    train_images: number of images on which the calibration report counts positives.
    backbone: file in the folder weights of PPN_SHARED that the backbone starts from; '' for random
      weights.
    aim: AP50 that each model should reach.
  """
  reduced: str
  phases: tuple[Phase, ...]
  epochs: int
  tune_epochs: int
  batch_size: int
  recipe: str
  seeds: tuple[int, ...]
  model: Mapping[str, Mapping[str, Any]]
  dtype: str
  train_images: int
  backbone: str = ''
  aim: float = 0.4

  @property
  def image_size(self) -> int:
    """Returns the side of the images that a run ends with and is evaluated on."""
    return self.phases[-1].image_size

  def for_tuning(self) -> 'Profile':
    """Returns the profile of runs that compare recipes, which have the first image size alone."""
    return dataclasses.replace(self, epochs=self.tune_epochs,
                               phases=(self.phases[0]._replace(share=1.0),))

  def note(self, epochs: int) -> str:
    """Returns the warning for runs of this many epochs, '' if nothing is reduced."""
    shorter = f'REDUCED: {epochs} epochs instead of {self.epochs}.' if epochs < self.epochs else ''
    return ' '.join(filter(None, (self.reduced, shorter)))


def _reduced(width: float, levels: int, head: int, depths: tuple[int, ...], fpn_depth: int
             ) -> dict[str, dict[str, Any]]:
  """Returns entries for narrower networks with fewer levels, reduced by similar factors."""
  shared = {'backbone.depth_multiplier': width}
  pooled = shared | {'neck.num_levels': levels, 'head.depth': head}
  return {'ppn': pooled, 'ssd': shared | {'neck.depths': depths},
          'fpn': pooled | {'neck.depth': fpn_depth}}


# At 160 and 224 px PPN and FPN have the five levels that the image allows, with the scales 0.15 to
# 0.95, and six of the same range at 300 px. SSD has six throughout, since each has variables of its
# own; the last two are of 1x1 pixel there.
_SMALLER = {'ppn': {}, 'ssd': {'neck.repeat_1x1': True}, 'fpn': {'neck.num_levels': 0}}
_GROWING = (Phase(160, 0.58, 1.0, _SMALLER), Phase(224, 0.23, 0.5, _SMALLER),
            Phase(300, 0.19, 0.5))

PROFILES = {
    # The recipe follows detectors that were trained on VOC from random weights (DSOD, ScratchDet)
    # as far as this package supports it; --tune has not been run on a GPU yet.
    'gpu': Profile('', (Phase(300),), epochs=400, tune_epochs=100, batch_size=64, recipe='decay',
                   seeds=(0, 1, 2), model={'ppn': {}, 'ssd': {}, 'fpn': {}}, dtype='bfloat16',
                   train_images=2000),
    # The paper's experiment on two CPU cores: 15 epochs at 160 px, 6 at 224 and 5 at 300, where a
    # step takes 1, 1.9 and 3.5 times as long.
    'imagenet': Profile(
        '', _GROWING, epochs=26, tune_epochs=3, batch_size=16, recipe='frozen_adamw',
        seeds=(0, 1), model={'ppn': {}, 'ssd': {}, 'fpn': {}}, dtype='float32', train_images=2000,
        backbone='mobilenet_v1_1.0_224_quant_embedding_extractor.tflite', aim=0.45),
    # From the backbone of a detector that was trained on COCO, which has these classes.
    'coco': Profile(
        '', _GROWING, epochs=28, tune_epochs=3, batch_size=16, recipe='frozen_adamw', seeds=(0,),
        model={name: {'backbone.depth_multiplier': 0.75} for name in MODELS}, dtype='float32',
        train_images=2000, backbone='ssd_mobilenet_v1_0.75_coco_quant.tflite', aim=0.55),
    'cpu': Profile(
        'REDUCED for a CPU: 96 px, networks of half the width and four levels. It tests the '
        'script; it is not the comparison.', (Phase(96),), epochs=32, tune_epochs=16,
        batch_size=16, recipe='shipped', seeds=(0,), model=_reduced(0.5, 4, 256, (256, 128), 128),
        dtype='float32', train_images=2000),
    'smoke': Profile(
        'REDUCED to a smoke test. The metrics are meaningless.', (Phase(64, 0.5), Phase(64, 0.5)),
        epochs=2, tune_epochs=2, batch_size=4, recipe='shipped', seeds=(0,),
        model=_reduced(0.25, 3, 16, (16,), 16), dtype='float32', train_images=8),
}


class Recipe(NamedTuple):
  """Training recipe.

  Fields:
    about: short description.
    transforms: as `config.data.transforms`; None for those of the config. A size of 0 stands for
      the network's input size.
    changes: entries of the config by dotted key that replace those of configs/coco_json.py.
    average: length of the moving average of the weights as a share of the steps; None keeps the
      config's own.
    resident: False for transforms that cannot run on the device; images are then cached in host
      memory.
  """
  about: str
  transforms: tuple[dict[str, Any], ...] | None = None
  changes: Mapping[str, Any] = {}
  average: float | None = None
  resident: bool = True


_FLIP, _CROP = dict(name='horizontal_flip'), dict(name='ssd_random_crop')
_COLOUR = dict(name='photometric_distortion')
_ZOOM_OUT = dict(name='expand', probability=0.5, ratio=(1.0, 3.0))
_ZOOM = (_ZOOM_OUT, _CROP, _FLIP, _COLOUR)
_AVERAGE = 0.02
# Entries of `optim`: what configs/coco_json.py had before AdamW.
SGD = dict(optimizer=dict(name='sgd'), learning_rate=0.1, rate_batch_size=32,
           rate_batch_exponent=1.0, weight_decay=4e-5)
_SGD = {f'optim.{key}': value for key, value in SGD.items()}
_DECAY = _SGD | {'optim.weight_decay': 4e-4}
# The threshold of the suppression was chosen for ppn_voc, on training images.
_FROZEN = {'optim.freeze': ('backbone/conv2d_[0-5]',), 'postprocess.iou_threshold': 0.5}

RECIPES = {
    'shipped': Recipe('configs/coco_json.py as it is'),
    'average': Recipe('SGD and a moving average', None, _SGD, _AVERAGE, resident=False),
    'frozen': Recipe('average, with the first six blocks of the backbone frozen', None,
                     _SGD | _FROZEN, _AVERAGE, resident=False),
    'frozen_fast': Recipe('frozen with twice the rate', None,
                          _SGD | _FROZEN | {'optim.learning_rate': 0.2}, _AVERAGE,
                          resident=False),
    'frozen_adamw': Recipe('frozen with the AdamW of configs/coco_json.py', None, _FROZEN, _AVERAGE,
                           resident=False),
    # At 96 px and 16 epochs (results/voc300_tune_cpu_reduced.json) it has the AP of the recipe
    # shipped then, SGD, and twice the calibration error.
    'eager': Recipe('SGD with alpha 0.75, twice the rate and a moving average', None,
                    _SGD | {'loss.alpha': 0.75, 'optim.learning_rate': 0.2,
                            'optim.warmup_factor': 0.1}, _AVERAGE),
    'zoom': Recipe("average; zooming out, SSD's crop, flip, colours", _ZOOM, _SGD, _AVERAGE),
    'decay': Recipe('zoom with ten times the weight decay', _ZOOM, _DECAY, _AVERAGE),
    'jitter': Recipe('decay, with large-scale jittering in place of zoom and crop',
                     (dict(name='large_scale_jitter', size=0, scale=(0.4, 2.0)), _FLIP, _COLOUR),
                     _DECAY, _AVERAGE),
    'mosaic': Recipe('decay, with mosaics of half the images in place of zooming out',
                     (dict(name='mosaic', size=0, probability=0.5), _CROP, _FLIP, _COLOUR),
                     _DECAY, _AVERAGE, resident=False),
}


def make_config(data: pathlib.Path, profile: Profile, model: str, recipe: Recipe, *, seed: int,
                images: int, epochs: int, batch_size: int, conv_form: str = 'auto',
                tune: bool = False, phase: int = -1, weights: str = '', backbone: str = ''
                ) -> ConfigDict:
  """Returns the config of a phase of a run, locked.

  Args:
    data: folder with `train`, `val` and an `instances_*.json` for each.
    profile: size and duration.
    model: one of `MODELS`.
    recipe: training recipe.
    seed: seed of weights, order and augmentation.
    images: number of training images.
    epochs: passes over the training set, in all phases together.
    batch_size: images per step.
    conv_form: see `config.model.layers`.
    tune: holds out `TUNING_FRACTION` of the training images and evaluates on them, so that
      recipes are not chosen on the images that the comparison is scored on.
    phase: index of the phase.
    weights, backbone: what the phase starts from, see `config.init`.
  """
  now = profile.phases[phase]
  config = load_config(str(_SHIPPED), []).copy_and_resolve_references().unlock()
  if model != 'ppn':
    {'ssd': ssd, 'fpn': fpn}[model](config)
  config.seed = seed
  config.model.backbone.depth_multiplier = 1.0  # Of the profiles that do not name another.
  config.model.image_size = now.image_size
  config.model.layers.update(dtype=profile.dtype, conv_form=conv_form)
  _set(config.model, {**profile.model[model], **now.model.get(model, {})})
  config.init.update(weights=weights, backbone=backbone)
  for split in ('train',) if tune else ('train', 'val'):
    config.data['train' if split == 'train' else 'eval'].update(
        images=str(data / split), annotations=str(data / f'instances_{split}.json'))
  if tune:
    config.data.eval_fraction = TUNING_FRACTION
    images -= round(TUNING_FRACTION * images)
  config.data.resident.enabled = recipe.resident
  config.data.cache.where = '' if recipe.resident else 'memory'
  if recipe.transforms is not None:
    config.data.transforms = tuple(
        dict(t, size=t['size'] or now.image_size) if 'size' in t else t
        for t in recipe.transforms)
  _set(config, recipe.changes)
  config.optim.learning_rate *= now.rate
  _set(config.train, schedule(images, max(round(now.share * epochs), 1), batch_size,
                              evaluations=max(5 // len(profile.phases), 1)))
  if recipe.average is not None:
    config.optim.ema_decay = 1 - 1 / max(recipe.average * config.train.steps, 2)
  return config.lock()


def schedule(images: int, epochs: int, batch_size: int, evaluations: int) -> dict[str, int]:
  """Returns the steps and intervals of a phase that reports 50 and saves 20 times."""
  steps = max(images * epochs // batch_size, 1)
  often = lambda times: max(steps // times, 1)
  return {'steps': steps, 'batch_size': batch_size, 'log_every': often(50),
          'checkpoint_every': often(20), 'evaluate_every': often(evaluations), 'keep_last': 1,
          'keep_best': 0}


def _set(block: ConfigDict, entries: Mapping[str, Any]) -> None:
  """Sets entries by dotted key; training refuses those that do not exist."""
  for key, value in entries.items():
    *path, last = key.split('.')
    at = block
    for name in path:
      at = at[name]
    at[last] = value
