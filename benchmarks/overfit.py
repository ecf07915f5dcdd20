"""Checks that the whole system learns: overfits the full PPN at 300 px on 32 real images.

  python benchmarks/overfit.py --json

Trains on the first images of ../shared/data/coco100/train2017 (PPN_SHARED names another folder)
from random weights without augmentation, evaluates with pycocotools on the same images, and prints
AP50. It calls `train` and `evaluate`, so it includes JPEG decoding, 80 classes and checkpoints. A
detector that cannot do this has a bug; one that can has only shown that it can memorise. With
--json the last line is JSON.
"""

import argparse
import json
import logging
import os
import pathlib
import tempfile
import time

import hardware

from ppn_jax.config import base_config
from ppn_jax.jobs.evaluate import EvaluationOptions, evaluate
from ppn_jax.jobs.train import train
from ppn_jax.metrics.coco import format_table
from ppn_jax.run import open_run


def main() -> None:
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--steps', type=int, default=500)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--learning_rate', type=float, default=0.1)
  parser.add_argument('--workdir', help='keep the run here (default: a temporary folder)')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.workdir or temporary)
    annotations = write_subset(folder / 'subset.json', args.images)
    started = time.perf_counter()
    train(make_config(args, str(annotations)), folder / 'run')
    minutes = (time.perf_counter() - started) / 60
    scores = evaluate(open_run(folder / 'run'),
                      options=EvaluationOptions(scorer='pycocotools')).scores
  print(format_table(scores))
  if args.json:
    print(json.dumps({
        'benchmark': 'overfit', 'images': args.images, 'steps': args.steps, 'batch': args.batch,
        'learning_rate': args.learning_rate, 'minutes': round(minutes, 1),
        'num_boxes': sum(c.num_boxes for c in scores.per_class),
        'figures': {k: round(v, 4) for k, v in scores.metrics.items()},
        **hardware.describe()}))


def coco100() -> pathlib.Path:
  """Returns the folder of coco100."""
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  folder = pathlib.Path(os.environ.get('PPN_SHARED', default)) / 'data' / 'coco100'
  if not folder.is_dir():
    raise SystemExit(f'no folder {folder}; set PPN_SHARED to the folder that has data/coco100')
  return folder


def write_subset(path: pathlib.Path, count: int) -> pathlib.Path:
  """Writes annotations of the first `count` images of coco100's training split."""
  full = json.loads((coco100() / 'annotations' / 'instances_train2017.json').read_text())
  images = full['images'][:count]
  kept = {image['id'] for image in images}
  annotations = [a for a in full['annotations'] if a['image_id'] in kept]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({'images': images, 'annotations': annotations,
                              'categories': full['categories']}))
  return path


def make_config(args: argparse.Namespace, annotations: str):
  config = base_config()
  data = dict(name='coco_json', images=str(coco100() / 'train2017'), annotations=annotations)
  config.data.train, config.data.eval = data, data
  config.data.transforms = ()
  config.model.layers.norm_decay = 0.9
  config.optim.learning_rate = args.learning_rate
  config.optim.warmup_factor = 0.1
  config.optim.rate_batch_size = 0
  config.optim.clip_norm = 10.0
  config.optim.weight_decay = 0.0
  config.train.steps, config.train.batch_size = args.steps, args.batch
  config.train.log_every = 20
  config.train.checkpoint_every = 100
  config.train.evaluate_every = 100
  config.eval.batch_size = 16
  return config.lock()


if __name__ == '__main__':
  main()
