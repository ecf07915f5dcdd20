"""Batch norm, the policy and the blocks, on one device and on eight."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.errors import InputError
from ppn_jax.models import layers


def random(shape, seed=0, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def value_and_gradients(op, *operands):
  """Returns the value, and gradients for a fixed random cotangent."""
  y, vjp = jax.vjp(op, *operands)
  return y, *vjp(random(y.shape, 9).astype(y.dtype))


def batch_norm(x, decay=0.9):
  norm = layers.BatchNorm(layers.LayerPolicy(norm_decay=decay))
  variables = norm.init(jax.random.key(0), x, train=True)
  return norm, variables, *norm.apply(variables, x, train=True, mutable=['batch_stats'])


def test_batch_norm_uses_the_biased_variance_and_averages_the_unbiased():
  x = random((3, 2, 2, 4), dtype=np.float32) * 3 + 2
  _, variables, y, updates = batch_norm(x)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], np.zeros(4))
  rows = np.asarray(x).reshape(-1, 4)
  np.testing.assert_allclose(
      y.reshape(-1, 4), (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3), atol=1e-5)
  stats = updates['batch_stats']
  np.testing.assert_allclose(stats['mean'], 0.1 * rows.mean(0), rtol=1e-5)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_of_one_sample_stays_finite():
  _, _, y, updates = batch_norm(jnp.full((1, 1, 1, 4), 7.0))
  np.testing.assert_array_equal(y, np.zeros((1, 1, 1, 4)))
  np.testing.assert_allclose(updates['batch_stats']['var'], np.full(4, 0.9), rtol=1e-6)


def test_batch_norm_keeps_float32_statistics_of_bfloat16():
  x = (random((64, 8, 8, 2), dtype=np.float32) + 3).astype(jnp.bfloat16)
  norm, variables, y, updates = batch_norm(x, decay=0.0)
  assert y.dtype == jnp.bfloat16
  wide = np.asarray(x, np.float64).reshape(-1, 2)
  np.testing.assert_allclose(updates['batch_stats']['mean'], wide.mean(0), rtol=1e-4)
  np.testing.assert_allclose(updates['batch_stats']['var'], wide.var(0, ddof=1), rtol=1e-4)
  still = norm.apply(variables, x, train=False)
  np.testing.assert_allclose(still.astype(jnp.float32), x.astype(jnp.float32), rtol=1e-2)


@pytest.mark.usefixtures('float64')
def test_statistics_stay_float32_in_float64():
  """Checks that a step returns the types that it takes."""
  _, _, _, updates = batch_norm(random((4, 3, 3, 2)))
  assert {leaf.dtype for leaf in jax.tree.leaves(updates['batch_stats'])} == {jnp.dtype('float32')}


@pytest.mark.slow
@pytest.mark.usefixtures('float64')
def test_batch_norm_gradient_equals_the_definition():
  x = random((4, 3, 3, 2))
  norm, variables, _, _ = batch_norm(x)

  def ours(x):
    return norm.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  def definition(x):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-3)

  for a, b in zip(value_and_gradients(ours, x), value_and_gradients(definition, x), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('options', 'words'), [
    ({'conv_form': 'shifte'}, "did you mean 'shifted'"),
    ({'dtype': 'int32'}, 'not a float type'),
    ({'dtype': 'bfloat17'}, 'not a float type'),
    ({'norm_decay': 1.5}, r'not in \[0, 1\)'),
    ({'norm_epsilon': 0.0}, 'not positive'),
    ({'kernel_stddev': -1.0}, 'not positive'),
])
def test_policy_rejects(options, words):
  with pytest.raises(InputError, match=words):
    layers.LayerPolicy(**options)


def test_kernels_are_initialised_by_the_policy():
  x = jnp.zeros((1, 4, 4, 64))
  for stddev, expected in ((None, (2 / 64) ** 0.5), (0.01, 0.01)):
    module = layers.ConvNorm(256, policy=layers.LayerPolicy(kernel_stddev=stddev))
    kernel = module.init(jax.random.key(0), x, train=False)['params']['kernel']
    assert kernel.shape == (1, 1, 64, 256)
    assert abs(float(kernel.std()) / expected - 1) < 0.05


@pytest.mark.slow
def test_separable_block_keeps_float32_parameters_and_halves_the_map():
  block = layers.DepthwiseSeparable(6, stride=2, policy=layers.LayerPolicy(dtype=jnp.bfloat16))
  x = random((2, 5, 5, 4), dtype=np.float32)
  variables = block.init(jax.random.key(0), x, train=False)
  y = block.apply(variables, x, train=False)
  assert (y.shape, y.dtype) == ((2, 3, 3, 6), jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


# Runs in its own process, since eight devices must be set up before JAX starts.
SHARDED = '''
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ppn_jax.models import convolution, layers
jax.config.update('jax_enable_x64', True)
block = layers.DepthwiseSeparable(6, stride=2)
x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 10, 10, 4)))
variables = block.init(jax.random.key(0), x, train=False)
def loss(variables, x):
  y, _ = block.apply(variables, x, train=True, mutable=['batch_stats'])
  return jnp.mean(convolution.max_pool(y) ** 2)
step = jax.jit(jax.value_and_grad(loss))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
assert mesh.size == 8
split = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
text = step.lower(variables, split).compile().as_text()
assert 'all-reduce' in text and 'all-gather' not in text
for a, b in zip(jax.tree.leaves(step(variables, x)), jax.tree.leaves(step(variables, split))):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
'''


@pytest.mark.slow
def test_batch_over_eight_devices_equals_one_and_gathers_nothing():
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '8',
                 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', SHARDED], env=environment, capture_output=True,
                        text=True, timeout=HANG_SECONDS, check=False)
  assert done.returncode == 0, done.stderr
