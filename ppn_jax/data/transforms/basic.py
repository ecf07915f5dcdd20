"""Transforms of an Example, each a frozen dataclass that is called as `transform(example, rng)`.

A transform keeps pixels, boxes, labels and crowd flags consistent, changes nothing in place and
takes all random numbers from the generator that it is given. Crops before `resize` and changes of
colour after it cost the least.

A transform may have three attributes that the loader looks for:

  takes_lazy_image   True: the image may be a `LazyImage`, which the functions of `geometry` accept,
                     and so may that of the result. Other transforms are given arrays.
  takes_others       True: it is called as `transform(example, rng, draw)`, where draw() returns
                     another Example, drawn with `rng` and sent through the transforms before it.
  box_factor         The result has at most so many times the boxes of one image.
  resize_mode        '': `build_transforms` sets it to the config's `data.resize_mode`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np

from ppn_jax import registry
from ppn_jax.data.checks import check_bool, check_number, check_range
from ppn_jax.data.images.resizing import check_method
from ppn_jax.data.transforms.geometry import fit, mirror
from ppn_jax.detection.frame import ImageSize, InputFrame, check_image_size, check_mode
from ppn_jax.detection.structures import Example

Transform = Callable[[Example, np.random.Generator], Example]

TRANSFORMS = {
    'horizontal_flip': 'ppn_jax.data.transforms.basic:HorizontalFlip',
    'ssd_random_crop': 'ppn_jax.data.transforms.random_crop:SsdRandomCrop',
    'expand': 'ppn_jax.data.transforms.zoom:Expand',
    'large_scale_jitter': 'ppn_jax.data.transforms.zoom:LargeScaleJitter',
    'mosaic': 'ppn_jax.data.transforms.mosaic:Mosaic',
    'mixup': 'ppn_jax.data.transforms.mixing:Mixup',
    'copy_paste': 'ppn_jax.data.transforms.mixing:CopyPaste',
    'photometric_distortion': 'ppn_jax.data.transforms.basic:PhotometricDistortion',
    'resize': 'ppn_jax.data.transforms.basic:Resize',
}


def build_transforms(blocks: Sequence[Mapping[str, Any]], resize_mode: str = 'stretch'
                     ) -> tuple[Transform, ...]:
  """Builds the transforms of a config's list of blocks, in order; see `registry.build`.

  Args:
    blocks: The config's `data.transforms`.
    resize_mode: That of transforms that resize and whose block names none.
  """
  ops = (registry.build('transform', block, TRANSFORMS) for block in blocks)
  return tuple(dataclasses.replace(op, resize_mode=resize_mode)
               if dataclasses.is_dataclass(op) and getattr(op, 'resize_mode', None) == '' else op
               for op in ops)


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
  """Mirrors the image left to right.

  Attributes:
    probability: Probability of mirroring, 0 to 1.
  """
  probability: float = 0.5
  takes_lazy_image: ClassVar[bool] = True

  def __post_init__(self):
    check_number('horizontal_flip.probability', self.probability, 0, 1)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    if rng.random() >= self.probability:
      return example
    return mirror(example)


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
  """Changes colours as SSD does: four changes with probability 1/2 each, in random order.

  Each change rounds to 8 bits, in HSV where needed, which costs strong colours a few levels.

  Attributes:
    brightness: Largest shift, in grey levels of 255.
    contrast: Range of the factor of all channels.
    saturation: Range of the factor of S in HSV.
    hue: Largest rotation of the hue, in degrees.
  """
  brightness: float = 32.0
  contrast: tuple[float, float] = (0.5, 1.5)
  saturation: tuple[float, float] = (0.5, 1.5)
  hue: float = 18.0

  def __post_init__(self):
    check_number('photometric_distortion.brightness', self.brightness, 0, 255)
    check_range('photometric_distortion.contrast', self.contrast, 0, 10)
    check_range('photometric_distortion.saturation', self.saturation, 0, 10)
    check_number('photometric_distortion.hue', self.hue, 0, 180)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    ops = (
        lambda image: _look_up(image, _LEVELS + rng.uniform(-self.brightness, self.brightness)),
        lambda image: _look_up(image, _LEVELS * rng.uniform(*self.contrast)),
        lambda image: _shift_hsv(image, saturation=rng.uniform(*self.saturation)),
        lambda image: _shift_hsv(image, hue=rng.uniform(-self.hue, self.hue)),
    )
    image = example.image
    for i in rng.permutation(len(ops)):
      if rng.random() < 0.5:
        image = ops[i](image)
    return example._replace(image=image)


_LEVELS = np.arange(256, dtype=np.float32)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  return cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8))


def _shift_hsv(image: np.ndarray, hue: float = 0.0, saturation: float = 1.0) -> np.ndarray:
  """Rotates the hue by degrees and multiplies the saturation of u8 [H, W, 3] RGB."""
  # FULL maps the circle to 256 levels, so that rotating it is arithmetic modulo 256.
  tables = np.stack([np.mod(np.rint(_LEVELS + hue * 256 / 360), 256),
                     np.clip(np.rint(_LEVELS * saturation), 0, 255), _LEVELS], axis=-1)
  hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), tables[None].astype(np.uint8))
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@dataclasses.dataclass(frozen=True)
class Resize:
  """Resizes to `size` pixels a side, by default without keeping the aspect ratio.

  A JPEG that is not decoded yet (`LazyImage`) is decoded at 1/2, 1/4 or 1/8 of its size if the part
  left by crops then still has a pixel for each pixel of the result. This differs from averaging the
  whole image by a few grey levels and takes a fraction of the time. The edges of a crop are rounded
  by up to half a pixel, which boxes follow; a whole image is exact.

  Attributes:
    size: Side of the result in pixels, or (height, width).
    method: 'area' averages pixels along a side that shrinks and interpolates along one that grows.
      'supersample' averages two interpolated points where a side shrinks by a third or more, up to
      threefold; it differs from 'area' by half a grey level on average and takes 0.4 of the time
      for a whole photograph, 0.7 for SSD's crops. 'bilinear' interpolates, which aliases when
      shrinking but takes a sixth of the time (0.2 ms for 640 x 480). 'legacy' is
      `resizing.legacy_resize` rounded to 8 bits, the kernel that released TensorFlow checkpoints
      were trained with.
    reduced_decoding: False always decodes the whole image, and so does 'legacy'.
    resize_mode: 'stretch' fills all of the result, so boxes do not change. 'letterbox' keeps the
      aspect ratio: the longer side fits, the picture is at the top left, and the rest is grey, 128.
      '' is that of `data.resize_mode`.
  """
  size: ImageSize
  method: str = 'area'
  reduced_decoding: bool = True
  resize_mode: str = ''
  takes_lazy_image: ClassVar[bool] = True

  def __post_init__(self):
    check_image_size('resize.size', self.size)
    check_method('resize.method', self.method)
    check_bool('resize.reduced_decoding', self.reduced_decoding)
    check_mode('resize.resize_mode', self.resize_mode)

  @property
  def frame(self) -> InputFrame:
    """Returns the geometry of the result."""
    return InputFrame.of(self.size, self.resize_mode)

  def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
    return fit(example, self.frame, self.method, self.reduced_decoding)


@dataclasses.dataclass(frozen=True)
class ResizeWhole(Resize):
  """Resizes images that nothing was cut from, as `Resize` does.

  A letterbox has the aspect ratio of `Example.size`, by which detections are mapped back. That of
  an image that is stored smaller than its original may differ by a pixel.
  """

  def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
    return fit(example, self.frame, self.method, self.reduced_decoding, example.size)
