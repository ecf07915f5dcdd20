"""`--config=coco_json` is an earlier name of `--config=own_data:coco_json`."""

from ppn_jax.configs import own_data


def get_config():
  return own_data.get_config('coco_json')
