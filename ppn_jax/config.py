"""The one shape of every config. Files in configs/ fill it in; none adds keys at its top.

Each block is the keyword arguments of one function, named beside it: look there for what a key
means, which values are legal and what the default does.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base_config() -> ConfigDict:
  """PPN on MobileNet-v1 at 300 px, with the paper's losses; no data and no schedule yet."""
  config = ConfigDict()
  config.seed = 0  # Of the weights, the order of the data and its augmentation.

  config.model = dict(  # ppn_jax.detector.build
      image_size=300,
      num_classes=0,  # 0: as many as the training data has.
      backbone=dict(name='mobilenet_v1', depth_multiplier=1.0, last_block=11),
      neck=dict(name='pooling_pyramid', stride=16, num_levels=6, projection=0),
      head=dict(name='shared_box_predictor', depth=512, norm_per_level=True,
                prior=0.01),
      anchors=dict(  # ppn_jax.detection.anchors.ssd_anchors
          min_scale=0.15, max_scale=0.95, aspect_ratios=(1.0, 2.0, 0.5, 3.0, 0.3333),
          reduce_lowest_level=False),
      layers=dict(  # ppn_jax.models.layers.LayerPolicy
          dtype='float32', norm_decay=0.97, norm_epsilon=0.001, conv_form='auto',
          kernel_stddev=placeholder(float)))  # None: He's.
  config.matching = dict(  # ppn_jax.detection.matching.assign
      matched_iou=0.5, force_match=True, ignore_crowd=True)
  config.loss = dict(  # ppn_jax.detection.losses.detection_loss
      alpha=0.25, gamma=2.0, localization_weight=1.0)
  config.postprocess = dict(  # ppn_jax.detection.postprocess.postprocess
      score_threshold=1e-8, iou_threshold=0.6, max_per_class=100, max_detections=100)

  config.data = dict(
      train=dict(name=''),  # ppn_jax.data.sources.build_source
      eval=dict(name=''),
      transforms=(  # ppn_jax.data.transforms.build_transforms; of training, before resizing.
          dict(name='ssd_random_crop'),  # Before the flip, which is then of a smaller image.
          dict(name='horizontal_flip', probability=0.5)),
      resize='area',  # ppn_jax.data.transforms.Resize
      max_boxes=0,  # Boxes that every image's truth is padded to; 0: as the fullest image has.
      threads=0)  # That decode and augment; 0: one for each processor core.
  config.optim = dict(  # ppn_jax.training.optim.build_optimizer
      learning_rate=0.7, rate_batch_size=512, warmup_fraction=0.04, warmup_learning_rate=0.1333,
      momentum=0.9, weight_decay=4e-5, clip_norm=0.0, ema_decay=0.0)
  config.train = dict(  # ppn_jax.training.loop.train
      steps=0,
      batch_size=0,  # Over all devices.
      log_every=100,
      checkpoint_every=1000,
      evaluate_every=1000,  # 0: never; data.eval is not needed then.
      keep_last=3,  # Checkpoints: the newest so many, and
      keep_best=1)  # so many of highest AP.
  config.eval = dict(batch_size=32)  # Over all devices.
  return config
