"""Measures what reusing freed memory is worth to a training step on a CPU.

  python benchmarks/freed_memory.py --json

Two processes take training steps in turns. In one `keep_freed_memory` comes before JAX's backend,
as in `ppn train`; in the other it comes after, so that the backend's threads map and unmap their
buffers for each step. Results are images/s by the median step, the ratio of the two with the least
and the greatest of its rounds, and page faults a step.
With --json the last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys

import hardware

ORDERS = ('first', 'late')


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--image_size', type=int, default=160)
  parser.add_argument('--num_classes', type=int, default=20)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--steps', type=int, default=3, help='of each process in each round')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  parser.add_argument('--order', choices=ORDERS, help=argparse.SUPPRESS)  # Of a child process.
  args = parser.parse_args()
  if args.order:
    return _answer(args)

  command = [sys.executable, __file__, *sys.argv[1:], '--order']
  processes = {order: subprocess.Popen([*command, order], text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE) for order in ORDERS}
  rounds = {order: [] for order in ORDERS}
  for number in range(args.rounds + 1):
    for order, process in processes.items():
      process.stdin.write('run\n')
      process.stdin.flush()
      line = process.stdout.readline()
      if not line:
        return process.wait() or 1  # It has said why.
      answer = json.loads(line)
      if number:  # The first compiles.
        rounds[order].append(answer)
  for process in processes.values():
    process.stdin.close()
    process.wait()

  ratios = [late['seconds'] / first['seconds']
            for first, late in zip(rounds['first'], rounds['late'], strict=True)]
  median = lambda order, name: statistics.median(r[name] for r in rounds[order])
  result = {
      'benchmark': 'freed_memory', 'batch': args.batch, 'image_size': args.image_size,
      'num_classes': args.num_classes, 'rounds': args.rounds,
      'images_per_s': {o: round(args.batch / median(o, 'seconds'), 2) for o in ORDERS},
      'page_faults_of_step': {o: round(median(o, 'faults')) for o in ORDERS},
      'ratio': {'median': round(statistics.median(ratios), 3), 'least': round(min(ratios), 3),
                'greatest': round(max(ratios), 3)}, **hardware.describe()}
  print(f'{result["images_per_s"]} images/s, ratio {result["ratio"]}, '
        f'page faults of a step {result["page_faults_of_step"]}')
  if args.json:
    print(json.dumps(result))
  return 0


def _answer(args: argparse.Namespace) -> int:
  """Takes steps whenever a line arrives, and prints the seconds and page faults of one."""
  import resource
  import time

  from ppn_jax.telemetry.host_memory import keep_freed_memory
  if args.order == 'first':
    keep_freed_memory()
  import jax
  jax.devices()
  keep_freed_memory()
  import train_step

  from ppn_jax.config import base_config
  config = base_config()
  config.model.image_size, config.model.num_classes = args.image_size, args.num_classes
  config.model.neck.num_levels = 0  # As many as the size gives.
  setup = train_step.set_up(config, args.batch, max_boxes=20)
  setup.train_step()
  faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in sys.stdin:
    before, started = faults(), time.perf_counter()
    for _ in range(args.steps):
      setup.train_step()
    seconds = time.perf_counter() - started
    print(json.dumps({'seconds': seconds / args.steps,
                      'faults': (faults() - before) / args.steps}), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
