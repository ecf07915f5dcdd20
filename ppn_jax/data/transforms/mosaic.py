"""Mosaic of four images."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from ppn_jax.data.checks import check_bool, check_color, check_number, check_range
from ppn_jax.data.images.lazy import Color
from ppn_jax.data.images.resizing import check_method
from ppn_jax.data.transforms.geometry import crop, drop_small, resize
from ppn_jax.detection.frame import (
  ImageSize,
  InputFrame,
  check_image_size,
  check_mode,
  sides_of,
)
from ppn_jax.detection.structures import Example


@dataclasses.dataclass(frozen=True)
class Mosaic:
  """Arranges the image and three others around a random point of a canvas.

  Implements the mosaic of YOLOv4 (Bochkovskiy et al., 2020, section 3.3). Each image is resized to
  `scale` times the canvas, or with `resize_mode='letterbox'` so that it just fits into that, and
  placed with a corner at the point. Parts beyond the canvas are cut off,
  and parts that no image covers have the colour `fill`. The other images are drawn at random and go
  through the transforms before this one.

  Boxes completely outside are dropped, and those below `min_coverage` or `min_side` unless they are
  crowds; the others are cut at the canvas. `image_id` and `size` are those of the first image.

  Attributes:
    size: Side of the canvas in pixels, or (height, width), usually those of the network's input.
    probability: Probability of a mosaic, 0 to 1; otherwise the other images are not read.
    center: Range of the point's coordinates, as shares of the canvas; uniform.
    scale: Range of each image's sides, as a share of the canvas's; uniform, drawn for each image.
    fill: RGB.
    min_coverage: Share of a box's area that must be on the canvas.
    min_side: Pixels of the canvas that both sides of the visible part of a box must have.
    method, reduced_decoding, resize_mode: As in `Resize`.
  """
  size: ImageSize
  probability: float = 0.5
  center: tuple[float, float] = (0.25, 0.75)
  scale: tuple[float, float] = (0.5, 1.0)
  fill: Color = (128, 128, 128)
  min_coverage: float = 0.1
  min_side: float = 2.0
  method: str = 'area'
  reduced_decoding: bool = True
  resize_mode: str = ''
  takes_lazy_image: ClassVar[bool] = True
  takes_others: ClassVar[bool] = True
  box_factor: ClassVar[int] = 4

  def __post_init__(self):
    check_image_size('mosaic.size', self.size, 2)
    check_number('mosaic.probability', self.probability, 0, 1)
    check_range('mosaic.center', self.center, 0, 1)
    check_range('mosaic.scale', self.scale, 0.01, 4)
    check_color('mosaic.fill', self.fill)
    check_number('mosaic.min_coverage', self.min_coverage, 0, 1)
    check_number('mosaic.min_side', self.min_side, 0, min(sides_of(self.size)))
    check_method('mosaic.method', self.method)
    check_bool('mosaic.reduced_decoding', self.reduced_decoding)
    check_mode('mosaic.resize_mode', self.resize_mode)

  def __call__(self, example: Example, rng: np.random.Generator,
               draw: Callable[[], Example]) -> Example:
    if rng.random() >= self.probability:
      return example
    examples = [example, draw(), draw(), draw()]
    whole = np.array(sides_of(self.size))
    center = np.rint(rng.uniform(*self.center, 2) * whole).astype(int)
    center = np.clip(center, 1, whole - 1)
    sizes = np.rint(rng.uniform(*self.scale, 4)[:, None] * whole).astype(int).clip(1)
    canvas = np.empty((*whole, 3), np.uint8)
    canvas[:] = self.fill
    corners = rng.permutation(4).tolist()
    tiles = [self._place(canvas, tile, center, size, divmod(corner, 2))
             for tile, size, corner in zip(examples, sizes.tolist(), corners, strict=True)]
    boxes, labels, crowd = (np.concatenate(columns) for columns in zip(
        *((t.boxes, t.labels, t.crowd) for t in tiles), strict=True))
    return drop_small(example._replace(image=canvas, boxes=boxes, labels=labels, crowd=crowd),
                      self.min_side)

  def _place(self, canvas: np.ndarray, example: Example, center: np.ndarray,
             fitting: tuple[int, int], corner: tuple[int, int]) -> Example:
    """Draws one image in its size, and returns its visible boxes relative to the canvas.

    Args:
      canvas: u8 [H, W, 3], changed in place.
      example: The image with its boxes.
      center: (y, x) of the point in pixels.
      fitting: (height, width) of the resized image, or of its letterbox, in pixels.
      corner: (0 above or 1 below the point, 0 left or 1 right of it).
    """
    window, place = [], []
    size, sides = example.image.shape[:2], canvas.shape[:2]
    resized = InputFrame.of(fitting, self.resize_mode).content_of(size)
    for whole, out, side, at, after in zip(size, resized, sides, center.tolist(), corner,
                                           strict=True):
      shown = min(out, side - at if after else at)
      stored = max(1, round(whole * shown / out))
      window.append((0 if after else whole - stored, stored))
      place.append((at if after else at - shown, shown))
    (y, x), (height, width) = zip(*window, strict=True)
    (top, left), (rows, columns) = zip(*place, strict=True)
    tile = resize(crop(example, (y, x, height, width), self.min_coverage), rows, columns,
                  self.method, self.reduced_decoding)
    canvas[top:top + rows, left:left + columns] = tile.image
    boxes = (tile.boxes * np.float32([rows, columns] * 2) + np.float32([top, left] * 2))
    return tile._replace(boxes=boxes / np.float32(sides * 2))
