"""Measures how many images per second threads and processes can put into batches, by their number.

  python benchmarks/workers.py --json

Decoding and resizing are replaced by a sleep that holds no lock, so that a small machine shows what
many workers can do: their number is not limited by its cores, only what Python does for each image
is. Threads and processes take turns. `cores` is the processor time of all processes per second;
`ms_per_image` is that time per image. With --json the last line is JSON.
"""

import argparse
import json
import statistics
import time

import hardware
import psutil
from sleeping_source import Sleeping

from ppn_jax.data.loader import train_batches


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workers', default='1,2,4,16,56,112')
  parser.add_argument('--milliseconds', type=float, default=3.4, help='that an image sleeps')
  parser.add_argument('--batch', type=int, default=512)
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--seconds', type=float, default=5.0, help='duration of each measurement')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  cases = [(kind, int(n)) for n in args.workers.split(',') for kind in ('threads', 'processes')]
  found = {case: [] for case in cases}
  for _ in range(args.rounds):
    for case in cases:
      found[case].append(measure(*case, args))
  rows = []
  for (kind, number), values in found.items():
    rate, cores = (statistics.median(v[i] for v in values) for i in (0, 1))
    rows.append({'workers': number, 'kind': kind, 'images_per_s': round(rate),
                 'cores': round(cores, 2), 'ms_per_image': round(1e3 * cores / rate, 3)})
    print(json.dumps(rows[-1]), flush=True)
  if args.json:
    print(json.dumps({'benchmark': 'workers', 'milliseconds': args.milliseconds,
                      'batch': args.batch, 'image_size': args.image_size, 'rounds': args.rounds,
                      'rows': rows, **hardware.describe()}))


def measure(kind: str, workers: int, args: argparse.Namespace) -> tuple[float, float]:
  """Returns images per second, and seconds of processor time per second."""
  batches = train_batches(Sleeping(args.image_size, args.milliseconds / 1e3), transforms=(),
                          image_size=args.image_size, max_boxes=8, batch_size=args.batch, seed=0,
                          workers=kind, threads=workers)
  for _ in range(4):  # Those that are filled ahead.
    next(batches)
  count, started, used = 0, time.perf_counter(), processor_time()
  while time.perf_counter() - started < args.seconds:
    count += len(next(batches).images)
  elapsed, used = time.perf_counter() - started, processor_time() - used
  batches.close()
  return count / elapsed, used / elapsed


def processor_time() -> float:
  """Returns the seconds of processor time of this process and of all below it."""
  this = psutil.Process()
  times = [p.cpu_times() for p in (this, *this.children(recursive=True))]
  return sum(t.user + t.system for t in times)


if __name__ == '__main__':
  main()
