"""Checks that batches depend only on (seed, step), and that the loader's memory does not grow.

  python benchmarks/loader_checks.py --batches=1000 --images=50000 --json

Hashes the first batches with all augmentations, mosaic included: made by 1, 2 and 4 threads,
assembled from the rows of 1, 2 and 4 hosts, and resumed at a random step. Then reads many images
and records the memory of the process. Exits with 1 if a hash differs or memory grows by more than
5% over the last four fifths. With --json the last line is JSON.
"""

import argparse
import hashlib
import json
import sys

import hardware
import jax
import numpy as np
import psutil

from ppn_jax.data.loader import required_boxes, train_batches
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.transforms.basic import build_transforms

OPS = build_transforms([{'name': name, **({'size': 64} if name == 'mosaic' else {})} for name in (
    'mosaic', 'expand', 'ssd_random_crop', 'horizontal_flip', 'photometric_distortion')])
BATCH = 8


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batches', type=int, default=1000)
  parser.add_argument('--images', type=int, default=50_000)
  parser.add_argument('--seed', type=int, default=0, help='chooses the step to restart at')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  restart = int(np.random.default_rng(args.seed).integers(1, args.batches))
  hashes = {f'{threads} threads': digest(args.batches, threads=threads) for threads in (1, 2, 4)}
  hashes |= {f'{hosts} hosts': digest(args.batches, hosts=hosts) for hosts in (2, 4)}
  hashes[f'restart at {restart}'] = digest(args.batches, restart=restart)
  for name, value in hashes.items():
    print(f'{name:18} {value[:16]}')
  megabytes = memory(args.images)
  growth = megabytes[-1] / megabytes[len(megabytes) // 5] - 1
  print('memory in MB:', ' '.join(f'{m:.0f}' for m in megabytes), f' growth {growth:+.1%}')
  same = len(set(hashes.values())) == 1
  if args.json:
    print(json.dumps({
        'benchmark': 'loader_checks', 'batches': args.batches, 'batch': BATCH, 'same': same,
        'hashes': {name: value[:16] for name, value in hashes.items()}, 'images': args.images,
        'megabytes': [round(m, 1) for m in megabytes], 'growth': round(growth, 4),
        **hardware.describe()}))
  return 0 if same and growth < 0.05 else 1


def _stream(source, **options):
  return train_batches(source, transforms=OPS, image_size=64, batch_size=BATCH, seed=5,
                       max_boxes=required_boxes(source, 0, OPS), **options)


def digest(batches: int, *, threads: int = 2, hosts: int = 1, restart: int = 0) -> str:
  """Returns a hash of all arrays of the first global batches."""
  source = SyntheticShapes(num_images=777, image_size=(80, 96))
  rows = [slice(host, None, hosts) for host in range(hosts)]
  parts = [[_stream(source, threads=threads, rows=r, start_step=start) for r in rows]
           for start in ((0, restart) if restart else (0,))]
  found = hashlib.sha256()
  for step in range(batches):
    hosts_now = parts[1 if restart and step >= restart else 0]
    columns = [jax.tree.leaves(next(stream)) for stream in hosts_now]
    for shards in zip(*columns, strict=True):
      whole = np.empty((BATCH, *shards[0].shape[1:]), shards[0].dtype)
      for r, shard in zip(rows, shards, strict=True):
        whole[r] = shard
      found.update(whole.tobytes())
  return found.hexdigest()


def memory(images: int) -> list[float]:
  """Returns the resident memory in MB after each twentieth of the images."""
  stream = _stream(SyntheticShapes(num_images=5_000, image_size=(80, 96)))
  process = psutil.Process()
  found = []
  for number in range(images // BATCH):
    next(stream)
    if (number + 1) % max(1, images // BATCH // 20) == 0:
      found.append(process.memory_info().rss / 1e6)
  return found


if __name__ == '__main__':
  sys.exit(main())
