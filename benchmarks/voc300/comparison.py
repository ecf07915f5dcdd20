"""Figures of runs, over seeds, and of one model less another's: means and intervals of 95%.

Two kinds of chance are kept apart. Over seeds: what another start, order and augmentation would
give, by Student's t. Over images: what other images to evaluate on would give, by leaving out
groups of them in turn, the mean over seeds being what is recomputed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special
from voc300.voc_ap import voc_ap50

from ppn_jax.metrics import calibration, coco, matching
from ppn_jax.metrics.intervals import JACKKNIFE_GROUPS, jackknife_interval, jackknife_masks

SIZES = ('AP_small', 'AP_medium', 'AP_large')
ACCURACY = ('AP', 'AP50', 'AP75', 'VOC_AP50', *SIZES)
# Of the calibration report: error of all scores; between levels, spread of the gap and of the
# precision at equal score; and what that spread costs. The second spread ends at zero, where its
# interval over images is too short: there, that over seeds is what counts.
CALIBRATION = ('ECE', 'gap_spread', 'spread_at_equal_score', 'cost_AP', 'cost_AP50')
FIGURES = (*ACCURACY, *CALIBRATION)


def accuracy(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """`ACCURACY` of detections; None where there is no truth to score."""
  found = coco.score(truth, rows).metrics | {'VOC_AP50': voc_ap50(truth, rows)[0]}
  return {name: None if found[name] in (None, coco.NO_GROUND_TRUTH) else found[name]
          for name in ACCURACY}


def calibration_figures(report: Mapping[str, Any]) -> dict[str, Any]:
  """`CALIBRATION` of a `calibration_job.report`; without the costs, of `calibration.measure`."""
  spread, cost = report['spread'], report.get('recalibration', {}).get('cost', {})
  return {'ECE': report['all']['ece'], 'gap_spread': spread['gap'],
          'spread_at_equal_score': spread['at_equal_score'],
          'cost_AP': cost.get('AP'), 'cost_AP50': cost.get('AP50')}


def without_groups(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                   num_levels: int, floor: float) -> dict[str, list]:
  """Each of `FIGURES`, as far as it comes cheap, with one group of images left out in turn.

  Groups are the same for all runs, so that differences are paired.

  Args:
    truth: COCO instances dict.
    rows: detections.
    num_levels: L.
    floor: least score that enters calibration.
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
                 | calibration_figures(measured))
  return {name: [p[name] for p in parts] for name in FIGURES}


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
  """Mean, standard deviation, least, greatest, and the mean's interval by Student's t.

  All None where a seed lacks the figure: a mean of some of them would not be paired. Deviation
  and interval are None of a single seed.
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
  """One of `FIGURES` over a model's runs, one for each seed: `over_seeds`, and 'images', its
  interval over them."""
  values = [r['figures'][name] for r in runs]
  parts = [r['without_groups'][name] for r in runs]
  return over_seeds(values) | {'images': _over_images(values, parts)}


def differences(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], name: str
                ) -> dict[str, Any]:
  """One of `FIGURES` of the first model less the second's, by seeds that both have.

  Returns:
    As `summarize`, and 'seeds'.
  """
  by_seed = [{r['seed']: r for r in runs} for runs in (first, second)]
  seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
  pairs = [(by_seed[0][s], by_seed[1][s]) for s in seeds]
  values = [_less(a['figures'][name], b['figures'][name]) for a, b in pairs]
  parts = [[_less(x, y) for x, y in zip(a['without_groups'][name], b['without_groups'][name],
                                        strict=True)] for a, b in pairs]
  return {'seeds': seeds} | over_seeds(values) | {'images': _over_images(values, parts)}


def _less(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a - b


def _over_images(values: Sequence[float | None], parts: Sequence[Sequence[float | None]]
                 ) -> list[float] | None:
  """Interval of the mean over seeds, from each seed's values with groups of images left out."""
  if not values or None in values or any(None in p for p in parts):
    return None
  return jackknife_interval(float(np.mean(values)), np.mean(parts, axis=0).tolist())
