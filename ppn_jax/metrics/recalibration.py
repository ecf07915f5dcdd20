"""What miscalibration between levels costs: AP with scores as they are, and recalibrated.

A map of the score's logit, slope * logit + intercept (Platt, 1999), is fitted to right and wrong
for each level. Slopes are positive, so the order within a level stays; what changes is how levels
rank against one another, and AP sees nothing else. The maps of one half of the images are applied
to the other, so no score is judged by a map that saw it. One map for all levels, fitted in the
same way, is the control: it can change AP only through its halves differing.

Suppression has happened by then, with scores as they were. What it lost across levels is not in
the cost, which is therefore of ranking alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from ppn_jax.detection.structures import Array
from ppn_jax.metrics import coco
from ppn_jax.metrics.intervals import jackknife_interval, jackknife_masks
from ppn_jax.metrics.matching import Judged

# Standard deviations of a map's (log slope, intercept at the centre) around what it is pulled
# towards: the scores as they are for all levels together, the map of all levels for one. A level
# of a thousand detections hardly feels it, one of ten hardly leaves it.
_GLOBAL_SPREAD, _LEVEL_SPREAD = (1.0, 3.0), (0.5, 1.0)
_LEAST = 1000  # Detections of a level to fit to, its best ones, should the floor leave fewer.
_EDGE = 1e-12  # Scores of 0 and 1 have no logit.
FIGURES = ('AP', 'AP50')
_GROUPS = 10  # Of images; each is left out once, at the cost of scoring the rest twice.


class Platt(NamedTuple):
  """Calibrated logit = exp(log_slope) * (logit - centre) + intercept."""
  log_slope: float
  intercept: float
  centre: float

  def __call__(self, scores: Array) -> np.ndarray:
    """Scores, 0 to 1, to calibrated ones in the same order."""
    return special.expit(np.exp(self.log_slope) * (_logit(scores) - self.centre) + self.intercept)

  def centred(self, centre: float) -> 'Platt':
    """The same map about another centre; about their mean, slope and intercept fit apart."""
    moved = self.intercept + np.exp(self.log_slope) * (centre - self.centre)
    return Platt(self.log_slope, float(moved), centre)

  def inverse(self, precision: float) -> float:
    """The score that stands for a precision."""
    return float(special.expit(
        (special.logit(precision) - self.intercept) * np.exp(-self.log_slope) + self.centre))


def fit_levels(judged: Judged, num_levels: int) -> tuple[Platt, tuple[Platt, ...]]:
  """The maps of greatest likelihood: of all detections, and of each level pulled towards it.

  Without any detections both leave scores as they are.
  """
  whole = _fit(judged, Platt(0.0, 0.0, 0.0), _GLOBAL_SPREAD)
  return whole, tuple(_fit(judged.take(judged.level == level), whole, _LEVEL_SPREAD)
                      for level in range(num_levels))


def _fit(judged: Judged, prior: Platt, spread: tuple[float, float]) -> Platt:
  if not len(judged.score):
    return prior
  x, y = _logit(judged.score), judged.correct.astype(float)
  prior = prior.centred(float(x.mean()))
  x, start, spread = x - prior.centre, np.array(prior[:2]), np.array(spread)

  def loss(parameters):
    slope, intercept = np.exp(parameters[0]), parameters[1]
    z, pull = slope * x + intercept, (parameters - start) / spread
    error = special.expit(z) - y
    gradient = np.array([error @ x * slope, error.sum()]) + pull / spread
    return (np.logaddexp(0, z).sum() - z @ y + pull @ pull / 2) / len(x), gradient / len(x)

  # BFGS: L-BFGS-B's compiled code takes milliseconds a call to start threads for two numbers.
  return Platt(*map(float, optimize.minimize(loss, start, jac=True, method='BFGS').x),
               prior.centre)


def _to_fit(judged: Judged, floor: float, num_levels: int) -> Judged:
  """Those of `floor` and more, and the best `_LEAST` of each level whatever their scores.

  A level may be so miscalibrated that nothing on it reaches the floor; its cost counts too.
  Choosing by score does not bias what a score stands for.
  """
  judged = judged.above(0)
  chosen = judged.score >= floor
  for level in range(num_levels):
    there = np.flatnonzero(judged.level == level)
    chosen[there[np.argsort(-judged.score[there], kind='stable')[:_LEAST]]] = True
  return judged.take(chosen)


def recalibrate(judged: Judged, floor: float, num_levels: int,
                first_half: Array) -> tuple[np.ndarray, np.ndarray]:
  """Scores mapped by what the other half of the images shows.

  Args:
    judged: all N detections; see `_to_fit` for which are fitted to.
    floor: least score.
    num_levels: L.
    first_half: bool [images].

  Returns:
    f64 [N] each: by one map for all levels, by one for each.
  """
  by_one, by_level = np.zeros((2, len(judged.score)))
  half = np.asarray(first_half)[judged.image]
  for mine in (half, ~half):
    whole, levels = fit_levels(_to_fit(judged.take(~mine), floor, num_levels), num_levels)
    by_one[mine] = whole(judged.score[mine])
    for level, platt in enumerate(levels):
      there = mine & (judged.level == level)
      by_level[there] = platt(judged.score[there])
  return by_one, by_level


def cost(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], judged: Judged, *,
         num_levels: int, floor: float, seed: int = 0, scorer: str = 'hotcoco',
         intervals: bool = True) -> dict[str, Any]:
  """How much AP the differences between levels cost.

  Args:
    ground_truth: COCO instances dict.
    rows: the N detections.
    judged: the same, as of `judging.judge`.
    num_levels: L.
    floor: least score that the maps are fitted to, see `_to_fit`; they are applied to all.
    seed: of the halves.
    scorer: see `coco.score`.
    intervals: whether to score 20 times more, with a tenth of the images left out in turn.

  Returns:
    'as_is', 'one_map' and 'map_per_level', the `FIGURES` of each; 'cost', those per level less
    those of the control, with 'cost_interval' of 95%; None where there is no truth.
  """
  num_images = len(ground_truth['images'])
  rng = np.random.default_rng(seed)
  first_half = rng.permutation(num_images) % 2 == 0
  place = rng.permutation(num_images)

  def mapped(truth, kept):
    chosen = [dict(rows[i]) for i in np.flatnonzero(kept)]
    return [_figures(truth, chosen, scores, scorer) for scores in
            recalibrate(judged.take(kept), floor, num_levels, first_half)]

  one_map, per_level = mapped(ground_truth, np.ones(len(rows), bool))
  result = {'as_is': _figures(ground_truth, [dict(r) for r in rows], judged.score, scorer),
            'one_map': one_map, 'map_per_level': per_level,
            'cost': _difference(one_map, per_level)}
  result['cost_interval'] = dict.fromkeys(FIGURES)
  if intervals and None not in result['cost'].values():
    parts = [_difference(*mapped(_without(ground_truth, images), images[judged.image]))
             for images in jackknife_masks(place, num_images, _GROUPS)]
    for f in FIGURES:
      result['cost_interval'][f] = jackknife_interval(
          result['cost'][f], [p[f] for p in parts if p[f] is not None])
  return result


def maps(judged: Judged, floor: float, num_levels: int) -> list[dict[str, float | None]]:
  """The map of each level, fitted to all images: for reading, not for judging.

  `score_at_half` is the score at which half of the level's detections are right by its map;
  None for a level without right detections, which cannot tell.
  """
  judged = _to_fit(judged, floor, num_levels)
  _, levels = fit_levels(judged, num_levels)
  right = np.bincount(judged.level[judged.correct], minlength=num_levels)
  return [{'slope': float(np.exp(p.log_slope)), 'intercept': p.centred(0.0).intercept,
           'score_at_half': p.inverse(0.5) if count else None}
          for p, count in zip(levels, right, strict=True)]


def _figures(truth: Mapping[str, Any], rows: Sequence[dict[str, Any]], scores: np.ndarray,
             scorer: str) -> dict[str, float | None]:
  """AP of the rows with these scores, which are written into them."""
  for row, score in zip(rows, scores.tolist(), strict=True):
    row['score'] = score
  found = coco.score(truth, rows, scorer=scorer).metrics
  return {f: found[f] for f in FIGURES}


def _difference(control: Mapping[str, float | None], per_level: Mapping[str, float | None]
                ) -> dict[str, float | None]:
  return {f: None if control[f] is None else per_level[f] - control[f] for f in FIGURES}


def _without(truth: Mapping[str, Any], kept: np.ndarray) -> dict[str, Any]:
  images = [image for image, keep in zip(truth['images'], kept, strict=True) if keep]
  ids = {image['id'] for image in images}
  return {**truth, 'images': images,
          'annotations': [a for a in truth['annotations'] if a['image_id'] in ids]}


def _logit(scores: Array) -> np.ndarray:
  return special.logit(np.clip(np.asarray(scores, np.float64), _EDGE, 1 - _EDGE))
