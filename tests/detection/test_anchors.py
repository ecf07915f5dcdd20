"""Default boxes equal the reference's bit for bit."""

import numpy as np
import pytest

from ppn_jax.detection.anchors import anchors_per_cell, ssd_anchors
from ppn_jax.errors import InputError

GRIDS = tuple((n, n) for n in (19, 10, 5, 3, 2, 1))


@pytest.mark.parametrize('model, options, count', [
    ('ppn', {}, 3000), ('ssd', {'min_scale': 0.2, 'reduce_lowest_level': True}, 1917)])
def test_equal_to_the_reference_in_every_bit(shared, model, options, count):
  expected = np.load(shared / 'golden' / f'anchors_{model}.npy')
  anchors = ssd_anchors(GRIDS, **options)
  assert anchors.boxes.shape == (count, 4) and anchors.boxes.dtype == np.float32
  assert anchors.boxes.tobytes() == expected.tobytes()


def test_levels_follow_the_grids():
  level = ssd_anchors(GRIDS).level
  assert np.bincount(level).tolist() == [6 * h * w for h, w in GRIDS]
  assert np.all(np.diff(level) >= 0)


def test_grids_need_not_be_square():
  anchors = ssd_anchors([(2, 4)], aspect_ratios=(1.0,))
  centers = (anchors.boxes[::2, :2] + anchors.boxes[::2, 2:]) / 2
  expected = [(y, x) for y in (.25, .75) for x in (.125, .375, .625, .875)]
  np.testing.assert_allclose(centers, expected, atol=1e-6)


def test_shapes_are_those_of_pixels_whatever_the_input_is():
  """As in the reference, scales are in units of the shorter side."""
  square = ssd_anchors(GRIDS).boxes
  for side in (1, 300, (64, 64)):
    assert ssd_anchors(GRIDS, side).boxes.tobytes() == square.tobytes()
  for height, width in ((240, 320), (320, 240), (100, 400)):
    boxes = ssd_anchors([(3, 4), (2, 2)], (height, width), min_scale=0.2, max_scale=0.9).boxes
    sides = (boxes[:, 2:] - boxes[:, :2]) * [height, width]
    shortest = min(height, width)
    # The first cell of each level: five ratios at its scale, and a square up to the next scale.
    for first, scale, coarser in ((0, 0.2, 0.9), (6 * 12, 0.9, 1.0)):
      ratios = np.array([1, 2, 0.5, 3, 0.3333, 1])
      scales = np.array([scale] * 5 + [np.sqrt(scale * coarser)]) * shortest
      np.testing.assert_allclose(sides[first:first + 6],
                                 np.stack([scales / ratios**.5, scales * ratios**.5], 1), rtol=1e-5)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centres[:6], [[1 / 6, 1 / 8]] * 6, atol=1e-6)


def test_anchors_per_cell():
  grids = [(4, 3), (2, 2), (1, 1)]
  assert anchors_per_cell(ssd_anchors(grids, reduce_lowest_level=True), grids) == (3, 6, 6)
  assert anchors_per_cell(ssd_anchors(grids, aspect_ratios=(1.0, 2.0)), grids) == (3, 3, 3)


@pytest.mark.parametrize('options, named', [
    ({'min_scale': 0.0}, 'min_scale=0.0'), ({'min_scale': 0.9, 'max_scale': 0.5}, 'max_scale=0.5'),
    ({'max_scale': 1.5}, 'max_scale=1.5'), ({'aspect_ratios': ()}, 'aspect_ratios'),
    ({'aspect_ratios': (1.0, -2.0)}, '-2.0')])
def test_options_out_of_range_are_named(options, named):
  with pytest.raises(InputError, match=named):
    ssd_anchors(GRIDS, **options)
