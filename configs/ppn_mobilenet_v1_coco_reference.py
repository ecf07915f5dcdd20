"""PPN on COCO as in its authors' published config, which fits their checkpoints.

  ppn import-tf --config=ppn_mobilenet_v1_coco_reference --workdir=runs/imported \\
    --checkpoint=DOWNLOADED/model.ckpt --config.model.num_classes=90

or `ppn train` with the data flags of ppn_mobilenet_v1_coco, from which it differs as listed here.
The TF Object Detection API calls it ssd_mobilenet_v1_ppn_shared_box_predictor_300x300_coco14_sync.

Where the paper and its config disagree, this follows the config: focal alpha .75 (paper .25) and
localisation weight 1.5 (the paper names none). Both have batch 512, 50,000 steps and rate .7 from
.1333. The reference also differs from our defaults in these: a background column, kernels from
N(0, .01), the legacy bilinear resize, crowds matched like any box, and the flip before the crop.

One difference in training remains: each of its replicas, apparently 8, takes batch statistics and
counts positive anchors over its own part of the batch. With --config.train.batch_size=512 that is
--config.model.layers.norm_group_size=64 --config.loss.group_size=64.
"""

from ppn_jax.configs.ppn_mobilenet_v1_coco import get_config as ppn

from ppn_jax.config import tf_reference


def get_config():
  config = ppn()
  with config.unlocked():
    tf_reference(config)
    config.model.layers.dtype = 'float32'
    config.loss.localization_weight = 1.5
  return config
