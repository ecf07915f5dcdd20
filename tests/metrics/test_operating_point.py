"""Calibration of scores, and what is kept of it with a detector."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from ppn_jax.detection.structures import Detections
from ppn_jax.metrics import operating_point, platt
from ppn_jax.metrics.matching import MatchedDetections
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.metrics.platt import Platt

NAMES = ('cat', 'dog')
POINT = OperatingPoint(NAMES, (0.25, 0.5), 'platt', (Platt(0.0, 1.0, 0.0), Platt(np.log(2), 0, 0)))


def drawn(distort, *, n=8000, levels=2, seed=0):
  """Returns detections whose score is a distortion of the probability that they are correct."""
  rng = np.random.default_rng(seed)
  truth, level = rng.uniform(0.02, 0.98, n), rng.integers(0, levels, n)
  zeros = np.zeros(n, int)
  return truth, MatchedDetections(rng.integers(0, 50, n), zeros, level, zeros,
                                  distort(truth, level), rng.random(n) < truth, zeros.astype(bool))


def test_temperature_finds_the_slope_and_keeps_the_order():
  truth, matched = drawn(lambda p, level: expit(logit(p) * 3))
  maps = platt.fit_temperature(matched, 2)
  assert maps[0] == maps[1] and maps[0].intercept == maps[0].centre == 0
  assert np.exp(maps[0].log_slope) == pytest.approx(1 / 3, rel=0.08)
  scores = platt.apply_by_level(maps, matched.score, matched.level)
  assert (np.argsort(scores) == np.argsort(matched.score)).all()
  assert np.abs(scores - truth).max() < 0.03


def test_platt_fits_each_level():
  truth, matched = drawn(lambda p, level: expit(logit(p) * (1 + level) - 2 * level))
  maps = platt.METHODS['platt'](matched, 2)
  scores = platt.apply_by_level(maps, matched.score, matched.level)
  assert np.abs(scores - truth).max() < 0.06 and np.abs(matched.score - truth).max() > 0.3
  half = platt.random_half(50)
  held_out = platt.cross_fit(matched, 0.0, 2, half, platt.METHODS['platt'])
  assert np.abs(held_out - truth).max() < 0.1
  # What one half contains does not change the maps that it is calibrated by.
  mine = half[matched.image]
  flipped = matched._replace(correct=matched.correct ^ mine)
  again = platt.cross_fit(flipped, 0.0, 2, half, platt.METHODS['platt'])
  assert (again[mine] == held_out[mine]).all() and (again[~mine] != held_out[~mine]).any()


def test_without_detections_scores_stay():
  _, matched = drawn(lambda p, level: p)
  nothing = matched.select(np.zeros(0, int))
  for fit in platt.METHODS.values():
    assert platt.apply_by_level(fit(nothing, 2), np.array([0.3]), np.array([1])) == pytest.approx(
        [0.3])


def test_detections_are_sorted_by_calibrated_score():
  found = Detections(np.arange(8.0).reshape(2, 4), np.float32([0.6, 0.55]), np.array([0, 1]),
                     np.array([1, 0]), np.ones(2, bool))
  made = POINT.calibrated(found)
  assert made.level.tolist() == [0, 1] and made.labels.tolist() == [1, 0]
  expected = [expit(logit(0.55) + 1), expit(2 * logit(0.6))]
  np.testing.assert_allclose(made.scores, expected, rtol=1e-5)
  assert made.scores.dtype == np.float32 and made.boxes[0, 0] == 4
  plain = POINT._replace(maps=(), method='')
  assert plain.calibrated(found) is found


def test_it_is_read_as_it_was_written():
  for point in (POINT, POINT._replace(maps=(), method='')):
    read = operating_point.parse(json.loads(json.dumps(point.describe())), NAMES)
    assert read.names == NAMES and read.thresholds == point.thresholds
    assert read.method == point.method
    np.testing.assert_allclose(np.array(read.maps), np.array(point.maps), atol=1e-12)
  assert operating_point.parse(None, NAMES) is None
  assert operating_point.parse(POINT.describe(), ('dog', 'cat')) is None


@pytest.mark.parametrize('change', [
    lambda d: d.pop('thresholds'), lambda d: d.update(thresholds=3),
    lambda d: d['thresholds'][0].update(threshold=1.5),
    lambda d: d['thresholds'][0].update(threshold=True),
    lambda d: d['thresholds'][0].update(threshold=float('nan')),
    lambda d: d['calibration'].pop('levels'),
    lambda d: d['calibration']['levels'][0].update(slope=0),
    lambda d: d['calibration']['levels'][0].update(intercept='1')])
def test_damage_is_an_error(change):
  described = json.loads(json.dumps(POINT.describe()))
  change(described)
  with pytest.raises(ValueError):
    operating_point.parse(described, NAMES)
