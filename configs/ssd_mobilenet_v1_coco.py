"""Vanilla MobileNet SSD on COCO, the paper's baseline: PPN's config with another neck and head.

  ppn train --config=ssd_mobilenet_v1_coco --workdir=runs/ssd \\
    --config.data.train.images=COCO/train2017 \\
    --config.data.train.annotations=COCO/annotations/instances_train2017.json \\
    --config.data.eval.images=COCO/val2017 \\
    --config.data.eval.annotations=COCO/annotations/instances_val2017.json

Meant for a TPU v5e-8 or larger. Expected: the paper reports 20.8 mAP, starting from a backbone
trained on ImageNet; this config has not been run to its end.

Data, losses and schedule are those of ppn_mobilenet_v1_coco, so that a comparison is one of the two
models: convolutions between scales instead of max pooling, a predictor for each scale instead of
one for all, scales from .2 instead of .15, and three anchors instead of six on the finest level.
ssd_mobilenet_v1_coco_reference has SSD's own recipe.
"""

from ppn_jax.configs.ppn_mobilenet_v1_coco import get_config as ppn

from ppn_jax.config import ssd


def get_config():
  config = ppn()
  with config.unlocked():
    ssd(config)
  return config
