"""SSD's random crop, as the TF Object Detection API draws it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ppn_jax.data.checks import check_integer, check_number, check_range
from ppn_jax.data.transforms.geometry import crop
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SsdRandomCrop:
  """Cuts out a random window that covers enough of some object (SSD, section 2.2).

  One of `coverages` is drawn. The window must contain at least this share of one box's area. Boxes
  of which it contains less are dropped, possibly all of them; the others, and all crowds that it
  overlaps, are cut at its border. With probability `keep_probability` the image does not change.

  Attributes:
    coverages: Shares of a box's area, equally likely.
    aspect_ratio: Range of width / height of the window in pixels.
    area: Range of the window's share of the image's area.
    keep_probability: Probability of no change, 0 to 1, whichever coverage was drawn.
    attempts: Number of windows to try before the whole image is taken.
  """
  coverages: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
  aspect_ratio: tuple[float, float] = (0.5, 2.0)
  area: tuple[float, float] = (0.1, 1.0)
  keep_probability: float = 0.15
  attempts: int = 100
  takes_lazy_image: ClassVar[bool] = True

  def __post_init__(self):
    if not isinstance(self.coverages, Sequence) or not self.coverages:
      raise InputError(f'ssd_random_crop.coverages is {self.coverages!r}, legal: numbers, 0 to 1')
    for coverage in self.coverages:
      check_number('ssd_random_crop.coverages', coverage, 0, 1)
    check_range('ssd_random_crop.aspect_ratio', self.aspect_ratio, 0.01, 100)
    check_range('ssd_random_crop.area', self.area, 0, 1)
    check_number('ssd_random_crop.keep_probability', self.keep_probability, 0, 1)
    check_integer('ssd_random_crop.attempts', self.attempts, 1)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    coverage = self.coverages[rng.integers(len(self.coverages))]
    if rng.random() < self.keep_probability:
      return example
    window = draw_window(rng, example.image.shape[:2], example.boxes, coverage,
                         aspect_ratio=self.aspect_ratio, area=self.area, attempts=self.attempts)
    return crop(example, window, coverage)


def draw_window(rng: np.random.Generator, size: tuple[int, int], boxes: np.ndarray,
                coverage: float, *, aspect_ratio: tuple[float, float] = (0.5, 2.0),
                area: tuple[float, float] = (0.1, 1.0),
                attempts: int = 100) -> tuple[int, int, int, int]:
  """Draws a window as `tf.image.sample_distorted_bounding_box` does.

  Takes the first attempt that covers enough of some box, or the whole image if none does.

  Args:
    rng: Source of the random numbers.
    size: (height, width) of the image in pixels.
    boxes: f32 [N, 4]; if N is 0, the whole image serves as a box.
    coverage: Share of some box's area, in whole pixels, that the window must contain.
    aspect_ratio, area, attempts: As in `SsdRandomCrop`.

  Returns:
    (y, x, height, width) in pixels.
  """
  # Python numbers, since the first attempts mostly succeed and NumPy is slower for so few.
  objects = _in_whole_pixels(boxes, size)
  for _ in range(attempts):
    sides = _draw_sides(rng, size, aspect_ratio, area)
    if sides is None:
      continue
    height, width = sides
    # The last position is never drawn, since the reference's uniform integer excludes its bound.
    y = int(rng.random() * (size[0] - height))
    x = int(rng.random() * (size[1] - width))
    if any(_overlap(box, y, x, height, width) >= coverage * own for box, own in objects):
      return y, x, height, width
  return 0, 0, *size


def _in_whole_pixels(boxes: np.ndarray, size: tuple[int, int]) -> list[tuple[list[int], int]]:
  """Returns (corners, area) of boxes of at least a pixel; the whole image if there are no boxes."""
  if not len(boxes):
    return [([0, 0, *size], size[0] * size[1])]
  corners = (box_ops.clip(boxes) * np.float32([*size, *size])).astype(np.int64).tolist()
  found = [(box, (box[2] - box[0]) * (box[3] - box[1])) for box in corners]
  return [(box, own) for box, own in found if own >= 1 and box[2] > box[0]]


def _overlap(box: list[int], y: int, x: int, height: int, width: int) -> int:
  rows = min(box[2], y + height) - max(box[0], y)
  columns = min(box[3], x + width) - max(box[1], x)
  return rows * columns if rows > 0 and columns > 0 else 0


def _draw_sides(rng: np.random.Generator, size: tuple[int, int],
                aspect_ratio: tuple[float, float], area: tuple[float, float]
                ) -> tuple[int, int] | None:
  """Draws height and width of a window in whole pixels; None if they are not legal.

  The height is uniform between those of the smallest and the largest area at the drawn aspect
  ratio, so the area is not uniform.
  """
  low_area, high_area = (share * size[0] * size[1] for share in area)
  aspect = aspect_ratio[0] + rng.random() * (aspect_ratio[1] - aspect_ratio[0])
  # The largest height whose width, rounded, still fits into the image.
  fitting = int((size[1] + 0.5 - 1e-7) / aspect)
  highest = min(round(math.sqrt(high_area / aspect)), fitting, size[0])
  lowest = min(round(math.sqrt(low_area / aspect)), highest)
  height = lowest + int(rng.random() * (highest - lowest + 1))
  # Rounding can leave the area just outside its range; one pixel of height corrects it.
  if height * round(height * aspect) < low_area:
    height += 1
  if height * round(height * aspect) > high_area:
    height -= 1
  width = round(height * aspect)
  legal = (low_area <= height * width <= high_area and 0 < height <= size[0]
           and 0 < width <= size[1])
  return (height, width) if legal else None
