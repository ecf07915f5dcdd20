"""PPN on the split of COCO 2014 that the paper's tables use.

  ppn train --config=ppn_mobilenet_v1_coco14:ROOT --workdir=W

ROOT is a folder with train2014, val2014, annotations and mscoco_minival_ids.txt, which lists the
ids of the 8,059 images of val2014 that are held out for scoring, one per line (the TF Object
Detection API publishes this list). The rest of val2014 is trained on. Everything else is as in
ppn_mobilenet_v1_coco.
"""

import os

from ppn_jax.configs.ppn_mobilenet_v1_coco import get_config as coco


def get_config(root='coco'):
  train, val = (os.path.join(root, part) for part in ('train2014', 'val2014'))
  files = tuple(os.path.join(root, 'annotations', f'instances_{part}2014.json')
                for part in ('train', 'val'))
  minival = os.path.join(root, 'mscoco_minival_ids.txt')
  config = coco()
  with config.unlocked():
    del config.data.train.images, config.data.train.annotations  # Strings, which become tuples.
    config.data.train.update(images=(train, val), annotations=files, exclude_ids=minival)
    config.data.eval.update(images=val, annotations=files[1], include_ids=minival)
  return config
