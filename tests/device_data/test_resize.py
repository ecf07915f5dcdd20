"""Crop and resize on the device against the host's, on the same pixels."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Example
from ppn_jax.device_data.resize import crop_and_resize, weights

NO_BOXES = np.zeros((0, 4), np.float32)


def picture(side, seed=0):
  """Returns an image u8 [side, side, 3] of blotches of every size down to single pixels."""
  rng = np.random.default_rng(seed)
  layers = [cv2.resize(rng.uniform(0, 255, (n, n, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
            for n in (3, 9, side // 2, side)]
  return np.clip(np.mean(layers, axis=0), 0, 255).astype(np.uint8)


def on_host(image, window, mirrored, size, kernel):
  y, x, height, width = window
  cut = image[y:y + height, x:x + width]
  cut = cut[:, ::-1] if mirrored else cut
  example = Example(np.ascontiguousarray(cut), NO_BOXES, None, None, 0, image.shape[:2])
  return Resize(size, kernel)(example).image


def on_device(image, window, mirrored, size, kernel):
  y, x, height, width = window
  frame = np.float32([y, x, y + height, x + width]) / image.shape[0]
  out, seen = jax.jit(crop_and_resize, static_argnums=(3, 4))(
      image.transpose(2, 0, 1), frame, mirrored, size, kernel)
  assert seen is None
  return np.asarray(out).transpose(1, 2, 0)


@pytest.mark.parametrize('kernel', ['area', 'bilinear', 'legacy', 'supersample'])
def test_same_pixels_as_the_host(kernel):
  image = picture(96)
  for size in (40, 64) if kernel != 'supersample' else (96,):
    for window in [(0, 0, 96, 96), (3, 10, 80, 40), (50, 0, 46, 96), (17, 30, 24, 33)]:
      for mirrored in (False, True):
        theirs = on_host(image, window, mirrored, size, kernel).astype(int)
        difference = np.abs(on_device(image, window, mirrored, size, kernel) - theirs)
        # Weights in 256ths, twice, and the host's rounding.
        assert difference.max() <= 2, (size, window, mirrored)
        assert difference.mean() < 0.5, (size, window, mirrored)


@pytest.mark.parametrize('kernel', ['area', 'bilinear', 'legacy'])
def test_the_whole_image_at_its_own_size_is_untouched(kernel):
  image = picture(45)
  for mirrored, expected in ((False, image), (True, image[:, ::-1])):
    out = on_device(image, (0, 0, 45, 45), mirrored, 45, kernel)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.slow
def test_pixels_beyond_the_image_are_not_seen():
  image, frame = picture(40), np.float32([-20, -30, 60, 50]) / 40
  # A canvas of 80 with the image at (20, 30), which mirroring moves to (20, 10).
  for mirrored, at in ((False, 30), (True, 10)):
    out, seen = jax.jit(crop_and_resize, static_argnums=(3, 4, 5))(
        image.transpose(2, 0, 1), frame, mirrored, 80, 'area', True)
    canvas, shown = np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80))
    canvas[20:60, at:at + 40] = image[:, ::-1] if mirrored else image
    shown[20:60, at:at + 40] = 1
    np.testing.assert_array_equal(np.asarray(out).transpose(1, 2, 0), canvas)
    np.testing.assert_array_equal(seen, shown)
  # At half the size and an odd place, pixels at the border show half of it.
  _, seen = crop_and_resize(image.transpose(2, 0, 1), np.float32([-19, -19, 61, 61]) / 40, False,
                            40, 'area', True)
  np.testing.assert_allclose(seen[20, 8:12], [0, 0.5, 1, 1])


def test_weights_are_whole_and_add_up():
  rng = np.random.default_rng(0)
  for kernel in ('area', 'bilinear', 'legacy'):
    rows = jax.jit(jax.vmap(lambda s, e, k=kernel: weights(s, e, 50, 30, k)))
    # Down to windows of a tenth of a pixel, at either end.
    extent = np.float32(10 ** rng.uniform(-1, np.log10(50), 300))
    start = np.float32(rng.choice([0, 0.3, 0.7, 1], 300)) * (50 - extent)
    found = np.asarray(rows(start, extent))
    assert (found == np.rint(found)).all() and (found >= 0).all()
    np.testing.assert_array_equal(found.sum(axis=2), 256)


def test_the_arithmetic_is_exact_at_its_worst():
  """White stays white under fractional weights everywhere, so nothing is rounded."""
  white = np.full((3, 64, 64), 255, np.uint8)
  frame = jnp.float32([0.013, 0.017, 0.871, 0.933])
  for precision in ('bfloat16', 'float32'):
    with jax.default_matmul_precision(precision):
      out, _ = jax.jit(crop_and_resize, static_argnums=(3, 4))(white, frame, False, 57, 'area')
    np.testing.assert_array_equal(out, 255)
