"""Measures how much AP is lost because pyramid levels are calibrated differently.

A map of the score's logit, slope * logit + intercept (Platt, 1999), is fitted to correctness for
each level. Slopes are positive, so the order within a level stays; only the ranking of levels
against one another changes, and AP depends on nothing else. The maps fitted to one half of the
images are applied to the other, so no map is applied to scores that it was fitted to. One map for
all levels, fitted in the same way, is the control: it can change AP only because its halves differ.

Suppression has happened by then, with the scores as they were. Its losses across levels are not
part of the cost, which is therefore that of ranking alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from ppn_jax.detection.structures import Array
from ppn_jax.metrics import coco
from ppn_jax.metrics.intervals import jackknife_interval, jackknife_masks
from ppn_jax.metrics.matching import MatchedDetections

# Standard deviations of the Gaussian prior of a map's (log slope, intercept at the centre). The map
# of all levels has the identity as its mean, that of one level the map of all levels. A level of a
# thousand detections is hardly affected by the prior, one of ten hardly departs from it.
_GLOBAL_DEVIATION, _LEVEL_DEVIATION = (1.0, 3.0), (0.5, 1.0)
_MIN_DETECTIONS = 1000  # Of a level to fit to, its best ones, if the floor leaves fewer.
_EPSILON = 1e-12  # Scores of 0 and 1 have no logit.
METRICS = ('AP', 'AP50')
_GROUPS = 10  # Of images; each is left out once, at the cost of scoring the rest twice.


class Platt(NamedTuple):
  """Calibrated logit = exp(log_slope) * (logit - centre) + intercept."""
  log_slope: float
  intercept: float
  centre: float

  def __call__(self, scores: Array) -> np.ndarray:
    """Returns calibrated scores, 0 to 1, which have the same order as `scores`."""
    return special.expit(np.exp(self.log_slope) * (_logit(scores) - self.centre) + self.intercept)

  def centred(self, centre: float) -> 'Platt':
    """Returns the same map about another centre.

    About the mean of the logits, slope and intercept are nearly uncorrelated in a fit.
    """
    moved = self.intercept + np.exp(self.log_slope) * (centre - self.centre)
    return Platt(self.log_slope, float(moved), centre)

  def inverse(self, precision: float) -> float:
    """Returns the score that the map takes to a precision."""
    return float(special.expit(
        (special.logit(precision) - self.intercept) * np.exp(-self.log_slope) + self.centre))


def fit_levels(matched: MatchedDetections, num_levels: int) -> tuple[Platt, tuple[Platt, ...]]:
  """Fits a map to all detections, and one to each level with a prior around the former.

  Both are maximum a posteriori estimates of logistic regression of correctness on the logit.
  Without any detections both leave scores as they are.
  """
  whole = _fit(matched, Platt(0.0, 0.0, 0.0), _GLOBAL_DEVIATION)
  return whole, tuple(_fit(matched.select(matched.level == level), whole, _LEVEL_DEVIATION)
                      for level in range(num_levels))


def _fit(matched: MatchedDetections, prior: Platt, deviation: tuple[float, float]) -> Platt:
  """Fits one map, with a Gaussian prior of this deviation around the parameters of `prior`."""
  if not len(matched.score):
    return prior
  x, y = _logit(matched.score), matched.correct.astype(float)
  prior = prior.centred(float(x.mean()))
  x, start, deviation = x - prior.centre, np.array(prior[:2]), np.array(deviation)

  def loss(parameters):
    slope, intercept = np.exp(parameters[0]), parameters[1]
    z, pull = slope * x + intercept, (parameters - start) / deviation
    error = special.expit(z) - y
    gradient = np.array([error @ x * slope, error.sum()]) + pull / deviation
    return (np.logaddexp(0, z).sum() - z @ y + pull @ pull / 2) / len(x), gradient / len(x)

  # BFGS, since the compiled code of L-BFGS-B takes milliseconds to start threads in each call.
  return Platt(*map(float, optimize.minimize(loss, start, jac=True, method='BFGS').x),
               prior.centre)


def _detections_to_fit(matched: MatchedDetections, floor: float, num_levels: int
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


def recalibrate(matched: MatchedDetections, floor: float, num_levels: int,
                first_half: Array) -> tuple[np.ndarray, np.ndarray]:
  """Recalibrates scores by maps that are fitted to the other half of the images.

  Args:
    matched: all N detections; `_detections_to_fit` chooses those that maps are fitted to.
    floor: least score of a detection that maps are fitted to.
    num_levels: L.
    first_half: bool [images].

  Returns:
    f64 [N] each: scores by one map for all levels, and by one map for each level.
  """
  by_one, by_level = np.zeros((2, len(matched.score)))
  half = np.asarray(first_half)[matched.image]
  for mine in (half, ~half):
    whole, levels = fit_levels(
        _detections_to_fit(matched.select(~mine), floor, num_levels), num_levels)
    by_one[mine] = whole(matched.score[mine])
    for level, platt in enumerate(levels):
      there = mine & (matched.level == level)
      by_level[there] = platt(matched.score[there])
  return by_one, by_level


def cost(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
         matched: MatchedDetections, *, num_levels: int, floor: float, seed: int = 0,
         scorer: str = 'hotcoco', intervals: bool = True) -> dict[str, Any]:
  """Measures how much AP the differences between levels cost.

  Args:
    ground_truth: COCO instances dict.
    rows: the N detections.
    matched: the same detections, from `matching.match_detections`.
    num_levels: L.
    floor: least score that maps are fitted to, see `_detections_to_fit`; they are applied to all.
    seed: of the split into halves.
    scorer: see `coco.score`.
    intervals: computes intervals, which scores 20 times more, with a tenth of the images left out
      in turn.

  Returns:
    'as_is', 'one_map' and 'map_per_level', the `METRICS` of each; 'cost', those of a map per level
    minus those of the control, with 'cost_interval' of 95%; None without any ground truth.
  """
  num_images = len(ground_truth['images'])
  rng = np.random.default_rng(seed)
  first_half = rng.permutation(num_images) % 2 == 0
  position = rng.permutation(num_images)

  def recalibrated(ground_truth, kept):
    chosen = [dict(rows[i]) for i in np.flatnonzero(kept)]
    return [_score(ground_truth, chosen, scores, scorer) for scores in
            recalibrate(matched.select(kept), floor, num_levels, first_half)]

  one_map, per_level = recalibrated(ground_truth, np.ones(len(rows), bool))
  result = {'as_is': _score(ground_truth, [dict(r) for r in rows], matched.score, scorer),
            'one_map': one_map, 'map_per_level': per_level,
            'cost': _difference(one_map, per_level)}
  result['cost_interval'] = dict.fromkeys(METRICS)
  if intervals and None not in result['cost'].values():
    parts = [_difference(*recalibrated(_subset(ground_truth, images), images[matched.image]))
             for images in jackknife_masks(position, num_images, _GROUPS)]
    for name in METRICS:
      result['cost_interval'][name] = jackknife_interval(
          result['cost'][name], [p[name] for p in parts if p[name] is not None])
  return result


def maps(matched: MatchedDetections, floor: float, num_levels: int
         ) -> list[dict[str, float | None]]:
  """Fits a map of each level to all images, for information; costs never come from these.

  `score_at_half` is the score at which half of the level's detections are correct by its map;
  None for a level without correct detections, where it is unknown.
  """
  matched = _detections_to_fit(matched, floor, num_levels)
  _, levels = fit_levels(matched, num_levels)
  correct = np.bincount(matched.level[matched.correct], minlength=num_levels)
  return [{'slope': float(np.exp(p.log_slope)), 'intercept': p.centred(0.0).intercept,
           'score_at_half': p.inverse(0.5) if count else None}
          for p, count in zip(levels, correct, strict=True)]


def _score(ground_truth: Mapping[str, Any], rows: Sequence[dict[str, Any]], scores: np.ndarray,
           scorer: str) -> dict[str, float | None]:
  """Returns `METRICS` of the rows with these scores, which are written into them."""
  for row, score in zip(rows, scores.tolist(), strict=True):
    row['score'] = score
  metrics = coco.score(ground_truth, rows, scorer=scorer).metrics
  return {name: metrics[name] for name in METRICS}


def _difference(control: Mapping[str, float | None], per_level: Mapping[str, float | None]
                ) -> dict[str, float | None]:
  return {name: None if control[name] is None else per_level[name] - control[name]
          for name in METRICS}


def _subset(ground_truth: Mapping[str, Any], kept: np.ndarray) -> dict[str, Any]:
  """Returns the ground truth of the images that a mask keeps."""
  images = [image for image, keep in zip(ground_truth['images'], kept, strict=True) if keep]
  ids = {image['id'] for image in images}
  return {**ground_truth, 'images': images,
          'annotations': [a for a in ground_truth['annotations'] if a['image_id'] in ids]}


def _logit(scores: Array) -> np.ndarray:
  return special.logit(np.clip(np.asarray(scores, np.float64), _EPSILON, 1 - _EPSILON))
