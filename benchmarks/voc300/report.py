"""Writes the report of the runs: report.json, table.md, curves.png and report.html."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from voc300 import comparison, page
from voc300.pieces import Folder, RunKey

from ppn_jax import storage
from ppn_jax.visualization.drawing import save_picture


def write(folder: Folder, keys: Sequence[RunKey], setting: Mapping[str, Any], note: str,
          aim: float = 0.4) -> dict[str, Any]:
  """Writes the report of the runs that are finished.

  Args:
    folder: workdir with the results.
    keys: all requested runs.
    setting: settings that the runs share.
    note: warning that every output shows for a reduced profile; '' for the full one.
    aim: AP50 that each model should reach.

  Returns:
    The content of report.json.
  """
  runs = [folder.read_scored(key) for key in keys if folder.is_scored(key)]
  found = assemble(runs, keys, setting, note, aim)
  # The data first, since pictures and pages can be drawn again.
  text = json.dumps(found, indent=1, allow_nan=False)
  storage.write_text(folder.path / 'report.json', f'{text}\n')
  storage.write_text(folder.path / 'table.md', page.markdown(found))
  whole = group_runs(runs)
  save_picture(folder.path / 'curves.png', page.curves(found, whole))
  storage.write_text(folder.path / 'report.html', page.html(found, whole))
  return found


def group_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  """Groups finished runs by variant: a model, or a model with a recipe if there are several."""
  several = len({r['recipe'] for r in runs}) > 1
  groups: dict[str, list] = {}
  for r in runs:
    if 'figures' in r:
      name = f'{r["model"].upper()} {r["recipe"]}' if several else r['model'].upper()
      groups.setdefault(name, []).append(r)
  return groups


def assemble(runs: Sequence[Mapping[str, Any]], keys: Sequence[RunKey],
             setting: Mapping[str, Any], note: str, aim: float) -> dict[str, Any]:
  """Returns the report as plain data; see `write`."""
  groups = group_runs(runs)
  found = {
      'benchmark': 'voc300', 'note': note, **setting,
      'complete': len(runs) == len(keys), 'runs_finished': len(runs), 'runs_asked_for': len(keys),
      'stopped': [{k: r[k] for k in ('model', 'recipe', 'seed', 'stopped')}
                  for r in runs if 'stopped' in r],
      'variants': {name: _variant(group) for name, group in groups.items()},
      'differences': _differences(groups),
      'hardware': _distinct([{k: v for k, v in r['hardware'].items() if k != 'load_average'}
                             for group in groups.values() for r in group]),
      'runs': [_run(r) for group in groups.values() for r in group]}
  if setting['tune']:
    found['tuning'] = tuning(runs)
  elif not note:
    found['claims'] = claims(found, aim)
  return rounded(found)


def _variant(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  first = runs[0]
  time = lambda name: comparison.over_seeds([r['training'][name] for r in runs])
  levels = [{'level': g['name'],
             'ECE': comparison.over_seeds([r['calibration']['by_level'][k]['ece'] for r in runs]),
             'gap': comparison.over_seeds([r['calibration']['by_level'][k]['gap'] for r in runs]),
             'detections': [r['calibration']['by_level'][k]['detections'] for r in runs]}
            for k, g in enumerate(first['calibration']['by_level'])]
  return {
      'model': first['model'], 'recipe': first['recipe'], 'seeds': [r['seed'] for r in runs],
      'steps': first['step'], 'images': first['num_images'],
      **{k: comparison.summarize(runs, k) for k in comparison.METRICS},
      'parameters': first['parameters'], 'flops': first['flops'],
      **{k: time(k) for k in ('images_per_second', 'hours', 'data_wait')},
      'error_costs': {kind: comparison.over_seeds([r['error_costs'][kind] for r in runs])
                      for kind in first['error_costs']},
      'calibration_by_level': levels, 'config': first['config']}


def _differences(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Returns the differences of variants that share a recipe, by metric."""
  found = {}
  for (a, first), (b, second) in itertools.combinations(groups.items(), 2):
    if first[0]['recipe'] == second[0]['recipe']:
      found[f'{a} - {b}'] = {name: comparison.differences(first, second, name)
                             for name in comparison.METRICS}
  return found


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a run without the data that only the HTML page needs."""
  return {k: run[k] for k in ('model', 'recipe', 'seed', 'figures', 'training')} | {
      'load_average': run['hardware'].get('load_average'),
      'voc_ap50_by_class': run['voc_ap50_by_class'],
      'cost_interval': run['calibration']['recalibration']['cost_interval'],
      'spread_intervals': {k: run['calibration']['spread'][k]
                           for k in ('gap_interval', 'at_equal_score_interval')},
      'evaluated': [{k: v for k, v in line.items() if not k.startswith('train/')}
                    for line in run['curve'] if 'eval/AP' in line]}


def tuning(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns recipes by mean AP over models, highest first; unfinished recipes come last."""
  models, table = list(dict.fromkeys(r['model'] for r in runs)), []
  for recipe in dict.fromkeys(r['recipe'] for r in runs):
    there = {m: comparison.over_seeds([r.get('figures', {}).get('AP') for r in runs
                                       if (r['recipe'], r['model']) == (recipe, m)])['mean']
             for m in models}
    whole = None not in there.values()
    table.append({'recipe': recipe, 'AP': there,
                  'mean': sum(there.values()) / len(there) if whole else None})
  return sorted(table, key=lambda row: -(row['mean'] or 0))


def claims(found: Mapping[str, Any], aim: float) -> list[dict[str, str]]:
  """Returns verdicts on the goals of the comparison and on the paper's claim.

  A claim about a difference is confirmed or refuted if the interval over images and, with several
  seeds, the interval over seeds both lie on one side of the limit. Otherwise it is undecided.
  """
  made = []
  for name, variant in found['variants'].items():
    mean = variant['AP50']['mean']
    made.append({'claim': f'{name}: AP50 of at least {aim:.2f} {page.start_text(found)}',
                 'verdict': 'undecided' if mean is None else 'yes' if mean >= aim else 'no'})
  pair = found['differences'].get('PPN - SSD')
  if pair:
    made += [
        {'claim': "PPN's AP is at most 0.005 below SSD's", 'verdict': _verdict(pair['AP'], -0.005)},
        {'claim': "PPN's precision at equal score differs less between levels than SSD's",
         'verdict': _verdict(pair['spread_at_equal_score'], 0, below=True)},
        {'claim': "PPN loses less AP to differences between levels than SSD",
         'verdict': _verdict(pair['cost_AP'], 0, below=True)}]
  return made


def _verdict(difference: Mapping[str, Any], limit: float, *, below: bool = False) -> str:
  several = len(difference['values']) > 1
  # Costs have no interval over images, so only the interval over seeds counts.
  intervals = [i for i in (difference['interval'], difference['images']) if i is not None]
  if not intervals or (several and difference['interval'] is None):
    return 'undecided'
  low, high = min(i[0] for i in intervals), max(i[1] for i in intervals)
  if low >= limit or high < limit:
    return 'confirmed' if (low >= limit) != below else 'refuted'
  return 'undecided'


def _distinct(values: Sequence[Any]) -> list[Any]:
  return [v for i, v in enumerate(values) if v not in values[:i]]


def rounded(value: Any) -> Any:
  """Rounds all floats in plain data to six decimal places."""
  if isinstance(value, Mapping):
    return {k: rounded(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [rounded(v) for v in value]
  return round(value, 6) if isinstance(value, float) else value
