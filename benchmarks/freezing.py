"""Measures what freezing the first blocks saves: images/s of the training step, in turns.

  python benchmarks/freezing.py --batch=8 --json

Two steps of the same network run alternately on noise, one that trains everything and one with
`optim.freeze`. Then the second takes further steps, and what is frozen is compared with what it
was, bit for bit, also in the moving average. With --json the last line is JSON.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import hardware
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from train_step import in_turns, random_batch

from ppn_jax.config import base_config
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.run import build_detector, optimizer_of
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.training.parameter_paths import frozen_modules, frozen_paths
from ppn_jax.training.train_step import jit_init, jit_train_step


class Step(NamedTuple):
  """A compiled training step and its state."""
  take: Callable[[], None]  # Takes one and waits for it.
  state: Callable[[], Any]  # Returns the state on the host.
  flops: float
  temporary_bytes: int


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--num_classes', type=int, default=90)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--freeze', default='backbone/conv2d_[0-5]')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--steps', type=int, default=50, help='steps before frozen bits are compared')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  keep_freed_memory()  # As `train` does.
  steps = {'all': set_up(args, ()), 'frozen': set_up(args, (args.freeze,))}
  before = steps['frozen'].state()
  times = in_turns({name: step.take for name, step in steps.items()}, args.rounds)
  for _ in range(args.steps - args.rounds - 1):
    steps['frozen'].take()
  median = {name: float(np.median(t)) for name, t in times.items()}
  result = {
      'benchmark': 'freezing', 'batch': args.batch, 'image_size': args.image_size,
      'num_classes': args.num_classes, 'dtype': args.dtype, 'freeze': args.freeze,
      'rounds': args.rounds,
      'images_per_s': {name: round(1000 * args.batch / ms, 2) for name, ms in median.items()},
      'speedup': round(median['all'] / median['frozen'], 2),
      'gflops_of_step': {name: round(step.flops / 1e9, 2) for name, step in steps.items()},
      'temporary_mb': {name: round(step.temporary_bytes / 1e6) for name, step in steps.items()},
      **same_bits(before, steps['frozen'].state(), args.freeze), **hardware.describe()}
  for name, value in result.items():
    print(f'{name}: {value}')
  if args.json:
    print(json.dumps(result))


def set_up(args: argparse.Namespace, freeze: tuple[str, ...]) -> Step:
  """Compiles the step of a config with these parameters frozen."""
  config = base_config()
  config.model.image_size, config.model.num_classes = args.image_size, args.num_classes
  config.model.layers.dtype, config.optim.freeze = args.dtype, freeze
  config.optim.learning_rate, config.optim.rate_batch_size = 0.01, 0
  config.optim.ema_decay = 0.99
  detector, mesh = build_detector(config), data_mesh()
  optimizer = optimizer_of(config, steps=1000, batch_size=args.batch)
  batch = random_batch(args.batch, detector.image_size, detector.num_classes)
  state = jit_init(detector, optimizer, mesh)(0)
  step = jit_train_step(detector, optimizer, mesh).lower(state, *batch).compile()

  def take():
    nonlocal state
    state, metrics = step(state, *batch)
    jax.block_until_ready(metrics)

  return Step(take, lambda: jax.device_get(state), step.cost_analysis()['flops'],
              step.memory_analysis().temp_size_in_bytes)


def same_bits(before: Any, after: Any, pattern: str) -> dict[str, Any]:
  """Returns whether what is frozen has kept its bits, and how much of the rest has changed."""
  params = before.variables['params']
  frozen, modules = frozen_paths(params, (pattern,)), frozen_modules(params, (pattern,))

  def is_frozen(path):
    return path[1:] in frozen if path[0] == 'params' else path[1:-1] in modules

  pairs = [(is_frozen(path), np.array_equal(leaf, flatten_dict(now)[path]))
           for then, now in ((before.variables, after.variables), (before.average, after.average))
           for path, leaf in flatten_dict(then).items()]
  return {'steps': int(after.step), 'frozen_arrays': sum(f for f, _ in pairs),
          'frozen_bits_equal': all(same for f, same in pairs if f),
          'trained_arrays': sum(not f for f, _ in pairs),
          'trained_arrays_changed': sum(not same for f, same in pairs if not f)}


if __name__ == '__main__':
  main()
