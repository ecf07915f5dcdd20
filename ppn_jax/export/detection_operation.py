"""TensorFlow Lite's own operation for decoding and suppression, TFLite_Detection_PostProcess.

The converter replaces a function of this name by the operation, which every build of TensorFlow
Lite and LiteRT has; its meaning is that of `tflite/kernels/detection_postprocess.cc`. It computes
the suppression of `nms.postprocess` within a class, but not across classes, and does not clip.
With n > 1 threads it loses class n (github.com/tensorflow/tensorflow/issues/56058), so unused
classes come first here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ppn_jax.detection.boxes import CODE_SCALES
from ppn_jax.detection.structures import Array, Detections
from ppn_jax.export.tflite_operations import pack, unpack

NAME = 'TFLite_Detection_PostProcess'
# With up to this many threads, the lost class is an unused one.
MAX_THREADS = 32
_UNUSED = MAX_THREADS + 1
# Names of the Object Detection API, in the order of the operation.
OUTPUTS = ('detection_boxes', 'detection_classes', 'detection_scores', 'num_detections')


def detection_operation(anchors: Array, num_classes: int, options: Mapping[str, Any]) -> Callable:
  """Returns the operation as a TensorFlow function, for a graph that is converted.

  Args:
    anchors: [A, 4], ymin, xmin, ymax, xmax.
    num_classes: C.
    options: of `nms.postprocess`; `cross_class_iou` and `candidates` have no counterpart.

  Returns:
    A function of box codes [1, A, 4] and scores [1, A, C] to the outputs of `OUTPUTS`, float32:
    [1, K, 4], [1, K], [1, K] and [1].
  """
  import tensorflow as tf
  count = int(options['max_detections'])
  attributes: dict[str, int | float | bool] = {
      'max_detections': count, 'max_classes_per_detection': 1,
      'detections_per_class': int(options['max_per_class']), 'use_regular_nms': True,
      'nms_score_threshold': float(options['score_threshold']),
      'nms_iou_threshold': float(options['iou_threshold']), 'num_classes': num_classes + _UNUSED}
  attributes |= zip(('y_scale', 'x_scale', 'h_scale', 'w_scale'), CODE_SCALES, strict=True)
  ymin, xmin, ymax, xmax = np.asarray(anchors, np.float64).T
  centred = np.stack([(ymin + ymax) / 2, (xmin + xmax) / 2, ymax - ymin, xmax - xmin],
                     axis=-1).astype(np.float32)

  @tf.function(experimental_implements=_signature(attributes))
  def placeholder(codes, scores, anchors):
    # Stands for the operation: its values are never computed, only its shapes count.
    del codes, scores, anchors
    return (tf.zeros((1, count, 4)), tf.zeros((1, count)), tf.zeros((1, count)), tf.zeros((1,)))

  def operation(codes: Any, scores: Any) -> dict[str, Any]:
    scores = tf.pad(scores, [[0, 0], [0, 0], [_UNUSED, 0]])  # A score of 0 is never found.
    boxes, classes, scores, found = placeholder(codes, scores, tf.constant(centred))
    # In int32, since the converter quantises arithmetic in floats; 0 in the places not used.
    classes = tf.cast(tf.maximum(tf.cast(classes, tf.int32) - _UNUSED, 0), tf.float32)
    return {name: tf.identity(x, name=name)
            for name, x in zip(OUTPUTS, (boxes, classes, scores, found), strict=True)}

  return operation


def _signature(attributes: Mapping[str, int | float | bool]) -> str:
  """Writes the attributes of the operation as the converter reads them."""
  kinds = {bool: 'b', int: 'i', float: 'f'}
  entries = [f'name: "{NAME}"']
  for name, value in {**attributes, 'tfl_fusable_op': True}.items():
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    entries.append(f'attr {{ key: "{name}" value {{ {kinds[type(value)]}: {text} }} }}')
  return ' '.join(entries)


def with_outputs_in_order(content: bytes) -> bytes:
  """Returns a converted file with its outputs in the order of `OUTPUTS`, which programs rely on.

  The converter leaves them in another one.
  """
  model = unpack(content)
  tensors = {output.name.decode(): output.tensorIndex for output in model.signatureDefs[0].outputs}
  model.subgraphs[0].outputs = [tensors[name] for name in OUTPUTS]
  return pack(model)


def detections(found: Mapping[str, Array]) -> Detections:
  """Returns the outputs of the operation, NumPy, as detections: clipped, without empty boxes.

  The operation does not tell the pyramid's levels, so they are 0.
  """
  boxes, labels, scores, count = (np.asarray(found[name]) for name in OUTPUTS)
  boxes = np.clip(boxes, 0, 1)
  inside = (boxes[..., 2:] > boxes[..., :2]).all(-1)
  inside &= np.arange(boxes.shape[1]) < count[:, None]
  order = np.argsort(~inside, axis=1, kind='stable')
  valid = np.take_along_axis(inside, order, 1)
  scores, labels = (np.take_along_axis(x, order, 1) for x in (scores, labels))
  return Detections(
      boxes=np.where(valid[..., None], np.take_along_axis(boxes, order[..., None], 1), 0),
      scores=np.where(valid, scores, 0).astype(np.float32),
      labels=np.where(valid, labels, 0).astype(np.int32),
      level=np.zeros(valid.shape, np.int32), valid=valid)
