"""Compares what training on one's own data starts from, at equal minutes: blood cells (bccd).

  python benchmarks/starts.py --minutes=10 --json

Trains the detector of configs/own_data.py on the 205 images of bccd's training split from a model
that comes with the package, from a backbone trained on ImageNet, and from random weights, each for
the same number of minutes (`train.minutes`), and evaluates on the 87 of its validation split. The
files lie in the folder PPN_SHARED. With --json the last line is JSON.
"""

import argparse
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import hardware
from ml_collections import ConfigDict

from ppn_jax.config_files import load_config
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run

IMAGENET = 'mobilenet_v1_1.0_224_quant_embedding_extractor.tflite'


def main() -> None:
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('ppn_jax').setLevel(logging.INFO)
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--minutes', type=float, default=10.0)
  parser.add_argument('--starts', default='ppn_voc,imagenet,random')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for start in args.starts.split(','):
      rows.append(measure(start, pathlib.Path(folder) / start, args))
      print(json.dumps(rows[-1]), flush=True)
  if args.json:
    print(json.dumps({'benchmark': 'starts', 'minutes': args.minutes, 'batch': args.batch,
                      'image_size': args.image_size, 'rows': rows, **hardware.describe()}))


def measure(start: str, workdir: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
  """Trains from a start; returns a row of the table."""
  train(make_config(start, args), workdir)
  run = open_run(workdir)
  scores = [line for line in run.metrics() if 'eval/AP' in line]
  return {'start': start, 'steps': run.config.train.steps,
          'depth_multiplier': run.config.model.backbone.depth_multiplier,
          **{name: round(scores[-1][f'eval/{name}'] or 0.0, 4) for name in ('AP', 'AP50', 'AP75')}}


def make_config(start: str, args: argparse.Namespace) -> ConfigDict:
  """Returns the config of a start; they differ in `init`, and in the width that a file has."""
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  shared = pathlib.Path(os.environ.get('PPN_SHARED', default))
  if not (shared / 'data' / 'bccd').is_dir():
    raise SystemExit(f'no {shared}/data/bccd; set PPN_SHARED to the folder that has it')
  config = load_config('own_data:pascal_voc', []).copy_and_resolve_references().unlock()
  config.model.image_size = args.image_size
  for block in (config.data.train, config.data.eval):
    block.update(folder=str(shared / 'data' / 'bccd'), on_bad_box='drop')  # One has no area.
  config.init.weights = config.init.backbone = ''
  config.model.backbone.depth_multiplier = 1.0 if start == 'imagenet' else 0.75
  if start == 'imagenet':
    config.init.backbone = str(shared / 'weights' / IMAGENET)
  elif start != 'random':
    config.init.weights = start
  config.train.update(minutes=args.minutes, steps=0, batch_size=args.batch, evaluate_every=10**6,
                      checkpoint_every=10**6)
  config.optim.ema_decay = 0.99
  return config.lock()


if __name__ == '__main__':
  main()
