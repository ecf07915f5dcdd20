"""The kernels in interpret mode against XLA's gradients of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ppn_jax.models import pallas_kernels

# Most of the time goes into compiling.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
# Of a gradient's largest element. The plain form rounds what goes into the multiplications to
# bfloat16, the kernels do not always.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
  """Long ones take XLA seconds to compile on a CPU."""
  monkeypatch.setattr(pallas_kernels, '_UNROLL', 2)


def plain(x, factor, offset, kernel, stride):
  """conv(relu6(x * factor + offset), kernel), the argument rounded to the type of x."""
  h = (x.astype(jnp.float32) * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)
  h = lax.clamp(jnp.zeros((), x.dtype), h, jnp.full((), 6, x.dtype))
  return lax.conv_general_dilated(
      h, kernel.astype(x.dtype), (stride, stride), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1] if kernel.shape[0] == 3 else 1)


def layer(shape, depth_out, dtype):
  """x, factors and offsets of each image, and a kernel, depthwise if `depth_out` is 0. About a
  third of the arguments of ReLU6 are beyond its corners."""
  rng = np.random.default_rng(sum(shape))
  batch, _, _, depth = shape
  kernel = rng.normal(size=(1, 1, depth, depth_out) if depth_out else (3, 3, 1, depth))
  x, affine = rng.normal(size=shape), 2 + rng.normal(size=(2, batch, depth))
  return (jnp.asarray(x, dtype), *jnp.asarray(affine, jnp.float32),
          jnp.asarray(kernel, jnp.float32))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def wanted_and_found(stride, primals, dy, c):
  y, vjp = jax.vjp(lambda *p: plain(*p, stride), *primals)
  c0, c1 = c
  shift = c0[:, None, None] + c1[:, None, None] * y.astype(jnp.float32)
  x, factor, offset, kernel = primals
  found = pallas_kernels.backward(x, y, dy, factor, offset, c0, c1, kernel, stride=stride,
                                  interpret=True)
  return (vjp((dy.astype(jnp.float32) + shift).astype(y.dtype)),
          (found.x, found.factor, found.offset, found.kernel))


def check(primals, stride=1):
  """Returns the gradients that were found."""
  x, kernel = primals[0], primals[3]
  shape = (len(x), *(-(-n // stride) for n in x.shape[1:3]), kernel.shape[-1])
  rng = np.random.default_rng(1)
  dy = jnp.asarray(rng.normal(size=shape), x.dtype)
  c = jnp.asarray(rng.normal(size=(2, shape[0], shape[-1])), jnp.float32)
  wanted, found = wanted_and_found(stride, primals, dy, c)
  for name, a, b in zip(('x', 'factor', 'offset', 'kernel'), found, wanted, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype, name
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    assert np.abs(a - b).max() <= TOLERANCE[x.dtype.type] * np.abs(b).max(), name
  return found


# Channels fill the lanes or not, on either side; a pixel count that is odd, and 1.
@pytest.mark.parametrize(('shape', 'depth_out', 'dtype'), [
    ((8, 3, 5, 16), 24, jnp.float32), ((8, 3, 1, 16), 128, jnp.float32),
    ((256, 1, 2, 128), 256, jnp.float32), ((8, 1, 1, 128), 8, jnp.float32),
    ((8, 3, 1, 16), 128, jnp.bfloat16), ((8, 1, 2, 128), 128, jnp.bfloat16)])
def test_pointwise_is_the_gradient(shape, depth_out, dtype):
  check(layer(shape, depth_out, dtype))


@pytest.mark.parametrize(('shape', 'stride', 'dtype'), [
    ((8, 4, 3, 8), 1, jnp.float32), ((8, 2, 7, 16), 1, jnp.bfloat16),
    # Padding by 0 or 1 in front, by rows and by columns. The last block of two rows reaches
    # beyond an odd height, and interpret mode puts NaN there.
    ((8, 4, 5, 8), 2, jnp.float32), ((8, 5, 4, 8), 2, jnp.bfloat16), ((8, 1, 1, 8), 2, jnp.float32),
    # Several blocks of images, and of channels.
    ((256, 3, 2, 8), 2, jnp.float32), ((6, 3, 2, 256), 1, jnp.float32),
    ((8, 1, 2, 192), 1, jnp.float32)])
def test_depthwise_is_the_gradient(shape, stride, dtype):
  check(layer(shape, 0, dtype), stride)


# What the type rounds to a corner is at it: 5.99 in bfloat16.
@pytest.mark.parametrize(('depth_out', 'dtype', 'corner'), [
    (0, jnp.float32, 0), (0, jnp.bfloat16, 5.99), (8, jnp.float32, 6), (8, jnp.bfloat16, 5.99)])
def test_nothing_flows_through_the_corners(depth_out, dtype, corner):
  x, *_, kernel = layer((8, 2, 2, 8), depth_out, dtype)
  found = check((x, jnp.zeros((8, 8)), jnp.full((8, 8), corner, jnp.float32), kernel))
  assert not any(np.any(v) for v in found[:3])


@pytest.mark.parametrize(('x', 'y', 'dtype', 'taken'), [
    ((128, 150, 150, 32), (128, 150, 150, 64), jnp.bfloat16, True),
    ((256, 5, 5, 128), (256, 3, 3, 128), jnp.float32, True),
    ((64, 5, 5, 32), (64, 5, 5, 32), jnp.bfloat16, False),
    ((192, 5, 5, 32), (192, 5, 5, 32), jnp.bfloat16, False),
    ((128, 5, 5, 12), (128, 5, 5, 64), jnp.bfloat16, False),
    ((128, 5, 5, 32), (128, 5, 5, 20), jnp.bfloat16, False),
    ((128, 5, 5, 32), (128, 5, 5, 32), jnp.float16, False),
    ((128, 5, 5, 32), (128, 5, 5, 32), jnp.float64, False),
    # Its rows do not fit.
    ((128, 640, 640, 128), (128, 640, 640, 128), jnp.bfloat16, False)])
def test_what_the_kernels_take(x, y, dtype, taken):
  assert pallas_kernels.supported(x, y, dtype) is taken
