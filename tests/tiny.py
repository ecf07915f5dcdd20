"""Run small enough for tests: it compiles in seconds, and a step takes a fraction of one."""

from ppn_jax.config import base_config


def tiny_config(**train):
  """Returns the config of a 64 px PPN with a few thousand parameters, on synthetic shapes."""
  config = base_config()
  config.model.image_size = 64
  config.model.backbone = dict(name='mobilenet_v1', depth_multiplier=0.25, last_block=5)
  config.model.neck = dict(name='pooling_pyramid', stride=8, num_levels=3, projection=0)
  config.model.head.depth = 16
  config.data.train.update(name='synthetic_shapes', num_images=10, image_size=64, split='train')
  config.data.eval = dict(name='synthetic_shapes', num_images=6, image_size=64, split='eval')
  config.optim.learning_rate, config.optim.warmup_factor = 0.05, 0.01 / 0.05
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


def untrained_run(workdir, steps=(6,), *, ema_decay=0.0, categories=None, image_size=64,
                  resize_mode='stretch'):
  """Creates a run with saved steps of random weights, different for each step and its average."""
  from ppn_jax.detection.structures import Category
  from ppn_jax.distributed import sharding
  from ppn_jax.run import create_run
  from ppn_jax.training.train_step import jit_init
  config = tiny_config().copy_and_resolve_references().unlock()
  config.optim.ema_decay = ema_decay
  with config.ignore_type():
    config.model.image_size = image_size
  config.data.resize_mode = resize_mode
  run = create_run(workdir, config, categories or [
      Category(10 * i, name) for i, name in enumerate(('circle', 'square', 'star'))])
  run.save()
  init = jit_init(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=False) as checkpoints:
    for step in steps:
      checkpoints.save(step, init(step)._replace(average=init(step + 100).average))
      checkpoints.wait()
  return workdir
