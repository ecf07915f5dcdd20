"""Mixup of two images, and pasting objects of one image into another."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import cv2
import numpy as np

from ppn_jax.data.checks import check_bool, check_integer, check_number, check_range
from ppn_jax.data.images.resizing import check_method
from ppn_jax.data.transforms.geometry import crop, drop_small, fit, keep, resize
from ppn_jax.detection.frame import (
  ImageSize,
  InputFrame,
  check_image_size,
  check_mode,
  sides_of,
)
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mixup:
  """Blends the image with another one, and shows the boxes of both.

  Implements mixup for detection (Zhang et al., "Bag of Freebies for Training Object Detection
  Neural Networks", 2019, section 3.1). Both images are resized to the network's input, and the
  result is r times the first and 1 - r times the second, with r drawn from Beta(alpha, alpha).
  Boxes count fully whatever r is, as in YOLOX; those of an image with a share below `min_share`,
  which can hardly be seen, are dropped. The other image is drawn at random and goes through the
  transforms before this one. `image_id` and `size` are those of the first image.

  Attributes:
    size: Side of the result in pixels, or (height, width), usually those of the network's input.
    probability: Probability of a blend, 0 to 1; otherwise the other image is not read.
    alpha: Above 0. The paper's best is 1.5; large values blend nearly equal shares.
    min_share: Least share of an image whose boxes are kept, 0 to 0.5.
    method, reduced_decoding, resize_mode: As in `Resize`.
  """
  size: ImageSize
  probability: float = 0.5
  alpha: float = 1.5
  min_share: float = 0.1
  method: str = 'area'
  reduced_decoding: bool = True
  resize_mode: str = ''
  takes_lazy_image: ClassVar[bool] = True
  takes_others: ClassVar[bool] = True
  box_factor: ClassVar[int] = 2

  def __post_init__(self):
    check_image_size('mixup.size', self.size)
    check_number('mixup.probability', self.probability, 0, 1)
    check_number('mixup.alpha', self.alpha, 0, 1e6)
    if not self.alpha:
      raise InputError('mixup.alpha is 0, which blends nothing; use a value above it, or '
                       'mixup.probability=0')
    check_number('mixup.min_share', self.min_share, 0, 0.5)
    check_method('mixup.method', self.method)
    check_bool('mixup.reduced_decoding', self.reduced_decoding)
    check_mode('mixup.resize_mode', self.resize_mode)

  def __call__(self, example: Example, rng: np.random.Generator,
               draw: Callable[[], Example]) -> Example:
    if rng.random() >= self.probability:
      return example
    other, share = draw(), float(rng.beta(self.alpha, self.alpha))
    frame = InputFrame.of(self.size, self.resize_mode)
    one, two = (fit(e, frame, self.method, self.reduced_decoding) for e in (example, other))
    image = cv2.addWeighted(one.image, share, two.image, 1 - share, 0)
    seen = [e for e, s in ((one, share), (two, 1 - share)) if s >= self.min_share]
    return _with_boxes_of(one._replace(image=image), seen)


@dataclasses.dataclass(frozen=True)
class CopyPaste:
  """Pastes objects of another image at random places of this one.

  Follows Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
  Segmentation" (CVPR 2021), with boxes in place of masks: what is pasted is the rectangle of an
  object, with all that it contains. The image is resized to the network's input. The other
  image is drawn at random and goes through the transforms before this one. Of its objects that are
  no crowds, a random number is pasted, each with `scale` times the share of the image that it had,
  at a place of this image where all of it is seen. Other boxes of that image of which the
  rectangle contains `min_visible` come along; an object is left out if there would then be more
  pasted boxes than the other image has.

  Boxes of which later rectangles leave less than `min_visible` are dropped; others do not change.
  Crowds are kept unless they are covered completely. Boxes with a side below `min_side` are
  dropped. `image_id` and `size` are those of the first image.

  Attributes:
    size: Side of the result in pixels, or (height, width), usually those of the network's input.
    probability: Probability of pasting, 0 to 1; otherwise the other image is not read.
    max_objects: Largest number of rectangles; uniform from 1.
    scale: Range of the factor; uniform, drawn for each rectangle. One that would be larger than the
      image is as large as the image.
    min_visible: Least share of a box's area that must be seen, 0 to 1.
    min_side: Pixels of the result that both sides of a box must have.
    method, reduced_decoding, resize_mode: As in `Resize`.
  """
  size: ImageSize
  probability: float = 0.5
  max_objects: int = 3
  scale: tuple[float, float] = (0.25, 1.0)
  min_visible: float = 0.3
  min_side: float = 2.0
  method: str = 'area'
  reduced_decoding: bool = True
  resize_mode: str = ''
  takes_lazy_image: ClassVar[bool] = True
  takes_others: ClassVar[bool] = True
  box_factor: ClassVar[int] = 2

  def __post_init__(self):
    check_image_size('copy_paste.size', self.size, 2)
    check_number('copy_paste.probability', self.probability, 0, 1)
    check_integer('copy_paste.max_objects', self.max_objects, 1)
    check_range('copy_paste.scale', self.scale, 0.01, 100)
    check_number('copy_paste.min_visible', self.min_visible, 0, 1)
    check_number('copy_paste.min_side', self.min_side, 0, min(sides_of(self.size)))
    check_method('copy_paste.method', self.method)
    check_bool('copy_paste.reduced_decoding', self.reduced_decoding)
    check_mode('copy_paste.resize_mode', self.resize_mode)

  def __call__(self, example: Example, rng: np.random.Generator,
               draw: Callable[[], Example]) -> Example:
    if rng.random() >= self.probability:
      return example
    other, num_pasted = draw(), int(rng.integers(1, self.max_objects + 1))
    frame = InputFrame.of(self.size, self.resize_mode)
    sides = frame.content_of(example.image.shape[:2])
    canvas = fit(example, frame, self.method, self.reduced_decoding)
    image, tiles, room = np.array(canvas.image), [], len(other.boxes)
    for index in rng.permutation(np.flatnonzero(~other.crowd))[:num_pasted]:
      tile, window = self._cut(other, other.boxes[index], sides, rng)
      if len(tile.boxes) > room:
        continue
      room -= len(tile.boxes)
      top, left, rows, columns = window
      image[top:top + rows, left:left + columns] = tile.image
      boxes = tile.boxes * np.float32([rows, columns] * 2) + np.float32([top, left] * 2)
      tiles.append((tile._replace(boxes=boxes / np.float32(sides_of(self.size) * 2)), window))
    seen, covered = [], np.zeros(sides_of(self.size), bool)
    for tile, (top, left, rows, columns) in reversed(tiles):  # The last one hides the others.
      seen.append(self._visible(tile, covered))
      covered[top:top + rows, left:left + columns] = True
    seen.append(self._visible(canvas, covered))
    return drop_small(_with_boxes_of(canvas._replace(image=image), seen[::-1]), self.min_side)

  def _cut(self, other: Example, box: np.ndarray, room: tuple[int, int], rng: np.random.Generator
           ) -> tuple[Example, tuple[int, int, int, int]]:
    """Cuts out and resizes the rectangle of a box, and draws where to paste it.

    Args:
      other: The other image.
      box: One of its boxes.
      room: (rows, columns) of the result that the first image fills.
      rng: Random numbers.

    Returns:
      The rectangle with its boxes, and (top, left, rows, columns) in pixels of the result.
    """
    sides = np.array(other.image.shape[:2])
    # All pixels of which the box covers more than what may be an error of rounding.
    start = np.clip(np.floor(box[:2] * sides + 1e-3), 0, sides - 1).astype(int)
    stop = np.clip(np.ceil(box[2:] * sides - 1e-3), start + 1, sides).astype(int)
    frame = InputFrame.of(self.size, self.resize_mode)
    factor = rng.uniform(*self.scale) * frame.content(sides)
    rows, columns = np.rint((stop - start) / sides * factor).clip(1, room).astype(int).tolist()
    top, left = (int(rng.integers(whole - side + 1))
                 for whole, side in zip(room, (rows, columns), strict=True))
    window = (*start.tolist(), *(stop - start).tolist())
    # Below 1, since the window contains the object's own box but for that.
    tile = resize(crop(other, window, min(self.min_visible, 0.99)), rows, columns, self.method,
                  self.reduced_decoding)
    return tile, (top, left, rows, columns)

  def _visible(self, example: Example, covered: np.ndarray) -> Example:
    """Keeps the boxes of which enough is not covered, by pixels: bool [rows, columns]."""
    shares = np.ones(len(example.boxes))
    for k, box in enumerate(np.clip(example.boxes, 0, 1) * np.float32(sides_of(self.size) * 2)):
      top, left = np.floor(box[:2]).astype(int)
      bottom, right = np.ceil(box[2:]).astype(int)
      shares[k] = 1 - covered[top:max(bottom, top + 1), left:max(right, left + 1)].mean()
    return keep(example, (shares > 0) & (example.crowd | (shares >= self.min_visible)))


def _with_boxes_of(example: Example, parts: list[Example]) -> Example:
  """Returns `example` with the boxes of `parts`, in order, in place of its own."""
  boxes, labels, crowd = (np.concatenate(columns) for columns in zip(
      *((p.boxes, p.labels, p.crowd) for p in parts), strict=True))
  return example._replace(boxes=boxes, labels=labels, crowd=crowd)
