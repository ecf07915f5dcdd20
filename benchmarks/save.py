"""Measures how long a save delays training.

  python benchmarks/save.py

Takes real steps of the full model, with momentum and a moving average, and saves at intervals, as
`ppn train` does. `blocked_ms` is the time that the loop spends in `wait` and `save`, each time with
the previous save complete; `in_background_ms` is the time until the checkpoint is on disk.
`step_ms` and `step_ms_while_saving` show how much the saving thread slows the steps down. Prints
one line of JSON.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from ppn_jax.checkpoints.manager import Checkpoints  # noqa: E402
from ppn_jax.detection.structures import GroundTruth  # noqa: E402
from ppn_jax.distributed import sharding  # noqa: E402
from ppn_jax.run import build_detector, optimizer_of  # noqa: E402
from ppn_jax.telemetry.host_memory import keep_freed_memory  # noqa: E402
from ppn_jax.training.train_step import jit_init, jit_train_step  # noqa: E402


def full_model(file: str, batch_size: int):
  """Returns the state and the compiled step of a config with 80 classes and a moving average."""
  spec = importlib.util.spec_from_file_location('config', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config().copy_and_resolve_references().unlock()
  config.model.num_classes, config.optim.ema_decay = 80, config.optim.ema_decay or 0.999
  mesh, detector = sharding.data_mesh(), build_detector(config)
  optimizer = optimizer_of(config, steps=1000, batch_size=batch_size)
  size, rng = config.model.image_size, np.random.default_rng(0)
  boxes = np.tile(np.float32([.2, .2, .7, .7]), (batch_size, 8, 1))
  valid = np.full((batch_size, 8), True)
  ground_truth = GroundTruth(boxes, np.ones_like(valid, np.int32), ~valid, valid)
  images = rng.integers(0, 255, (batch_size, size, size, 3), np.uint8)
  batch = sharding.to_global((images, ground_truth), mesh, batch_size)
  state = jit_init(detector, optimizer, mesh)(0)
  step = jit_train_step(detector, optimizer, mesh).lower(state, *batch).compile()
  return state, lambda state: step(state, *batch)


def measure(state, step, folder: pathlib.Path, saves: int, between: int) -> dict:
  """Returns the milliseconds of each part, one value per save or step."""
  times = {'blocked': [], 'in_background': [], 'step': [], 'step_while_saving': []}

  def timed_step(state, name):
    started = time.perf_counter()
    state, metrics = step(state)
    jax.block_until_ready(metrics)
    times[name].append(1e3 * (time.perf_counter() - started))
    return state

  with Checkpoints(folder) as checkpoints:
    for number in range(saves):
      for _ in range(between):
        state = timed_step(state, 'step')
      state, _ = step(state)  # Still running, as in training.
      started = time.perf_counter()
      checkpoints.wait()
      checkpoints.save(number + 1, state)
      times['blocked'].append(1e3 * (time.perf_counter() - started))
      while not (folder / str(number + 1)).exists():
        state = timed_step(state, 'step_while_saving')
      checkpoints.wait()
      times['in_background'].append(1e3 * (time.perf_counter() - started))
  return times


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--config', default=str(ROOT / 'configs' / 'ppn_mobilenet_v1_coco.py'))
  parser.add_argument('--saves', type=int, default=21, help='the first is reported separately')
  parser.add_argument('--steps', type=int, default=3, help='between two saves')
  parser.add_argument('--batch_size', type=int, default=2)
  args = parser.parse_args()
  keep_freed_memory()
  state, step = full_model(args.config, args.batch_size)
  megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
  state, metrics = step(state)
  jax.block_until_ready(metrics)
  with tempfile.TemporaryDirectory() as folder:
    times = measure(state, step, pathlib.Path(folder) / 'checkpoints', args.saves, args.steps)
  first, *later = times['blocked']
  median = {name: round(statistics.median(values), 1) for name, values in times.items() if values}
  print(json.dumps({
      'benchmark': 'save', 'device': jax.devices()[0].device_kind, 'saves': len(later),
      'state_megabytes': round(megabytes, 1), 'blocked_ms': round(statistics.median(later), 1),
      'blocked_ms_worst': round(max(later), 1), 'blocked_ms_first': round(first, 1),
      'in_background_ms': median['in_background'], 'step_ms': median['step'],
      'step_ms_while_saving': median.get('step_while_saving')}))
  return 0


if __name__ == '__main__':
  sys.exit(main())
