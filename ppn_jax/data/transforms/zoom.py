"""Random zoom: SSD's zoom-out and large-scale jittering."""

import dataclasses
from typing import ClassVar

import numpy as np

from ppn_jax.data.checks import check_bool, check_color, check_number, check_range
from ppn_jax.data.images.lazy import Color, LazyImage
from ppn_jax.data.images.resizing import check_method
from ppn_jax.data.transforms.geometry import crop, drop_small, resize
from ppn_jax.detection.frame import ImageSize, check_image_size, sides_of
from ppn_jax.detection.structures import Example


@dataclasses.dataclass(frozen=True)
class Expand:
  """Places the image on a larger canvas of one colour (SSD, section 3.6), before any crop.

  No box is dropped. If the next transform accepts arrays only, the canvas is drawn, up to ratio^2
  times as large as the image; for crops, flips and resizes it is not.

  Attributes:
    probability: Probability of a change, 0 to 1.
    ratio: Range of the canvas's sides relative to the image's; uniform.
    fill: RGB of the canvas; ImageNet's mean by default.
  """
  probability: float = 0.5
  ratio: tuple[float, float] = (1.0, 4.0)
  fill: Color = (124, 116, 104)
  takes_lazy_image: ClassVar[bool] = True

  def __post_init__(self):
    check_number('expand.probability', self.probability, 0, 1)
    check_range('expand.ratio', self.ratio, 1, 16)
    check_color('expand.fill', self.fill)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    if rng.random() >= self.probability:
      return example
    rows, columns = example.image.shape[:2]
    ratio = rng.uniform(*self.ratio)
    height, width = round(rows * ratio), round(columns * ratio)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    return crop(example, (-int(top), -int(left), height, width), fill=self.fill)


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
  """Zooms the image by a random factor, then crops or pads it to a frame.

  Implements large-scale jittering of Ghiasi et al., "Simple Copy-Paste is a Strong Data
  Augmentation Method for Instance Segmentation" (CVPR 2021), section 3. At factor 1 the image just
  fits the frame, with its aspect ratio. If it is larger than the frame, a random part is shown. If
  it is smaller, it is at the top left and the rest has the colour `fill`.

  Boxes completely outside the frame are dropped, and those below `min_coverage` or `min_side`
  unless they are crowds; the others are cut at the frame.

  Attributes:
    size: Side of the frame in pixels, or (height, width), usually those of the network's input.
    scale: Range of the factor; uniform. (0.8, 1.25) is the paper's "standard" jittering.
    fill: RGB of the padding.
    min_coverage: Share of a box's area that must be in the frame.
    min_side: Pixels of the frame that both sides of the visible part of a box must have.
    method, reduced_decoding: As in `Resize`.
  """
  size: ImageSize
  scale: tuple[float, float] = (0.1, 2.0)
  fill: Color = (128, 128, 128)
  min_coverage: float = 0.0
  min_side: float = 1.0
  method: str = 'area'
  reduced_decoding: bool = True
  takes_lazy_image: ClassVar[bool] = True

  def __post_init__(self):
    check_image_size('large_scale_jitter.size', self.size)
    check_range('large_scale_jitter.scale', self.scale, 0.01, 100)
    check_color('large_scale_jitter.fill', self.fill)
    check_number('large_scale_jitter.min_coverage', self.min_coverage, 0, 1)
    check_number('large_scale_jitter.min_side', self.min_side, 0, min(sides_of(self.size)))
    check_method('large_scale_jitter.method', self.method)
    check_bool('large_scale_jitter.reduced_decoding', self.reduced_decoding)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    sides = example.image.shape[:2]
    # In pixels of the image, so that the zoomed image itself never exists.
    factor = rng.uniform(*self.scale)
    height, width = (max(1, round(side / factor)) for side in smallest_frame(sides, self.size))
    y, x = (int(rng.integers(max(side - shown, 0) + 1))
            for side, shown in zip(sides, (height, width), strict=True))
    lazy = example._replace(image=LazyImage.of(example.image))
    seen = crop(lazy, (y, x, height, width), self.min_coverage, self.fill)
    return drop_small(resize(seen, *sides_of(self.size), self.method, self.reduced_decoding),
                      self.min_side)


def smallest_frame(size: tuple[float, float], image_size: ImageSize) -> tuple[float, float]:
  """Returns (height, width) of the smallest frame of a shape that contains an image of `size`."""
  height, width = sides_of(image_size)
  return max(size[0], size[1] * (height / width)), max(size[1], size[0] * (width / height))
