"""Your own images: a folder and a json in COCO's instances format for each split.

  ppn train --config=configs/coco_json.py --workdir=W \\
    --config.data.train.images=DIR --config.data.train.annotations=JSON \\
    --config.data.eval.images=DIR --config.data.eval.annotations=JSON \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

Runs on a laptop, a GPU or a TPU. The number of classes is read from the json. The rate goes with
the batch size, the warm-up with the rate and the number of steps, so each may be changed alone.
Without data to evaluate on, --config.data.eval_fraction=0.1 keeps back a tenth of the training
images for it, and --config.train.evaluate_every=0 does without.
"""

from ppn_jax.config import base_config


def recipe():
  """What training on your own images has in common in all formats: everything but the data."""
  config = base_config()
  config.model.neck.num_levels = 0  # As many as the image size allows.
  config.model.layers.norm_decay = 0.99
  config.optim.learning_rate = 0.1
  config.optim.warmup_factor = 0.1
  config.optim.rate_batch_size = 32
  config.optim.clip_norm = 10.0
  config.train.steps = 10_000
  config.train.batch_size = 32
  config.train.log_every = 20
  config.train.checkpoint_every = 500
  config.train.evaluate_every = 1_000
  return config


def get_config():
  config = recipe()
  # Boxes over the edge are cut; on_bad_box='drop' leaves out those that cannot be right.
  files = dict(name='coco_json', images='', annotations='', on_bad_box='clip')
  # Text files of image ids to leave out, or to keep alone.
  ids = dict(exclude_ids='', include_ids='')
  config.data.train.update(**files, **ids)
  config.data.eval = dict(**files, **ids)
  return config.lock()
