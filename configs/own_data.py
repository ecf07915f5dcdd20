"""Your own images in one of nine formats, which is the argument of the config.

  ppn train --config=own_data:coco_json --workdir=W \\
    --config.data.train.images=DIR --config.data.train.annotations=JSON \\
    --config.data.eval.images=DIR --config.data.eval.annotations=JSON \\
    --config.train.steps=N --config.train.batch_size=B --config.train.checkpoint_every=K

The other formats take these flags in place of images and annotations, for data.eval too:

  own_data:pascal_voc  --config.data.train.folder=DIR, with Annotations, ImageSets/Main and
                       JPEGImages. Objects marked difficult are neither trained on nor scored.
  own_data:yolo_txt    --config.data.train.data=data.yaml
  own_data:labelme     --config.data.train.folder=DIR, with LabelMe's JSON files and the images
  own_data:cvat_xml    --config.data.train.annotations=XML --config.data.train.images=DIR
  own_data:label_studio  --config.data.train.annotations=JSON --config.data.train.images=DIR
  own_data:open_images --config.data.train.annotations=CSV --config.data.train.images=DIR
                       --config.data.train.class_descriptions=CSV
  own_data:tf_records  --config.data.train.records="train.record-*"
                       --config.data.train.label_map=PBTXT: TFRecord files of the TF Object
                       Detection API, read without TensorFlow
  own_data:tfds        --config.data.train.dataset=NAME --config.data.train.data_dir=DIR, where DIR
                       may be in gs://: ArrayRecord files of TensorFlow Datasets or `ppn prepare`.
                       For a data set that TFDS made, such as voc/2007, add
                       --config.data.eval.split=validation.

`ppn data FOLDER` finds out which format a folder has, and writes such a config.

Runs on a laptop, a GPU or a TPU. The classes are read from the data. The learning rate scales with
the root of the batch size, and the warm-up with the rate and the number of steps, so each can be
changed alone. The optimizer is AdamW; for SGD give --config.optim.optimizer="dict(name='sgd')"
--config.optim.learning_rate=0.05 --config.optim.rate_batch_exponent=1
--config.optim.weight_decay=4e-5.
Without data to evaluate on, --config.data.eval_fraction=0.1 keeps back a tenth of the training
images for it, and --config.train.evaluate_every=0 does not evaluate.

Training starts from ppn_voc, a model that comes with the package (docs/models.md), which has a
MobileNet-v1 of depth multiplier 0.75. For a wider one, give a trained backbone too:
--config.model.backbone.depth_multiplier=1.0 --config.init.backbone=FILE, a TensorFlow checkpoint, a
.tflite file or Keras' MobileNet. --config.init.weights= starts from random values, which need
thousands of images and many hours.
"""

from ppn_jax.config import base_config
from ppn_jax.errors import InputError, did_you_mean

# Data format -> the options of data.train, and those of data.eval that differ. Boxes that reach
# over the edge of the image are clipped; on_bad_box='drop' drops boxes that cannot be right.
FORMATS = {
    # exclude_ids and include_ids: text files of image ids to leave out, or to keep alone.
    'coco_json': (dict(images='', annotations='', on_bad_box='clip', exclude_ids='',
                       include_ids=''), {}),
    'cvat_xml': (dict(annotations='', images='', on_bad_box='clip'), {}),
    'label_studio': (dict(annotations='', images='', on_bad_box='clip'), {}),
    'labelme': (dict(folder='', on_bad_box='clip'), {}),
    'open_images': (dict(annotations='', images='', class_descriptions='', on_bad_box='clip'), {}),
    'pascal_voc': (dict(folder='', split='train', on_bad_box='clip'), dict(split='val')),
    'tf_records': (dict(records='', label_map='', on_bad_box='clip'), {}),
    'tfds': (dict(dataset='', data_dir='', split='train', on_bad_box='clip'), dict(split='eval')),
    # polygons='box' takes the bounding boxes of outlines.
    'yolo_txt': (dict(data='', split='train', on_bad_box='clip', polygons='raise'),
                 dict(split='val')),
}


def get_config(data_format='coco_json'):
  if data_format not in FORMATS:
    raise InputError(f'unknown data format {data_format!r}; {did_you_mean(data_format, FORMATS)}')
  config = base_config()
  config.model.neck.num_levels = 0  # As many as the image size allows.
  config.model.backbone.depth_multiplier = 0.75
  config.model.layers.norm_decay = 0.99
  config.init.weights = 'auto'  # ppn_voc, unless init.backbone or another width is given.
  # On bccd from ppn_voc AP50 0.732 instead of SGD's 0.687 (docs/training.md), on a split of
  # voc300's training images from ImageNet's backbone 0.244 instead of 0.213 (docs/results.md).
  config.optim.optimizer = dict(name='adamw')
  config.optim.weight_decay = 0.05
  config.optim.learning_rate = 1e-3
  config.optim.rate_batch_size = 16
  config.optim.rate_batch_exponent = 0.5
  config.optim.warmup_factor = 0.1
  config.optim.clip_norm = 10.0
  config.train.steps = 10_000
  config.train.batch_size = 32
  config.train.log_every = 20
  config.train.checkpoint_every = 500
  config.train.evaluate_every = 1_000
  train, evaluation = FORMATS[data_format]
  config.data.train.update(name=data_format, **train)
  config.data.eval = dict(name=data_format, **(train | evaluation))
  return config.lock()
