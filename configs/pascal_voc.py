"""`--config=pascal_voc` is an earlier name of `--config=own_data:pascal_voc`."""

from ppn_jax.configs import own_data


def get_config():
  return own_data.get_config('pascal_voc')
