"""Compares the post-processing in a TensorFlow Lite file with that of a config."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ppn_jax.detection.structures import Anchors
from ppn_jax.weights.tflite_network import PostProcessing

_ROUNDING = 1e-5  # Of float32 anchors that were computed in another order.
_SIDES = ('centre y', 'centre x', 'height', 'width')
# Options of TFLite_Detection_PostProcess -> keys of the config block `postprocess`.
_OPTIONS = {'nms_score_threshold': 'score_threshold', 'nms_iou_threshold': 'iou_threshold',
            'max_detections': 'max_detections'}


def compare(theirs: PostProcessing, anchors: Anchors, ours: Mapping[str, Any]) -> list[str]:
  """Returns lines on the anchors of a file, and on options that differ.

  Args:
    theirs: post-processing of the file.
    anchors: the detector's anchors.
    ours: the config block `postprocess`.
  """
  lines = [_compare_anchors(theirs, anchors)]
  options = [f'{key}={ours[key]} (there {theirs.options[name]:.3g})'
             for name, key in _OPTIONS.items() if name in theirs.options and key in ours
             and not np.isclose(theirs.options[name], ours[key], rtol=1e-3, atol=0)]
  if options:
    lines.append(f'post-processing that differs from the file: postprocess.{", ".join(options)}')
  return lines


def _compare_anchors(theirs: PostProcessing, anchors: Anchors) -> str:
  """Returns a line on how the anchors of the file differ from the detector's."""
  if theirs.anchors is None:
    return ("anchors: the file has none to compare with; they are the config's, "
            f'{len(anchors.boxes):,} of them')
  if len(theirs.anchors) != len(anchors.boxes):
    return (f'anchors differ: {len(theirs.anchors):,} in the file, {len(anchors.boxes):,} here; '
            'see model.anchors and model.image_size')
  boxes = np.asarray(anchors.boxes, np.float64)
  low, high = boxes[:, :2], boxes[:, 2:]
  own = np.concatenate([(low + high) / 2, high - low], axis=1)
  difference = np.abs(theirs.anchors - own)
  allowed = max(theirs.anchor_step / 2 * 1.001, _ROUNDING)
  largest = difference.max(initial=0)
  step = (f'; the file rounds them to multiples of {theirs.anchor_step:.2g}'
          if theirs.anchor_step else '')
  if largest <= allowed:
    return (f'anchors: {len(own):,}, equal to those of the config up to {largest:.2g}{step}')
  first = int(np.argmax((difference > allowed).any(axis=1)))
  side = _SIDES[int(difference[first].argmax())]
  return (f'anchors differ: {int((difference > allowed).any(axis=1).sum()):,} of {len(own):,}, '
          f'most by {largest:.3g}; the first is number {first} by its {side}: '
          f'{_listed(theirs.anchors[first])} in the file, {_listed(own[first])} here (yc, xc, h, w)'
          f'; see model.anchors{step}')


def _listed(values: np.ndarray) -> str:
  return '[' + ', '.join(f'{value:.4f}' for value in values) + ']'
