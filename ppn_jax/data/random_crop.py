"""SSD's random crop, as the TF Object Detection API draws it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ppn_jax.data.checks import check_integer, check_number, check_range
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SsdRandomCrop:
  """Cuts a random window that covers enough of some object (SSD, section 2.2).

  One of `coverages` is picked. The window must then contain at least that share of one box's
  area, and every box of which it contains less is dropped; the others are cut at its border.
  All boxes may go. With probability `keep_probability` the image is left alone.

  Attributes:
    coverages: shares of a box's area, equally likely.
    aspect_ratio: range of width / height of the window in pixels.
    area: range of the window's share of the image.
    keep_probability: of leaving the image alone, whichever coverage was picked.
    attempts: windows to try before settling for the whole image.
  """
  coverages: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
  aspect_ratio: tuple[float, float] = (0.5, 2.0)
  area: tuple[float, float] = (0.1, 1.0)
  keep_probability: float = 0.15
  attempts: int = 100

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
  """`tf.image.sample_distorted_bounding_box`: a window that covers enough of some box.

  Draws all attempts at once and takes the first that will do; the whole image if none does.

  Args:
    size: (height, width) of the image in pixels.
    boxes: f32 [N, 4]; without boxes the whole image serves as one.
    coverage: the least share of some box's area that the window must contain, in whole pixels.
    aspect_ratio, area, attempts: as of `SsdRandomCrop`.

  Returns:
    (y, x, height, width) in pixels.
  """
  height, width, legal = _draw_sides(rng, size, aspect_ratio, area, attempts)
  # The last position is never drawn: the reference's uniform integer excludes its bound.
  y = np.floor(rng.random(attempts) * (size[0] - height))
  x = np.floor(rng.random(attempts) * (size[1] - width))
  windows = np.stack([y, x, y + height, x + width], axis=-1)
  objects = np.trunc(box_ops.clip(boxes) * np.float32([*size, *size])).astype(np.float64)
  if not len(boxes):
    objects = np.float64([[0, 0, *size]])
  objects = objects[box_ops.area(objects) >= 1]
  good = legal & (box_ops.coverage(objects, windows) >= coverage).any(axis=0)
  if not good.any():
    return 0, 0, *size
  first = np.argmax(good)
  return int(y[first]), int(x[first]), int(height[first]), int(width[first])


def _draw_sides(rng: np.random.Generator, size: tuple[int, int],
                aspect_ratio: tuple[float, float], area: tuple[float, float],
                attempts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Heights and widths in whole pixels, and which of them keep to the rules; [attempts] each.

  The height is uniform between the ones that give the least and the greatest area at the aspect
  ratio drawn, so the area is not uniform.
  """
  low_area, high_area = (share * size[0] * size[1] for share in area)
  aspect = rng.uniform(*aspect_ratio, attempts)
  # The largest height whose width, rounded, still fits into the image.
  fitting = np.floor((size[1] + 0.5 - 1e-7) / aspect)
  highest = np.minimum(np.minimum(np.rint(np.sqrt(high_area / aspect)), fitting), size[0])
  lowest = np.minimum(np.rint(np.sqrt(low_area / aspect)), highest)
  height = lowest + np.floor(rng.random(attempts) * (highest - lowest + 1))
  # Rounding may have left the area just outside its range; one pixel of height mends it.
  height += height * np.rint(height * aspect) < low_area
  height -= height * np.rint(height * aspect) > high_area
  width = np.rint(height * aspect)
  drawn = height * width
  legal = (low_area <= drawn) & (drawn <= high_area) & (height <= size[0]) & (width <= size[1])
  legal &= (height > 0) & (width > 0)
  # Those that break the rules are made harmless rather than sent on to the offsets.
  return np.where(legal, height, size[0]), np.where(legal, width, size[1]), legal


def crop(example: Example, window: tuple[int, int, int, int], coverage: float = 0.0) -> Example:
  """The part of an image in a window, with the boxes of which it has at least `coverage`.

  Args:
    window: (y, x, height, width) in pixels.
    coverage: share of a box's area, 0 to 1. Boxes wholly outside always go.
  """
  y, x, height, width = window
  rows, columns = example.image.shape[:2]
  frame = np.float32([[y / rows, x / columns, (y + height) / rows, (x + width) / columns]])
  share = box_ops.coverage(example.boxes, frame)[:, 0]
  keep = (share > 0) & (share >= coverage)
  sides = np.tile(frame[0, 2:] - frame[0, :2], 2)
  boxes = box_ops.clip((example.boxes[keep] - np.tile(frame[0, :2], 2)) / sides)
  return example._replace(image=example.image[y:y + height, x:x + width], boxes=boxes,
                          labels=example.labels[keep], crowd=example.crowd[keep])
