"""Maps from detection scores to calibrated ones: temperature scaling, and Platt's for each level.

A map of the score's logit, slope * logit + intercept (Platt, 1999), is fitted to the correctness of
detections. With an intercept of zero it is temperature scaling (Guo et al., "On Calibration of
Modern Neural Networks", 2017), and the slope is one over the temperature. Slopes are positive, so
a map keeps the order of the scores that it is applied to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.detection.structures import Array
from ppn_jax.metrics.matching import MatchedDetections

# Standard deviations of the Gaussian prior of a map's (log slope, intercept at the centre). The map
# of all levels has the identity as its mean, that of one level the map of all levels. A level of a
# thousand detections is hardly affected by the prior, one of ten hardly departs from it.
_GLOBAL_DEVIATION, _LEVEL_DEVIATION = (1.0, 3.0), (0.5, 1.0)
_MIN_DETECTIONS = 1000  # Of a level to fit to, its best ones, if the floor leaves fewer.
_EPSILON = 1e-12  # Scores of 0 and 1 have no logit.


class Platt(NamedTuple):
  """Calibrated logit = exp(log_slope) * (logit - centre) + intercept."""
  log_slope: float
  intercept: float
  centre: float

  def __call__(self, scores: Array) -> np.ndarray:
    """Returns calibrated scores, 0 to 1, which have the same order as `scores`."""
    from scipy import special  # SciPy here and below, so that loading a detector stays fast.
    return special.expit(np.exp(self.log_slope) * (_logit(scores) - self.centre) + self.intercept)

  def centred(self, centre: float) -> 'Platt':
    """Returns the same map about another centre.

    About the mean of the logits, slope and intercept are nearly uncorrelated in a fit.
    """
    moved = self.intercept + np.exp(self.log_slope) * (centre - self.centre)
    return Platt(self.log_slope, float(moved), centre)

  def inverse(self, precision: float) -> float:
    """Returns the score that the map takes to a precision."""
    from scipy import special
    return float(special.expit(
        (special.logit(precision) - self.intercept) * np.exp(-self.log_slope) + self.centre))


def apply_by_level(maps: Sequence[Platt], scores: Array, level: Array) -> np.ndarray:
  """Returns calibrated scores.

  Args:
    maps: one for each pyramid level.
    scores: [N], 0 to 1.
    level: [N], pyramid level of each.
  """
  calibrated = np.zeros(np.shape(scores))
  for k, platt in enumerate(maps):
    calibrated[level == k] = platt(np.asarray(scores)[level == k])
  return calibrated


def fit_levels(matched: MatchedDetections, num_levels: int) -> tuple[Platt, tuple[Platt, ...]]:
  """Fits a map to all detections, and one to each level with a prior around the former.

  Both are maximum a posteriori estimates of logistic regression of correctness on the logit.
  Without any detections both leave scores as they are.
  """
  whole = _fit(matched, Platt(0.0, 0.0, 0.0), _GLOBAL_DEVIATION)
  return whole, tuple(_fit(matched.select(matched.level == level), whole, _LEVEL_DEVIATION)
                      for level in range(num_levels))


def fit_temperature(matched: MatchedDetections, num_levels: int) -> tuple[Platt, ...]:
  """Fits one slope for all levels, with an intercept of zero; returns a map for each level.

  It keeps the order of all scores, and so AP.
  """
  whole = _fit(matched, Platt(0.0, 0.0, 0.0), _GLOBAL_DEVIATION, with_intercept=False)
  return (whole,) * num_levels


# Name -> function of (matched, number of levels) that returns a map for each level.
METHODS = {'temperature': fit_temperature, 'platt': lambda m, n: fit_levels(m, n)[1]}


def cross_fit(matched: MatchedDetections, floor: float, num_levels: int, first_half: Array,
              fit: Callable[[MatchedDetections, int], Sequence[Platt]]) -> np.ndarray:
  """Returns calibrated scores, f64 [N], by maps that are fitted to the other half of the images.

  Args:
    matched: all N detections; `detections_to_fit` chooses those that maps are fitted to.
    floor: least score of a detection that maps are fitted to.
    num_levels: L.
    first_half: bool [images].
    fit: as in `METHODS`.
  """
  calibrated = np.zeros(len(matched.score))
  half = np.asarray(first_half)[matched.image]
  for mine in (half, ~half):
    maps = fit(detections_to_fit(matched.select(~mine), floor, num_levels), num_levels)
    calibrated[mine] = apply_by_level(maps, matched.score[mine], matched.level[mine])
  return calibrated


def random_half(num_images: int, seed: int = 0) -> np.ndarray:
  """Returns a random half of the images, bool [images]."""
  return np.random.default_rng(seed).permutation(num_images) % 2 == 0


def _fit(matched: MatchedDetections, prior: Platt, deviation: tuple[float, float], *,
         with_intercept: bool = True) -> Platt:
  """Fits one map, with a Gaussian prior of this deviation around the parameters of `prior`."""
  if not len(matched.score):
    return prior
  from scipy import optimize, special
  x, y = _logit(matched.score), matched.correct.astype(float)
  if with_intercept:
    prior = prior.centred(float(x.mean()))
  x, start, deviation = x - prior.centre, np.array(prior[:2]), np.array(deviation)
  fitted = np.array([1.0, float(with_intercept)])

  def loss(parameters):
    slope, intercept = np.exp(parameters[0]), parameters[1]
    z, pull = slope * x + intercept, (parameters - start) / deviation
    error = special.expit(z) - y
    gradient = np.array([error @ x * slope, error.sum()]) + pull / deviation
    return ((np.logaddexp(0, z).sum() - z @ y + pull @ pull / 2) / len(x),
            fitted * gradient / len(x))

  # BFGS, since the compiled code of L-BFGS-B takes milliseconds to start threads in each call.
  return Platt(*map(float, optimize.minimize(loss, start, jac=True, method='BFGS').x),
               prior.centre)


def detections_to_fit(matched: MatchedDetections, floor: float, num_levels: int
                      ) -> MatchedDetections:
  """Returns detections that score at least `floor`, and the best `_MIN_DETECTIONS` of each level.

  A level may be so miscalibrated that nothing on it reaches the floor; its cost counts too.
  Selecting by score does not bias the precision at a score.
  """
  matched = matched.at_least(0)
  chosen = matched.score >= floor
  for level in range(num_levels):
    there = np.flatnonzero(matched.level == level)
    chosen[there[np.argsort(-matched.score[there], kind='stable')[:_MIN_DETECTIONS]]] = True
  return matched.select(chosen)


def _logit(scores: Array) -> np.ndarray:
  from scipy import special
  return special.logit(np.clip(np.asarray(scores, np.float64), _EPSILON, 1 - _EPSILON))
