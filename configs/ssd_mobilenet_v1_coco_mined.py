"""MobileNet SSD on COCO with the SSD paper's objective: softmax and the hardest negatives.

  ppn train --config=ssd_mobilenet_v1_coco_mined --workdir=runs/ssd_mined

with the data flags of ssd_mobilenet_v1_coco. For each positive of an image, the three hardest
negatives count (SSD, section 2.2).

The zoo's ssd_mobilenet_v1_coco mines over sigmoid scores instead:
--config.model.score_activation=sigmoid. It was trained by RMSProp (rate .004, decay .9, momentum
.9) at batch 24. That optimizer is not available here; the schedule is PPN's with a tenth of its
rate, since this loss is several times as large.
"""

from ppn_jax.configs.ssd_mobilenet_v1_coco import get_config as ssd

from ppn_jax.config import hard_negative_mining


def get_config():
  config = ssd()
  with config.unlocked():
    hard_negative_mining(config)
    config.optim.learning_rate = 0.07
    config.optim.warmup_factor = 0.01 / 0.07
  return config
