"""Your own images in Pascal VOC's layout: Annotations, ImageSets/Main and JPEGImages in a folder.

  ppn train --config=configs/pascal_voc.py --workdir=W \\
    --config.data.train.folder=DIR --config.data.eval.folder=DIR \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

Recipe and advice are those of configs/coco_json.py. The classes are read from the xml files.
Objects marked difficult are neither trained on nor asked for. To start from a trained backbone,
add --config.init.backbone=FILE: a TensorFlow checkpoint or Keras' MobileNet.
"""

from coco_json import recipe


def get_config():
  config = recipe()
  # Boxes over the edge are cut; on_bad_box='drop' leaves out those that cannot be right.
  config.data.train.update(name='pascal_voc', folder='', split='train', on_bad_box='clip')
  config.data.eval = dict(name='pascal_voc', folder='', split='val', on_bad_box='clip')
  return config.lock()
