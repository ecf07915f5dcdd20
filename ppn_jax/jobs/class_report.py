"""Thresholds, calibration, confusion and VOC's AP of the detections of an evaluated step."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax import storage
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.metrics import calibration, coco, confusion, matching, platt, thresholds, voc
from ppn_jax.metrics.confusion import ImageResult
from ppn_jax.metrics.matching import MatchedDetections
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.metrics.thresholds import ThresholdAnalysis
from ppn_jax.run import THRESHOLDS

IMAGES, CONFUSION = 'images.csv', 'confusion_matrix.csv'
NOTHING = '(nothing)'  # Names the row of detections without an object, and the column of missed.


@dataclasses.dataclass(frozen=True)
class ClassReport:
  """What the scores of a set of detections are good for.

  Attributes:
    names: of the classes, in order of label.
    analysis: precision, recall and F1 over thresholds, of calibrated scores if they are calibrated.
    point: best thresholds and calibration; None if no detection is correct.
    voc_ap50: VOC's AP50, the mean over classes; None without ground truth.
    voc_by_class: VOC's AP50 of each class, in order of label.
    matrix: see `confusion.confusion_matrix`, at the best thresholds.
    images: results of each image at the best thresholds, most errors first.
    held_out: expected calibration error and AP, before and after, by maps of the other half of the
      images; None if scores were not calibrated.
  """
  names: tuple[str, ...]
  analysis: ThresholdAnalysis
  point: OperatingPoint | None
  voc_ap50: float | None
  voc_by_class: tuple[float | None, ...]
  matrix: np.ndarray
  images: Sequence[ImageResult]
  held_out: Mapping[str, Any] | None = None


def check_method(method: str) -> None:
  """Raises InputError unless a method of calibration is known, or '' for none."""
  if method and method not in platt.METHODS:
    raise InputError(f'unknown calibration {method!r}; {did_you_mean(method, platt.METHODS)}')


def find_operating_point(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
                         categories: Sequence[Category]) -> OperatingPoint | None:
  """Returns the best threshold of each class; None if no detection is correct."""
  names = tuple(c.name for c in categories)
  analysis = thresholds.analyse(matching.match_detections(ground_truth, rows),
                                thresholds.count_objects(ground_truth), names)
  return _point(analysis, names)


def build_report(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
                 categories: Sequence[Category], *, num_levels: int, method: str = '',
                 floor: float = 0.05, scorer: str = 'hotcoco') -> ClassReport:
  """Analyses the detections on a data set.

  Args:
    ground_truth: COCO instances dict.
    rows: detections, see `coco.to_rows`; their scores are those of the detector.
    categories: in order of label.
    num_levels: L, of the pyramid.
    method: name of a calibration in `platt.METHODS` to fit, '' for none.
    floor: least score that a calibration is fitted to.
    scorer: see `coco.score`.
  """
  names = tuple(c.name for c in categories)
  objects = thresholds.count_objects(ground_truth)
  matched = matching.match_detections(ground_truth, rows)
  maps, held_out = (), None
  if method and matched.correct.any():
    maps = tuple(platt.METHODS[method](platt.detections_to_fit(matched, floor, num_levels),
                                       num_levels))
    held_out = _held_out(ground_truth, rows, matched, method, floor, num_levels, names, scorer)
    scores = platt.apply_by_level(maps, matched.score, matched.level)
    rows = [{**row, 'score': score} for row, score in zip(rows, scores.tolist(), strict=True)]
    matched = matching.match_detections(ground_truth, rows)
  analysis = thresholds.analyse(matched, objects, names)
  point = _point(analysis, names, method, maps)
  kept = np.zeros(len(rows), bool)
  if point is not None:
    by_id = {c.id: t for c, t in zip(categories, point.thresholds, strict=True)}
    kept = confusion.keep_from(rows, by_id)
  paired = confusion.pair(ground_truth, rows, kept)
  voc_ap50, voc_by_class = voc.voc_ap50(ground_truth, rows)
  return ClassReport(names, analysis, point, voc_ap50, tuple(voc_by_class.values()),
                     confusion.confusion_matrix(ground_truth, rows, paired),
                     confusion.image_results(ground_truth, rows, paired), held_out)


def _point(analysis: ThresholdAnalysis, names: tuple[str, ...], method: str = '',
           maps: tuple[platt.Platt, ...] = ()) -> OperatingPoint | None:
  best = analysis.by_label
  if best is None:
    return None
  return OperatingPoint(names, tuple(best.tolist()), method if maps else '', maps)


def _held_out(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
              matched: MatchedDetections, method: str, floor: float, num_levels: int,
              names: Sequence[str], scorer: str) -> dict[str, Any]:
  """Measures a calibration on images that it was not fitted to; see `ClassReport.held_out`.

  The same detections count before and after: those that score at least `floor` before.
  """
  num_images = len(ground_truth['images'])
  scores = platt.cross_fit(matched, floor, num_levels, platt.random_half(num_images),
                           platt.METHODS[method])
  counted = matched.score >= floor

  def measure(scores: np.ndarray) -> dict[str, Any]:
    there = matched._replace(score=scores).select(counted)
    ece = calibration.measure(there, num_images=num_images, num_levels=num_levels,
                              class_names=names, floor=0)['all']['ece']
    scored = [{**row, 'score': score} for row, score in zip(rows, scores.tolist(), strict=True)]
    return {'ece': ece, 'AP': coco.score(ground_truth, scored, scorer=scorer).metrics['AP']}

  return {'before': measure(matched.score), 'after': measure(scores)}


def write_report(folder: storage.Path, report: ClassReport, scored: Mapping[str, Any]) -> None:
  """Writes `THRESHOLDS`, `IMAGES` and `CONFUSION`, each atomically.

  Args:
    folder: to write to.
    report: to write.
    scored: see `coco.write_scores`.
  """
  choices = (*report.analysis.classes, report.analysis.every)
  write_operating_point(
      folder, report.point, scored, classes=[c._asdict() for c in choices],
      held_out=report.held_out, VOC_AP50=report.voc_ap50, VOC_AP50_by_class=report.voc_by_class)
  storage.write_text(folder / IMAGES, _table([
      (*ImageResult._fields, 'errors'), *((*r, r.errors) for r in report.images)]))
  storage.write_text(folder / CONFUSION, _table([
      ('object', *report.names, NOTHING),
      *((name, *row) for name, row in zip((*report.names, NOTHING), report.matrix.tolist(),
                                          strict=True))]))


def write_operating_point(folder: storage.Path, point: OperatingPoint | None,
                          scored: Mapping[str, Any], **about: Any) -> None:
  """Writes `THRESHOLDS`, which `Run.operating_point` reads; None is written as no thresholds."""
  described = point.describe() if point else {'thresholds': [], 'calibration': None}
  storage.write_text(folder / THRESHOLDS, json.dumps(
      {**described, **about, 'scored': scored}, indent=2, allow_nan=False) + '\n')


def _table(rows: Sequence[Sequence[Any]]) -> str:
  """Returns rows as CSV."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


def format_table(report: ClassReport) -> str:
  """Formats thresholds and VOC's AP by class, and what a calibration changed, as text."""
  lines = [thresholds.format_table(report.analysis,
                                   (*report.voc_by_class, report.voc_ap50))]
  if report.held_out:
    before, after = report.held_out['before'], report.held_out['after']
    show = coco.format_metric
    lines.append(f'calibration, on images that it was not fitted to: expected error '
                 f'{show(before["ece"], 4)} before, {show(after["ece"], 4)} after; AP '
                 f'{show(before["AP"], 4)} before, {show(after["AP"], 4)} after')
  return '\n'.join(lines)
