"""Plots of training curves, precision and recall, AP by class, and errors by kind.

Each function returns u8 [H, W, 3].
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppn_jax.metrics.coco import IOUS, NO_GROUND_TRUTH, SIZES
from ppn_jax.visualization.plotting import (
  MUTED,
  STRONG,
  class_rgb,
  name_rows,
  plot,
  short,
  show_message,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SHOWN_CLASSES = 7  # In a legend; the others are grey.
_LISTED_CLASSES = 100
_DOTS = (4, 7, 10)  # Of small, medium and large objects, in points.
_RECALL = np.linspace(0, 1, 101)
_LOSSES = {'train/loss': ('all', STRONG), 'train/classification': ('classification', '#0072b2'),
           'train/localization': ('localization', '#d55e00'),
           'train/regularization': ('weight decay', '#009e73')}
_METRICS = {'eval/AP': ('AP', STRONG), 'eval/AP50': ('AP50', '#0072b2'),
            'eval/AP75': ('AP75', '#d55e00')}


def training(lines: Sequence[Mapping[str, float | None]]) -> np.ndarray:
  """Plots losses, COCO's metrics, learning rate and gradient norm by step.

  Args:
    lines: of `metrics.jsonl`, see `telemetry.metrics.read`; nulls and missing values are left out.
  """
  with plot(14.5, 3.8) as picture:
    axes = picture.figure.subplots(1, 4)
    _plot_lines(axes[0], lines, _LOSSES, 'Loss', yscale='log')
    _plot_lines(axes[1], lines, _METRICS, 'On the evaluation data', marker='o', ylim=(0, None))
    _plot_lines(axes[2], lines, {'train/learning_rate': ('', '#0072b2')}, 'Learning rate',
           ylim=(0, None))
    _plot_lines(axes[3], lines, {'train/gradient_norm': ('', '#0072b2')}, 'Gradient norm',
           yscale='log')
  return picture.pixels


def _plot_lines(axes: 'Axes', lines: Sequence[Mapping], curves: Mapping[str, tuple[str, str]],
                title: str, marker: str = '', **scale) -> None:
  """Plots the curves {key of a line: (name, colour)}."""
  drawn = 0
  for key, (name, colour) in curves.items():
    points = [(line['step'], line[key]) for line in lines if line.get(key) is not None
              and line[key] > 0]
    if points:
      # A single point has no line.
      axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.5, markersize=4,
                marker=marker if len(points) > 1 else 'o')
      drawn += 1
  axes.set_title(title)
  if not drawn:
    show_message(axes, 'none recorded')
    return
  axes.set(xlabel='step', **scale)
  if drawn > 1:
    axes.legend()


def precision_recall(table: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """Plots precision against recall: mean over classes at each IoU, and by class at IoU 0.5.

  Args:
    table: of `coco.precision_table`.
    names: of the classes, in order of label.
  """
  from matplotlib import colormaps
  every = np.where(table[..., 0] == NO_GROUND_TRUTH, np.nan, table[..., 0])  # [10, 101, C]
  scored = np.flatnonzero(~np.isnan(every[0]).all(axis=0))
  with plot(11, 4.4) as picture:
    left, right = picture.figure.subplots(1, 2)
    for k in range(len(IOUS)) if len(scored) else ():
      left.plot(_RECALL, every[k][:, scored].mean(axis=1), linewidth=1.6,
                color=colormaps['viridis'](k / len(IOUS)),
                label=f'{IOUS[k]:.2f}' if k % 3 == 0 else None)
    order = scored[np.argsort(-every[0][:, scored].mean(axis=0), kind='stable')]
    for at, label in reversed(list(enumerate(order.tolist()))):
      shown = at < _SHOWN_CLASSES
      right.plot(_RECALL, every[0][:, label], linewidth=1.6 if shown else 0.7,
                 alpha=1 if shown else 0.35, color=class_rgb(label) if shown else MUTED,
                 label=short(names[label]) if shown else None)
    for axes, title in ((left, 'Mean over classes, by IoU'), (right, 'By class, at IoU 0.50')):
      axes.set(title=title, xlim=(0, 1), ylim=(0, 1.02), xlabel='recall', ylabel='precision')
      if len(scored):
        axes.legend(loc='lower left', reverse=axes is right)
      else:
        show_message(axes, 'there is no ground truth to score')
  return picture.pixels


def average_precision(table: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """Plots AP over all classes and by class, best first, with AP50 and AP by size of the object.

  Args:
    table: of `coco.precision_table`.
    names: of the classes, in order of label.
  """
  known = np.where(table == NO_GROUND_TRUTH, np.nan, table)
  present = np.flatnonzero(~np.isnan(known[0, 0, :, 0]))
  by_size = known.mean(axis=(0, 1))  # [C, 4]
  order = present[np.argsort(-by_size[present, 0], kind='stable')][:_LISTED_CLASSES]
  with plot(11, 2.2 + 0.24 * len(order)) as picture:
    axes = picture.figure.subplots()
    if not len(order):
      show_message(axes, 'there is no ground truth to score')
    rows = [([_mean(by_size[present, k]) for k in range(len(SIZES))],
             _mean(known[0, :, present, 0]), STRONG),
            *((by_size[k], known[0, :, k, 0].mean(), class_rgb(k)) for k in order.tolist())]
    for at, (sizes, ap50, colour) in enumerate(rows if len(order) else ()):
      axes.barh(at, ap50, height=0.7, color=colour, alpha=0.3)
      axes.barh(at, sizes[0], height=0.7, color=colour)
      for value, size in zip(sizes[1:], _DOTS, strict=True):
        axes.plot(value, at, 'o', color='#222222', markeredgecolor='white', markersize=size)
    if len(order):
      name_rows(axes, ['all classes', *(names[k] for k in order.tolist())])
      _name_sizes(axes)
      axes.set(xlim=(0, 1), title='Average precision by class and object size',
               xlabel='solid: AP, mean over IoU 0.50 to 0.95; pale: AP50; dots: AP by size')
  return picture.pixels


def _name_sizes(axes: 'Axes') -> None:
  for name, size in zip(SIZES[1:], _DOTS, strict=True):
    axes.plot([], [], 'o', color='#222222', markersize=size, label=name)
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))


def _mean(values: np.ndarray) -> float:
  return float(np.nanmean(values)) if not np.isnan(values).all() else float('nan')


def errors(counts: Mapping[str, int], costs: Mapping[str, float]) -> np.ndarray:
  """Plots how many errors of each kind there are, and the AP50 gained by fixing them.

  Args:
    counts, costs: by kind, see `error_analysis`.
  """
  with plot(11, 2.9) as picture:
    left, right = picture.figure.subplots(1, 2)
    for axes, values, form, title in (
        (left, costs, '{:.3f}', 'AP50 gained if these were fixed'),
        (right, counts, '{:,}', 'Number')):
      for at, value in enumerate(values.values()):
        axes.barh(at, value, height=0.65, color='#0072b2' if axes is left else MUTED)
        axes.annotate(form.format(value), (max(value, 0), at), xytext=(4, 0), va='center',
                      textcoords='offset points', fontsize=8)
      name_rows(axes, list(values), limit=24)
      axes.set_title(title)
      axes.margins(x=0.15)
  return picture.pixels
