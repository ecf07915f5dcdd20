"""Comparison of detections: which differences are allowed and which are errors."""

import numpy as np
import pytest

from ppn_jax.detection.structures import Detections
from ppn_jax.export.comparison import TOLERANCES, compare, is_wrong

TIGHT = TOLERANCES['float32']


def detections(count=20, places=30, seed=0):
  rng = np.random.default_rng(seed)
  corners = rng.uniform(0, 0.5, (1, places, 2)).astype(np.float32)
  valid = np.arange(places)[None] < count
  return Detections(
      boxes=np.concatenate([corners, corners + 0.3], -1) * valid[..., None],
      scores=np.sort(rng.uniform(0.1, 1, (1, places)).astype(np.float32))[:, ::-1] * valid,
      labels=rng.integers(0, 3, (1, places), dtype=np.int32) * valid,
      level=np.zeros((1, places), np.int32), valid=valid)


def test_equal():
  difference = compare(detections(), detections(), TIGHT)
  assert difference == (0, 0, 0, 20, True) and not is_wrong(difference, TIGHT)


def test_rounding_is_measured():
  a = detections()
  difference = compare(a, a._replace(boxes=a.boxes + np.float32(1e-4)), TIGHT)
  assert difference.boxes == pytest.approx(1e-4, rel=0.01) and difference.missing == 0


def test_swapped_neighbours_are_matched():
  a = detections()
  order = np.r_[1, 0, 2:30]
  difference = compare(a, Detections(*(f[:, order] for f in a)), TIGHT)
  assert difference.missing == 0 and not difference.same_order


@pytest.mark.parametrize('change', [
    lambda d: d._replace(boxes=d.boxes[..., [1, 0, 3, 2]]),
    lambda d: d._replace(labels=(d.labels + 1) * d.valid),
    lambda d: d._replace(scores=d.scores * 0.9),
    lambda d: d._replace(valid=d.valid & False),
    lambda d: Detections(*(f[:, ::2] for f in d)),
])
def test_wrong(change):
  difference = compare(detections(), change(detections()), TIGHT)
  assert is_wrong(difference, TIGHT)


def test_last_detection_of_a_full_list_is_not_compared():
  a = detections(30)
  b = detections(30)
  b.boxes[0, -1] = 0.5
  assert compare(a, b, TIGHT).missing == 0
  b.boxes[0, 0] = 0.5
  assert compare(a, b, TIGHT).missing == 1
