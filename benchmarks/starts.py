"""Compares what training on one's own data starts from, and how many images it has.

  python benchmarks/starts.py --minutes=5 --json
  python benchmarks/starts.py --data=voc300 --starts=coco_ssd --images=400,1600,3200 --minutes=8

Trains the detector of configs/own_data.py for the same number of minutes (`train.minutes`) from
each start, on each number of images and by each optimizer, and evaluates on the validation split.
The optimizers are AdamW as in the config, and SGD as the config had it before. Starts: a model
that comes with the package; `imagenet`, a backbone trained on ImageNet, of depth multiplier 1.0;
`coco_ssd`, the backbone of an SSD trained on COCO; `random`. Data: `bccd`, 205 and 87 images of
blood cells; `voc300`, 3,200 and 800 photographs, which the shipped models have seen. The files lie
in the folder PPN_SHARED. With --json the last line is JSON.
"""

import argparse
import itertools
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import hardware
from ml_collections import ConfigDict
from voc300.recipes import SGD

from ppn_jax import zoo
from ppn_jax.config_files import load_config
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run

BACKBONES = {'imagenet': ('mobilenet_v1_1.0_224_quant_embedding_extractor.tflite', 1.0),
             'coco_ssd': ('ssd_mobilenet_v1_0.75_coco_quant.tflite', 0.75)}
RANDOM = 'random'
OPTIMIZERS = {'adamw': {}, 'sgd': SGD}  # Entries of `optim` that replace those of the config.


def main() -> None:
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('ppn_jax').setLevel(logging.INFO)
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--data', choices=('bccd', 'voc300'), default='bccd')
  parser.add_argument('--images', default='0', help='numbers of training images; 0: all')
  parser.add_argument('--minutes', type=float, default=5.0)
  parser.add_argument('--starts', default='ppn_voc,imagenet,random',
                      help=f'of {", ".join((*zoo.names(), *BACKBONES, RANDOM))}')
  parser.add_argument('--optimizers', default='adamw', help=f'of {", ".join(OPTIMIZERS)}')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  starts = args.starts.split(',')
  for start in starts:
    if start not in (*zoo.names(), *BACKBONES, RANDOM):
      parser.error(f'--starts: no start is named {start!r}')
    if args.data == 'voc300' and start in zoo.names():
      parser.error(f'--starts={start}: it has been trained on all images of voc300')
  if args.data == 'bccd' and args.images != '0':
    parser.error(f'--images={args.images} is for --data=voc300')
  optimizers = args.optimizers.split(',')
  for name in optimizers:
    if name not in OPTIMIZERS:
      parser.error(f'--optimizers={name}: legal: {", ".join(OPTIMIZERS)}')
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for start, images, optimizer in itertools.product(
        starts, map(int, args.images.split(',')), optimizers):
      workdir = pathlib.Path(folder) / f'{start}_{images}_{optimizer}'
      rows.append(measure(start, images, optimizer, workdir, args))
      print(json.dumps(rows[-1]), flush=True)
  if args.json:
    print(json.dumps({'benchmark': 'starts', 'data': args.data, 'minutes': args.minutes,
                      'batch': args.batch, 'image_size': args.image_size, 'rows': rows,
                      **hardware.describe()}))


def measure(start: str, images: int, optimizer: str, workdir: pathlib.Path,
            args: argparse.Namespace) -> dict[str, Any]:
  """Trains on the first `images` images from a start; returns a row of the table."""
  config = make_config(start, args)
  config.optim.update(OPTIMIZERS[optimizer])
  if images:
    listed = json.loads(pathlib.Path(config.data.train.annotations).read_text('utf-8'))['images']
    chosen = workdir.with_suffix('.txt')
    chosen.write_text('\n'.join(str(image['id']) for image in listed[:images]), 'utf-8')
    config.data.train.include_ids = str(chosen)
  train(config.lock(), workdir)
  run = open_run(workdir)
  scores = [line for line in run.metrics() if 'eval/AP' in line]
  return {'start': start, 'images': images, 'optimizer': optimizer,
          'steps': run.config.train.steps,
          'depth_multiplier': run.config.model.backbone.depth_multiplier,
          **{name: round(scores[-1][f'eval/{name}'] or 0.0, 4) for name in ('AP', 'AP50', 'AP75')}}


def make_config(start: str, args: argparse.Namespace) -> ConfigDict:
  """Returns the config of a start; they differ in `init`, and in the width that a file has."""
  default = pathlib.Path(__file__).resolve().parents[2] / 'shared'
  shared = pathlib.Path(os.environ.get('PPN_SHARED', default))
  data = shared / 'data' / args.data
  if not data.is_dir():
    raise SystemExit(f'no {data}; set PPN_SHARED to the folder that has it')
  kind = 'pascal_voc' if args.data == 'bccd' else 'coco_json'
  config = load_config(f'own_data:{kind}', []).copy_and_resolve_references().unlock()
  config.model.image_size = args.image_size
  for split, block in (('train', config.data.train), ('val', config.data.eval)):
    if args.data == 'bccd':
      block.update(folder=str(data), on_bad_box='drop')  # One has no area.
    else:
      block.update(images=str(data / split), annotations=str(data / f'instances_{split}.json'))
  config.data.cache.where = 'memory'
  config.init.weights = config.init.backbone = ''
  config.model.backbone.depth_multiplier = 0.75
  if start in BACKBONES:
    file, config.model.backbone.depth_multiplier = BACKBONES[start]
    config.init.backbone = str(shared / 'weights' / file)
  elif start != RANDOM:
    config.init.weights = start
  config.train.update(minutes=args.minutes, steps=0, batch_size=args.batch, evaluate_every=10**6,
                      checkpoint_every=10**6)
  config.optim.ema_decay = 0.99
  return config


if __name__ == '__main__':
  main()
