"""Builds the HTML report of an evaluated step."""

from collections.abc import Mapping, Sequence

import numpy as np

from ppn_jax.metrics import calibration, coco, error_analysis, matching
from ppn_jax.metrics.error_analysis import KINDS
from ppn_jax.visualization import calibration_plot, curves
from ppn_jax.visualization.gallery import CaptionedImage, Gallery
from ppn_jax.visualization.html_page import (
  Group,
  Picture,
  Section,
  Table,
  class_swatches,
  picture,
  plot,
  render,
)

_MISTAKES, _IMAGES = 6, 6  # Number shown of each kind, and of best and worst.
_PAIR_WIDTH, _CROP_WIDTH = 628, 200
_DESCRIPTIONS = {
    'missed': 'no detection matches it or, but for its class or place, would match it',
    'duplicate': 'the object already has a better detection',
    'wrong class': 'IoU of 0.5 and more with an object of another class',
    'poorly placed': 'IoU of 0.1 to 0.5 with an object of its class',
    'wrong class and place': 'IoU of 0.1 to 0.5 with an object of another class',
    'background': 'IoU below 0.1 with every object'}


def evaluation_page(title: str, gallery: Gallery, scores: coco.Scores,
                    metrics: Sequence[Mapping[str, float | None]], *, num_levels: int,
                    floor: float = 0.05, scorer: str = 'hotcoco',
                    more: Sequence[Section] = ()) -> str:
  """Builds a page of metrics, curves, errors, example images and reliability of a step.

  Args:
    title: of the page.
    gallery: the evaluation data and its detections.
    scores: of the gallery's rows.
    metrics: lines of the run's `metrics.jsonl`; none of a file, and no section then.
    num_levels: L, of the pyramid.
    floor: least score that counts in the plots of reliability.
    scorer: see `coco.score`.
    more: further sections, shown after the curves; see `class_page`.

  Returns:
    HTML, complete in itself.
  """
  names = [c.name for c in gallery.categories]
  table = coco.precision_table(gallery.ground_truth, gallery.rows, scorer=scorer)
  sections = [
      _metrics(scores),
      *([Section('Training', groups=[plot(curves.training(metrics), 'curves of training')])]
        if metrics else []),
      Section('Precision and recall', groups=[
          plot(curves.precision_recall(table, names), 'precision against recall')]),
      Section('By class and size', groups=[
          plot(curves.average_precision(table, names), 'average precision by class and size')]),
      *more,
      _mistakes(gallery),
      _images('Worst images', gallery.worst(_IMAGES)),
      _images('Best images', gallery.best(_IMAGES)),
      _reliability(gallery, names, num_levels, floor)]
  subtitle = (f'{scores.num_detections:,} detections on {scores.num_images:,} images. A class has '
              'the same colour in every picture.')
  return render(title, subtitle, sections)


def _metrics(scores: coco.Scores) -> Section:
  show = coco.format_metric
  metrics = Table(('', 'value', ''), [(name, show(value), coco.DESCRIPTIONS[name])
                                      for name, value in scores.metrics.items()],
                  "COCO's twelve metrics", words=(2,))
  classes = Table(('class', 'AP', 'AP50', 'boxes'),
                  [(c.name, show(c.ap), show(c.ap50), f'{c.num_boxes:,}')
                   for c in scores.per_class], 'By class',
                  class_swatches(range(len(scores.per_class))))
  return Section('Metrics', tables=[metrics, classes])


def _mistakes(gallery: Gallery) -> Section:
  """Counts errors among the detections that are drawn; costs, as in TIDE, are of all detections."""
  costs = error_analysis.costs(gallery.ground_truth, gallery.rows)
  groups = [plot(curves.errors(gallery.errors.counts(), costs),
                 'cost and number of mistakes of each kind')]
  for kind in KINDS:
    if mistakes := gallery.mistakes(kind, _MISTAKES):
      groups.append(Group(_pictures(mistakes, _CROP_WIDTH),
                          f'{kind.capitalize()}: {_DESCRIPTIONS[kind]}'))
  return Section(
      'Mistakes by kind',
      'Kinds and costs as defined by TIDE (Bolya et al., ECCV 2020). A cost is the AP50 gained by '
      'fixing this kind alone, over all detections; costs do not add up. Numbers and pictures are '
      f'of detections that score at least {gallery.threshold:g}, highest scores first; ground '
      'truth is dashed.', groups=groups)


def _images(heading: str, images: Sequence[CaptionedImage]) -> Section:
  return Section(
      heading, 'Ground truth on the left, detections on the right, mistakes named. Quality is F1 '
      'with detections weighted by their scores, 0 to 1.',
      groups=[Group(_pictures(images, _PAIR_WIDTH))])


def _pictures(images: Sequence[CaptionedImage], width: int) -> list[Picture]:
  return [picture(i.image, i.caption, i.caption, width=min(width, np.shape(i.image)[1]))
          for i in images]


def _reliability(gallery: Gallery, names: Sequence[str], num_levels: int, floor: float) -> Section:
  matched = matching.match_detections(gallery.ground_truth, gallery.rows)
  measured = calibration.measure(matched, num_images=len(gallery.ground_truth['images']),
                                 num_levels=num_levels, class_names=names, floor=floor)
  ece = measured['all']['ece']
  overall = '' if ece is None else f' Expected calibration error of all: {ece:.3f}.'
  return Section(
      'Reliability of scores', 'Share of detections of about the same score that is correct at IoU '
      f'0.5; scores from {floor:g} on, with 95% bands.{overall} `ppn evaluate --calibration` '
      'reports more.',
      groups=[plot(calibration_plot.draw_reliability(measured), 'precision against score')])

