"""Losses of box codes, for each anchor: smooth L1 of the codes, GIoU and CIoU of the boxes."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.detection import boxes
from ppn_jax.detection.structures import Anchors, Array
from ppn_jax.errors import InputError, did_you_mean

# Values of `loss.localization`.
LOCALIZATIONS = ('smooth_l1', 'giou', 'ciou')
# Keeps quotients of boxes without area finite. Boxes are measured in sides of their anchor, of
# which this is a ten millionth, whatever the size of the object.
_EPSILON = 1e-7
# Codes beyond these are cut before boxes are made of them, as torchvision and Detectron2 cut the
# last two: 100 anchors away, and 1000 / 16 times as large or as small.
_LARGEST_CODES = np.float32(boxes.CODE_SCALES) * np.float32(
    [100, 100, math.log(1000 / 16), math.log(1000 / 16)])


def check_localization(name: str, takes_anchors: bool = True) -> None:
  """Checks a value of `loss.localization`.

  Args:
    name: the value.
    takes_anchors: whether there are anchors to decode boxes with.

  Raises:
    InputError: If it is unknown, or needs anchors and has none.
  """
  if name not in LOCALIZATIONS:
    raise InputError(f'loss.localization={name!r} is unknown; '
                     f'{did_you_mean(str(name), LOCALIZATIONS)}')
  if name != 'smooth_l1' and not takes_anchors:
    raise InputError(f"loss.localization={name!r} compares boxes and needs the argument 'anchors'; "
                     "pass it, or use 'smooth_l1'")


def box_loss(codes: Array, target_codes: Array, localization: str = 'smooth_l1',
             anchors: Anchors | None = None) -> Array:
  """Computes the loss of each anchor's box.

  Args:
    codes: f32 [B, A, 4], predicted box codes.
    target_codes: f32 [B, A, 4], desired ones.
    localization: 'smooth_l1' is the sum over the four codes, 'giou' and 'ciou' are `giou_loss` and
      `ciou_loss` of the decoded boxes.
    anchors: the A anchors; 'smooth_l1' does not need them.

  Returns:
    f32 [B, A].
  """
  if localization == 'smooth_l1':
    return jnp.sum(smooth_l1(codes - target_codes), axis=-1)
  assert anchors is not None, 'see check_localization'
  function: Callable[..., Array] = {'giou': giou_loss, 'ciou': ciou_loss}[localization]
  # One unit for both axes, since CIoU has an aspect ratio and a distance.
  unit = jnp.sqrt(boxes.area(jnp.asarray(anchors.boxes)))[:, None]
  predicted, target = (
      boxes.decode(jnp.clip(c, -_LARGEST_CODES, _LARGEST_CODES), anchors.boxes) / unit
      for c in (codes, target_codes))
  return function(predicted, target)


def smooth_l1(error: Array, *, delta: float = 1.0) -> Array:
  """Computes Huber's loss, elementwise: error^2 / 2 up to `delta`, linear of slope `delta` beyond.

  `optax.losses.huber_loss` has the same values to the bit, but its gradient of a small error is the
  difference of two larger numbers, up to 0.3% off in float32 for normally distributed errors.
  """
  size = jnp.abs(error)
  inside = jnp.minimum(size, delta)
  return inside * (size - 0.5 * inside)


def giou_loss(predicted: Array, target: Array) -> Array:
  """Computes 1 - GIoU of pairs of boxes (Rezatofighi et al., 2019, algorithm 2).

  GIoU = IoU - (C - U) / C, with U the area of the union and C that of the smallest box around both.
  As in torchvision's `generalized_box_iou_loss`, 1e-7 is added to each divisor.

  Args:
    predicted: f32 [..., 4], [ymin, xmin, ymax, xmax] in any unit.
    target: f32 [..., 4].

  Returns:
    f32 [...], 0 to 2.
  """
  overlap, union = _overlap_and_union(predicted, target)
  around = boxes.area(_enclosing(predicted, target))
  return 1 - overlap / (union + _EPSILON) + (around - union) / (around + _EPSILON)


def ciou_loss(predicted: Array, target: Array) -> Array:
  """Computes the complete IoU loss of pairs of boxes (Zheng et al., 2020, equations 8 to 11).

  CIoU loss = 1 - IoU + d^2 / c^2 + a v, with d the distance of the centres, c the diagonal of the
  smallest box around both, v = 4 / pi^2 (atan(w / h) - atan(w' / h'))^2, and the trade-off
  a = v / (1 - IoU + v), through which no gradient flows. As in torchvision's
  `complete_box_iou_loss`, 1e-7 is added to each divisor.

  Args:
    predicted, target: f32 [..., 4], [ymin, xmin, ymax, xmax] in a unit that both axes share.

  Returns:
    f32 [...], at least 0.
  """
  overlap, union = _overlap_and_union(predicted, target)
  iou = overlap / (union + _EPSILON)
  around = _enclosing(predicted, target)
  diagonal = jnp.sum(jnp.square(around[..., 2:] - around[..., :2]), axis=-1) + _EPSILON
  shift = (predicted[..., :2] + predicted[..., 2:] - target[..., :2] - target[..., 2:]) / 2
  v = 4 / math.pi**2 * jnp.square(_angle(target) - _angle(predicted))
  # IoU of equal boxes may be rounded to a little more than 1.
  alpha = jax.lax.stop_gradient(v / (jnp.maximum(1 - iou, 0) + v + _EPSILON))
  return 1 - iou + jnp.sum(jnp.square(shift), axis=-1) / diagonal + alpha * v


def _overlap_and_union(a: Array, b: Array) -> tuple[Array, Array]:
  overlap = boxes.area(boxes.intersect(a, b))
  return overlap, boxes.area(a) + boxes.area(b) - overlap


def _enclosing(a: Array, b: Array) -> Array:
  """Returns the smallest boxes around pairs of boxes."""
  return jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]),
                          jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)


def _angle(box: Array) -> Array:
  """Returns atan(width / height), 0 to pi / 2, with a finite gradient for boxes without sides."""
  height, width = (jnp.maximum(box[..., i + 2] - box[..., i], _EPSILON) for i in (0, 1))
  return jnp.arctan2(width, height)
