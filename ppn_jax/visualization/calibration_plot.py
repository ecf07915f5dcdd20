"""Plots of the calibration report."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppn_jax import storage
from ppn_jax.visualization.drawing import save_picture
from ppn_jax.visualization.plotting import (
  MUTED,
  SIZE_COLOURS,
  STRONG,
  class_rgb,
  level_colours,
  name_rows,
  plain,
  plot,
  short,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SHOWN_CLASSES = 7  # Drawn in colour and named; the others are grey.
_LISTED_CLASSES = 20


def save(path: storage.Path, report: Mapping[str, Any], title: str) -> None:
  """Draws a report of `jobs.calibration_report` and writes it as PNG.

  Args:
    path: of the file; its folder is created if needed.
    report: what `calibration_report.build_report` returns.
    title: of the picture.
  """
  with plot(14.5, 12.6) as picture:
    axes = picture.figure.subplots(3, 3).ravel()
    colours = level_colours(len(report['by_level']))
    levels = _level_names(report)
    _draw_reliability(axes[:3], report)
    _draw_scores(axes[3], report['by_level'], levels, colours)
    _draw_gaps(axes[4], report, levels, colours)
    _draw_positives(axes[5], report['training'], colours)
    _draw_ece(axes[6], report, levels, colours)
    _draw_ece_by_class(axes[7], report['by_class'])
    _draw_costs(axes[8], report)
    picture.figure.suptitle(
        f'{plain(title)}: {report["all"]["detections"]:,} detections of score {report["floor"]:g} '
        f'and more on {report["num_images"]:,} images, correct at IoU {report["min_iou"]:g}',
        x=0.008, ha='left', fontsize=13)
  save_picture(path, picture.pixels)


def draw_reliability(measured: Mapping[str, Any]) -> np.ndarray:
  """Draws reliability diagrams, precision against score, by level, size and class.

  Args:
    measured: what `calibration.measure` returns.

  Returns:
    u8 [H, W, 3].
  """
  with plot(14.5, 4.4) as picture:
    _draw_reliability(picture.figure.subplots(1, 3), measured)
  return picture.pixels


def _draw_reliability(axes: Sequence['Axes'], report: Mapping[str, Any]) -> None:
  _draw_diagram(axes[0], 'By pyramid level', report['by_level'], _level_names(report),
                level_colours(len(report['by_level'])))
  _draw_diagram(axes[1], 'By size of the detection', report['by_size'],
                [g['name'] for g in report['by_size']], SIZE_COLOURS)
  _draw_diagram_of_classes(axes[2], report['by_class'])


def _level_names(report: Mapping[str, Any]) -> list[str]:
  return [f'level {g["name"]}' for g in report['by_level']]


def _draw_diagram(axes: 'Axes', title: str, groups: Sequence[Mapping], names: Sequence[str],
                  colours: Sequence) -> None:
  """Draws precision against the mean score of each bin, with Wilson's intervals."""
  axes.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
  for group, name, colour in zip(groups, names, colours, strict=True):
    if group['bins']:
      x, y = _points(group)
      ends = np.array([b['precision_interval'] for b in group['bins']])
      axes.fill_between(x, ends[:, 0], ends[:, 1], color=colour, alpha=0.13, linewidth=0)
      axes.plot(x, y, color=colour, marker='o', markersize=3.5, linewidth=1.6,
                label=f'{name} ({group["detections"]:,})')
  axes.set(title=f'{title}: precision at a score', xlim=(0, 1), ylim=(0, 1),
           xlabel='mean score of the bin', ylabel='precision')
  axes.text(0.97, 0.9, 'calibrated', color=MUTED, ha='right', rotation=40, fontsize=7.5)
  if axes.get_legend_handles_labels()[1]:
    axes.legend(loc='upper left')


def _draw_diagram_of_classes(axes: 'Axes', groups: Sequence[Mapping]) -> None:
  order = np.argsort([-g['detections'] for g in groups], kind='stable')
  first = set(order[:_SHOWN_CLASSES].tolist())
  for k, group in enumerate(groups):
    if k not in first and group['bins']:
      axes.plot(*_points(group), color=MUTED, alpha=0.35, linewidth=0.7)
  shown = sorted(first)
  _draw_diagram(axes, 'By class', [groups[k] for k in shown],
                [short(groups[k]['name']) for k in shown], [class_rgb(k) for k in shown])


def _points(group: Mapping) -> tuple[list[float], list[float]]:
  return ([b['mean_score'] for b in group['bins']], [b['precision'] for b in group['bins']])


def _draw_scores(axes: 'Axes', groups: Sequence[Mapping], names: Sequence[str],
                 colours: Sequence) -> None:
  for group, name, colour in zip(groups, names, colours, strict=True):
    if group['detections']:
      share = np.array(group['histogram']['counts']) / group['detections']
      axes.stairs(share, group['histogram']['edges'], color=colour, linewidth=1.6, label=name)
  axes.set(title='Scores by level', xlabel='score', ylabel="share of the level's detections",
           xlim=(0, 1), yscale='log')
  if axes.get_legend_handles_labels()[1]:
    axes.legend(loc='upper right', frameon=True, framealpha=0.85, edgecolor='none')


def _draw_gaps(axes: 'Axes', report: Mapping, names: Sequence[str], colours: Sequence) -> None:
  groups = [*report['by_level'], *report['by_size'], report['all']]
  for at, (group, colour) in enumerate(zip(groups, (*colours, *SIZE_COLOURS, STRONG),
                                           strict=True)):
    if group['gap'] is not None:
      axes.plot(group['gap_interval'], [at, at], color=colour, linewidth=2)
      axes.plot(group['gap'], at, 'o', color=colour, markersize=6)
  axes.axvline(0, color=MUTED, linewidth=1)
  name_rows(axes, [*names, *(g['name'] for g in report['by_size']), 'all'])
  axes.set(title='Mean score minus precision', xlabel='← underconfident        overconfident →')


def _draw_ece(axes: 'Axes', report: Mapping, names: Sequence[str], colours: Sequence) -> None:
  groups = [*report['by_level'], *report['by_size'], report['all']]
  _draw_bars(axes, groups, (*colours, *SIZE_COLOURS, STRONG))
  name_rows(axes, [*names, *(g['name'] for g in report['by_size']), 'all'])
  axes.set(title='Expected calibration error', xlabel='ECE (white tick: by chance alone)')


def _draw_ece_by_class(axes: 'Axes', groups: Sequence[Mapping]) -> None:
  order = np.argsort([-g['detections'] for g in groups], kind='stable')[:_LISTED_CLASSES]
  _draw_bars(axes, [groups[k] for k in order], [class_rgb(k) for k in order.tolist()])
  name_rows(axes, [groups[k]['name'] for k in order])
  which = '' if len(groups) <= _LISTED_CLASSES else f', the {_LISTED_CLASSES} most detected'
  axes.set(title=f'ECE by class{which}', xlabel='ECE (white tick: by chance alone)')


def _draw_bars(axes: 'Axes', groups: Sequence[Mapping], colours: Sequence) -> None:
  for at, (group, colour) in enumerate(zip(groups, colours, strict=True)):
    if group['ece'] is None:
      continue
    axes.barh(at, group['ece'], color=colour, height=0.62)
    for colour, width in (('white', 3), ('black', 1.2)):
      axes.plot(group['ece_interval'], [at, at], color=colour, linewidth=width)
    for colour, width in (('black', 3.2), ('white', 1.8)):
      axes.plot([group['ece_by_chance']] * 2, [at - 0.3, at + 0.3], color=colour, linewidth=width,
                solid_capstyle='butt')
  axes.set_xlim(left=0)


def _draw_positives(axes: 'Axes', training: Mapping, colours: Sequence) -> None:
  axes.set_title('What each level was trained on')
  if 'absent' in training:
    reason = plain(textwrap.fill(training['absent'], 42, max_lines=6))
    axes.text(0.02, 0.9, f'not counted:\n{reason}', va='top', color=MUTED,
              transform=axes.transAxes)
    axes.set_axis_off()
    return
  levels, images = training['by_level'], max(training['images'], 1)
  for at, (level, colour) in enumerate(zip(levels, colours, strict=True)):
    for side, key, alpha in ((-0.2, 'positives', 1), (0.2, 'boxes', 0.45)):
      value = level[key] / images
      axes.bar(at + side, value, width=0.38, color=colour, alpha=alpha)
      axes.annotate(f'{value:.2g}', (at + side, value), xytext=(0, 2), ha='center',
                    textcoords='offset points', fontsize=7.5, color='#333333')
  axes.set_xticks(range(len(levels)),
                  [f'level {g["name"]}\n{g["anchors"]:,} anchors' for g in levels], fontsize=8)
  axes.set_ylabel(f'an image, over {training["images"]:,} training images')
  axes.grid(axis='x', visible=False)
  axes.text(0.98, 0.97,
            'solid: positive anchors\npale: ground-truth boxes whose\nbest anchor is there',
            ha='right', va='top', transform=axes.transAxes, fontsize=8, color='#555555')


def _draw_costs(axes: 'Axes', report: Mapping) -> None:
  """Writes AP, AP recalibrated, and the spread as text; the differences are too small for bars."""
  axes.set_axis_off()
  axes.set_title('Cost of differences between levels')
  costs, spread = report['recalibration'], report['spread']
  table = [('', 'AP', 'AP50')]
  for name, key in (('scores as they are', 'as_is'), ('one map for all levels', 'one_map'),
                    ('a map for each level', 'map_per_level')):
    table.append((name, *(_number(costs[key][f], '.4f') for f in ('AP', 'AP50'))))
  table.append(('cost: third minus second', *(_number(costs['cost'][f], '+.4f')
                                             for f in ('AP', 'AP50'))))
  table.append(('   95% interval', *(_range(costs['cost_interval'][f], '+.4f')
                                     for f in ('AP', 'AP50'))))
  halves = '  '.join(_number(m['score_at_half'], '.2f') for m in costs['maps'])
  table += [('', '', ''), ('spread between levels', '', '95% interval'),
            ('of score minus precision', _number(spread['gap'], '.3f'),
             _range(spread['gap_interval'], '.3f')),
            ('of precision at equal score', _number(spread['at_equal_score'], '.3f'),
             _range(spread['at_equal_score_interval'], '.3f')),
            ('', '', ''), ('score at which half are correct, by level', '', ''),
            (f'   {halves}', '', '')]
  for row, (name, *values) in enumerate(table):
    y = 0.94 - 0.082 * row
    bold = 'bold' if row in (0, 4, 7, 11) else 'normal'
    axes.text(0, y, name, transform=axes.transAxes, fontsize=9, fontweight=bold)
    for x, value in zip((0.68, 1.0), values, strict=True):
      small = ' to ' in value  # Intervals.
      axes.text(x, y, value, transform=axes.transAxes, ha='right', fontweight=bold,
                fontsize=7 if small else 9, color='#555555' if small else 'black')


def _number(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)


def _range(interval: Sequence[float] | None, form: str) -> str:
  return '-' if interval is None else ' to '.join(format(x, form) for x in interval)
