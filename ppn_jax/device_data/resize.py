"""Crop, mirror and resize of one image on the device, as two small matrix products.

The arithmetic is exact on integers: weights are 256ths, every product and sum is an integer that
float32 represents, and bfloat16 and TF32 represent every factor. So all devices compute the same
pixels, whatever the precision of their matrix products and the order of their sums.
"""

from typing import Any

import jax.numpy as jnp

from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.structures import Array

# Methods of `data.transforms.Resize`; 'supersample' averages as 'area' does.
KERNELS = ('area', 'supersample', 'bilinear', 'legacy')

_UNIT = 256  # Weights are multiples of 1 / 256; with one more bit they would not fit bfloat16.


def crop_and_resize(image: Array, frame: Array, mirrored: Array, size: ImageSize, kernel: str,
                    beyond: bool = False, visible: Array | None = None,
                    content: Array | None = None) -> tuple[Array, Array | None]:
  """Crops an image to a frame, mirrors it if asked to, and resizes it to the network's input.

  The result is within about a grey level of crop, flip and Resize(size, kernel) of
  `data.transforms` applied to the same pixels.

  Args:
    image: u8 [3, R, Q], channels first, since a last axis of 3 wastes most of a TPU's lanes.
    frame: f32 [4], a box of the stored image; its borders may lie inside pixels.
    mirrored: bool [], whether to mirror left to right.
    size: side of the result in pixels, or (height, width).
    kernel: one of KERNELS.
    beyond: whether the frame may reach beyond the image, or beyond its visible part.
    visible: f32 [4], the box of the stored image that may be shown; None for all of it.
    content: f32 [2], whole rows and columns of the result that the frame fills, from the top left
      on; what is beyond them is undefined. None for all of them.

  Returns:
    Image f32 [3, H, W], whole grey levels, 0 to 255, and f32 [H, W], the share of each pixel that
    shows the image, 0 to 1, or None if not `beyond`.
  """
  (high, wide), out = image.shape[-2:], sides_of(size)
  sides = jnp.float32([high, wide])
  start, extent = frame[:2] * sides, (frame[2:] - frame[:2]) * sides
  shown = shown_x = None
  if visible is not None:
    first, last = visible.reshape(2, 2) * sides
    shown = first[0], last[0]
    shown_x = (jnp.where(mirrored, wide - last[1], first[1]),
               jnp.where(mirrored, wide - first[1], last[1]))
  filled: tuple[Any, Any] = out if content is None else (content[0], content[1])
  rows = weights(start[0], extent[0], high, out[0], kernel, shown, filled[0])
  # The kernel runs over the mirrored image, since the legacy one is not symmetric.
  start_x = jnp.where(mirrored, wide - start[1] - extent[1], start[1])
  columns = weights(start_x, extent[1], wide, out[1], kernel, shown_x, filled[1])
  columns = jnp.where(mirrored, columns[:, ::-1], columns)
  partial = jnp.einsum('sr,crq->csq', rows, image.astype(jnp.float32))
  # 16-bit factors would not be exact, so they are split into two halves of 8 bits.
  upper = jnp.floor(partial / _UNIT)
  halves = jnp.einsum('kcsq,tq->kcst', jnp.stack([upper, partial - upper * _UNIT]), columns)
  total = halves[0] * _UNIT + halves[1]
  if not beyond:
    return jnp.floor((total + _UNIT**2 / 2) / _UNIT**2), None
  seen = rows.sum(axis=1)[:, None] * columns.sum(axis=1)
  return jnp.rint(total / jnp.maximum(seen, 1)), seen / _UNIT**2


def weights(start: Array, extent: Array, side: int, size: int, kernel: str,
            shown: tuple[Array, Array] | None = None, filled: Any = None) -> Array:
  """Computes the weight of each input pixel of an axis in each output pixel, in 256ths.

  Every kernel is a box that slides along the axis, on which pixel j covers [j, j + 1). It is as
  wide as an output pixel if the axis shrinks and the kernel averages, and otherwise one pixel wide,
  which is linear interpolation. It is kept inside the window.

  Args:
    start, extent: f32 [], the window in pixels of the axis; it may reach beyond them.
    side: input pixels of the axis.
    size: output pixels of the axis.
    kernel: one of KERNELS.
    shown: f32 [] each, start and end of the part that may be shown, in pixels of the axis; None for
      all of it.
    filled: first output pixels that the window is resized to, a whole number; None for all of them.

  Returns:
    f32 [size, side], integers; rows sum to 256, or less beyond the axis or the shown part.
  """
  step = extent / (size if filled is None else filled)
  width = jnp.maximum(step, 1) if kernel in ('area', 'supersample') else jnp.float32(1)
  outputs = jnp.arange(size, dtype=jnp.float32)
  # TensorFlow 1 aligns the corners of pixels rather than their centres.
  first = outputs * step if kernel == 'legacy' else (outputs + 0.5) * step - width / 2
  first = jnp.clip(start + first, start, jnp.maximum(start, start + extent - width))
  # A window narrower than the kernel, at the end of the axis.
  first = jnp.clip(first, jnp.minimum(start, 0), jnp.maximum(start + extent, side) - width)
  borders = jnp.arange(side + 1, dtype=jnp.float32)
  if shown is not None:
    borders = jnp.clip(borders, *shown)
  # Cumulative sums are rounded instead of weights, so that each row sums to 256 exactly.
  covered = jnp.clip((borders - first[:, None]) / width, 0, 1)
  return jnp.diff(jnp.floor(covered * _UNIT + 0.5), axis=1)
