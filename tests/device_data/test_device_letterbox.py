"""Letterboxes of resident images against the host's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Example, GroundTruth
from ppn_jax.device_data.transforms import Stored, build_augmentation
from ppn_jax.errors import InputError

SIDE = 32
BOXES = np.float32([[0.1, 0.2, 0.6, 0.5], [0.5, 0.4, 1, 1]])
TRUTH = GroundTruth(BOXES, np.int32([1, 2]), np.zeros(2, bool), np.ones(2, bool))


def picture(height, width):
  """Returns a smooth image, so that resizing it twice changes little."""
  y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
  return np.stack([200 * y, 200 * x, 100 + 100 * np.sin(3 * x + 5 * y)], -1).astype(np.uint8)


@pytest.mark.parametrize('image_size, mode', [
    (SIDE, 'letterbox'), pytest.param((24, 48), 'letterbox', marks=pytest.mark.slow),
    pytest.param((24, 48), 'stretch', marks=pytest.mark.slow)])
def test_the_same_letterbox_as_on_the_host(image_size, mode):
  augmentation = build_augmentation([], image_size=image_size, resize='area', resize_mode=mode)
  on_device = jax.jit(lambda *stored: augmentation(*stored, TRUTH, jax.random.key(0)))
  for size in ((24, 60), (60, 24), (40, 40)):
    example = Example(picture(*size), BOXES, TRUTH.labels, TRUTH.crowd, 0, size)
    host = Resize(image_size, resize_mode=mode)(example)
    stored = Resize(image_size)(example).image.transpose(2, 0, 1)
    pixels, truth = jax.device_get(on_device(stored, jnp.int32(size)))
    rows, columns = augmentation.frame.content_of(size)
    assert (pixels[rows:] == 128).all() and (pixels[:, columns:] == 128).all()
    assert np.abs(pixels.astype(int) - host.image).max() <= 8
    assert np.abs(pixels.astype(int) - host.image).mean() < 1
    np.testing.assert_allclose(truth.boxes, host.boxes, rtol=1e-6)


@pytest.mark.slow
def test_both_images_of_mixup_keep_their_aspect_ratio():
  block = {'name': 'mixup', 'size': SIDE, 'probability': 1.0, 'min_share': 0}
  augmentation = build_augmentation([block], image_size=SIDE, resize='area',
                                    resize_mode='letterbox')
  # Room for the boxes of both.
  truth = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), TRUTH)
  white = np.full((3, SIDE, SIDE), 255, np.uint8)
  pixels, mixed = jax.jit(lambda *given: augmentation(*given))(
      white, jnp.int32([20, 40]), truth, jax.random.key(0),
      Stored(white, jnp.int32([40, 20]), truth))
  pixels = np.asarray(pixels)[..., 0]
  half = SIDE // 2
  assert (pixels[:half, :half] == 255).all() and (pixels[half:, half:] == 128).all()
  shown = pixels[0, -1].astype(float) - 128, pixels[-1, 0].astype(float) - 128
  assert min(shown) > 0 and abs(sum(shown) - 127) <= 1
  half_height, half_width = (BOXES * np.float32(f) for f in ([.5, 1, .5, 1], [1, .5, 1, .5]))
  np.testing.assert_allclose(mixed.boxes, np.concatenate([half_height, half_width]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('image_size, last', [
    (64, {'name': 'expand', 'ratio': (1.0, 2.0)}),
    ((64, 120), {'name': 'large_scale_jitter', 'size': (64, 120), 'scale': (0.5, 2.0)}),
    ((120, 64), {'name': 'expand', 'ratio': (1.0, 2.0)})])
def test_boxes_follow_pixels_through_all_ops(image_size, last):
  blocks = [{'name': 'ssd_random_crop'}, {'name': 'horizontal_flip'}, last | {
      'fill': (128, 128, 128)}]
  augmentation = build_augmentation(blocks, image_size=image_size, resize='area',
                                    resize_mode='letterbox')
  image = np.full((3, 64, 64), 128, np.uint8)
  image[:, 16:40, 24:56] = 255
  truth = GroundTruth(np.float32([[0.25, 0.375, 0.625, 0.875]]), *(x[:1] for x in TRUTH[1:]))
  images, found = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
      image, jnp.int32([48, 96]), truth, jax.random.split(jax.random.key(0), 60))
  checked = 0
  for pixels, boxes, valid in zip(*map(np.asarray, (images, found.boxes, found.valid)),
                                  strict=True):
    lit = np.argwhere(pixels[..., 0] > 191)
    if valid[0] and len(lit):
      corners = np.concatenate([lit.min(axis=0), lit.max(axis=0) + 1])
      np.testing.assert_allclose(corners, boxes[0] * np.tile(pixels.shape[:2], 2), atol=2)
      checked += 1
  assert checked > 40


@pytest.mark.parametrize('block, mode, message', [
    ({'name': 'resize', 'size': 32}, 'letterbox', "resize.resize_mode='letterbox' with data.res"),
    ({'name': 'mixup', 'size': 32, 'resize_mode': 'letterbox'}, 'stretch',
     "mixup.resize_mode='letterbox' with data.resize_mode='stretch' is not available on the dev")])
def test_what_is_refused(block, mode, message):
  with pytest.raises(InputError, match=message):
    build_augmentation([block], image_size=32, resize='area', resize_mode=mode)
