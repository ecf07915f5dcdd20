"""Eight devices compute the same as one."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]

# In float64, since float32 sums in another order differ by up to a percent in single gradients.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update('jax_enable_x64', True)
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config
from ppn_jax.data.loader import train_batches
from ppn_jax.data.source import build_source
from ppn_jax.detector import jit_detect
from ppn_jax.run import build_detector
from ppn_jax.distributed import sharding
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.train_step import jit_init, jit_train_step

assert jax.device_count() == 8
config = tiny_config()
config.unlock()
config.model.num_classes = 5
config.model.layers.dtype = 'float64'
detector = build_detector(config)
optimizer = build_optimizer(steps=3, batch_size=8, learning_rate=.1, ema_decay=.9)
source = build_source(config.data.train.to_dict())


def widen(x):
  return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def three_steps(devices):
  mesh = sharding.data_mesh(devices)
  state = jax.tree.map(widen, jit_init(detector, optimizer, mesh)(0))
  step, losses = jit_train_step(detector, optimizer, mesh), []
  batches = train_batches(source, transforms=(), image_size=64, max_boxes=8, batch_size=8, seed=0,
                          rows=sharding.local_rows(8, mesh))
  for batch, _ in zip(batches, range(3)):
    images, truth = sharding.to_global((batch.images, batch.ground_truth), mesh, 8)
    assert len(images.addressable_shards) == len(devices)
    state, metrics = step(state, images, truth)
    losses.append(float(metrics.loss))
  found = jit_detect(detector, mesh)(state.variables, images)
  return losses, jax.device_get(state), jax.device_get(found)


one, eight = three_steps(jax.devices()[:1]), three_steps(jax.devices())
np.testing.assert_allclose(one[0], eight[0], rtol=1e-6)
for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(eight[1]), strict=True):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
np.testing.assert_allclose(one[2].scores, eight[2].scores, atol=1e-6)
np.testing.assert_array_equal(one[2].valid, eight[2].valid)
print('equal')
"""


@pytest.mark.slow
def test_eight_devices_equal_one():
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                 'JAX_NUM_CPU_DEVICES': '8'}
  result = subprocess.run([sys.executable, '-c', PROGRAM, str(TESTS)], env=environment, text=True,
                          capture_output=True)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == 'equal'
