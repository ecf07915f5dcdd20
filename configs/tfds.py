"""A data set of TensorFlow Datasets in ArrayRecord files, or one that `ppn prepare` made.

  ppn train --config=configs/tfds.py --workdir=W \\
    --config.data.train.dataset=NAME --config.data.train.data_dir=DIR \\
    --config.data.eval.dataset=NAME --config.data.eval.data_dir=DIR \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

DIR may be in gs://. For a data set that TFDS made, such as voc/2007, add
--config.data.eval.split=validation. Recipe and advice are those of configs/coco_json.py.
"""

from coco_json import recipe


def get_config():
  config = recipe()
  config.data.train.update(name='tfds', dataset='', data_dir='', split='train',
                           on_bad_box='clip')
  config.data.eval = dict(name='tfds', dataset='', data_dir='', split='eval', on_bad_box='clip')
  return config.lock()
