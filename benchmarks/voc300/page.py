"""Report for readers: tables in Markdown, curves, and a page of HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from voc300 import comparison

from ppn_jax.visualization import calibration_plot
from ppn_jax.visualization.html_page import Section, Table, plot, render
from ppn_jax.visualization.plotting import MUTED, show_message
from ppn_jax.visualization.plotting import plot as figure

TITLE = 'PPN and SSD on real photographs'
# Distinguishable with colour blindness; assigned to variants in order.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
_DASHES = ('-', '--', ':')
_ROWS = (
    ('AP', 'AP, mean over IoU 0.50:0.95', '.4f'), ('AP50', 'AP50 (COCO, 101 recalls)', '.4f'),
    ('VOC_AP50', 'AP50 (VOC, every recall)', '.4f'), ('AP75', 'AP75', '.4f'),
    ('AP_small', 'AP of small objects', '.4f'), ('AP_medium', 'AP of medium objects', '.4f'),
    ('AP_large', 'AP of large objects', '.4f'),
    ('parameters', 'parameters', ','), ('flops', 'FLOPs per image', ','),
    ('images_per_second', 'images/s in training', ',.0f'),
    ('hours', 'hours per run, steps only', '.3f'),
    ('data_wait', 'share of that time waiting for data', '.1%'),
    ('ECE', 'expected calibration error', '.4f'),
    ('gap_spread', 'spread of score minus precision between levels', '.4f'),
    ('spread_at_equal_score', 'spread of precision at equal score between levels', '.4f'),
    ('cost_AP', 'AP lost to differences between levels', '+.4f'),
    ('cost_AP50', 'AP50 lost to differences between levels', '+.4f'))


def main_table(found: Mapping[str, Any]) -> Table:
  """Returns metrics by variant: the mean over seeds, with standard deviation if several."""
  variants = found['variants']
  rows = [(label, *(show(v[key], form) for v in variants.values())) for key, label, form in _ROWS]
  counts = sorted({len(v['seeds']) for v in variants.values()})
  seeds = f'{"/".join(map(str, counts)) or 0} seed{"s" if counts != [1] else ""}'
  return Table(('', *variants), rows, f'Mean ± standard deviation over {seeds}')


def show(value: Any, form: str) -> str:
  """Formats a number, or a summary from `comparison.over_seeds`."""
  if not isinstance(value, Mapping):
    return '-' if value is None else format(value, form)
  if value['mean'] is None:
    return '-'
  deviation = value['deviation']
  return format(value['mean'], form) + (
      f' ± {format(deviation, form.replace("+", ""))}' if deviation is not None else '')


def difference_tables(found: Mapping[str, Any]) -> list[Table]:
  """Returns tables of paired differences with their intervals."""
  interval = lambda i: '-' if i is None else f'{i[0]:+.4f} to {i[1]:+.4f}'
  labels = {key: label for key, label, _ in _ROWS}
  return [Table(('', 'difference', '95% over seeds', '95% over images'),
                [(labels[k], '-' if d[k]['mean'] is None else f'{d[k]["mean"]:+.4f}',
                  interval(d[k]['interval']), interval(d[k]['images']))
                 for k in comparison.METRICS], f'{name}, paired by seed')
          for name, d in found['differences'].items()]


def level_table(found: Mapping[str, Any]) -> Table:
  """Returns the calibration error and the mean of score minus precision by level."""
  variants = found['variants']
  depth = max((len(v['calibration_by_level']) for v in variants.values()), default=0)
  rows = []
  for k in range(depth):
    row = [f'level {k}']
    for v in variants.values():
      level = (v['calibration_by_level'] + [None] * depth)[k]
      row += ['-', '-'] if level is None else [show(level['ECE'], '.3f'),
                                               show(level['gap'], '+.3f')]
    rows.append(row)
  header = [text for name in variants for text in (f'{name} ECE', f'{name} gap')]
  return Table(('', *header), rows, 'Calibration by pyramid level, finest first; the gap is mean '
               'score minus precision')


def error_table(found: Mapping[str, Any]) -> Table:
  """Returns the AP50 that each kind of error costs."""
  variants = found['variants'].values()
  kinds = list(next(iter(variants))['error_costs']) if variants else []
  return Table(('', *found['variants']),
               [(kind, *(show(v['error_costs'][kind], '.4f') for v in variants)) for kind in kinds],
               'AP50 gained by fixing the errors of one kind alone (TIDE)')


def other_tables(found: Mapping[str, Any]) -> list[Table]:
  """Returns tables of verdicts, tuned recipes and stopped runs, if there are any."""
  tables = []
  if found.get('claims'):
    tables.append(Table(('claim', 'verdict'), [(c['claim'], c['verdict'])
                                               for c in found['claims']], words=(1,)))
  if found.get('tuning'):
    models = list(found['tuning'][0]['AP'])
    tables.append(Table(('recipe', *(f'AP {m}' for m in models), 'mean'),
                        [(row['recipe'], *(show(row['AP'][m], '.4f') for m in models),
                          show(row['mean'], '.4f')) for row in found['tuning']],
                        'Recipes, highest mean first'))
  if found['stopped']:
    tables.append(Table(('run', 'why it stopped'), [
        (f'{r["model"]} {r["recipe"]} {r["seed"]}', r['stopped']) for r in found['stopped']],
                        words=(1,)))
  return tables


def setting_text(found: Mapping[str, Any]) -> str:
  """Describes the setting in a few sentences, starting with the note of a reduced profile."""
  kinds = '; '.join(f'{h["device"]} ({h["backend"]}), {h["cpu_cores"]} x {h["cpu"]}, JAX '
                    f'{h["jax"]}, commit {h["commit"]}' for h in found['hardware'])
  recipe = '' if found['tune'] else f' Recipe {found["recipe"]}.'
  done = '' if found['complete'] else (f' INCOMPLETE: {found["runs_finished"]} of '
                                       f'{found["runs_asked_for"]} runs are finished.')
  scored = found.get('held_out_images')
  images = (f'{found["train_images"] - scored:,} images to train on, {scored:,} others of the '
            'training set to score' if scored else
            f'{found["train_images"]:,} images to train on, {found["val_images"]:,} to score')
  return (f'{found["note"]}{" " if found["note"] else ""}{images}, {start_text(found)}. '
          f'{found["image_size"]} px, '
          f'{found["epochs"]} epochs, batch {found["batch_size"]}.{recipe}{done} '
          f'Run on {kinds or "nothing yet"}.')


def start_text(found: Mapping[str, Any]) -> str:
  """Describes what the runs start from."""
  backbone = found.get('backbone')
  return f'from the backbone {backbone}' if backbone else 'from random weights'


def markdown(found: Mapping[str, Any]) -> str:
  """Returns the tables in Markdown."""
  tables = [main_table(found), *difference_tables(found), level_table(found), error_table(found),
            *other_tables(found)]
  return '\n\n'.join([setting_text(found), *map(_markdown_table, tables)]) + '\n'


def _markdown_table(table: Table) -> str:
  cells = lambda row: '| ' + ' | '.join(str(c).replace('|', r'\|') for c in row) + ' |'
  return '\n'.join(([f'{table.caption}:', ''] if table.caption else []) +
                   [cells(table.header), '|' + '---|' * len(table.header),
                    *map(cells, table.rows)])


def curves(found: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]
           ) -> np.ndarray:
  """Draws loss, AP and AP50 over epochs, one line per seed; returns u8 [H, W, 3]."""
  epochs = found['batch_size'] / found['train_images']
  with figure(14.5, 4.4) as made:
    axes = made.figure.subplots(1, 3)
    for ax, key, title in zip(axes, ('train/loss', 'eval/AP', 'eval/AP50'),
                              ('Loss', 'AP on the evaluation data', 'AP50'), strict=True):
      drawn = 0
      for number, (name, runs) in enumerate(groups.items()):
        for at, run in enumerate(runs):
          points = [(line['step'] * epochs, line[key])
                    for line in run['curve'] if line.get(key) is not None]
          if points:
            drawn += 1
            ax.plot(*zip(*points, strict=True), color=_COLOURS[number % len(_COLOURS)],
                    linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)], linewidth=1.4,
                    alpha=0.85, marker='' if key == 'train/loss' else 'o', markersize=3.5,
                    label=name if at == 0 else None)
      ax.set_title(title)
      if drawn:
        ax.set(xlabel='epoch', **({'yscale': 'log'} if key == 'train/loss' else
                                  {'ylim': (0, None)}))
        ax.legend()
      else:
        show_message(ax, 'none recorded')
    if found['note']:
      made.figure.suptitle(found['note'], x=0.008, ha='left', fontsize=9, color=MUTED)
  return made.pixels


def html(found: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Returns the page as one self-contained file."""
  text = ('Means over seeds. Intervals over seeds are Student\'s; those over images leave out '
          'groups of images in turn. A difference is significant if neither contains zero.')
  sections = [
      Section('Metrics', text, [main_table(found), *other_tables(found)]),
      Section('Differences', '', difference_tables(found)),
      Section('Curves', '', groups=[plot(curves(found, groups), 'loss and AP by epoch')]),
      Section('Calibration by level', 'Expected calibration error of detections with a '
              'score of at least 0.05, correct at IoU 0.5.', [level_table(found)]),
      Section('Kinds of errors', '', [error_table(found)])]
  for name, runs in groups.items():
    sections.append(Section(f'Reliability of {name}', f'Seed {runs[0]["seed"]}; bands of 95%.',
                            groups=[plot(calibration_plot.draw_reliability(runs[0]['calibration']),
                                         f'precision against score, {name}')]))
  return render(TITLE if not found['tune'] else 'Recipes compared', setting_text(found), sections)
