"""Checks that batches depend only on (seed, step), that memory does not grow and nothing is left.

  python benchmarks/loader_checks.py --batches=1000 --images=50000 --kills=50 --json

Hashes the first batches with all augmentations, mosaic included: made by several numbers of threads
and of worker processes, assembled from the rows of 2 and 4 hosts, and resumed at a random step.
Then reads many images and records the memory of the process. Then SIGKILL ends a reader with two
worker processes, or one of its workers, at a random moment, again and again: a worker's end must
end the reader with a message, and no process and no file in /dev/shm may be left. Exits with 1 if a
hash differs, memory grows by more than 5% over the last four fifths, or anything is left. With
--json the last line is JSON.
"""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

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
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0,
                      help='chooses the step to restart at, and the moments of kills')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  rng = np.random.default_rng(args.seed)
  restart = int(rng.integers(1, args.batches))
  hashes = {f'{n} {workers}': digest(args.batches, threads=n, workers=workers)
            for workers, counts in (('threads', (1, 2, 4)), ('processes', (1, 2, 4, 16)))
            for n in counts}
  hashes |= {f'{n} hosts of 2 {workers}': digest(args.batches, hosts=n, workers=workers)
             for workers in ('threads', 'processes') for n in (2, 4)}
  hashes |= {f'restart at {restart}, 2 {workers}': digest(
      args.batches, restart=restart, workers=workers) for workers in ('threads', 'processes')}
  for name, value in hashes.items():
    print(f'{name:28} {value[:16]}')
  megabytes = memory(args.images)
  growth = megabytes[-1] / megabytes[len(megabytes) // 5] - 1
  print('memory in MB:', ' '.join(f'{m:.0f}' for m in megabytes), f' growth {growth:+.1%}')
  failures = [f for number in range(args.kills)
              if (f := kill(number % 2 == 0, float(rng.uniform(0, 0.3))))]
  print(f'{args.kills} kills; wrong: {failures or "nothing"}')
  same = len(set(hashes.values())) == 1
  if args.json:
    print(json.dumps({
        'benchmark': 'loader_checks', 'batches': args.batches, 'batch': BATCH, 'same': same,
        'hashes': {name: value[:16] for name, value in hashes.items()}, 'images': args.images,
        'megabytes': [round(m, 1) for m in megabytes], 'growth': round(growth, 4),
        'kills': args.kills, 'failures': failures, **hardware.describe()}))
  return 0 if same and growth < 0.05 and not failures else 1


def _stream(source, **options):
  return train_batches(source, transforms=OPS, image_size=64, batch_size=BATCH, seed=5,
                       max_boxes=required_boxes(source, 0, OPS), **options)


def digest(batches: int, *, threads: int = 2, workers: str = 'threads', hosts: int = 1,
           restart: int = 0) -> str:
  """Returns a hash of all arrays of the first global batches."""
  source = SyntheticShapes(num_images=777, image_size=(80, 96))
  rows = [slice(host, None, hosts) for host in range(hosts)]
  parts = [[_stream(source, threads=threads, workers=workers, rows=r, start_step=start)
            for r in rows]
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
  for stream in (s for host in parts for s in host):
    stream.close()
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


# A reader that takes batches until it is ended. It is a program of its own, without this one's
# threads.
_READER = """
from ppn_jax.data.loader import train_batches
from ppn_jax.data.sources.synthetic import SyntheticShapes
batches = train_batches(SyntheticShapes(num_images=777, image_size=(80, 96)), transforms=(), seed=0,
                        image_size=64, max_boxes=32, batch_size=8, threads=2, workers='processes')
next(batches)
print('started', flush=True)
for _ in batches: pass
"""


def kill(reader: bool, seconds: float) -> str:
  """Ends a reader, or one of its workers, after a while; returns what went wrong, or ''."""
  shared = pathlib.Path('/dev/shm')
  before = set(shared.iterdir())
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).resolve().parents[1])}
  with subprocess.Popen([sys.executable, '-c', _READER], stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True, env=environment) as process:
    process.stdout.readline()
    # A server, and the workers that it has forked.
    server, = psutil.Process(process.pid).children()
    family = [server, *server.children()]
    time.sleep(seconds)
    os.kill(process.pid if reader else family[-1].pid, signal.SIGKILL)
    message = process.stderr.read()
  _, alive = psutil.wait_procs(family, timeout=30)
  for survivor in alive:
    survivor.kill()
  if alive:
    return f'{len(alive)} processes were left'
  if not reader and 'was killed by SIGKILL' not in message:
    return f'no message about the worker: {message[-200:]}'
  left = sorted(p.name for p in set(shared.iterdir()) - before)
  return f'/dev/shm has {", ".join(left)}' if left else ''


if __name__ == '__main__':
  sys.exit(main())
