"""MobileNet FPN on COCO: the pyramid that section 2.2 of the paper compares with max pooling.

  ppn train --config=fpn_mobilenet_v1_coco --workdir=runs/fpn \\
    --config.data.train.images=COCO/train2017 \\
    --config.data.train.annotations=COCO/annotations/instances_train2017.json \\
    --config.data.eval.images=COCO/val2017 \\
    --config.data.eval.annotations=COCO/annotations/instances_val2017.json

Meant for a TPU v5e-8 or larger; it has not been run to its end, and the paper gives no result.

Only the neck differs from that of ppn_mobilenet_v1_coco: its maps come from a top-down path with
skip connections over strides 16 and 32, and further stride-2 convolutions. Grids, anchors and the
shared head are PPN's, so the comparison is one of the two pyramids.
--config.model.neck.strides='(8, 16, 32)' makes it an FPN from stride 8 on.
"""

from ppn_jax.configs.ppn_mobilenet_v1_coco import get_config as ppn

from ppn_jax.config import fpn


def get_config():
  config = ppn()
  with config.unlocked():
    fpn(config)
  return config
