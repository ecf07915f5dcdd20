"""The evaluation of a step as one HTML page."""

from collections.abc import Mapping, Sequence

import numpy as np

from ppn_jax.metrics import calibration, coco, error_analysis, matching
from ppn_jax.metrics.error_analysis import KINDS
from ppn_jax.visualization import calibration_plot, curves
from ppn_jax.visualization.gallery import Gallery, Shown
from ppn_jax.visualization.html_page import (
  Group,
  Section,
  Table,
  class_swatches,
  picture,
  plot,
  render,
)

_MISTAKES, _IMAGES = 6, 6  # Shown of each kind, and of best and worst.
_PAIR_WIDTH, _CROP_WIDTH = 628, 200
_MEANS = {
    'missed': 'no detection found it, nor was one meant for it',
    'duplicate': 'the object has a better detection already',
    'wrong class': 'IoU of 0.5 and more with an object of another class',
    'poorly placed': 'IoU of 0.1 to 0.5 with an object of its class',
    'wrong class and place': 'IoU of 0.1 to 0.5 with an object of another class',
    'background': 'IoU below 0.1 with every object'}


def evaluation_page(title: str, gallery: Gallery, scores: coco.Scores,
                    metrics: Sequence[Mapping[str, float | None]], *, num_levels: int,
                    floor: float = 0.05, scorer: str = 'hotcoco') -> str:
  """All that is known of an evaluated step.

  Args:
    title: of the page.
    gallery: the evaluation data and what was found in it.
    scores: COCO's figures of the gallery's rows.
    metrics: lines of the run's `metrics.jsonl`.
    num_levels: L, of the pyramid.
    floor: least score that enters the plots of reliability.
    scorer: see `coco.score`.

  Returns:
    HTML, complete in itself.
  """
  names = [c.name for c in gallery.categories]
  table = coco.precision_table(gallery.truth, gallery.rows, scorer=scorer)
  sections = [
      _figures(scores),
      Section('Training', groups=[plot(curves.training(metrics), 'curves of training')]),
      Section('Precision and recall', groups=[
          plot(curves.precision_recall(table, names), 'precision against recall')]),
      Section('By class and size', groups=[
          plot(curves.average_precision(table, names), 'average precision by class and size')]),
      _mistakes(gallery, scorer),
      _images('Worst images', gallery.worst(_IMAGES)),
      _images('Best images', gallery.best(_IMAGES)),
      _reliability(gallery, names, num_levels, floor)]
  subtitle = (f'{scores.num_detections:,} detections on {scores.num_images:,} images. A class has '
              'the same colour in every picture.')
  return render(title, subtitle, sections)


def _figures(scores: coco.Scores) -> Section:
  show = coco.format_metric
  figures = Table(('', 'value', ''), [(name, show(value), coco.MEANING[name])
                                      for name, value in scores.metrics.items()],
                  "COCO's twelve figures", words=(2,))
  classes = Table(('class', 'AP', 'AP50', 'boxes'),
                  [(c.name, show(c.ap), show(c.ap50), f'{c.num_boxes:,}')
                   for c in scores.per_class], 'By class',
                  class_swatches(range(len(scores.per_class))))
  return Section('Figures', tables=[figures, classes])


def _mistakes(gallery: Gallery, scorer: str) -> Section:
  """Counts are of what is drawn; costs, as TIDE has them, of all detections."""
  counts = gallery.errors.counts()
  costs = error_analysis.costs(gallery.truth, gallery.rows,
                            error_analysis.classify(gallery.truth, gallery.rows), scorer=scorer)
  groups = [plot(curves.errors(counts, costs), 'cost and number of mistakes of each kind')]
  for kind in KINDS:
    if shown := gallery.mistakes(kind, _MISTAKES):
      groups.append(Group(_pictures(shown, _CROP_WIDTH), f'{kind.capitalize()}: {_MEANS[kind]}'))
  return Section(
      'Mistakes by kind',
      'Kinds and costs as defined by TIDE (Bolya et al., ECCV 2020). A cost is what AP50 would '
      'gain if this kind alone were mended, over all detections; costs do not add up. Numbers and '
      f'pictures are of detections of score {gallery.threshold:g} and more, the surest mistakes '
      'first; dashes are the truth.', groups=groups)


def _images(heading: str, shown: Sequence[Shown]) -> Section:
  return Section(
      heading, 'Truth on the left, detections on the right, mistakes named. Quality is F1 with '
      'detections counted by their scores, 0 to 1.', groups=[Group(_pictures(shown, _PAIR_WIDTH))])


def _pictures(shown: Sequence[Shown], width: int):
  return [picture(s.image, s.caption, s.caption, width=min(width, np.shape(s.image)[1]))
          for s in shown]


def _reliability(gallery: Gallery, names: Sequence[str], num_levels: int, floor: float) -> Section:
  judged = matching.judge(gallery.truth, gallery.rows)
  measured = calibration.measure(judged, num_images=len(gallery.truth['images']),
                                 num_levels=num_levels, class_names=names, floor=floor)
  ece = measured['all']['ece']
  said = '' if ece is None else f' Expected calibration error of all: {ece:.3f}.'
  return Section(
      'Reliability of scores', 'Of detections of about the same score, the share that is right at '
      f'IoU 0.5; scores of {floor:g} and more, bands of 95%.{said} `ppn evaluate --calibration` '
      'tells more.',
      groups=[plot(calibration_plot.reliability(measured), 'precision against score')])

