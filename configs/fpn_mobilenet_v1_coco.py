"""MobileNet FPN on COCO: the pyramid that the paper's section 2.2 weighs against max pooling.

  ppn train --config=configs/fpn_mobilenet_v1_coco.py --workdir=runs/fpn \\
    --config.data.train.images=COCO/train2017 \\
    --config.data.train.annotations=COCO/annotations/instances_train2017.json \\
    --config.data.eval.images=COCO/val2017 \\
    --config.data.eval.annotations=COCO/annotations/instances_val2017.json

Meant for a TPU v5e-8 or larger; we have not run it to its end, and the paper gives no figure.

Only the neck is not that of configs/ppn_mobilenet_v1_coco.py: its maps come from a top-down path
with skip connections over strides 16 and 32, and further stride-2 convolutions. Grids, anchors and
the shared head are PPN's, which makes the comparison one of the two pyramids. An FPN from stride 8
on is --config.model.neck.strides='(8, 16, 32)'.
"""

from ppn_mobilenet_v1_coco import get_config as ppn

from ppn_jax.config import fpn


def get_config():
  config = ppn()
  with config.unlocked():
    fpn(config)
  return config
