"""TensorFlow as a side of benchmarks/peers.py: plain operations in a tf.function, no Keras.

NHWC, fused batch norm, tf.nn.depthwise_conv2d, tf.image.combined_non_max_suppression. XLA stays off
(jit_compile=False), because the side of ppn_jax already uses it.
"""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import (
  convert_variables_to_constants_v2,
)
from worker import Task, serve


class Network:
  """Maps images u8 [B, S, S, 3] to box codes f32 [B, A, 4] and class logits f32 [B, A, C]."""

  def __init__(self, weights: dict[str, np.ndarray], spec: dict):
    self.spec = spec
    self.variables = {name: tf.Variable(_to_tf(name, w), trainable=name.startswith('params/'))
                      for name, w in weights.items()}

  def __call__(self, images: tf.Tensor, *, train: bool) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.cast(images, tf.float32) * (2 / 255) - 1
    for i, stride in enumerate(self.spec['strides']):
      name = f'backbone/conv2d_{i}'
      if not i:
        x = self._norm(name, tf.nn.conv2d(x, self._kernel(name), stride, 'SAME'), train)
        continue
      x = tf.nn.depthwise_conv2d(x, self._kernel(f'{name}/depthwise'), [1, stride, stride, 1],
                                 'SAME')
      x = self._norm(f'{name}/depthwise', x, train)
      x = tf.nn.conv2d(x, self._kernel(f'{name}/pointwise'), 1, 'SAME')
      x = self._norm(f'{name}/pointwise', x, train)
    return self._head(x, train)

  def _head(self, x: tf.Tensor, train: bool) -> tuple[tf.Tensor, tf.Tensor]:
    maps = [x]
    while len(maps) < self.spec['num_levels']:
      maps.append(tf.nn.max_pool2d(maps[-1], 2, 2, 'SAME'))
    depth = x.shape[-1]
    cells = [level.shape[1] * level.shape[2] for level in maps]
    # The levels are concatenated, so that the shared convolutions run once.
    x = tf.concat([tf.reshape(level, [-1, n, 1, depth])
                   for level, n in zip(maps, cells, strict=True)], 1)
    x = tf.nn.conv2d(x, self.variables['params/head/tower_kernel'], 1, 'VALID')
    x = tf.concat([self._norm(f'head/norm_{i}', level, train, own=True)
                   for i, level in enumerate(tf.split(x, cells, 1))], 1)
    return (self._rows('box', x, 4), self._rows('class', x, self.spec['num_classes']))

  def _rows(self, name: str, x: tf.Tensor, width: int) -> tf.Tensor:
    y = tf.nn.conv2d(x, self.variables[f'params/head/{name}_kernel'], 1, 'VALID')
    y = tf.nn.bias_add(y, self.variables[f'params/head/{name}_bias'])
    return tf.reshape(y, [-1, x.shape[1] * (y.shape[-1] // width), width])

  def _kernel(self, name: str) -> tf.Variable:
    return self.variables[f'params/{name}/kernel']

  def _norm(self, name: str, x: tf.Tensor, train: bool, own: bool = False) -> tf.Tensor:
    """Applies batch norm and ReLU6; the fused operation updates the averages."""
    name = name if own else f'{name}/norm'
    mean, var = (self.variables[f'batch_stats/{name}/{m}'] for m in ('mean', 'var'))
    y, new_mean, new_var = tf.compat.v1.nn.fused_batch_norm(
        x, self.variables[f'params/{name}/scale'], self.variables[f'params/{name}/bias'],
        mean, var, epsilon=self.spec['norm_epsilon'], is_training=train,
        exponential_avg_factor=1 - self.spec['norm_decay'])
    if train:
      mean.assign(new_mean)
      var.assign(new_var)
    return tf.nn.relu6(y)

  def export(self) -> dict[str, np.ndarray]:
    return {name: _from_tf(name, v.numpy()) for name, v in self.variables.items()}


def _to_tf(name: str, array: np.ndarray) -> np.ndarray:
  return array.swapaxes(2, 3) if '/depthwise/kernel' in name else array


_from_tf = _to_tf


def _iou(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
  """Returns the IoU [B, N, M] of boxes [B, N, 4] and [M, 4]."""
  a, b = tf.unstack(a[:, :, None], axis=-1), tf.unstack(b[None, None], axis=-1)
  height = tf.maximum(tf.minimum(a[2], b[2]) - tf.maximum(a[0], b[0]), 0)
  width = tf.maximum(tf.minimum(a[3], b[3]) - tf.maximum(a[1], b[1]), 0)
  overlap = height * width
  area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
  return tf.math.divide_no_nan(overlap, area(a) + area(b) - overlap)


def _center_and_size(boxes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  size = boxes[..., 2:] - boxes[..., :2]
  return boxes[..., :2] + size / 2, size


def assign(anchors: tf.Tensor, boxes: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor, spec: dict):
  """Returns codes [B, A, 4], labels [B, A] and positive [B, A]; removes unneeded padding."""
  count = tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(valid, tf.int32), 1)), 1)
  boxes, labels, valid = boxes[:, :count], labels[:, :count], valid[:, :count]
  overlap = tf.where(valid[..., None], _iou(boxes, anchors), -1.0)
  match = tf.argmax(overlap, 1, tf.int32)
  positive = tf.reduce_max(overlap, 1) >= spec['matched_iou']
  # Each ground-truth box forces its best anchor to match it; the first box wins a tie.
  batch, number = tf.shape(labels)[0], anchors.shape[0]
  at = tf.argmax(overlap, 2, tf.int32) + tf.range(batch)[:, None] * number
  order = tf.broadcast_to(tf.range(count), tf.shape(at))
  claimant = tf.math.unsorted_segment_min(
      tf.boolean_mask(order, valid), tf.boolean_mask(at, valid), batch * number)
  claimant = tf.reshape(claimant, [batch, number])
  claimed = claimant < count
  match = tf.where(claimed, claimant, match)
  center, size = _center_and_size(tf.gather(boxes, match, batch_dims=1))
  anchor_center, anchor_size = _center_and_size(anchors)
  size, anchor_size = size + 1e-8, anchor_size + 1e-8
  codes = tf.concat([10 * (center - anchor_center) / anchor_size,
                     5 * tf.math.log(size / anchor_size)], -1)
  return codes, tf.gather(labels, match, batch_dims=1), positive | claimed


def objective(codes: tf.Tensor, logits: tf.Tensor, targets, spec: dict) -> tf.Tensor:
  """Computes focal loss plus smooth L1, divided by the number of positive anchors."""
  target_codes, labels, positive = targets
  number = tf.maximum(tf.reduce_sum(tf.cast(positive, tf.float32)), 1)
  one_hot = tf.one_hot(tf.where(positive, labels, -1), spec['num_classes'])
  cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(one_hot, logits)
  missing = tf.abs(one_hot - tf.sigmoid(logits))  # 1 - p_t
  if spec['gamma'] != 2:
    raise ValueError(f'written for gamma 2, not {spec["gamma"]}')
  weight = (1 - spec['alpha']) + (2 * spec['alpha'] - 1) * one_hot
  classification = tf.reduce_sum(weight * tf.square(missing) * cross_entropy)
  size = tf.abs(codes - target_codes)
  inside = tf.minimum(size, 1)
  errors = tf.reduce_sum(inside * (size - 0.5 * inside), -1)
  localization = tf.reduce_sum(tf.where(positive, errors, 0.0)) * spec['localization_weight'] / 4
  return (classification + localization) / number


def detect(codes: tf.Tensor, logits: tf.Tensor, anchors: tf.Tensor, spec: dict):
  """Returns boxes [B, K, 4], scores [B, K], labels [B, K] and the number of detections [B]."""
  anchor_center, anchor_size = _center_and_size(anchors)
  center = codes[..., :2] / 10 * anchor_size + anchor_center
  half = tf.exp(codes[..., 2:] / 5) * anchor_size / 2
  boxes = tf.concat([center - half, center + half], -1)
  return tf.image.combined_non_max_suppression(
      boxes[:, :, None], tf.sigmoid(logits), spec['max_per_class'], spec['max_detections'],
      iou_threshold=spec['iou_threshold'], score_threshold=spec['score_threshold'])


def prepare(task: Task):
  tf.config.threading.set_intra_op_parallelism_threads(task.threads)
  tf.config.threading.set_inter_op_parallelism_threads(task.options.get('inter_op', 1))
  if task.dtype == 'bfloat16':
    tf.config.optimizer.set_experimental_options({'auto_mixed_precision_onednn_bfloat16': True})
  network = Network(task.weights, task.spec)
  return (_train if task.kind == 'train' else _infer)(task, network, tf.constant(task.images))


def _train(task: Task, network: Network, images: tf.Tensor):
  spec, anchors = task.spec, tf.constant(task.anchors)
  ground_truth = [tf.constant(task.ground_truth[name]) for name in ('boxes', 'labels', 'valid')]
  params = {name: v for name, v in network.variables.items() if v.trainable}
  momenta = [tf.Variable(tf.zeros_like(v)) for v in params.values()]
  kernels = [v for name, v in params.items() if name.endswith('kernel')]

  @tf.function(jit_compile=False)
  def step(images, *ground_truth):
    with tf.GradientTape() as tape:
      codes, logits = network(images, train=True)
      loss = objective(codes, logits, assign(anchors, *ground_truth, spec), spec)
      loss += spec['weight_decay'] * tf.add_n([tf.nn.l2_loss(k) for k in kernels])
    gradients = tape.gradient(loss, list(params.values()))
    for v, a, g in zip(params.values(), momenta, gradients, strict=True):
      tf.raw_ops.ResourceApplyMomentum(
          var=v.handle, accum=a.handle, lr=spec['learning_rate'], grad=g,
          momentum=spec['momentum'])
    return loss

  last = None

  def once():
    nonlocal last
    last = step(images, *ground_truth).numpy()

  return once, lambda: {'loss': last, **network.export()}


def _infer(task: Task, network: Network, images: tf.Tensor):
  anchors = tf.constant(task.anchors)

  @tf.function(jit_compile=False)
  def function(images):
    outputs = network(images, train=False)
    return detect(*outputs, anchors, task.spec) if task.kind == 'detect' else outputs

  concrete = function.get_concrete_function(tf.TensorSpec(images.shape, tf.uint8))
  if task.options.get('fold', True):
    # Frozen, so that Grappler folds batch norm into the convolutions.
    concrete = convert_variables_to_constants_v2(concrete)
  last = None

  def once():
    nonlocal last
    last = [x.numpy() for x in tf.nest.flatten(concrete(images))]

  def results():
    if task.kind == 'network':
      return dict(zip(('box_codes', 'class_logits'), last, strict=True))
    boxes, scores, labels, count = last
    return {'boxes': boxes, 'scores': scores, 'labels': labels.astype(np.int32),
            'valid': np.arange(scores.shape[1]) < count[:, None]}

  return once, results


def describe() -> dict:
  return {'versions': {'tensorflow': tf.__version__}, 'memory': {},
          'nms': 'tf.image.combined_non_max_suppression'}


if __name__ == '__main__':
  serve(prepare, describe)
