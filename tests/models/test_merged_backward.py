"""Layers from batch norm to batch norm against the same by automatic differentiation."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppn_jax.errors import InputError
from ppn_jax.models import merged_backward, pallas_kernels
from ppn_jax.models.merged_backward import Raw
from ppn_jax.training.step import check_kernels

EPSILON = 1e-3
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
  """Long ones take XLA seconds to compile on a CPU."""
  monkeypatch.setattr(pallas_kernels, '_UNROLL', 2)


def conv(stride, x, kernel):
  return lax.conv_general_dilated(
      x, kernel.astype(x.dtype), (stride, stride), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1] if kernel.shape[0] == 3 else 1)


def merged(interpret, stride, x, kernel):
  return merged_backward.conv_with_moments(conv, stride, interpret, x, kernel)


def plain(stride, x, kernel):
  y = conv(stride, x.value(), kernel)
  return y, merged_backward.moments(y, len(x.factor))


def loss(layer, parameters, x):
  """Two layers with batch norm in two groups, and some function of what they give."""
  for stride, (kernel, scale, bias) in zip((2, 1), parameters['layers'], strict=True):
    y, statistics = layer(stride, x, kernel)
    factor = scale * lax.rsqrt(statistics.variance() + EPSILON)
    x = Raw(y, factor, bias - statistics.mean * factor)
  return jnp.sum(jnp.sin(x.value().astype(jnp.float32)) * parameters['weights'])


def problem():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  layers = [(normal(3, 3, 1, 8), 1 + normal(8), 2 + normal(8)),
            (normal(1, 1, 8, 16), 1 + normal(16), 2 + normal(16))]
  return ({'layers': layers, 'weights': normal(8, 2, 3, 16)},
          Raw(normal(8, 3, 5, 8), 1 + normal(2, 8), 2 + normal(2, 8)))


def gradients(layer, *placed):
  function = jax.value_and_grad(functools.partial(loss, layer), argnums=(0, 1))
  return jax.jit(function, compiler_options=QUICK)(*placed)


def assert_close(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize('interpret', [True, False])
def test_two_layers_have_the_gradients_of_the_plain_form(interpret):
  """With the kernels, and where the platform has none."""
  assert_close(gradients(functools.partial(merged, interpret), *problem()),
               gradients(plain, *problem()))


def on_four_devices():
  """What the test below runs. Groups are then of images on several devices."""
  mesh = Mesh(np.array(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec('data')))
  parameters, x = problem()
  placed = jax.device_put(parameters, whole), Raw(*jax.device_put(tuple(x), (rows, whole, whole)))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    found = gradients(functools.partial(merged, True), *placed)
  assert len(found[1][1].x.devices()) == len(jax.devices()) == 4
  assert_close(found, gradients(plain, parameters, x))


def test_devices_take_their_own_images():
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu',
                 'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
                 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *sys.path])}
  code = ('from ppn_jax.models import pallas_kernels; pallas_kernels._UNROLL = 2; '
          'import test_merged_backward; test_merged_backward.on_four_devices()')
  done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]


def test_small_batches_are_left_to_xla(monkeypatch):
  """On TPU too: 8 images do not fill a register."""
  def fail(*_, **__):
    raise AssertionError('a kernel was taken')

  monkeypatch.setattr(pallas_kernels, 'backward', fail)
  function = jax.jit(jax.grad(functools.partial(loss, functools.partial(merged, False))))
  function.trace(*problem()).lower(lowering_platforms=('tpu',))
  monkeypatch.setattr(pallas_kernels, 'supported', lambda *_: True)
  with pytest.raises(AssertionError, match='a kernel was taken'):
    function.clear_cache()
    function.trace(*problem()).lower(lowering_platforms=('tpu',))


@pytest.mark.parametrize('form, kinds, refused', [
    ('merged', ['TPU v4'], True), ('merged', ['TPU v3'], True), ('auto', ['TPU v4'], False),
    ('merged', ['TPU v5 lite', 'TPU v6 lite', 'cpu'], False)])
def test_chips_without_room_for_the_kernels_are_refused_before_compiling(form, kinds, refused):
  if not refused:
    return check_kernels(form, kinds)
  with pytest.raises(InputError, match=f"conv_form='merged' needs more VMEM than a {kinds[0]} has"):
    check_kernels(form, kinds)
