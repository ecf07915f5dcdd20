"""The quickstart with a vanilla SSD: the same data, schedule and backbone, another neck and head.

  ppn train --config=configs/quickstart_ssd.py --workdir=runs/quickstart_ssd

It is there to be compared with configs/quickstart.py, as benchmarks/calibration.py does.
"""

from quickstart import get_config as quickstart

from ppn_jax.config import ssd


def get_config():
  config = quickstart()
  with config.unlocked():
    last_block = config.model.backbone.last_block
    ssd(config)
    # One map of the backbone, as PPN has, so that neck and head alone differ.
    config.model.backbone.last_block = last_block
    config.model.neck.strides = (16,)
    config.model.neck.depths = (256, 128, 128)
  return config
