"""Crop, mirror and resize of one image on the device, as two small matrix products.

All of it is exact integer arithmetic: weights are 256ths, and every product and sum is an
integer that float32 holds, as do bfloat16 and TF32 the factors. So the same pixels come out of
any device, at whatever precision it multiplies matrices and in whatever order it adds.
"""

import jax.numpy as jnp

from ppn_jax.detection.structures import Array

# Methods of `data.transforms.Resize`; 'supersample' averages as 'area' does.
KERNELS = ('area', 'supersample', 'bilinear', 'legacy')

_UNIT = 256  # Of weights. One more bit and the factors would no longer fit into bfloat16.


def crop_and_resize(image: Array, frame: Array, mirrored: Array, size: int, kernel: str,
                    beyond: bool = False, visible: Array | None = None
                    ) -> tuple[Array, Array | None]:
  """The part of an image in a frame, mirrored if so decided, at the network's size.

  Within about a grey level of `data.transforms` applied to the same pixels: crop, then flip, then
  Resize(size, kernel).

  Args:
    image: u8 [3, R, R], channels first: a last axis of 3 wastes most of a TPU's lanes.
    frame: f32 [4], a box of the image as it is stored; its borders need not be those of pixels.
    mirrored: bool [], left to right.
    size: S.
    kernel: one of KERNELS.
    beyond: whether the frame may reach beyond the image, or beyond what is visible of it.
    visible: f32 [4], the box of the image as it is stored that may be shown; None is all of it.

  Returns:
    f32 [3, S, S], whole grey levels, 0 to 255, and f32 [S, S], the share of each pixel that shows
    the image, 0 to 1; None if the frame may not reach beyond it.
  """
  side = image.shape[-1]
  start, extent = frame[:2] * side, (frame[2:] - frame[:2]) * side
  shown = shown_x = None
  if visible is not None:
    low, high = visible.reshape(2, 2) * side
    shown = low[0], high[0]
    shown_x = (jnp.where(mirrored, side - high[1], low[1]),
               jnp.where(mirrored, side - low[1], high[1]))
  rows = weights(start[0], extent[0], side, size, kernel, shown)
  # The kernel runs over the mirrored image, since the legacy one is not symmetric.
  start_x = jnp.where(mirrored, side - start[1] - extent[1], start[1])
  columns = weights(start_x, extent[1], side, size, kernel, shown_x)
  columns = jnp.where(mirrored, columns[:, ::-1], columns)
  partial = jnp.einsum('sr,crq->csq', rows, image.astype(jnp.float32))
  # Sixteen bits would not fit; their two halves do.
  upper = jnp.floor(partial / _UNIT)
  halves = jnp.einsum('kcsq,tq->kcst', jnp.stack([upper, partial - upper * _UNIT]), columns)
  total = halves[0] * _UNIT + halves[1]
  if not beyond:
    return jnp.floor((total + _UNIT**2 / 2) / _UNIT**2), None
  seen = rows.sum(axis=1)[:, None] * columns.sum(axis=1)
  return jnp.rint(total / jnp.maximum(seen, 1)), seen / _UNIT**2


def weights(start: Array, extent: Array, side: int, size: int, kernel: str,
            shown: tuple[Array, Array] | None = None) -> Array:
  """What each pixel of an axis contributes to each pixel of the result, in 256ths.

  Every kernel here is a box slid along the axis, on which pixel j covers [j, j + 1): as wide as
  an output pixel where the axis shrinks and the kernel averages, else one pixel, which is linear
  interpolation. It is kept from reaching over the borders of the window.

  Args:
    start, extent: f32 [], the window in pixels of the axis; it may reach beyond them.
    side: pixels of the axis.
    size: pixels of the result.
    shown: f32 [], start and end of what may be shown, in pixels of the axis; None is all.

  Returns:
    f32 [size, side], integers; rows add up to 256, or less beyond the axis and what may be shown.
  """
  step = extent / size
  width = jnp.maximum(step, 1) if kernel in ('area', 'supersample') else jnp.float32(1)
  outputs = jnp.arange(size, dtype=jnp.float32)
  # TensorFlow 1 aligns corners of pixels rather than centres.
  first = outputs * step if kernel == 'legacy' else (outputs + 0.5) * step - width / 2
  first = jnp.clip(start + first, start, jnp.maximum(start, start + extent - width))
  # A window narrower than the kernel, at the end of the axis.
  first = jnp.clip(first, jnp.minimum(start, 0), jnp.maximum(start + extent, side) - width)
  borders = jnp.arange(side + 1, dtype=jnp.float32)
  if shown is not None:
    borders = jnp.clip(borders, *shown)
  # Rounded sums instead of rounded weights, so that a row adds up exactly.
  covered = jnp.clip((borders - first[:, None]) / width, 0, 1)
  return jnp.diff(jnp.floor(covered * _UNIT + 0.5), axis=1)
