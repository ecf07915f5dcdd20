"""Groups of images, micro-batches and sharded optimizer states, compared with a plain step.

In float64, where only the order of sums differs.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from time_limits import HANG_SECONDS

TESTS = pathlib.Path(__file__).resolve().parents[1]

# Prints JSON: what each case of __main__'s table came to. One process, four devices.
PROGRAM = """
import json, sys
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

B = 16
source = build_source({'name': 'synthetic_shapes', 'num_images': 16, 'image_size': 64})
mesh = sharding.data_mesh()
batch = next(iter(train_batches(source, transforms=(), image_size=64, max_boxes=8, batch_size=B,
                                seed=0, rows=np.arange(B))))


def rows(tree, order):
  return jax.tree.map(lambda x: x[order], tree)


def steps(order, devices=4, *, groups=0, **optim):
  mesh = sharding.data_mesh(jax.devices()[:devices])
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.num_classes = 5
  config.model.layers.dtype = 'float64'
  config.model.backbone.last_block, config.model.neck.stride = 3, 4
  config.model.neck.num_levels = 2
  config.model.layers.norm_group_size = config.loss.group_size = groups
  detector = build_detector(config)
  optimizer = build_optimizer(steps=2, batch_size=B, learning_rate=.1, ema_decay=.9, **optim)
  state = jit_init(detector, optimizer, mesh)(0)
  placed = jax.tree.map(lambda x: x.sharding, state)
  state = jax.tree.map(lambda x, s: jax.device_put(
      x.astype(jnp.float64) if x.dtype == jnp.float32 else x, s), state, placed)
  images, truth = sharding.to_global(rows((batch.images, batch.ground_truth), order), mesh, B)
  step = jit_train_step(detector, optimizer, mesh).lower(state, images, truth).compile()
  losses = []
  for _ in range(2):
    state, metrics = step(state, images, truth)
    losses.append([float(m) for m in metrics])
  held = sum(x.addressable_data(0).size for x in jax.tree.leaves((state.opt_state, state.average)))
  if optimizer.shard_state:
    found = jit_detect(detector, mesh)(state.best_variables(), images)
    assert np.isfinite(np.asarray(found.scores)).all()
  return losses, jax.device_get(state), held, step.as_text().count('all-reduce(')


def distance(a, b):
  leaves = zip(*map(jax.tree.leaves, (a[:2], b[:2])), strict=True)
  return max(float(np.max(np.abs(x - y) / (1e-6 + np.abs(x)))) for x, y in leaves)


straight = np.arange(B)
# Part m of four has rows m, m + 4, ...; as groups they lie one after another.
interleaved = straight.reshape(-1, 4).T.reshape(-1)
plain, grouped = steps(straight), steps(interleaved, groups=4)
accumulated, sharded = steps(straight, micro_batches=4), steps(straight, shard_state=True)
print(json.dumps({
    'groups_change_it': distance(plain, grouped),
    'groups_over_devices': distance(steps(straight, groups=8),
                                    steps(straight, devices=1, groups=8)),
    'accumulated_is_grouped': distance(grouped, accumulated),
    'sharded_is_plain': distance(plain, sharded),
    'held': [plain[2], sharded[2]],
    'all_reduces': [plain[3], grouped[3]]}))
"""


@pytest.fixture(scope='module')
def found():
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                 'JAX_NUM_CPU_DEVICES': '4'}
  result = subprocess.run([sys.executable, '-c', PROGRAM, str(TESTS)], env=environment, text=True,
                          capture_output=True, timeout=HANG_SECONDS)
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


@pytest.mark.slow
def test_groups_give_the_same_on_any_number_of_devices(found):
  assert found['groups_change_it'] > 1e-3
  assert found['groups_over_devices'] < 1e-8


@pytest.mark.slow
def test_groups_within_devices_exchange_no_statistics(found):
  plain, grouped = found['all_reduces']
  assert grouped < plain


@pytest.mark.slow
def test_micro_batches_equal_groups(found):
  assert found['accumulated_is_grouped'] < 1e-8


@pytest.mark.slow
def test_a_sharded_state_equals_a_replicated_one(found):
  assert found['sharded_is_plain'] < 1e-8
  plain, sharded = found['held']
  assert sharded < 0.3 * plain
