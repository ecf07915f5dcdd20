"""Kernels that resize images."""

from collections.abc import Mapping

import cv2
import numpy as np

from ppn_jax.data.images.lazy import Kernel
from ppn_jax.errors import InputError, did_you_mean

# Ratios of a side to that of the result. Below the first, interpolation weights all pixels about
# equally; above the second, two points would skip pixels.
_SUPERSAMPLED = 1.5, 3.0


def check_method(what: str, method: str) -> None:
  """Raises InputError unless `method` is in `KERNELS`."""
  if method not in KERNELS:
    raise InputError(f'unknown {what} {method!r}; {did_you_mean(str(method), KERNELS)}')


def _area(image: np.ndarray, height: int, width: int,
          extent: tuple[float, float] | None = None) -> np.ndarray:
  if extent:  # No side grows.
    return _interpolate(image, height, width, cv2.INTER_AREA, extent)
  # OpenCV averages only if no side grows, so the second call enlarges.
  small = min(image.shape[0], height), min(image.shape[1], width)
  if image.shape[:2] != small:
    image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
  return image if small == (height, width) else _bilinear(image, height, width)


def _bilinear(image: np.ndarray, height: int, width: int,
              extent: tuple[float, float] | None = None) -> np.ndarray:
  return _interpolate(image, height, width, cv2.INTER_LINEAR, extent)


def _supersample(image: np.ndarray, height: int, width: int,
                 extent: tuple[float, float] | None = None) -> np.ndarray:
  least, most = _SUPERSAMPLED
  sides = extent or image.shape[:2]
  ratios = sides[0] / height, sides[1] / width
  if max(ratios) > most:
    return _area(image, height, width, extent)
  points = [side * (2 if ratio > least else 1)
            for side, ratio in zip((height, width), ratios, strict=True)]
  return _area(_bilinear(image, *points, extent), height, width)


def _interpolate(image: np.ndarray, height: int, width: int, method: int,
                 extent: tuple[float, float] | None) -> np.ndarray:
  """Resizes the first rows and columns of an image, as many as `extent` says, with OpenCV."""
  if extent is None:
    return cv2.resize(image, (width, height), interpolation=method)
  # With factors OpenCV does not round the scale; the surplus of the last pixels is cut off.
  image = cv2.resize(image, None, fx=width / extent[1], fy=height / extent[0],
                     interpolation=method)
  return np.ascontiguousarray(image[:height, :width])


def legacy_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes with TensorFlow 1's bilinear kernel: no half-pixel centres, no antialiasing.

  Output index i reads source coordinate i * (in / out), computed in float32, and interpolates
  between the two pixels around it, along x first.

  Args:
    image: u8 or f32 [H, W, 3].
    height, width: Size of the result in pixels.

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
  """Returns lower and upper source indices and the weight of the upper ones, [out] each."""
  at = np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out))
  low = np.floor(at).astype(np.int64)
  return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)


def _legacy(image: np.ndarray, height: int, width: int) -> np.ndarray:
  return np.rint(legacy_resize(image, height, width)).astype(np.uint8)


# See `transforms.basic.Resize`. Each maps u8 [H, W, 3] to u8 [height, width, 3]. Those that accept
# a reduced image also take its extent (`lazy.Kernel`), which is no smaller than the result.
KERNELS: Mapping[str, Kernel] = {
    'area': _area, 'supersample': _supersample, 'bilinear': _bilinear, 'legacy': _legacy}
# For exact parity with released checkpoints.
NEVER_REDUCED = frozenset({'legacy'})
