"""Ten minutes with the system, less the waiting: a small PPN on the embedded synthetic shapes.

  make quickstart

or `ppn train --config=configs/quickstart.py --workdir=runs/quickstart`. Two CPU cores train it
in about four minutes; nothing is downloaded.
"""

from ppn_jax.config import base_config


def get_config():
  config = base_config()
  config.model.image_size = 128
  config.model.backbone.depth_multiplier = 0.5
  # The finest map of 16 x 16 cells, for the smallest shapes.
  config.model.neck = dict(name='pooling_pyramid', stride=8, num_levels=5, projection=0)
  config.model.head.depth = 128
  config.model.layers.norm_decay = 0.95
  config.data.train = dict(name='synthetic_shapes', num_images=20_000, split='train', seed=0,
                           image_size=160)
  config.data.eval = dict(name='synthetic_shapes', num_images=500, split='eval', seed=0,
                          image_size=160)
  config.data.transforms = (dict(name='horizontal_flip'),)
  config.optim.learning_rate = 0.1
  config.optim.warmup_learning_rate = 0.01
  config.optim.rate_batch_size = 32
  config.optim.clip_norm = 10.0
  config.optim.ema_decay = 0.99
  config.train.steps = 1_000
  config.train.batch_size = 32
  config.train.log_every = 50
  config.train.checkpoint_every = 250
  config.train.evaluate_every = 500
  return config.lock()
