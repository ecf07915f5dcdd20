"""`--config=yolo_txt` is an earlier name of `--config=own_data:yolo_txt`."""

from ppn_jax.configs import own_data


def get_config():
  return own_data.get_config('yolo_txt')
