"""Operations that move the pixels of an Example and its boxes together.

The image may be an array, which stays one, or a `LazyImage`, which `resize` converts to an array.
"""

import cv2
import numpy as np

from ppn_jax.data.images.lazy import Color, Frame, LazyImage, Window
from ppn_jax.data.images.resizing import KERNELS, NEVER_REDUCED
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.frame import FILL, InputFrame
from ppn_jax.detection.structures import Example


def mirror(example: Example) -> Example:
  """Mirrors an image left to right."""
  image = example.image
  image = image.mirror() if isinstance(image, LazyImage) else cv2.flip(image, 1)
  return example._replace(image=image, boxes=box_ops.flip_horizontal(example.boxes))


def crop(example: Example, window: Window, coverage: float = 0.0,
         fill: Color = (0, 0, 0)) -> Example:
  """Cuts out a window, and keeps the boxes of which it contains at least the share `coverage`.

  Crowds are kept, clipped, wherever the window overlaps them, because even a small visible part of
  a crowd is not background.

  Args:
    example: The image with its boxes.
    window: (y, x, height, width) in pixels; may extend beyond the image.
    coverage: Share of a box's area, 0 to 1. Boxes completely outside are always dropped.
    fill: Colour outside the image.
  """
  y, x, height, width = window
  rows, columns = example.image.shape[:2]
  frame = np.float32([[y / rows, x / columns, (y + height) / rows, (x + width) / columns]])
  share = box_ops.coverage(example.boxes, frame)[:, 0]
  origin = frame[0, [0, 1, 0, 1]]
  boxes = box_ops.clip((example.boxes - origin) / (frame[0, [2, 3, 2, 3]] - origin))
  return keep(example._replace(image=_cut(example.image, window, fill), boxes=boxes),
              (share > 0) & (example.crowd | (share >= coverage)))


def resize(example: Example, height: int, width: int, method: str = 'area',
           reduced_decoding: bool = True) -> Example:
  """Resizes to height x width pixels, without keeping the aspect ratio, and returns an array.

  See `basic.Resize` for `method` and `reduced_decoding`.
  """
  image, kernel = example.image, KERNELS[method]
  if not isinstance(image, LazyImage):
    if image.shape[:2] == (height, width):
      return example
    return example._replace(image=kernel(image, height, width))
  if image.shape[:2] == (height, width):
    return example._replace(image=image.pixels())
  pixels, frame = image.resize(height, width, kernel,
                               reduce=reduced_decoding and method not in NEVER_REDUCED)
  return _reframe(example._replace(image=pixels), frame, image.shape[:2])


def fit(example: Example, frame: InputFrame, method: str = 'area', reduced_decoding: bool = True,
        size: tuple[int, int] | None = None) -> Example:
  """Resizes into the network's input as `frame` says, and returns an array.

  Args:
    example: The image with its boxes.
    frame: Geometry of the input.
    method, reduced_decoding: See `basic.Resize`.
    size: (height, width) whose aspect ratio is kept, if not the image's own.
  """
  size = size or example.image.shape[:2]
  rows, columns = frame.content_of(size)
  example = resize(example, rows, columns, method, reduced_decoding)
  if (rows, columns) == (frame.height, frame.width):
    return example
  image = cv2.copyMakeBorder(example.image, 0, frame.height - rows, 0, frame.width - columns,
                             cv2.BORDER_CONSTANT, value=(FILL,) * 3)
  return example._replace(image=image, boxes=frame.to_input(example.boxes, np.array(size)))


def keep(example: Example, which: np.ndarray) -> Example:
  """Keeps only the boxes `which`, bool [N]."""
  return example._replace(boxes=example.boxes[which], labels=example.labels[which],
                          crowd=example.crowd[which])


def drop_small(example: Example, least: float) -> Example:
  """Drops boxes with a side of less than `least` pixels of the image, and those without area.

  Crowds are dropped only if they have no area.
  """
  boxes, size = example.boxes, example.image.shape[:2]
  sides = (boxes[:, 2:] - boxes[:, :2]) * np.float32(size)
  return keep(example, (example.crowd | (sides.min(axis=-1) >= least)) & (box_ops.area(boxes) > 0))


def materialise(example: Example) -> Example:
  """Converts a lazy image to an array."""
  if not isinstance(example.image, LazyImage):
    return example
  return example._replace(image=example.image.pixels())


def _cut(image: np.ndarray | LazyImage, window: Window, fill: Color) -> np.ndarray | LazyImage:
  y, x, height, width = window
  if isinstance(image, LazyImage):
    return image.crop(window, fill)
  if min(y, x) < 0 or y + height > image.shape[0] or x + width > image.shape[1]:
    return LazyImage.of(image).crop(window, fill).pixels()
  return image[y:y + height, x:x + width]


def _reframe(example: Example, frame: Frame, size: tuple[int, int]) -> Example:
  """Converts boxes of an image of `size` to boxes of a frame in its pixels."""
  if frame == (0, 0, *size):
    return example
  origin, sides = np.array(frame).reshape(2, 2)
  boxes = (example.boxes * np.tile(size, 2) - np.tile(origin, 2)) / np.tile(sides, 2)
  return drop_small(example._replace(boxes=box_ops.clip(boxes).astype(np.float32)), 0)
