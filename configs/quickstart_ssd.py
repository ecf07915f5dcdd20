"""The quickstart with a vanilla SSD: the same data, schedule and backbone, SSD's neck and head.

  ppn train --config=quickstart_ssd --workdir=runs/quickstart_ssd

benchmarks/calibration.py compares it with the quickstart.
"""

from ppn_jax.configs.quickstart import get_config as quickstart

from ppn_jax.config import ssd


def get_config():
  config = quickstart()
  with config.unlocked():
    last_block = config.model.backbone.last_block
    ssd(config)
    # One map of the backbone, as in PPN, so that only neck and head differ.
    config.model.backbone.last_block = last_block
    config.model.neck.strides = (16,)
    config.model.neck.depths = (256, 128, 128)
  return config
