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
from typing import Any

import numpy as np

from ppn_jax.detection.structures import Array
from ppn_jax.metrics import coco
from ppn_jax.metrics.intervals import jackknife_interval, jackknife_masks
from ppn_jax.metrics.matching import MatchedDetections
from ppn_jax.metrics.platt import METHODS, cross_fit, detections_to_fit, fit_levels

METRICS = ('AP', 'AP50')
_GROUPS = 10  # Of images; each is left out once, at the cost of scoring the rest twice.


def recalibrate(matched: MatchedDetections, floor: float, num_levels: int,
                first_half: Array) -> tuple[np.ndarray, np.ndarray]:
  """Recalibrates scores by maps that are fitted to the other half of the images.

  Args:
    matched: all N detections; `detections_to_fit` chooses those that maps are fitted to.
    floor: least score of a detection that maps are fitted to.
    num_levels: L.
    first_half: bool [images].

  Returns:
    f64 [N] each: scores by one map for all levels, and by one map for each level.
  """
  by = lambda fit: cross_fit(matched, floor, num_levels, first_half, fit)
  return by(lambda m, n: (fit_levels(m, n)[0],) * n), by(METHODS['platt'])


def cost(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
         matched: MatchedDetections, *, num_levels: int, floor: float, seed: int = 0,
         scorer: str = 'hotcoco', intervals: bool = True) -> dict[str, Any]:
  """Measures how much AP the differences between levels cost.

  Args:
    ground_truth: COCO instances dict.
    rows: the N detections.
    matched: the same detections, from `matching.match_detections`.
    num_levels: L.
    floor: least score that maps are fitted to, see `detections_to_fit`; they are applied to all.
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
  matched = detections_to_fit(matched, floor, num_levels)
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
