"""`--config=tfds` is an earlier name of `--config=own_data:tfds`."""

from ppn_jax.configs import own_data


def get_config():
  return own_data.get_config('tfds')
