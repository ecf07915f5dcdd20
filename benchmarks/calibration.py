"""Tests whether per-level predictors miscalibrate scores across levels and a shared one does not.

  python benchmarks/calibration.py --seeds=0,1,2 --json

This is the paper's first claim (sections 1 and 2.1). The script trains a PPN and an SSD on the same
data with the same schedule and seeds, evaluates both with the calibration report, and prints for
each run: AP, calibration error by level, the spread between levels, the AP that it costs, and the
number of positives of each level. Differences are paired by seed: same images, same order. Means
over seeds have a standard error, which is None for a single seed. With --json the last line is
JSON.
"""

import argparse
import json
import logging
import os
import pathlib
import tempfile
import time

import hardware
import numpy as np

from ppn_jax.config_files import load_config
from ppn_jax.errors import InputError
from ppn_jax.jobs.calibration_report import CalibrationOptions, format_table
from ppn_jax.jobs.evaluate import EvaluationOptions, evaluate
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def main() -> None:
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--shared', default=str(CONFIGS / 'quickstart.py'),
                      help='config of the model with a shared predictor (default: quickstart)')
  parser.add_argument('--separate', default=str(CONFIGS / 'quickstart_ssd.py'),
                      help='config of the model with one per level (default: quickstart_ssd)')
  parser.add_argument('--seeds', default=[0], metavar='N,N,...', help='default: 0',
                      type=seeds)
  parser.add_argument('--steps', type=int, default=0, help="0: the configs' own")
  parser.add_argument('--floor', type=float, default=0.05, help='lowest score that counts')
  parser.add_argument('--train_images', type=int, default=2000, help='to count positives on')
  parser.add_argument('--workdir', help='keep the runs here (default: a temporary folder)')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args, overrides = parser.parse_known_args()
  for argument in overrides:
    if not argument.startswith('--config.') or '=' not in argument:
      parser.error(f'unexpected argument {argument!r}; entries of both configs are given as '
                   '--config.KEY=VALUE')
  try:
    options = CalibrationOptions(floor=args.floor, train_images=args.train_images)
    configs = {name: _load(path, args.steps, overrides)
               for name, path in (('shared', args.shared), ('separate', args.separate))}
    with tempfile.TemporaryDirectory() as temporary:
      folder = pathlib.Path(args.workdir or temporary)
      runs = [{'model': name, 'seed': seed} | measure(config, seed, folder / f'{name}_{seed}',
                                                      options)
              for seed in args.seeds for name, config in configs.items()]
  except InputError as e:
    parser.error(str(e))
  result = {'benchmark': 'calibration', 'floor': args.floor,
            'configs': {n: os.path.basename(p) for n, p in (('shared', args.shared),
                                                            ('separate', args.separate))},
            'steps': configs['shared'].train.steps, 'overrides': overrides,
            'summary': summarize(runs, list(configs)), 'runs': runs, **hardware.describe()}
  print_summary(result['summary'])
  if args.json:
    print(json.dumps(result))


def seeds(text: str) -> list[int]:
  """Parses '0,1' as [0, 1]."""
  return [int(seed) for seed in text.split(',')]


def _load(path: str, steps: int, overrides: list[str]):
  steps = [f'--config.train.steps={steps}'] if steps else []
  return load_config(path, [*overrides, *steps, '--config.train.evaluate_every=0'])


def measure(config, seed: int, workdir: pathlib.Path, options: CalibrationOptions) -> dict:
  """Trains and evaluates one run; returns the part of its report that the claim needs."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = seed
  started = time.perf_counter()
  train(config, workdir)
  minutes = (time.perf_counter() - started) / 60
  evaluation = evaluate(open_run(workdir), options=EvaluationOptions(calibration=options))
  found = evaluation.calibration
  print(f'{workdir.name}\n{format_table(found)}\n', flush=True)
  group_keys = ('name', 'detections', 'correct', 'mean_score', 'precision', 'gap', 'gap_interval',
                'ece', 'ece_interval', 'ece_by_chance')
  group = lambda g: {k: _rounded(g[k]) for k in group_keys}
  return _rounded({
      'minutes': minutes, 'AP': evaluation.scores.metrics['AP'],
      'AP50': evaluation.scores.metrics['AP50'], 'all': group(found['all']),
      'by_level': [group(g) for g in found['by_level']],
      'by_size': [group(g) for g in found['by_size']], 'spread': found['spread'],
      'recalibration': found['recalibration'], 'floors': found['floors'],
      'training': found['training']})


METRICS = {
    'AP': lambda r: r['AP'], 'AP50': lambda r: r['AP50'], 'ece': lambda r: r['all']['ece'],
    'gap_spread': lambda r: r['spread']['gap'],
    'spread_at_equal_score': lambda r: r['spread']['at_equal_score'],
    'cost_AP': lambda r: r['recalibration']['cost']['AP'],
    'cost_AP50': lambda r: r['recalibration']['cost']['AP50']}


def summarize(runs: list[dict], models: list[str]) -> dict:
  """Returns {metric: {model: {mean, error}, 'separate - shared': {mean, error}}} over seeds."""
  summary = {}
  for name, read in METRICS.items():
    values = {m: [read(r) for r in runs if r['model'] == m] for m in models}
    pairs = zip(values['separate'], values['shared'], strict=True)
    values['separate - shared'] = [None if None in p else p[0] - p[1] for p in pairs]
    summary[name] = {m: _mean(v) for m, v in values.items()}
  return summary


def _mean(values: list) -> dict:
  """Returns mean and standard error, None if a seed has no value, since pairs would be missing."""
  if None in values:
    return {'mean': None, 'error': None}
  error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
  return _rounded({'mean': float(np.mean(values)), 'error': error and float(error)})


def print_summary(summary: dict) -> None:
  """Prints a line for each metric."""
  show = lambda f: '-' if f['mean'] is None else f'{f["mean"]:+.4f}' + (
      f' ± {f["error"]:.4f}' if f['error'] is not None else '')
  for name, models in summary.items():
    print(f'{name:<22}' + '   '.join(f'{m} {show(f):<18}' for m, f in models.items()).rstrip())


def _rounded(value):
  """Rounds all floats in plain data to five digits."""
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(v) for v in value]
  return round(value, 5) if isinstance(value, float) else value


if __name__ == '__main__':
  main()
