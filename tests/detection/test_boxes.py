"""Box arithmetic against written-out definitions, in NumPy and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection import boxes


def random_boxes(rng, *shape):
  corners = np.sort(rng.uniform(0, 1, (*shape, 2, 2)), axis=-2)
  return corners.reshape(*shape, 4).astype(np.float32)


@pytest.mark.parametrize('xp', [np, jnp])
def test_iou_is_the_share_of_pixels(xp):
  # Boxes on a 20 x 20 grid can be counted pixel by pixel.
  rng = np.random.default_rng(0)
  corners = np.sort(rng.integers(0, 21, (30, 2, 2)), axis=1).reshape(30, 4)
  masks = np.zeros((30, 20, 20), bool)
  for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
    mask[y0:y1, x0:x1] = True
  masks = masks.reshape(30, -1).astype(int)
  overlap = masks @ masks.T
  union = masks.sum(1)[:, None] + masks.sum(1) - overlap
  expected = np.where(overlap > 0, overlap / np.maximum(union, 1), 0)
  unit = xp.asarray(corners.astype(np.float32) / 20)
  np.testing.assert_allclose(boxes.iou(unit, unit), expected, atol=1e-6)
  share = np.where(overlap > 0, overlap / np.maximum(masks.sum(1), 1)[:, None], 0)
  np.testing.assert_allclose(boxes.coverage(unit, unit), share, atol=1e-6)
  np.testing.assert_allclose(boxes.area(unit), masks.sum(1) / 400, atol=1e-6)


def test_numpy_in_numpy_out():
  box = random_boxes(np.random.default_rng(1), 3)
  for result in (boxes.iou(box, box), boxes.encode(box, box), boxes.decode(box, box),
                 boxes.flip_horizontal(box), boxes.clip(box)):
    assert isinstance(result, np.ndarray) and result.dtype == np.float32
  assert isinstance(jax.jit(boxes.iou)(box, box), jax.Array)


@pytest.mark.parametrize('xp', [np, jnp])
def test_encode_and_decode_are_inverse(xp):
  rng = np.random.default_rng(2)
  targets = xp.asarray(random_boxes(rng, 200) * np.float32(0.9) + np.float32([0, 0, 0.05, 0.05]))
  anchors = xp.asarray(random_boxes(rng, 200) * np.float32(0.9) + np.float32([0, 0, 0.05, 0.05]))
  decoded = boxes.decode(boxes.encode(targets, anchors), anchors)
  np.testing.assert_allclose(decoded, targets, atol=2e-6)
  codes = xp.asarray(rng.normal(size=(200, 4)).astype(np.float32))
  np.testing.assert_allclose(boxes.encode(boxes.decode(codes, anchors), anchors), codes, atol=2e-3)


def test_encode_by_hand():
  anchor = np.float32([0.2, 0.2, 0.6, 0.4])  # centre (.4, .3), height .4, width .2
  box = np.float32([0.3, 0.2, 0.7, 0.6])  # centre (.5, .4), height .4, width .4
  np.testing.assert_allclose(boxes.encode(box, anchor), [2.5, 5.0, 0.0, 5 * np.log(2)], rtol=1e-5,
                             atol=1e-5)


def test_a_box_without_area_encodes_to_finite_codes():
  point = np.float32([0.5, 0.5, 0.5, 0.5])
  assert np.all(np.isfinite(boxes.encode(point, np.float32([0.2, 0.2, 0.6, 0.4]))))


def test_flip_is_its_own_inverse_and_keeps_area():
  box = random_boxes(np.random.default_rng(3), 50)
  flipped = boxes.flip_horizontal(box)
  assert np.all(flipped[:, 1] <= flipped[:, 3])
  np.testing.assert_allclose(boxes.flip_horizontal(flipped), box, atol=1e-6)
  np.testing.assert_allclose(boxes.area(flipped), boxes.area(box), atol=1e-6)
