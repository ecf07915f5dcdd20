"""Makes the weights, images and ground truth that all sides of benchmarks/peers.py share.

  python material.py FOLDER CLASSES IMAGES MAX_BOXES

Writes weights.npz (kernels from He's distribution; batch norm averages from the statistics of the
images; the last kernels scaled until logits and box codes vary as in a trained detector, so that
suppression has work to do), material.npz (images of drawn shapes with ground truth padded to
MAX_BOXES) and spec.json (the parameters of configs/ppn_mobilenet_v1_coco.py).
"""

import json
import pathlib
import sys

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ppn_jax.data.loader import train_batches
from ppn_jax.data.source import build_source
from ppn_jax.models.mobilenet_v1 import BLOCKS
from ppn_jax.run import build_detector

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEARNING_RATE = 0.01
LOGIT_SPREAD, CODE_SPREAD = 1.0, 1.0  # Standard deviations.
CALIBRATION_IMAGES = 8


def paper_config(num_classes: int, dtype: str, device: str) -> ConfigDict:
  """Returns the config of configs/ppn_mobilenet_v1_coco.py, unlocked.

  In bfloat16 on a CPU, it is matrix products alone that are.
  """
  sys.path.append(str(ROOT))
  from configs import ppn_mobilenet_v1_coco
  config = ppn_mobilenet_v1_coco.get_config().unlock()
  config.model.num_classes = num_classes
  if device == 'cpu' and dtype == 'bfloat16':
    config.model.layers.update(dtype='float32', matmul_dtype='bfloat16')
  else:
    config.model.layers.dtype = dtype
  return config


def write(folder: pathlib.Path, num_classes: int, num_images: int, max_boxes: int) -> None:
  config = paper_config(num_classes, 'float32', 'cpu')
  source = build_source({'name': 'synthetic_shapes', 'num_images': num_images + CALIBRATION_IMAGES,
                         'image_size': (480, 640)})
  batch = next(train_batches(source, transforms=(), image_size=config.model.image_size,
                             max_boxes=max_boxes, batch_size=len(source), seed=0))
  detector = build_detector(config)
  # Random labels, because the shapes have few classes; the cost does not depend on the class.
  labels = np.random.default_rng(0).integers(0, num_classes, batch.ground_truth.labels.shape)
  material = {'images': batch.images, 'boxes': batch.ground_truth.boxes,
              'valid': batch.ground_truth.valid,
              'labels': np.where(batch.ground_truth.valid, labels, 0).astype(np.int32)}
  np.savez(folder / 'material.npz', anchors=detector.anchors.boxes,
           **{name: array[:num_images] for name, array in material.items()})
  # Different images from those of the step, so that the step changes the averages.
  weights = traverse_util.flatten_dict(_realistic(config, batch.images[num_images:]), sep='/')
  np.savez(folder / 'weights.npz', **{name: np.asarray(w) for name, w in weights.items()})
  (folder / 'spec.json').write_text(json.dumps({
      **config.loss.to_dict(), **config.matching.to_dict(), **config.postprocess.to_dict(),
      'num_classes': num_classes, 'num_levels': detector.num_levels,
      'strides': [2] + [stride for _, stride in BLOCKS[:detector.network.backbone.last_block]],
      'norm_epsilon': config.model.layers.norm_epsilon,
      'norm_decay': config.model.layers.norm_decay, 'momentum': config.optim.optimizer.momentum,
      'weight_decay': config.optim.weight_decay, 'learning_rate': LEARNING_RATE}))


def _realistic(config: ConfigDict, images: np.ndarray) -> dict:
  """Returns variables with the averages of `images` and outputs of the given deviations."""
  config = config.copy_and_resolve_references()
  config.model.layers.norm_decay = 0.0  # The averages are then the last batch's.
  detector = build_detector(config)
  variables = jax.jit(detector.init)(jax.random.key(0))
  _, batch_stats = jax.jit(detector.forward_train)(variables, images)
  variables = {**variables, 'batch_stats': batch_stats}
  outputs = jax.jit(detector.forward)(variables, images)
  head = dict(variables['params']['head'])
  head['class_kernel'] *= LOGIT_SPREAD / float(np.std(outputs.class_logits))
  head['box_kernel'] *= CODE_SPREAD / float(np.std(outputs.box_codes))
  return {**variables, 'params': {**variables['params'], 'head': head}}


if __name__ == '__main__':
  write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
