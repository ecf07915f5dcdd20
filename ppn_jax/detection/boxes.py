"""Box arithmetic for NumPy and JAX arrays.

Each function computes in the array namespace of its arguments, so the input pipeline and the
compiled step share every formula. Boxes are `[..., 4]` float32, `[ymin, xmin, ymax, xmax]`, 0 to 1
of the image unless stated otherwise.
"""

import numpy as np

from ppn_jax.detection.structures import Array

# SSD's variances, inverted, as the TF Object Detection API has them: (y, x, height, width).
CODE_SCALES = (10.0, 10.0, 5.0, 5.0)
# Added to sides before dividing and taking logarithms, in `encode` only, as the reference does.
CODE_EPSILON = 1e-8


def array_namespace(*arrays: Array):
  """Returns JAX's array namespace if any of the arrays is JAX's, otherwise NumPy."""
  for a in arrays:
    if not isinstance(a, (np.ndarray, np.generic)) and hasattr(a, '__array_namespace__'):
      return a.__array_namespace__()
  return np


def area(boxes: Array) -> Array:
  """Computes areas, [..., 4] -> [...]; zero for inverted boxes."""
  xp = array_namespace(boxes)
  height = xp.maximum(boxes[..., 2] - boxes[..., 0], 0)
  width = xp.maximum(boxes[..., 3] - boxes[..., 1], 0)
  return _rounded_product(height, width)


def intersection(a: Array, b: Array) -> Array:
  """Computes pairwise areas of overlap: [..., N, 4], [..., M, 4] -> [..., N, M]."""
  xp = array_namespace(a, b)
  a, b = a[..., :, None, :], b[..., None, :, :]
  # Coordinate by coordinate: a [N, M, 2] intermediate pads its last axis to 128 lanes on a TPU.
  height = xp.minimum(a[..., 2], b[..., 2]) - xp.maximum(a[..., 0], b[..., 0])
  width = xp.minimum(a[..., 3], b[..., 3]) - xp.maximum(a[..., 1], b[..., 1])
  return _rounded_product(xp.maximum(height, 0), xp.maximum(width, 0))


def iou(a: Array, b: Array) -> Array:
  """Computes pairwise intersection over union: [..., N, 4], [..., M, 4] -> [..., N, M], 0 to 1.

  It is zero where the intersection is zero, so boxes without area overlap nothing.
  """
  xp = array_namespace(a, b)
  overlap = intersection(a, b)
  union = area(a)[..., :, None] + area(b)[..., None, :] - overlap
  return xp.where(overlap > 0, overlap / xp.where(overlap > 0, union, 1), 0)


def coverage(a: Array, b: Array) -> Array:
  """Computes the share of each box of `a` that lies in each box of `b`.

  Pairwise: [..., N, 4], [..., M, 4] -> [..., N, M], 0 to 1.
  """
  xp = array_namespace(a, b)
  overlap = intersection(a, b)
  own = area(a)[..., :, None]
  return xp.where(overlap > 0, overlap / xp.where(overlap > 0, own, 1), 0)


def clip(boxes: Array) -> Array:
  """Clips boxes to the image, [0, 1]."""
  return array_namespace(boxes).clip(boxes, 0, 1)


def intersect(a: Array, b: Array) -> Array:
  """Returns the intersection of two boxes as a box, one without area if they are disjoint."""
  xp = array_namespace(a, b)
  corner = xp.maximum(a[..., :2], b[..., :2])
  return xp.concatenate([corner, xp.maximum(xp.minimum(a[..., 2:], b[..., 2:]), corner)], axis=-1)


def flip_horizontal(boxes: Array) -> Array:
  """Returns the boxes of the image mirrored left to right."""
  xp = array_namespace(boxes)
  return xp.stack([boxes[..., 0], 1 - boxes[..., 3], boxes[..., 2], 1 - boxes[..., 1]], axis=-1)


def encode(boxes: Array, anchors: Array) -> Array:
  """Encodes boxes as offsets from anchors, the regression target (SSD, equation 2).

  A code is (10 (yc - yc_a) / h_a, 10 (xc - xc_a) / w_a, 5 ln(h / h_a), 5 ln(w / w_a)). This is the
  inverse of `decode` up to `CODE_EPSILON`, which keeps codes of boxes without area finite.

  Args:
    boxes: [..., 4].
    anchors: [..., 4], broadcast against `boxes`, with positive area.

  Returns:
    Codes [..., 4], (ty, tx, th, tw).
  """
  xp = array_namespace(boxes, anchors)
  yc, xc, h, w = _center_and_size(boxes)
  yc_a, xc_a, h_a, w_a = _center_and_size(anchors)
  h, w, h_a, w_a = (side + CODE_EPSILON for side in (h, w, h_a, w_a))
  codes = ((yc - yc_a) / h_a, (xc - xc_a) / w_a, xp.log(h / h_a), xp.log(w / w_a))
  return xp.stack([scale * code for scale, code in zip(CODE_SCALES, codes, strict=True)], axis=-1)


def decode(codes: Array, anchors: Array) -> Array:
  """Decodes box codes, the inverse of `encode`; boxes are neither clipped nor clamped.

  Args:
    codes: [..., 4] (ty, tx, th, tw).
    anchors: [..., 4], broadcast against `codes`.
  """
  xp = array_namespace(codes, anchors)
  ty, tx, th, tw = (codes[..., i] / scale for i, scale in enumerate(CODE_SCALES))
  yc_a, xc_a, h_a, w_a = _center_and_size(anchors)
  yc, xc, h, w = ty * h_a + yc_a, tx * w_a + xc_a, xp.exp(th) * h_a, xp.exp(tw) * w_a
  return xp.stack([yc - h / 2, xc - w / 2, yc + h / 2, xc + w / 2], axis=-1)


def _rounded_product(height: Array, width: Array) -> Array:
  """Multiplies non-negative sides so that the product is rounded before it is added to anything.

  XLA's CPU compiler contracts a product and a sum into one instruction (and sees through an
  optimization barrier); overlaps that are equal by definition then differ in the last bit, and
  `force_match` picks another anchor than the reference. A select in between prevents it.
  """
  product = height * width
  return array_namespace(product).where(product > 0, product, 0)


def _center_and_size(boxes: Array) -> tuple[Array, Array, Array, Array]:
  """Returns (yc, xc, height, width) of boxes [..., 4], each [...]."""
  ymin, xmin, ymax, xmax = (boxes[..., i] for i in range(4))
  height, width = ymax - ymin, xmax - xmin
  return ymin + height / 2, xmin + width / 2, height, width
