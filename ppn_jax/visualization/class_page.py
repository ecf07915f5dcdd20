"""Sections of the report on thresholds, confusion of classes, and errors by image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppn_jax.metrics.coco import format_metric
from ppn_jax.metrics.confusion import ImageResult
from ppn_jax.metrics.thresholds import MIN_OBJECTS, ThresholdAnalysis
from ppn_jax.visualization.html_page import Section, Table, class_swatches, plot
from ppn_jax.visualization.plotting import MUTED, class_rgb, draw_message, short
from ppn_jax.visualization.plotting import plot as open_plot

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SHOWN_CLASSES = 7  # Drawn in colour and named; the others are grey.
_WITH_NUMBERS = 25  # Up to so many classes, the cells of the matrix show their numbers.
_DRAWN = 80  # Classes of the matrix, at most.
_LISTED = 20  # Confusions and images.
_NOTHING = 'nothing'


def thresholds(names: Sequence[str], analysis: ThresholdAnalysis,
               voc_ap50: Sequence[float | None]) -> Section:
  """Builds the section on precision, recall and F1 over score thresholds.

  Args:
    names: of the classes, in order of label.
    analysis: see `metrics.thresholds`.
    voc_ap50: VOC's AP50 of each class, and of all.
  """
  choices = (*analysis.classes, analysis.every)
  table = Table(
      ('class', 'threshold', 'precision', 'recall', 'F1', 'VOC AP50', 'objects'),
      [(c.name, *(format_metric(v) for v in (c.threshold, c.precision, c.recall, c.f1, ap)),
        f'{c.objects:,}') for c, ap in zip(choices, voc_ap50, strict=True)],
      'Best thresholds; the last line is one for all classes',
      (*class_swatches(range(len(names))), '#ffffff'))
  return Section(
      'Thresholds', 'Of detections that score at least the threshold, at IoU 0.5. The best '
      'threshold of a class, marked, has the highest F1; classes with fewer than '
      f'{MIN_OBJECTS} objects or nothing correct take that of all classes. `ppn detect` and '
      '`ppn_jax.load` use them where no threshold is given.',
      tables=[table], groups=[plot(_draw_curves(names, analysis), 'metrics over thresholds')])


def _draw_curves(names: Sequence[str], analysis: ThresholdAnalysis) -> np.ndarray:
  known = [k for k, curve in enumerate(analysis.curves) if curve is not None]
  if not known:
    return draw_message('no detection is correct')
  order = sorted(known, key=lambda k: -analysis.classes[k].objects)
  with open_plot(14.5, 3.8) as picture:
    for axes, field in zip(picture.figure.subplots(1, 3), ('precision', 'recall', 'f1'),
                           strict=True):
      for at, k in reversed(list(enumerate(order))):
        shown = at < _SHOWN_CLASSES
        curve, best = analysis.curves[k], analysis.classes[k]
        colour = class_rgb(k) if shown else MUTED
        axes.step(curve.scores, getattr(curve, field), where='post', color=colour,
                  linewidth=1.6 if shown else 0.7, alpha=1 if shown else 0.35,
                  label=short(names[k]) if shown else None)
        if shown and getattr(best, field) is not None:
          axes.plot(best.threshold, getattr(best, field), 'o', color=colour, markersize=5)
      axes.set(title=f'{"F1" if field == "f1" else field.capitalize()} over the threshold',
               xlim=(0, 1), ylim=(0, 1.02), xlabel='threshold')
      if field == 'recall':
        axes.legend(loc='upper right', reverse=True)
  return picture.pixels


def confusion(names: Sequence[str], matrix: np.ndarray) -> Section:
  """Builds the section on which classes are taken for which.

  Args:
    names: of the classes, in order of label.
    matrix: see `confusion.confusion_matrix`.
  """
  off = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)[:-1, :-1]
  order = np.argsort(-off, axis=None, kind='stable')[:_LISTED]
  pairs = [(int(k) // len(names), int(k) % len(names)) for k in order if off.flat[k]]
  involved = np.flatnonzero(matrix.sum(axis=0)[:-1] + matrix.sum(axis=1)[:-1])
  most = sorted(involved.tolist(), key=lambda k: -matrix[k].sum())[:_DRAWN]
  shown = sorted(most)
  table = Table(('object', 'found as', 'times', 'of its objects'),
                [(names[a], names[b], f'{matrix[a, b]:,}', f'{matrix[a, b] / matrix[a].sum():.1%}')
                 for a, b in pairs], 'Most frequent confusions', words=(1,))
  return Section(
      'Confusion of classes', 'At the best thresholds. Objects by row, what they were found as by '
      'column, at IoU 0.5, one to one; detections of the right class are assigned first. The last '
      'column counts missed objects, the last row detections where there is no object. Colours are '
      'shares of the row.' + (f' The picture shows the {len(shown)} classes with the most objects.'
                             if len(shown) < len(names) else ''),
      tables=[table] if pairs else (),
      groups=[plot(_draw_matrix([*(names[k] for k in shown), _NOTHING],
                                matrix[np.ix_([*shown, -1], [*shown, -1])]), 'confusion matrix')])


def _draw_matrix(names: Sequence[str], matrix: np.ndarray) -> np.ndarray:
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  side = 2.4 + (0.42 if len(names) <= _WITH_NUMBERS else 0.2) * len(names)
  with open_plot(side, side) as picture:
    axes: Axes = picture.figure.subplots()
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    if len(names) <= _WITH_NUMBERS:
      for a, b in np.argwhere(matrix):
        axes.text(b, a, f'{matrix[a, b]:,}', ha='center', va='center', fontsize=7,
                  color='white' if share[a, b] > 0.6 else '#333333')
    axes.set_xticks(range(len(names)), [short(name) for name in names], rotation=90)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.tick_params(labelsize=8 if len(names) <= _WITH_NUMBERS else 6)
    axes.grid(visible=False)
    axes.set(xlabel='found as', ylabel='object')
  return picture.pixels


def images(results: Sequence[ImageResult]) -> Section:
  """Builds the section on the images with the most errors; see `confusion.image_results`."""
  counts = ('errors', 'objects', 'correct', 'confused', 'background', 'missed')
  rows = [(r.file_name or str(r.image_id), *(f'{getattr(r, name):,}' for name in counts))
          for r in results[:_LISTED]]
  table = Table(('image', 'errors', 'objects', 'correct', 'wrong class', 'no object', 'missed'),
                rows, f'The {len(rows)} images with the most errors')
  return Section('Errors by image', 'At the best thresholds and IoU 0.5. images.csv, beside this '
                 'page, lists all images.', tables=[table])
