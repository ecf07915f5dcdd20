"""Builds the HTML page of the statistics of a data set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ppn_jax.detection.frame import show_size, sides_of
from ppn_jax.jobs.data_statistics import DataStatistics, box_sides, describe_anchor_fit
from ppn_jax.visualization import html_page
from ppn_jax.visualization.drawing import draw_boxes
from ppn_jax.visualization.html_page import Group, Picture, Section, Table
from ppn_jax.visualization.plotting import MUTED, class_rgb, level_colours, name_rows, plot

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SAMPLE_SIDE, _LISTED_CLASSES, _DOTS = 300, 60, 20_000
_WIDTH = 204  # Of an example on the page, so that six are in a row.


def data_page(title: str, found: DataStatistics, summary: Mapping[str, Any]) -> str:
  """Builds the page that `ppn data` writes.

  Args:
    title: of the page.
    found: the statistics.
    summary: of the statistics, see `data_statistics.summarize`.

  Returns:
    HTML, complete in itself.
  """
  source = ('as training uses them: augmented, in its order' if found.split == 'train' else
            'as evaluation reads them')
  has_boxes = len(found.boxes.label) > 0
  sections = [
      Section('Images', f'The first {_num_examples(found)} images at the '
              f'{show_size(found.image_size)} px of the network, {source}.',
              groups=[Group(_examples(found))]),
      Section('Sizes and shapes', 'Boxes in pixels of the network\'s input; crosses are the shapes '
              'of anchors, dark on the finest level.',
              groups=[html_page.plot(draw_shapes(found), 'sizes of boxes')] if has_boxes else ()),
      Section('Classes', tables=[_class_table(summary)],
              groups=[html_page.plot(draw_classes(found), 'boxes of each class')]),
      Section('Anchors', f'{describe_anchor_fit(summary)}.', tables=_fit_tables(summary),
              groups=[html_page.plot(draw_fit(found), 'how well anchors fit')] if has_boxes
              else ())]
  problems = [*found.report.warnings, *found.skipped]
  if problems:
    sections.append(Section('Left out, changed or wrong', tables=[
        Table(('problem',), [(line,) for line in problems])]))
  subtitle = (f'{found.num_images:,} of {found.total_images:,} images of {found.split}, '
              f'{len(found.boxes.label):,} boxes, {summary["images_without_boxes"]:,} images '
              f'without, {found.num_crowds:,} crowds')
  return html_page.render(title, subtitle, sections)


def _num_examples(found: DataStatistics) -> int:
  return sum(len(batch.valid) for batch in found.examples)


def _examples(found: DataStatistics) -> list[Picture]:
  """Draws the ground truth of the example images."""
  names, pictures = [c.name for c in found.categories], []
  for batch in found.examples:
    for row, image in enumerate(batch.images):
      truth = [column[row][batch.ground_truth.valid[row]] for column in batch.ground_truth]
      drawn = draw_boxes(image, truth[0], truth[1], names, min_side=_SAMPLE_SIDE, weight=1.2,
                         notes=['(crowd)' if crowd else '' for crowd in truth[2]])
      number = int(batch.image_id[row])
      caption = found.file_names.get(number, f'image {number}')
      pictures.append(html_page.picture(drawn, caption, caption, width=_WIDTH))
  return pictures


def draw_shapes(found: DataStatistics) -> np.ndarray:
  """Plots sides, aspect ratios, and width against height of boxes and anchors; u8 [H, W, 3]."""
  boxes, level = found.boxes, found.anchors.level
  colours = level_colours(level[-1] + 1)
  with plot(14.5, 4.3) as drawn:
    axes = drawn.figure.subplots(1, 3)
    sides = np.geomspace(max(1, boxes.side.min()), max(sides_of(found.image_size)), 40)
    axes[0].hist(boxes.side, sides, color=MUTED)
    size = box_sides(found.anchors.boxes, found.image_size)
    anchor_sides = np.sqrt(size.prod(axis=-1))
    for k, colour in enumerate(colours):
      for side in np.unique(anchor_sides[level == k].round(1)):
        axes[0].axvline(side, color=colour, linewidth=1.2)
    axes[0].set(title='Side of a square of the same area', xscale='log', xlabel='pixels')
    axes[1].hist(np.clip(boxes.ratio, 0.1, 10), np.geomspace(0.1, 10, 40), color=MUTED)
    axes[1].set(title='Width over height', xscale='log')
    chosen = np.random.default_rng(0).permutation(len(boxes.label))[:_DOTS]
    axes[2].scatter(boxes.width[chosen], boxes.height[chosen], s=4, linewidths=0, alpha=0.5,
                    color=[class_rgb(k) for k in boxes.label[chosen].tolist()])
    for k, colour in enumerate(colours):
      height, width = np.unique(size[level == k].round(1), axis=0).T
      axes[2].plot(width, height, 'x', color=colour, markersize=7, markeredgewidth=1.8,
                   label=f'level {k}')
    axes[2].set(title='Width against height', xscale='log', yscale='log', xlabel='width, pixels',
                ylabel='height, pixels')
    axes[2].legend(loc='upper left')
    for each in axes:
      _plain_numbers(each)
  return drawn.pixels


def _plain_numbers(axes: 'Axes') -> None:
  """Labels logarithmic axes with 20 and 50 instead of 2 x 10^1."""
  from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
  for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
    if scale == 'log':
      axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axis.set_major_formatter(ScalarFormatter())
      axis.set_minor_formatter(NullFormatter())


def draw_classes(found: DataStatistics) -> np.ndarray:
  """Plots the number of boxes of each class, the most frequent first; u8 [H, W, 3]."""
  count = np.bincount(found.boxes.label, minlength=len(found.categories))
  order = np.argsort(-count, kind='stable')[:_LISTED_CLASSES].tolist()
  with plot(9, 1.1 + 0.22 * len(order)) as drawn:
    axes = drawn.figure.subplots()
    axes.barh(range(len(order)), count[order], color=[class_rgb(k) for k in order], height=0.7)
    name_rows(axes, [found.categories[k].name for k in order], limit=24)
    more = '' if len(order) == len(count) else f', the {len(order)} most frequent'
    axes.set(title=f'Boxes by class{more}')
  return drawn.pixels


def draw_fit(found: DataStatistics) -> np.ndarray:
  """Plots the IoU with the best anchor, over all, by level and by side; u8 [H, W, 3]."""
  boxes, matched_iou = found.boxes, found.matching['matched_iou']
  num_levels = found.anchors.level[-1] + 1
  colours = level_colours(num_levels)
  with plot(14.5, 4) as drawn:
    axes = drawn.figure.subplots(1, 3)
    by_level = [boxes.best_iou[boxes.best_level == k] for k in range(num_levels)]
    axes[0].hist(by_level, np.linspace(0, 1, 41), stacked=True, color=colours,
                 label=[f'level {k}' for k in range(num_levels)])
    axes[0].axvline(matched_iou, color='#d55e00', linewidth=1.5)
    axes[0].legend(loc='upper left')
    axes[0].set(title=f'IoU with the best anchor; line: matched_iou={matched_iou:g}', xlim=(0, 1))
    for k, (found_here, colour) in enumerate(zip(by_level, colours, strict=True)):
      fits = int((found_here >= matched_iou).sum())
      axes[1].bar(k, fits, color=colour)
      axes[1].bar(k, len(found_here) - fits, bottom=fits, color=colour, alpha=0.3)
    axes[1].set(title='Boxes by the level of their best anchor',
                xlabel='level; pale: IoU below matched_iou', xticks=range(num_levels))
    axes[1].grid(axis='x', visible=False)
    _unfit_by_side(axes[2], boxes.side, boxes.best_iou < matched_iou)
  return drawn.pixels


def _unfit_by_side(axes: 'Axes', side: np.ndarray, unfit: np.ndarray) -> None:
  """Plots the share of unfit boxes against the side of the box."""
  edges = np.geomspace(max(1, side.min()), side.max() * 1.001 + 1, 16)
  index = np.digitize(side, edges) - 1
  count = np.bincount(index, minlength=len(edges))[:len(edges) - 1]
  share = np.bincount(index, unfit, len(edges))[:len(edges) - 1] / np.maximum(count, 1)
  axes.stairs(np.where(count, share, np.nan), edges, fill=True, color='#d55e00', alpha=0.75)
  axes.set(title='Share that no anchor fits, by side', xscale='log', ylim=(0, 1), xlabel='pixels')
  _plain_numbers(axes)


def _class_table(summary: Mapping[str, Any]) -> Table:
  rows = [(g['name'], f'{g["boxes"]:,}', f'{g["images"]:,}', _show(g['median_side'], '.0f'),
           _show(g['anchors_a_box'], '.1f'), _show(g['unfit'], '.1%'))
          for g in summary['by_class']]
  return Table(('class', 'boxes', 'images', 'median side', 'anchors per box', 'no anchor fits'),
               rows, colours=html_page.class_swatches(range(len(rows))))


def _fit_tables(summary: Mapping[str, Any]) -> list[Table]:
  shared = lambda g: (g['name'], f'{g["boxes"]:,}', _show(g['best_iou'], '.2f'),
                      _show(g['anchors_a_box'], '.1f'), _show(g['unfit'], '.1%'))
  header = ('boxes', 'best IoU', 'anchors per box', 'no anchor fits')
  levels = [(*shared(g), f'{g["anchors"]:,}', '{:.0f} to {:.0f}'.format(*g['anchor_sides']),
             f'{g["positives_an_image"]:.1f}') for g in summary['by_level']]
  return [Table(('level', *header, 'anchors', 'of side', 'positives per image'), levels,
                'By the level of the best anchor'),
          Table(('side', *header), [shared(g) for g in summary['by_side'] if g['boxes']],
                'By side of the box, pixels')]


def _show(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)
