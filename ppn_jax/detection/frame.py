"""How a picture lies in the network's input: stretched over it, or with its own aspect ratio.

Training, evaluation, detection and export take the geometry from here: boxes go in by `to_input`
and come back by `to_picture`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array, Detections
from ppn_jax.errors import InputError, did_you_mean

# `model.image_size`, the size of the network's input in pixels: the side of a square, or (height,
# width).
ImageSize = int | tuple[int, int]

RESIZE_MODES = ('stretch', 'letterbox')
# Grey of the rest of a letterbox, in all channels. The network scales it to 0, where the zeros are
# with which its convolutions pad, to half a grey level.
FILL = 128


class InputFrame(NamedTuple):
  """Geometry of the network's input.

  A picture of h x w pixels fills the whole input of H x W ('stretch'), or its top left corner, s h
  x s w pixels of it with s = min(H / h, W / w) and sides rounded to at least a pixel ('letterbox').
  At the top left, a box of the input is one of the picture but for a factor.

  Fields:
    height, width: H and W.
    mode: one of `RESIZE_MODES`.
  """
  height: int
  width: int
  mode: str = 'stretch'

  @classmethod
  def of(cls, image_size: ImageSize, mode: str = 'stretch') -> 'InputFrame':
    """Makes the frame of the config's `model.image_size` and `data.resize_mode`; '' stretches.

    Raises:
      InputError: If there is no such mode.
    """
    return cls(*sides_of(image_size), check_mode('data.resize_mode', mode) or 'stretch')

  @property
  def keeps_aspect(self) -> bool:
    """Whether pictures keep their aspect ratio."""
    return self.mode == 'letterbox'

  def content(self, size: Array) -> Array:
    """Returns (rows, columns) of the input that pictures fill, in whole pixels.

    Args:
      size: [..., 2], (height, width) of the pictures in pixels, at least 1.
    """
    xp = box_ops.array_namespace(size)
    sides = xp.asarray([self.height, self.width])
    if not self.keeps_aspect:
      return xp.broadcast_to(sides, size.shape)
    # The side that limits the scale comes out as that of the input, and the other above it.
    fitting = xp.floor(size * sides[::-1] / size[..., ::-1] + 0.5)
    return xp.clip(fitting, 1, sides).astype(sides.dtype)

  def content_of(self, size: tuple[int, int]) -> tuple[int, int]:
    """Returns `content` of one picture as whole numbers."""
    rows, columns = self.content(np.array(size)).tolist()
    return rows, columns

  def to_input(self, boxes: Array, size: Array) -> Array:
    """Maps boxes of pictures to the input: [..., N, 4] and sizes [..., 2] -> [..., N, 4]."""
    return boxes * self._shares(boxes, size) if self.keeps_aspect else boxes

  def to_picture(self, boxes: Array, size: Array) -> Array:
    """Maps boxes of the input to pictures, and clips them there; the inverse of `to_input`."""
    return box_ops.clip(boxes / self._shares(boxes, size)) if self.keeps_aspect else boxes

  def in_pictures(self, found: Detections, size: Array) -> Detections:
    """Returns detections in the input as detections in pictures of `size` [..., 2].

    What lies completely beside its picture is not valid.
    """
    if not self.keeps_aspect:
      return found
    xp = box_ops.array_namespace(found.boxes)
    boxes = self.to_picture(found.boxes, size)
    valid = found.valid & (box_ops.area(boxes) > 0)
    kept = [xp.where(valid[..., None] if field.ndim > valid.ndim else valid, field, 0)
            .astype(field.dtype) for field in (boxes, *found[1:-1])]
    return Detections(*kept, valid)

  def _shares(self, boxes: Array, size: Array) -> Array:
    """Returns the part of the input that pictures fill, by coordinate of a box: [..., 1, 4]."""
    xp = box_ops.array_namespace(boxes, size)
    shares = self.content(size) / xp.asarray([self.height, self.width])
    return xp.concatenate([shares, shares], axis=-1)[..., None, :].astype(boxes.dtype)


def sides_of(image_size: ImageSize) -> tuple[int, int]:
  """Returns (height, width) of an image size."""
  if isinstance(image_size, Sequence):
    height, width = image_size
    return height, width
  return image_size, image_size


def check_image_size(what: str, image_size: Any, least: int = 1) -> ImageSize:
  """Returns an image size with sides of at least `least` pixels; the side alone for a square.

  Raises:
    InputError: If it is something else.
  """
  sides = (tuple(image_size) if isinstance(image_size, Sequence) and not isinstance(image_size, str)
           else (image_size, image_size))
  if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
    raise InputError(f'{what} is {image_size!r}, legal: an integer, {least} or more, or two of '
                     'them, (height, width)')
  height, width = sides
  return height if height == width else (height, width)


def show_size(image_size: ImageSize) -> str:
  """Returns an image size as text: '300', or '240x320' for height and width that differ."""
  height, width = sides_of(image_size)
  return f'{height}' if height == width else f'{height}x{width}'


def check_mode(what: str, mode: str) -> str:
  """Returns `mode`, one of `RESIZE_MODES` or ''.

  Raises:
    InputError: If it is something else.
  """
  if mode not in (*RESIZE_MODES, ''):
    raise InputError(f'{what}={mode!r} is unknown; {did_you_mean(str(mode), RESIZE_MODES)}')
  return mode
