"""Metrics of runs over seeds, and differences between models: means and 95% intervals.

Two sources of variance are kept apart. Intervals over seeds, by Student's t, cover other initial
weights, orders and augmentations. Intervals over images, by a jackknife that leaves out groups of
images in turn and recomputes the mean over seeds, cover other evaluation images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from ppn_jax.metrics import calibration, coco, matching
from ppn_jax.metrics.intervals import JACKKNIFE_GROUPS, jackknife_interval, jackknife_masks
from ppn_jax.metrics.voc import voc_ap50

SIZES = ('AP_small', 'AP_medium', 'AP_large')
ACCURACY = ('AP', 'AP50', 'AP75', 'VOC_AP50', *SIZES)
# From the calibration report: the error of all scores; the spread of the gap, and of the precision
# at equal score, between levels; and the AP that the spread costs. Near zero, the lower limit of
# the second spread, its interval over images is too short, and the interval over seeds counts.
CALIBRATION = ('ECE', 'gap_spread', 'spread_at_equal_score', 'cost_AP', 'cost_AP50')
METRICS = (*ACCURACY, *CALIBRATION)


def accuracy(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the metrics `ACCURACY` of detections, None if there is no ground truth for one."""
  found = coco.score(truth, rows).metrics | {'VOC_AP50': voc_ap50(truth, rows)[0]}
  return {name: None if found[name] in (None, coco.NO_GROUND_TRUTH) else found[name]
          for name in ACCURACY}


def calibration_metrics(report: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the metrics `CALIBRATION` of a report; `calibration.measure` alone has no costs."""
  spread, cost = report['spread'], report.get('recalibration', {}).get('cost', {})
  return {'ECE': report['all']['ece'], 'gap_spread': spread['gap'],
          'spread_at_equal_score': spread['at_equal_score'],
          'cost_AP': cost.get('AP'), 'cost_AP50': cost.get('AP50')}


def without_groups(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                   num_levels: int, floor: float) -> dict[str, list]:
  """Computes the metrics with each group of images left out in turn, except the costs.

  Groups are the same for all runs, so that differences are paired.

  Args:
    truth: COCO instances dict.
    rows: detections.
    num_levels: L, number of pyramid levels.
    floor: lowest score that counts for calibration.

  Returns:
    {metric: values without each group}.
  """
  ids = [image['id'] for image in truth['images']]
  place = np.random.default_rng(0).permutation(len(ids))  # Neighbours may resemble one another.
  judged, parts = matching.match_detections(truth, rows), []
  for kept in jackknife_masks(place, len(ids), JACKKNIFE_GROUPS):
    there = {i for i, keep in zip(ids, kept, strict=True) if keep}
    part = {**truth, 'images': [m for m in truth['images'] if m['id'] in there],
            'annotations': [a for a in truth['annotations'] if a['image_id'] in there]}
    measured = calibration.measure(
        judged.select(kept[judged.image]), num_images=len(ids), num_levels=num_levels,
        class_names=[], floor=floor)
    parts.append(accuracy(part, [r for r in rows if r['image_id'] in there])
                 | calibration_metrics(measured))
  return {name: [p[name] for p in parts] for name in METRICS}


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
  """Returns mean, standard deviation, least, greatest, and the mean's interval by Student's t.

  All are None if a seed has no value, since pairs would be missing. Deviation and interval are None
  for a single seed.
  """
  summary = {'values': list(values),
             **dict.fromkeys(('mean', 'deviation', 'least', 'greatest', 'interval'))}
  if not values or None in values:
    return summary
  n, mean = len(values), float(np.mean(values))
  summary |= {'mean': mean, 'least': min(values), 'greatest': max(values)}
  if n > 1:
    deviation = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, 0.975)) * deviation / n**0.5
    summary |= {'deviation': deviation, 'interval': [mean - half, mean + half]}
  return summary


def summarize(runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
  """Summarises a metric over a model's runs: `over_seeds`, and 'images', its interval over them."""
  values = [r['figures'][name] for r in runs]
  parts = [r['without_groups'][name] for r in runs]
  return over_seeds(values) | {'images': _over_images(values, parts)}


def differences(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], name: str
                ) -> dict[str, Any]:
  """Summarises the differences of a metric, first model minus second, over seeds that both have.

  Returns:
    As `summarize`, and 'seeds'.
  """
  by_seed = [{r['seed']: r for r in runs} for runs in (first, second)]
  seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
  pairs = [(by_seed[0][s], by_seed[1][s]) for s in seeds]
  values = [_difference(a['figures'][name], b['figures'][name]) for a, b in pairs]
  parts = [[_difference(x, y) for x, y in zip(a['without_groups'][name], b['without_groups'][name],
                                              strict=True)] for a, b in pairs]
  return {'seeds': seeds} | over_seeds(values) | {'images': _over_images(values, parts)}


def _difference(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a - b


def _over_images(values: Sequence[float | None], parts: Sequence[Sequence[float | None]]
                 ) -> list[float] | None:
  """Returns the interval of the mean over seeds from each seed's values without some images."""
  if not values or None in values or any(None in p for p in parts):
    return None
  return jackknife_interval(float(np.mean(values)), np.mean(parts, axis=0).tolist())
