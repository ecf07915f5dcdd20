"""Your own images with YOLO's text files, as a data.yaml describes them.

  ppn train --config=configs/yolo_txt.py --workdir=W \\
    --config.data.train.data=data.yaml --config.data.eval.data=data.yaml \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

Recipe and advice are those of configs/coco_json.py.
"""

from coco_json import recipe


def get_config():
  config = recipe()
  # polygons='box' takes the bounding boxes of outlines.
  config.data.train.update(name='yolo_txt', data='', split='train', on_bad_box='clip',
                           polygons='raise')
  config.data.eval = dict(name='yolo_txt', data='', split='val', on_bad_box='clip',
                          polygons='raise')
  return config.lock()
