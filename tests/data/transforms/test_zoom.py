"""Zooms: what is drawn and dropped; test_boxes_follow_pixels has the positions of boxes."""

import numpy as np
import pytest

from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.data.transforms.zoom import Expand, LargeScaleJitter
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError


def example_of(boxes, size=(60, 80)):
  n = len(boxes)
  image = np.full((*size, 3), 250, np.uint8)
  return Example(image, np.float32(boxes).reshape(-1, 4), np.arange(n, dtype=np.int32),
                 np.arange(n) % 2 == 1, 7, size)


def test_expand_places_the_whole_image_anywhere_on_a_canvas():
  op, rng = Expand(probability=1.0), np.random.default_rng(0)
  ratios, places = [], []
  for _ in range(200):
    out = op(example_of([[0, 0, 1, 1], [0.5, 0.5, 0.505, 0.505]]), rng)
    height, width = out.image.shape[:2]
    ratios.append(height / 60)
    assert abs(height / 60 - width / 80) < 0.02
    rows, columns = np.nonzero((out.image == 250).all(axis=-1))
    assert len(rows) == 60 * 80 and (np.ptp(rows), np.ptp(columns)) == (59, 79)
    assert (out.image[~(out.image == 250).all(axis=-1)] == (124, 116, 104)).all()
    np.testing.assert_allclose(out.boxes[0] * np.tile([height, width], 2),
                               [rows[0], columns[0], rows[0] + 60, columns[0] + 80], atol=1e-3)
    np.testing.assert_array_equal(out.labels, [0, 1])
    np.testing.assert_array_equal(out.crowd, [False, True])
    if height > 120:
      places.append([rows[0] / (height - 60), columns[0] / (width - 80)])
  assert min(ratios) < 1.15 and max(ratios) > 3.85 and abs(np.mean(ratios) - 2.5) < 0.25
  assert np.abs(np.mean(places, axis=0) - 0.5).max() < 0.1
  assert np.min(places) < 0.05 and np.max(places) > 0.95


@pytest.mark.parametrize('probability', [0.0, 0.4])
def test_expand_as_often_as_asked(probability):
  op, rng, example = Expand(probability), np.random.default_rng(0), example_of([])
  share = np.mean([op(example, rng) is not example for _ in range(1000)])
  assert abs(share - probability) <= (0.065 if probability else 0)


def test_jitter_at_factor_one_fits_the_image_into_the_frame():
  out = LargeScaleJitter(40, scale=(1.0, 1.0))(example_of([[0, 0, 1, 1]]), np.random.default_rng(0))
  assert out.image.shape == (40, 40, 3)
  assert (out.image[:30] == 250).all() and (out.image[30:] == 128).all()
  np.testing.assert_allclose(out.boxes, [[0, 0, 0.75, 1]], atol=1e-6)


def test_jitter_smaller_pads_at_the_bottom_right_and_larger_shows_any_part():
  small = LargeScaleJitter(40, scale=(0.5, 0.5))(example_of([]), np.random.default_rng(0)).image
  assert (small[:15, :20] == 250).all()
  assert (small[15:] == 128).all() and (small[:, 20:] == 128).all()
  op, rng, starts = LargeScaleJitter(40, scale=(2.0, 2.0)), np.random.default_rng(0), []
  for _ in range(300):
    out = op(example_of([[0, 0, 1, 1]])._replace(image=_slope()), rng)
    assert (out.image != 128).any(axis=-1).all()  # Nothing is padded.
    starts.append(out.image[0, 0, :2])
  assert np.ptp(starts, axis=0).min() > 15


def _slope():
  y, x = np.mgrid[:60, :80]
  return np.stack([y + 5, x + 5, y * 0], axis=-1).astype(np.uint8)


def test_jitter_draws_the_factor_uniformly():
  op, rng = LargeScaleJitter(200, min_side=0), np.random.default_rng(0)
  sides = []
  for _ in range(600):
    out = op(example_of([[0, 0, 0.05, 0.05]], size=(100, 100)), rng)
    if len(out.boxes):
      sides.append((out.boxes[0, 2:] - out.boxes[0, :2]).max() * 200 / 10)
  # If the image is larger than the frame, the corner is rarely visible.
  small = np.sort([s for s in sides if s < 0.98])
  assert small[0] < 0.15 and abs(np.mean(small) - 0.54) < 0.05


def test_jitter_drops_boxes_that_are_too_small_or_show_too_little():
  tiny, half = [0.1, 0.1, 0.1125, 0.1125], [0.0, 0.0, 1.0, 1.0]
  op = LargeScaleJitter(40, scale=(1.0, 1.0), min_side=1.0)
  out = op(example_of([tiny, half, tiny], size=(60, 60)), np.random.default_rng(0))
  np.testing.assert_array_equal(out.labels, [1])
  np.testing.assert_array_equal(out.crowd, [True])
  kept = LargeScaleJitter(40, scale=(1.0, 1.0), min_side=0.4)(
      example_of([tiny, half, tiny], size=(60, 60)), np.random.default_rng(0))
  np.testing.assert_array_equal(kept.labels, [0, 1, 2])
  for coverage, number in ((0.2, 1), (0.3, 0)):  # A quarter of the image is in the frame.
    op = LargeScaleJitter(40, scale=(2.0, 2.0), min_coverage=coverage)
    assert len(op(example_of([half], size=(60, 60)), np.random.default_rng(0)).boxes) == number


def test_a_huge_zoom_out_needs_no_huge_canvas():
  out = LargeScaleJitter(30, scale=(0.01, 0.01))(example_of([[0, 0, 1, 1]], size=(3000, 4000)),
                                                  np.random.default_rng(0))
  assert out.image.shape == (30, 30, 3) and not len(out.boxes)


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (200, 2)])
def test_images_of_extreme_shape(size):
  rng = np.random.default_rng(0)
  for op in build_transforms([{'name': 'expand', 'probability': 1},
                              {'name': 'large_scale_jitter', 'size': 16}]):
    for _ in range(20):
      out = op(example_of([[0, 0, 1, 1]], size), rng)
      assert min(out.image.shape) > 0 and ((out.boxes >= 0) & (out.boxes <= 1)).all()


@pytest.mark.parametrize('block, message', [
    ({'name': 'expand', 'probability': 2}, r'expand\.probability is 2, legal: 0 to 1'),
    ({'name': 'expand', 'ratio': (0.5, 2)}, r'expand\.ratio is \(0\.5, 2\), legal: two numbers'),
    ({'name': 'expand', 'fill': (0, 0, 256)}, r'expand\.fill .*three integers, 0 to 255'),
    ({'name': 'expand', 'fill': 7}, r'expand\.fill is 7'),
    ({'name': 'large_scale_jitter'}, "needs the option 'size'"),
    ({'name': 'large_scale_jitter', 'size': 0}, r'size is 0'),
    ({'name': 'large_scale_jitter', 'size': 9, 'scale': (0, 2)}, r'scale is \(0, 2\)'),
    ({'name': 'large_scale_jitter', 'size': 9, 'min_side': 10}, r'min_side is 10, legal: 0 to 9'),
    ({'name': 'large_scale_jitter', 'size': 9, 'method': 'cubic'}, "method 'cubic'"),
    ({'name': 'large_scale_jitter', 'size': 9, 'reduced_decoding': 1}, 'is 1, legal: True, False'),
    ({'name': 'expnd'}, "did you mean 'expand'"),
])
def test_wrong_blocks(block, message):
  with pytest.raises(InputError, match=message):
    build_transforms([block])
