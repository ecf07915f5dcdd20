"""Your own images with YOLO's text files, as a data.yaml describes them.

  ppn train --config=configs/yolo_txt.py --workdir=W \\
    --config.data.train.data=data.yaml --config.data.eval.data=data.yaml \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

Recipe and advice are those of configs/coco_json.py.
"""

from coco_json import get_config as own_data


def get_config():
  config = own_data()
  with config.unlocked():
    # polygons='box' takes the bounding boxes of outlines.
    for key in ('images', 'annotations', 'exclude_ids', 'include_ids'):
      del config.data.train[key]
    config.data.train.update(name='yolo_txt', data='', split='train', on_bad_box='raise',
                             polygons='raise')
    config.data.eval = dict(name='yolo_txt', data='', split='val', on_bad_box='raise',
                            polygons='raise')
  return config
