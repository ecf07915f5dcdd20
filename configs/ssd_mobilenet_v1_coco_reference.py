"""MobileNet SSD on COCO as in the sync config of the TF Object Detection API.

  ppn import-tf --config=ssd_mobilenet_v1_coco_reference --workdir=runs/imported \\
    --checkpoint=DOWNLOADED/model.ckpt --config.model.num_classes=90

or `ppn train` with the data flags of ssd_mobilenet_v1_coco. It is called
ssd_mobilenet_v1_300x300_coco14_sync there: focal loss with alpha .75, localisation weight 1,
batch 1,024, 20,000 steps, rate .9 from .3 over 1,000 steps. The zoo's older ssd_mobilenet_v1_coco
has the same network and loads the same way; its objective is that of
ssd_mobilenet_v1_coco_mined.

SSD's kernels start from N(0, .03) cut off at two deviations in the backbone there; here the
normal distribution of that deviation is not cut off.
"""

from ppn_jax.configs.ssd_mobilenet_v1_coco import get_config as ssd

from ppn_jax.config import tf_reference


def get_config():
  config = ssd()
  with config.unlocked():
    tf_reference(config)
    config.model.layers.dtype = 'float32'
    config.model.layers.kernel_stddev = 0.03
    config.optim.learning_rate = 0.9
    config.optim.warmup_factor = 0.3 / 0.9
    config.optim.warmup_fraction = 1_000 / 20_000
    config.optim.rate_batch_size = 1_024
    config.train.steps = 20_000
    config.train.batch_size = 1_024
  return config
