"""A run small enough for tests: seconds to compile, a fraction of one a step."""

from ppn_jax.config import base_config


def tiny_config(**train):
  """A 64 px PPN of a few thousand parameters on the synthetic shapes."""
  config = base_config()
  config.model.image_size = 64
  config.model.backbone = dict(name='mobilenet_v1', depth_multiplier=0.25, last_block=5)
  config.model.neck = dict(name='pooling_pyramid', stride=8, num_levels=3, projection=0)
  config.model.head.depth = 16
  config.data.train.update(name='synthetic_shapes', num_images=10, image_size=64, split='train')
  config.data.eval = dict(name='synthetic_shapes', num_images=6, image_size=64, split='eval')
  config.optim.learning_rate, config.optim.warmup_learning_rate = 0.05, 0.01
  config.optim.rate_batch_size = 0
  config.train.update(dict(steps=6, batch_size=4, log_every=2, checkpoint_every=3,
                           evaluate_every=0), **train)
  config.eval.batch_size = 4
  return config.lock()


CONFIG_FILE = """
import sys
sys.path.insert(0, {folder!r})
from tiny import tiny_config
def get_config():
  return tiny_config()
"""
