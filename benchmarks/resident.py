"""Measures the share of the training step that drawing a batch from device memory takes.

  python benchmarks/resident.py --batch=8 --json

Uses PPN at 300 px with 90 classes, SSD's crop and a flip. Alternates between drawing a batch alone,
the step with a given batch, and the step that draws its own batch (`data.resident`). Prints
medians over the rounds and the share of the arithmetic. With --json the last line is JSON.
"""

import argparse
import json
import statistics
import time

import hardware
import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.config import base_config
from ppn_jax.device_data import dataset
from ppn_jax.device_data.transforms import build_augmentation
from ppn_jax.distributed import sharding
from ppn_jax.models.flops import operations
from ppn_jax.run import build_detector
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.train_step import jit_init, jit_resident_step, jit_train_step

IMAGES, BOXES = 64, 16  # Images on the device, and the number of boxes that each is padded to.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  keep_freed_memory()
  config, mesh = base_config(), sharding.data_mesh()
  config.model.num_classes, config.model.layers.dtype = 90, args.dtype
  detector = build_detector(config)
  optimizer = build_optimizer(steps=100, batch_size=args.batch, learning_rate=0.01,
                              rate_batch_size=0)
  augmentation = build_augmentation(config.data.transforms, image_size=300,
                                    resize=config.data.resize)
  plan = dataset.ResidentSpec(num_images=IMAGES, batch_size=args.batch, max_boxes=BOXES,
                              stored_size=300, augmentation=augmentation, seed=0)
  data = random_data(plan, mesh)
  draw = jax.jit(lambda data, step: dataset.draw_batch(plan, mesh, data, step))
  batch = jax.block_until_ready(draw(data, jnp.int32(0)))
  states = [jit_init(detector, optimizer, mesh)(0) for _ in range(2)]
  given, drawing = (jit_train_step(detector, optimizer, mesh),
                    jit_resident_step(detector, optimizer, mesh, plan))
  flops = {'draw': count(draw, data, jnp.int32(0)), 'step': count(given, states[0], *batch)}
  times = {'draw': [], 'step': [], 'resident_step': []}
  for step in range(args.rounds + 1):  # The first compiles.
    times['draw'].append(_seconds(lambda s=step: draw(data, jnp.int32(s)))[0])
    seconds, (states[0], _) = _seconds(lambda: given(states[0], *batch))
    times['step'].append(seconds)
    seconds, (states[1], _) = _seconds(lambda: drawing(states[1], data))
    times['resident_step'].append(seconds)
  median = {name: 1000 * statistics.median(values[1:]) for name, values in times.items()}
  result = {
      'benchmark': 'resident', 'batch': args.batch, 'dtype': args.dtype,
      'ms': {name: round(value, 1) for name, value in median.items()},
      'draw_share_of_step': round(median['draw'] / median['resident_step'], 4),
      'gflop_per_image': {k: round(v / args.batch / 1e9, 3) for k, v in flops.items()},
      'draw_share_of_flops': round(flops['draw'] / (flops['draw'] + flops['step']), 4),
      **hardware.describe()}
  print(f'draw {median["draw"]:.1f} ms, step {median["step"]:.1f} ms, step that draws '
        f'{median["resident_step"]:.1f} ms; share {result["draw_share_of_step"]:.1%}, of the '
        f'FLOPs {result["draw_share_of_flops"]:.1%}')
  if args.json:
    print(json.dumps(result))


def random_data(plan: dataset.ResidentSpec, mesh: jax.sharding.Mesh) -> dataset.ResidentData:
  """Returns images of noise with five boxes each."""
  shapes, rng = dataset.abstract_data(plan, mesh), np.random.default_rng(0)
  corners = np.sort(rng.uniform(size=(IMAGES, BOXES, 2, 2)), axis=2)
  corners = corners.reshape(IMAGES, 4 * BOXES)
  ground_truth = (corners.astype(np.float32), np.zeros((IMAGES, BOXES), np.int32),
                  np.zeros((IMAGES, BOXES), bool), np.tile(np.arange(BOXES) < 5, (IMAGES, 1)))
  pixels = rng.integers(0, 256, shapes.images.shape, np.uint8)
  made = dataset.ResidentData(pixels, np.tile(np.int32([480, 640]), (IMAGES, 1)), *ground_truth)
  return jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), made, shapes)


def count(function, *arguments) -> int:
  """Returns the FLOPs of a call."""
  return sum(op.flops for op in operations(jax.make_jaxpr(function)(*arguments).jaxpr))


def _seconds(call):
  started = time.perf_counter()
  result = jax.block_until_ready(call())
  return time.perf_counter() - started, result


if __name__ == '__main__':
  main()
