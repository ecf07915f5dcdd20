"""Changes to an Example, each a frozen dataclass called as `op(example, rng)`.

An op keeps pixels, boxes, labels and crowd flags together, changes nothing in place and takes
every random number from the generator it is given. Put crops before `resize` and colour after
it: both are then cheap.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from ppn_jax import registry
from ppn_jax.data.checks import check_integer, check_number, check_range
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError, did_you_mean

Transform = Callable[[Example, np.random.Generator], Example]

TRANSFORMS = {
    'horizontal_flip': 'ppn_jax.data.transforms:HorizontalFlip',
    'ssd_random_crop': 'ppn_jax.data.random_crop:SsdRandomCrop',
    'photometric_distortion': 'ppn_jax.data.transforms:PhotometricDistortion',
    'resize': 'ppn_jax.data.transforms:Resize',
}


def build_transforms(blocks: Sequence[Mapping[str, Any]]) -> tuple[Transform, ...]:
  """The ops of a config's list of blocks, in order; see `registry.build`."""
  return tuple(registry.build('transform', block, TRANSFORMS) for block in blocks)


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
  """Mirrors left to right.

  Attributes:
    probability: of doing so, 0 to 1.
  """
  probability: float = 0.5

  def __post_init__(self):
    check_number('horizontal_flip.probability', self.probability, 0, 1)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    if rng.random() >= self.probability:
      return example
    # Not image[:, ::-1]: a view with a negative stride is copied by every later op.
    return example._replace(image=cv2.flip(example.image, 1),
                            boxes=box_ops.flip_horizontal(example.boxes))


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
  """SSD's colour changes: each with probability 1/2, in random order.

  Each works on 8 bits, in HSV where needed, which costs strong colours a few levels.

  Attributes:
    brightness: largest shift, in grey levels of 255.
    contrast: range of the factor of all channels.
    saturation: range of the factor of the S of HSV.
    hue: largest turn of the colour circle, in degrees.
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
  """Turns the hue by degrees and multiplies the saturation of u8 [H, W, 3] RGB."""
  # FULL spreads the circle over 256 levels, so that turning it is arithmetic modulo 256.
  tables = np.stack([np.mod(np.rint(_LEVELS + hue * 256 / 360), 256),
                     np.clip(np.rint(_LEVELS * saturation), 0, 255), _LEVELS], axis=-1)
  hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), tables[None].astype(np.uint8))
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@dataclasses.dataclass(frozen=True)
class Resize:
  """To `size` x `size` pixels; the aspect ratio is not kept, so boxes stay as they are.

  Attributes:
    size: side of the result.
    method: 'area' averages pixels along a side that shrinks and interpolates along one that
      grows; 'bilinear' interpolates, which aliases when shrinking but takes a tenth of the time
      (0.2 ms for 640 x 480); 'legacy' is `legacy_resize` rounded to 8 bits, the kernel that
      released TensorFlow checkpoints were trained with.
  """
  size: int
  method: str = 'area'

  def __post_init__(self):
    check_integer('resize.size', self.size, 1)
    if self.method not in _RESIZERS:
      raise InputError(f'unknown resize.method {self.method!r}; '
                       f'{did_you_mean(str(self.method), _RESIZERS)}')

  def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
    if example.image.shape[:2] == (self.size, self.size):
      return example
    return example._replace(image=_RESIZERS[self.method](example.image, self.size, self.size))


def _area_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  # OpenCV averages only if no side grows, so what grows waits for the second call.
  small = min(image.shape[0], height), min(image.shape[1], width)
  if image.shape[:2] != small:
    image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
  return image if small == (height, width) else _bilinear_resize(image, height, width)


def _bilinear_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def legacy_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """TensorFlow 1's bilinear kernel: no half-pixel centres, no antialiasing.

  Output index i looks at source coordinate i * (in / out), computed in float32, and mixes the
  two pixels around it, along x first.

  Args:
    image: u8 or f32 [H, W, 3].

  Returns:
    f32 [height, width, 3], not rounded.
  """
  y0, y1, y_mix = _legacy_taps(image.shape[0], height)
  x0, x1, x_mix = _legacy_taps(image.shape[1], width)
  image = image.astype(np.float32)
  left = image[:, x0]
  rows = left + (image[:, x1] - left) * x_mix[:, None]
  top = rows[y0]
  return top + (rows[y1] - top) * y_mix[:, None, None]


def _legacy_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Lower and upper source index and the share of the upper one, [out] each."""
  at = np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out))
  low = np.floor(at).astype(np.int64)
  return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)


def _rounded_legacy_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  return np.rint(legacy_resize(image, height, width)).astype(np.uint8)


_RESIZERS = {'area': _area_resize, 'bilinear': _bilinear_resize, 'legacy': _rounded_legacy_resize}
