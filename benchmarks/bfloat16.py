"""Measures what bfloat16 is worth on a CPU: in matrix products alone, and everywhere.

  python benchmarks/bfloat16.py --json

Times the training step, the network and the detector of PPN in float32, with
`layers.matmul_dtype='bfloat16'`, and with `layers.dtype='bfloat16'`, in turns in one process.
Results are medians in ms, and the time in float32 divided by each other one in the same round:
median, least and greatest; above 1 bfloat16 is faster. With --json the last line is JSON.
"""

import argparse
import json
from collections.abc import Callable, Mapping

import hardware
import numpy as np
from train_step import in_turns, set_up, set_up_inference

from ppn_jax.config import base_config
from ppn_jax.processor import multiplies_bfloat16

VARIANTS: dict[str, dict[str, str]] = {
    'float32': {}, 'products': {'matmul_dtype': 'bfloat16'}, 'everything': {'dtype': 'bfloat16'}}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--num_classes', type=int, default=90)
  parser.add_argument('--train_batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  times = {}
  for name, batch in (('train', args.train_batch), ('network', 1), ('network', 8), ('detect', 1),
                      ('detect', 8)):
    runs = {variant: prepare(args, name, batch, layers) for variant, layers in VARIANTS.items()}
    times[f'{name}_{batch}'] = compared(in_turns(runs, args.rounds))
  for workload, variants in times.items():
    print(workload)
    for variant, result in variants.items():
      print(f'  {variant:12} {result["ms"]:9.1f} ms  {result["speedup"]}')
  if args.json:
    print(json.dumps({'benchmark': 'bfloat16', 'image_size': args.image_size,
                      'num_classes': args.num_classes, 'rounds': args.rounds,
                      'multiplies_bfloat16': multiplies_bfloat16(), 'workloads': times,
                      **hardware.describe()}))


def prepare(args: argparse.Namespace, name: str, batch: int, layers: Mapping[str, str]
            ) -> Callable[[], object]:
  """Returns a function that runs a workload once and waits for it."""
  config = base_config()
  config.model.image_size, config.model.num_classes = args.image_size, args.num_classes
  config.model.layers.update(layers)
  if name == 'train':
    return set_up(config, batch).train_step
  return set_up_inference(config, name, batch)[0]


def compared(times: Mapping[str, list[float]]) -> dict[str, dict]:
  """Returns the median of each variant, and its speed relative to float32 by round."""
  plain = np.array(times['float32'])
  found = {}
  for variant, milliseconds in times.items():
    speedups = plain / np.array(milliseconds)
    found[variant] = {'ms': round(float(np.median(milliseconds)), 2), 'speedup': {
        'median': round(float(np.median(speedups)), 3), 'least': round(float(speedups.min()), 3),
        'greatest': round(float(speedups.max()), 3)}}
  return found


if __name__ == '__main__':
  main()
