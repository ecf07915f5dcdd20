"""The one shape of every config. Files in configs/ fill it in; none adds keys at its top.

Each block is the keyword arguments of one function, named beside it: look there for what a key
means, which values are legal and what the default does.

The functions after `base_config` are the named differences from PPN of which the baselines are
made. They change an unlocked config in place and leave data and schedule alone.
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
      background_column=False,  # ppn_jax.detection.columns.ClassColumns
      score_activation='sigmoid',
      backbone=dict(name='mobilenet_v1', depth_multiplier=1.0, last_block=11),
      neck=dict(name='pooling_pyramid', stride=16, num_levels=6, projection=0),
      head=dict(name='shared_box_predictor', depth=512, norm_per_level=True,
                prior=0.01),
      anchors=dict(  # ppn_jax.detection.anchors.ssd_anchors
          min_scale=0.15, max_scale=0.95, aspect_ratios=(1.0, 2.0, 0.5, 3.0, 0.3333),
          reduce_lowest_level=False),
      layers=dict(  # ppn_jax.models.layers.LayerPolicy
          dtype='float32', norm_decay=0.97, norm_epsilon=0.001, norm_group_size=0,
          conv_form='auto', kernel_stddev=placeholder(float)))  # None: He's.
  config.matching = dict(  # ppn_jax.detection.matching.assign
      matched_iou=0.5, force_match=True, ignore_crowd=True)
  config.loss = dict(  # ppn_jax.detection.losses.LOSSES
      name='focal', alpha=0.25, gamma=2.0, localization_weight=1.0, group_size=0)
  config.postprocess = dict(  # ppn_jax.detection.postprocess.postprocess
      score_threshold=1e-8, iou_threshold=0.6, max_per_class=100, max_detections=100)

  config.init = dict(weights='', backbone='', report=())  # ppn_jax.weights.initial.initial_weights
  config.data = dict(
      train=dict(  # ppn_jax.data.sources.build_source
          name='',
          cache='',  # 'memory' or a folder: images are decoded once (ppn_jax.data.cache).
          cache_size=0,  # Shorter side of cached images in pixels; 0: as the network's input.
          resident=False,  # The whole set in device memory (ppn_jax.training.resident).
          resident_size=0),  # Side in pixels of what is held there; 0: as the network's input.
      eval=dict(name=''),
      transforms=(  # ppn_jax.data.transforms.build_transforms; of training, before resizing.
          dict(name='ssd_random_crop'),  # Before the flip, which is then of a smaller image.
          dict(name='horizontal_flip', probability=0.5)),
      resize='supersample',  # The `method` of ppn_jax.data.transforms.Resize.
      reduced_decoding=True,  # JPEGs at 1/2, 1/4, 1/8 where that leaves pixels enough.
      on_bad_example='raise',  # An image that cannot be read: 'raise', or 'skip' and name it.
      max_bad_share=0.01,  # Share of the images that may be skipped.
      max_boxes=0,  # Boxes that every image's truth is padded to; 0: as the fullest image has.
      threads=0)  # That decode and augment; 0: one for each processor core.
  config.optim = dict(  # ppn_jax.training.optim.build_optimizer
      learning_rate=0.7, rate_batch_size=512, warmup_fraction=0.04, warmup_learning_rate=0.1333,
      momentum=0.9, weight_decay=4e-5, clip_norm=0.0, ema_decay=0.0,
      micro_batches=1, shard_state=False)
  config.train = dict(  # ppn_jax.training.loop.train
      steps=0,  # Of the whole run; to be set.
      batch_size=0,  # Images a step, over all devices; to be set.
      log_every=100,  # Steps between two lines of metrics.
      checkpoint_every=1000,  # Steps between two checkpoints; the last step is always saved.
      evaluate_every=1000,  # Steps between two evaluations; 0: never, data.eval is not needed.
      keep_last=3,  # How many of the newest checkpoints to keep.
      keep_best=1,  # How many of those of highest AP to keep besides.
      on_save_error='continue')  # A checkpoint that cannot be written: 'continue' or 'stop'.
  config.eval = dict(batch_size=32)  # Images at a time, over all devices.
  return config


def ssd(config: ConfigDict) -> None:
  """Vanilla MobileNet SSD: convolutions between scales and a predictor for each."""
  config.model.backbone.last_block = 13
  config.model.neck = dict(name='conv_pyramid', strides=(16, 32), depths=(512, 256, 256, 128))
  config.model.head = dict(name='per_level_box_predictor', side=1, prior=0.01)
  config.model.anchors.min_scale = 0.2
  config.model.anchors.reduce_lowest_level = True


def fpn(config: ConfigDict) -> None:
  """A top-down pyramid in place of the pooled one; head and anchors stay PPN's (section 2.2)."""
  config.model.backbone.last_block = 13
  config.model.neck = dict(name='feature_pyramid', strides=(16, 32), num_levels=6, depth=256)


def hard_negative_mining(config: ConfigDict) -> None:
  """The SSD paper's objective: softmax over classes and background, the hardest negatives."""
  config.model.background_column = True
  config.model.score_activation = 'softmax'
  config.model.head.prior = 0.5  # Biases of zero.
  config.loss = dict(name='hard_negative_mining', negatives_per_positive=3.0,
                     localization_weight=1.0, group_size=0)


def tf_reference(config: ConfigDict) -> None:
  """As the TF Object Detection API's sync configs compute, where we differ (REFERENCE.md).

  Its checkpoints need it: they have the background column, and were trained on images resized
  by the legacy kernel.
  """
  config.model.background_column = True
  config.model.layers.kernel_stddev = 0.01
  config.matching.ignore_crowd = False
  config.loss.alpha = 0.75
  config.data.transforms = (dict(name='horizontal_flip', probability=0.5),
                            dict(name='ssd_random_crop'))
  config.data.resize = 'legacy'
