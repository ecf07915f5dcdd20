"""Ten minutes with the system, less the waiting: a small PPN on the embedded synthetic shapes.

  make quickstart

or `ppn train --config=configs/quickstart.py --workdir=runs/quickstart`. Two CPU cores train it
in about four minutes; nothing is downloaded.
"""

from ppn_jax.config import base_config


def get_config():
  config = base_config()
  config.model.image_size = 128
  config.model.backbone = dict(name='mobilenet_v1', depth_multiplier=0.5, last_block=8)
  config.model.neck.num_levels = 4  # 8, 4, 2, 1 cells a side.
  config.model.head.depth = 128
  config.model.layers.norm_decay = 0.95
  config.data.train = dict(name='synthetic_shapes', num_images=20_000, split='train', seed=0,
                           image_size=128, scale=(0.16, 0.7), max_shapes=4, max_turn=20.0)
  config.data.eval = dict(name='synthetic_shapes', num_images=500, split='eval', seed=0,
                          image_size=128, scale=(0.16, 0.7), max_shapes=4, max_turn=20.0)
  config.loss.alpha = 0.75
  config.data.transforms = (dict(name='horizontal_flip'),)
  config.optim.learning_rate = 0.15
  config.optim.warmup_learning_rate = 0.01
  config.optim.rate_batch_size = 16
  config.optim.clip_norm = 10.0
  config.optim.ema_decay = 0.99
  config.train.steps = 1_500
  config.train.batch_size = 16
  config.train.log_every = 100
  config.train.checkpoint_every = 500
  config.train.evaluate_every = 500
  return config.lock()
