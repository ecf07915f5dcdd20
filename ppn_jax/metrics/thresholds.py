"""Precision, recall and F1 over score thresholds, and the best threshold of each class.

Detections are matched as COCO does at IoU 0.5. That matching goes by score, so what is correct
does not depend on a threshold: one matching gives the values at all of them. The best threshold of
a class is that of its highest F1, 2 correct / (detections + objects). It lies in the middle between
the last score that it keeps and the next, so that rounding in another runtime does not change what
is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection.structures import Array
from ppn_jax.metrics.matching import MatchedDetections

# With fewer objects, the best threshold of a class is chance; it takes that of all classes.
MIN_OBJECTS = 10


class ThresholdCurve(NamedTuple):
  """Precision, recall and F1 at N thresholds: the scores of a class's detections, descending.

  At least one of them is correct.
  """
  scores: Array  # f64 [N], without repetitions.
  precision: Array  # f64 [N], of detections that score at least as much.
  recall: Array  # f64 [N].
  f1: Array  # f64 [N].


class ThresholdChoice(NamedTuple):
  """A threshold, and what it gives on the data that it was chosen on.

  Attributes:
    name: of the class, or 'all'.
    threshold: least score to keep, 0 to 1; None if nothing is correct at any.
    precision, recall, f1: of detections that score at least that; None where undefined.
    objects: ground-truth boxes, without crowds.
  """
  name: str
  threshold: float | None
  precision: float | None
  recall: float | None
  f1: float | None
  objects: int


class ThresholdAnalysis(NamedTuple):
  """Curves and best thresholds of a set of detections.

  Attributes:
    curves: of each class in order of label; None for a class without a correct detection.
    classes: best threshold of each class.
    every: one threshold for all classes, that of the highest F1 over all detections.
  """
  curves: tuple[ThresholdCurve | None, ...]
  classes: tuple[ThresholdChoice, ...]
  every: ThresholdChoice

  @property
  def by_label(self) -> np.ndarray | None:
    """Best thresholds in order of label, f64 [C]; None if there are none."""
    if self.every.threshold is None:
      return None
    return np.array([c.threshold for c in self.classes])


def analyse(matched: MatchedDetections, objects: Sequence[int], names: Sequence[str]
            ) -> ThresholdAnalysis:
  """Computes curves and best thresholds of all classes.

  A class of fewer than `MIN_OBJECTS` objects, or without a correct detection, gets the threshold of
  all classes together.

  Args:
    matched: all detections, matched at IoU 0.5.
    objects: number of ground-truth boxes of each class, without crowds.
    names: of the classes, in order of label.
  """
  matched = matched.at_least(0)
  by_class = [matched.select(matched.label == k) for k in range(len(names))]
  curves = tuple(threshold_curve(m, n) for m, n in zip(by_class, objects, strict=True))
  every = _best('all', threshold_curve(matched, sum(objects)), sum(objects))
  classes = []
  for name, curve, of_class, count in zip(names, curves, by_class, objects, strict=True):
    if curve is not None and count >= MIN_OBJECTS:
      classes.append(_best(name, curve, count))
    else:
      classes.append(_at(name, every.threshold, of_class, count))
  return ThresholdAnalysis(curves, tuple(classes), every)


def threshold_curve(matched: MatchedDetections, objects: int) -> ThresholdCurve | None:
  """Computes precision, recall and F1 at every score; None without a correct detection.

  Args:
    matched: detections, none of them ignored.
    objects: number of ground-truth boxes that they were matched to.
  """
  if not matched.correct.any():
    return None
  order = np.argsort(-matched.score, kind='stable')
  scores, hits = matched.score[order], np.cumsum(matched.correct[order])
  last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # Of those of equal score.
  hits, kept = hits[last], last + 1
  return ThresholdCurve(scores[last], hits / kept, hits / objects, 2 * hits / (kept + objects))


def _best(name: str, curve: ThresholdCurve | None, objects: int) -> ThresholdChoice:
  """Returns the threshold of the highest F1, of several the highest threshold."""
  if curve is None:
    return ThresholdChoice(name, None, None, None, None, objects)
  at = int(np.argmax(curve.f1))
  below = curve.scores[at + 1] if at + 1 < len(curve.scores) else 0.0
  return ThresholdChoice(name, float(curve.scores[at] + below) / 2, float(curve.precision[at]),
                         float(curve.recall[at]), float(curve.f1[at]), objects)


def _at(name: str, threshold: float | None, matched: MatchedDetections, objects: int
        ) -> ThresholdChoice:
  """Returns what a given threshold gives for a class."""
  if threshold is None:
    return ThresholdChoice(name, None, None, None, None, objects)
  kept = matched.score >= threshold
  correct, count = int(matched.correct[kept].sum()), int(kept.sum())
  ratio = lambda a, b: a / b if b else None
  return ThresholdChoice(name, threshold, ratio(correct, count), ratio(correct, objects),
                         ratio(2 * correct, count + objects), objects)


def count_objects(ground_truth: Mapping[str, Any]) -> list[int]:
  """Returns the number of ground-truth boxes of each class, without crowds, in order of label."""
  ids = sorted(c['id'] for c in ground_truth['categories'])
  counts = dict.fromkeys(ids, 0)
  for annotation in ground_truth['annotations']:
    counts[annotation['category_id']] += not annotation.get('iscrowd', 0)
  return [counts[i] for i in ids]


def format_table(analysis: ThresholdAnalysis, voc_ap50: Sequence[float | None]) -> str:
  """Formats the thresholds of classes with objects as aligned text; '-' where there is no value.

  Args:
    analysis: to show.
    voc_ap50: VOC's AP50 of each class, and of all.
  """
  show = lambda value: f'{"-" if value is None else format(value, ".3f"):>9}'
  choices = (*analysis.classes, analysis.every)
  width = max(len('class'), *(len(c.name) for c in choices))
  lines = [f'{"class":<{width}}  threshold  precision     recall         F1    VOC AP50']
  lines += [f'{c.name:<{width}}  ' + '  '.join(
      show(v) for v in (c.threshold, c.precision, c.recall, c.f1, ap))
      for c, ap in zip(choices, voc_ap50, strict=True) if c.objects or c is analysis.every]
  return '\n'.join(lines)
