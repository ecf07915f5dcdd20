"""MobileNet-v2 SSD on COCO as in the detection zoo of the TF Object Detection API.

  ppn import-tf --config=ssd_mobilenet_v2_coco_reference --workdir=runs/imported \\
    --checkpoint=DOWNLOADED/ssd_mobilenet_v2_320x320_coco17_tpu-8

or `ppn train` with the data flags of ssd_mobilenet_v1_coco. For all its name, the zoo's detector
reads images of 300 x 300: that is what its pipeline.config says. Focal loss with alpha .75,
localisation weight 1, batch 512, 50,000 steps, rate .08 from .0133 over 2,000 steps. TensorFlow
1's ssd_mobilenet_v2_coco has the same network.

The backbone's kernels start from N(0, .03) cut off at two deviations there; here the normal
distribution of that deviation is not cut off.
"""

from ppn_jax.configs.ssd_mobilenet_v1_coco_reference import get_config as ssd


def get_config():
  config = ssd()
  with config.unlocked():
    config.model.backbone = dict(name='mobilenet_v2', depth_multiplier=1.0, last_stride=32)
    config.optim.learning_rate = 0.08
    config.optim.warmup_factor = 0.013333 / 0.08
    config.optim.warmup_fraction = 2_000 / 50_000
    config.optim.rate_batch_size = 512
    config.train.steps = 50_000
    config.train.batch_size = 512
  return config
