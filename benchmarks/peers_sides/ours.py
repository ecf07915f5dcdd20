"""ppn_jax as a side of benchmarks/peers.py, by the package's own functions."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from material import LEARNING_RATE, paper_config
from worker import Task, serve

from ppn_jax.detection.structures import GroundTruth
from ppn_jax.detector import jit_detect
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.run import build_detector
from ppn_jax.telemetry import profiling
from ppn_jax.telemetry.host_memory import expects_cpu, keep_freed_memory
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.state import first_state
from ppn_jax.training.train_step import jit_train_step

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import hardware

compiled = None  # The program of the task, for `describe`.


def prepare(task: Task):
  config = paper_config(task.spec['num_classes'], task.dtype, task.device)
  config.model.layers.conv_form = task.options.get('conv_form', 'auto')
  detector, mesh = build_detector(config), data_mesh()
  variables = traverse_util.unflatten_dict(
      {tuple(name.split('/')): jnp.asarray(w) for name, w in task.weights.items()})
  images = jax.device_put(task.images)
  if task.kind == 'train':
    return _train(task, config, detector, mesh, variables, images)
  function = jit_detect(detector, mesh) if task.kind == 'detect' else jax.jit(detector.forward)
  program = _compile(function, variables, images)
  last = None

  def once():
    nonlocal last
    last = jax.block_until_ready(program(variables, images))

  return once, lambda: {name: np.asarray(a) for name, a in last._asdict().items()}


def _train(task, config, detector, mesh, variables, images):
  optimizer = build_optimizer(
      steps=1_000_000, batch_size=task.batch, learning_rate=LEARNING_RATE, rate_batch_size=0,
      warmup_fraction=0, optimizer=config.optim.optimizer.to_dict(),
      weight_decay=config.optim.weight_decay)
  boxes, labels, valid = (task.ground_truth[name] for name in ('boxes', 'labels', 'valid'))
  ground_truth = jax.device_put(GroundTruth(boxes, labels, np.zeros_like(valid), valid))
  state, metrics = first_state(variables, optimizer), None
  program = _compile(jit_train_step(detector, optimizer, mesh), state, images, ground_truth)

  def once():
    nonlocal state, metrics
    state, metrics = program(state, images, ground_truth)
    jax.block_until_ready(metrics)

  def results():
    return {'loss': np.asarray(metrics.loss), **traverse_util.flatten_dict(
        jax.tree.map(np.asarray, state.variables), sep='/')}

  return once, results


def _compile(function, *arguments):
  global compiled
  compiled = function.lower(*arguments).compile()
  return compiled


def describe() -> dict:
  costs = (compiled.cost_analysis() if compiled else None) or {}
  return {'versions': {'jax': jax.__version__}, 'hardware': hardware.describe(),
          'memory': profiling.peak_memory(),
          'program': {'flops': costs.get('flops'), 'bytes': costs.get('bytes accessed')}}


if __name__ == '__main__':
  # As `train` does. It must come first, because it does not affect running threads.
  if expects_cpu():
    keep_freed_memory()
  serve(prepare, describe)
