"""MobileNet SSD on COCO with the SSD paper's objective: softmax and the hardest negatives.

  ppn train --config=configs/ssd_mobilenet_v1_coco_mined.py --workdir=runs/ssd_mined

with the data flags of configs/ssd_mobilenet_v1_coco.py, of which it is a difference. Of each
image's negatives the three hardest for every positive count (SSD, section 2.2).

The zoo's ssd_mobilenet_v1_coco mines over sigmoid scores instead:
--config.model.score_activation=sigmoid. It was trained by RMSProp (rate .004, decay .9, momentum
.9) at batch 24; that optimizer is not offered here, and the schedule is PPN's with a tenth of
its rate, since this objective is several times as large.
"""

from ssd_mobilenet_v1_coco import get_config as ssd

from ppn_jax.config import hard_negative_mining


def get_config():
  config = ssd()
  with config.unlocked():
    hard_negative_mining(config)
    config.optim.learning_rate = 0.07
    config.optim.warmup_factor = 0.01 / 0.07
  return config
