"""Measures images/s of the training step and the times of its parts.

  python benchmarks/train_step.py --batch=8 --json

Each part is compiled and timed separately on real shapes, alternating with the others: the whole
step, the backbone forward and backward, assignment, the loss with its gradient, the optimizer, and,
after the others, the input pipeline for one batch (images of 640 x 480 are drawn, encoded as JPEG,
decoded, cropped, flipped and resized). Results are medians over the rounds. The parts do not add up
to the step: neck and head are missing, and the compiler fuses parts that are timed separately here.
With --json the last line is JSON.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hardware
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppn_jax.config import base_config
from ppn_jax.data.loader import train_batches
from ppn_jax.data.source import build_source
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection.structures import GroundTruth, Outputs
from ppn_jax.detector import Detector, Variables, jit_detect
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.run import build_detector
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.training.optimizer import Optimizer, build_optimizer
from ppn_jax.training.train_step import jit_init, jit_train_step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--num_classes', type=int, default=90)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--conv_form', default='auto', choices=('auto', 'native', 'shifted'))
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  config = base_config()
  config.model.image_size, config.model.num_classes = args.image_size, args.num_classes
  config.model.layers.update(dtype=args.dtype, conv_form=args.conv_form)
  milliseconds, compile_seconds = measure(config, args.batch, args.rounds)

  step = milliseconds['train_step']
  result = {
      'benchmark': 'train_step', 'batch': args.batch, 'image_size': args.image_size,
      'num_classes': args.num_classes, 'dtype': args.dtype, 'conv_form': args.conv_form,
      'images_per_s': round(1000 * args.batch / step['median'], 2),
      'parts_ms': milliseconds, 'compile_s': round(compile_seconds, 1), **hardware.describe()}
  for part, ms in milliseconds.items():
    print(f'{part:18} {ms["median"]:9.1f} ms   (fastest {ms["fastest"]:.1f})')
  print(f'{result["images_per_s"]} images/s at batch {args.batch}')
  if args.json:
    print(json.dumps(result))


def measure(config, batch_size: int, rounds: int) -> tuple[dict, float]:
  """Returns {part: {median, fastest} in ms}, and the compile time of the step in seconds."""
  parts, compile_seconds = prepare(config, batch_size)
  times = in_turns(parts, rounds)
  times['input'] = input_times(config, batch_size, rounds)
  return {name: {'median': round(float(np.median(t)), 2), 'fastest': round(min(t), 2)}
          for name, t in times.items()}, compile_seconds


def prepare(config, batch_size: int) -> tuple[dict[str, Callable], float]:
  """Returns {part: function that runs it once}, and the compile time of the step in seconds."""
  setup = set_up(config, batch_size)
  optimizer, variables = setup.optimizer, setup.variables
  backbone = setup.detector.network.backbone
  weights = {k: v['backbone'] for k, v in variables.items()}
  pixels = jnp.asarray(setup.images, jnp.float32) * (2 / 255) - 1

  def features(params):
    maps, _ = backbone.apply({**weights, 'params': params}, pixels, train=True,
                             mutable=['batch_stats'])
    return maps[config.model.neck.stride]

  cotangent = jax.eval_shape(features, weights['params'])
  cotangent = jnp.ones(cotangent.shape, cotangent.dtype)

  def both(params):
    _, pullback = jax.vjp(features, params)
    return pullback(cotangent)

  def update(gradient, opt_state, params):
    updates, opt_state = optimizer.transform.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = optimizer.transform.init(variables['params'])
  return {
      'train_step': setup.train_step,
      'backbone_forward': blocking(jax.jit(features), weights['params']),
      'backbone_forward_backward': blocking(jax.jit(both), weights['params']),
      **loss_parts(setup),
      'optimizer': blocking(jax.jit(update), variables['params'], opt_state, variables['params']),
  }, setup.compile_seconds


class Setup(NamedTuple):
  """Detector that is ready to take training steps on noise."""
  detector: Detector
  optimizer: Optimizer
  variables: Variables
  images: jax.Array
  ground_truth: GroundTruth
  train_step: Callable[[], None]  # Takes one and waits for it.
  compiled: jax.stages.Compiled
  compile_seconds: float


def set_up(config, batch_size: int, max_boxes: int = 100) -> Setup:
  """Compiles the step for batches of noise with ground truth padded to `max_boxes`."""
  keep_freed_memory()  # As `train` does.
  detector = build_detector(config)
  optimizer = build_optimizer(steps=1000, batch_size=batch_size, learning_rate=0.01,
                              rate_batch_size=0)
  mesh = data_mesh()
  state = jit_init(detector, optimizer, mesh)(0)
  variables = jax.tree.map(jnp.copy, state.variables)
  images, ground_truth = random_batch(batch_size, detector.image_size, detector.num_classes,
                                      max_boxes)
  started = time.perf_counter()
  step = jit_train_step(detector, optimizer, mesh).lower(state, images, ground_truth).compile()
  compile_seconds = time.perf_counter() - started

  def train_step():
    nonlocal state
    state, metrics = step(state, images, ground_truth)
    jax.block_until_ready(metrics)

  return Setup(detector, optimizer, variables, images, ground_truth, train_step, step,
               compile_seconds)


def set_up_inference(config, work: str, batch_size: int
                     ) -> tuple[Callable[[], object], jax.stages.Compiled]:
  """Compiles inference on noise, with random weights.

  Args:
    config: the config of the model.
    work: 'network', the outputs of the network, or 'detect', detections.
    batch_size: images in a batch.

  Returns:
    A function that runs it once and waits for the result, and the compiled program.
  """
  keep_freed_memory()  # As all commands do on a CPU.
  detector = build_detector(config)
  images, _ = random_batch(batch_size, detector.image_size, detector.num_classes)
  function = (jax.jit(detector.forward) if work == 'network'
              else jit_detect(detector, data_mesh()))
  arguments = jax.jit(detector.init)(jax.random.key(0)), images
  compiled = function.lower(*arguments).compile()
  return blocking(compiled, *arguments), compiled


def loss_parts(setup: Setup) -> dict[str, Callable]:
  """Returns assignment and loss as separate functions, on the outputs of random weights."""
  detector = setup.detector
  outputs = jax.jit(detector.forward)(setup.variables, setup.images)
  assignment = jax.jit(functools.partial(detector.assign_targets, detector.anchors))
  total = lambda o, t: sum(detector.outputs_loss(Outputs(*o), t)[:2])
  return {'assignment': blocking(assignment, setup.ground_truth),
          'loss_with_gradient': blocking(jax.jit(jax.value_and_grad(total)), outputs,
                                         assignment(setup.ground_truth))}


def in_turns(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
  """Times functions alternately, so that all see the same disturbances.

  Each function runs once before, to compile.

  Returns:
    {name: milliseconds in each round}.
  """
  times = {name: [] for name in runs}
  for run in runs.values():
    run()
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      times[name].append(1000 * (time.perf_counter() - start))
  return times


def blocking(function, *arguments):
  """Returns a function that calls another and waits for the result, which JAX computes later."""
  return lambda: jax.block_until_ready(function(*arguments))


def random_batch(batch_size: int, side: int, num_classes: int, max_boxes: int = 100):
  """Returns noise with 1 to 14 boxes per image; the step's time does not depend on content."""
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(0, 1, (batch_size, max_boxes, 2, 2)), axis=2)
  valid = np.arange(max_boxes) < rng.integers(1, 15, (batch_size, 1))
  shape = (batch_size, max_boxes)
  ground_truth = GroundTruth(corners.reshape(*shape, 4).astype(np.float32),
                             rng.integers(0, num_classes, shape).astype(np.int32),
                             np.zeros(shape, bool), valid)
  images = rng.integers(0, 256, (batch_size, side, side, 3), np.uint8)
  return jax.device_put((images, ground_truth))


def input_times(config, batch_size: int, rounds: int) -> list[float]:
  """Returns the milliseconds per batch, after the prefetched batches."""
  batches = input_batches(config, batch_size)
  times = []
  for index in range(rounds + 4):
    start = time.perf_counter()
    next(batches)
    if index >= 4:
      times.append(1000 * (time.perf_counter() - start))
  batches.close()
  return times


def input_batches(config, batch_size: int):
  source = build_source({'name': 'synthetic_shapes', 'num_images': 64, 'image_size': (480, 640)})
  return train_batches(source, transforms=build_transforms(config.data.transforms),
                       image_size=config.model.image_size, max_boxes=100, batch_size=batch_size,
                       seed=0, resize=config.data.resize)


if __name__ == '__main__':
  main()
