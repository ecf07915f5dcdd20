"""Measures the start-up time of `ppn --help` and of training up to its first step.

  python benchmarks/startup.py --json

Each start is a new process. It trains the quickstart in a new workdir, first with an empty cache of
compiled programs, then with the cache that the first start filled. The parts are read from the
command's output: until it names the model (imports, config checks, data), until it starts to
compile (the first state), until it has compiled, and until it reports the first step. With --json
the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import hardware

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Beginning of a line -> the part of the start that it ends.
PARTS = {'pooling_pyramid on ': 'imports and checks', 'compiling ': 'first state',
         'compiled in ': 'compiling', 'step 1/': 'first step'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--rounds', type=int, default=3, help='warm starts to take the median of')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  helps = [help_seconds() for _ in range(5)]
  with tempfile.TemporaryDirectory() as home:
    cold = train_seconds(home)
    warm = [train_seconds(home) for _ in range(args.rounds)]
  result = {
      'benchmark': 'startup', 'help_s': round(statistics.median(helps), 3), 'first_start_s': cold,
      'second_start_s': {part: round(statistics.median(w[part] for w in warm), 2) for part in cold},
      'second_start_total_s': [w['total'] for w in warm], **hardware.describe()}
  print(f'ppn --help {result["help_s"]} s')
  for part in cold:
    print(f'{part:20} first {cold[part]:7.2f} s   later {result["second_start_s"][part]:7.2f} s')
  if args.json:
    print(json.dumps(result))


def help_seconds() -> float:
  start = time.perf_counter()
  subprocess.run([sys.executable, '-m', 'ppn_jax.cli.main', '--help'], cwd=ROOT, check=True,
                 stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def train_seconds(home: str) -> dict[str, float]:
  """Starts the quickstart; returns the seconds of each part until its first step, and in total."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COMPILATION')}
  seconds, last = {}, time.perf_counter()
  with (tempfile.TemporaryDirectory() as workdir,
        subprocess.Popen(
            [sys.executable, '-m', 'ppn_jax.cli.main', 'train', '--config=configs/quickstart.py',
             f'--workdir={workdir}', '--config.train.log_every=1'], cwd=ROOT, text=True,
            stderr=subprocess.PIPE, env=environment | {'XDG_CACHE_HOME': home}) as process):
    for line in process.stderr:
      for start, part in PARTS.items():
        if line.startswith(start) and part not in seconds:
          now = time.perf_counter()
          seconds[part], last = round(now - last, 2), now
      if len(seconds) == len(PARTS):
        break
    process.kill()
    process.wait()
  if len(seconds) < len(PARTS):
    raise SystemExit(f'training did not reach its first step; its last line was: {line}')
  return seconds | {'total': round(sum(seconds.values()), 2)}


if __name__ == '__main__':
  main()
