"""What is trained: profiles (how large, how long), models, and recipes (how), as one config.

A recipe is what may be tuned: augmentation, optimizer, loss. All models of a comparison share it,
the budget and the data; they differ by the named differences of `ppn_jax.config`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ppn_jax.config import fpn, ssd
from ppn_jax.config_files import load_config

MODELS = ('ppn', 'ssd', 'fpn')
TUNING_SEED = 100  # Nothing that is reported may have been chosen on its own seed.
_SHIPPED = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'coco_json.py'


@dataclasses.dataclass(frozen=True)
class Profile:
  """How large and how long.

  Attributes:
    reduced: what every output says of it; '' for the real thing.
    image_size: pixels.
    epochs, tune_epochs: of a reported run, and of one that compares recipes.
    batch_size: images a step.
    recipe: of the reported runs, unless another is asked for.
    seeds: of the reported runs.
    model: entries of `config.model` by dotted key, for each model.
    dtype: of activations.
    train_images: how many to count the positives of each level on, for the calibration report.
  """
  reduced: str
  image_size: int
  epochs: int
  tune_epochs: int
  batch_size: int
  recipe: str
  seeds: tuple[int, ...]
  model: Mapping[str, Mapping[str, Any]]
  dtype: str
  train_images: int

  def note(self, epochs: int) -> str:
    """What to say of runs of so many epochs; '' where nothing is reduced."""
    shorter = f'REDUCED: {epochs} epochs instead of {self.epochs}.' if epochs < self.epochs else ''
    return ' '.join(filter(None, (self.reduced, shorter)))


def _reduced(width: float, levels: int, head: int, depths: tuple[int, ...], fpn_depth: int
             ) -> dict[str, dict[str, Any]]:
  """Narrower networks of fewer levels, each by the same factor or so."""
  shared = {'backbone.depth_multiplier': width}
  pooled = shared | {'neck.num_levels': levels, 'head.depth': head}
  return {'ppn': pooled, 'ssd': shared | {'neck.depths': depths},
          'fpn': pooled | {'neck.depth': fpn_depth}}


PROFILES = {
    # The recipe is that of detectors trained on VOC from random weights (DSOD, ScratchDet) as
    # far as it is ours; --tune has not been run on a GPU yet.
    'gpu': Profile('', 300, epochs=400, tune_epochs=100, batch_size=64, recipe='decay',
                   seeds=(0, 1, 2), model={'ppn': {}, 'ssd': {}, 'fpn': {}}, dtype='bfloat16',
                   train_images=2000),
    'cpu': Profile(
        'REDUCED for a CPU: 96 px, networks of half the width and four levels. It proves the '
        'script; it is not the comparison.', 96, epochs=32, tune_epochs=16, batch_size=16,
        recipe='shipped', seeds=(0,), model=_reduced(0.5, 4, 256, (256, 128), 128), dtype='float32',
        train_images=2000),
    'smoke': Profile(
        'REDUCED to a smoke test. The figures mean nothing.', 64, epochs=2,
        tune_epochs=1, batch_size=4, recipe='shipped', seeds=(0,),
        model=_reduced(0.25, 3, 16, (16,), 16), dtype='float32', train_images=8),
}


class Recipe(NamedTuple):
  """How to train.

  Fields:
    about: in a few words.
    transforms: as of `config.data.transforms`; None for the shipped ones. A size of 0 is that of
      the network's input.
    changes: entries of the config by dotted key, after those of configs/coco_json.py.
    average: share of the steps that a moving average of the weights looks back on; None keeps
      the config's own.
    resident: False for transforms that have no form on the device; images are then cached in
      the host's memory.
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
_DECAY = {'optim.weight_decay': 4e-4}

RECIPES = {
    'shipped': Recipe('configs/coco_json.py as it is'),
    # Measured at 96 px, 16 epochs (results/voc300_tune_cpu_reduced.json): AP as with the shipped
    # one, twice the calibration error.
    'eager': Recipe('the same with alpha 0.75, twice the rate and a moving average', None,
                    {'loss.alpha': 0.75, 'optim.learning_rate': 0.2,
                     'optim.warmup_factor': 0.1}, _AVERAGE),
    'zoom': Recipe("moving average; zooming out, SSD's crop, flip, colours", _ZOOM, {}, _AVERAGE),
    'decay': Recipe('zoom with ten times the weight decay', _ZOOM, _DECAY, _AVERAGE),
    'jitter': Recipe('decay, with large-scale jittering in place of zoom and crop',
                     (dict(name='large_scale_jitter', size=0, scale=(0.4, 2.0)), _FLIP, _COLOUR),
                     _DECAY, _AVERAGE),
    'mosaic': Recipe('decay, with mosaics of half the images in place of zooming out',
                     (dict(name='mosaic', size=0, probability=0.5), _CROP, _FLIP, _COLOUR),
                     _DECAY, _AVERAGE, resident=False),
}


def make_config(data: pathlib.Path, profile: Profile, model: str, recipe: Recipe, *, seed: int,
                images: int, epochs: int, batch_size: int, conv_form: str = 'auto'
                ) -> ConfigDict:
  """The config of one run, locked.

  Args:
    data: folder with `train`, `val` and an `instances_*.json` of each.
    profile, recipe: see there.
    model: one of `MODELS`.
    seed: of weights, order and augmentation.
    images: of the training set.
    epochs: passes over the training set.
    batch_size: images a step.
    conv_form: of `config.model.layers`.
  """
  config = load_config(str(_SHIPPED), []).copy_and_resolve_references().unlock()
  if model != 'ppn':
    {'ssd': ssd, 'fpn': fpn}[model](config)
  config.seed = seed
  config.model.image_size = profile.image_size
  config.model.layers.update(dtype=profile.dtype, conv_form=conv_form)
  _set(config.model, profile.model[model])
  for split in ('train', 'val'):
    config.data['train' if split == 'train' else 'eval'].update(
        images=str(data / split), annotations=str(data / f'instances_{split}.json'))
  config.data.train.update(resident=recipe.resident, cache='' if recipe.resident else 'memory')
  if recipe.transforms is not None:
    config.data.transforms = tuple(
        dict(t, size=t['size'] or profile.image_size) if 'size' in t else t
        for t in recipe.transforms)
  _set(config, recipe.changes)
  _set(config.train, schedule(images, epochs, batch_size))
  if recipe.average is not None:
    config.optim.ema_decay = 1 - 1 / max(recipe.average * config.train.steps, 2)
  return config.lock()


def schedule(images: int, epochs: int, batch_size: int) -> dict[str, int]:
  """Steps, and when to report, save and evaluate: 50, 20 and 5 times a run."""
  steps = max(images * epochs // batch_size, 1)
  often = lambda times: max(steps // times, 1)
  return {'steps': steps, 'batch_size': batch_size, 'log_every': often(50),
          'checkpoint_every': often(20), 'evaluate_every': often(5), 'keep_last': 1,
          'keep_best': 0}


def _set(block: ConfigDict, entries: Mapping[str, Any]) -> None:
  """Sets entries by dotted key; they must exist."""
  for key, value in entries.items():
    *path, last = key.split('.')
    at = block
    for name in path:
      at = at[name]
    if last not in at:
      raise KeyError(key)
    at[last] = value
