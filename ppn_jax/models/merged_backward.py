"""A convolution from batch norm to batch norm, whose backward pass is one kernel on TPU.

A layer leaves its output as the convolution gave it, with the factor and the offset that batch
norm makes of its moments: a `Raw`. The next layer takes them as its prologue. What a backward pass
reads then lies between two convolutions, as `pallas_kernels` wants it, and the moments' part of
the cotangent is an affine function of the output.

On other platforms than TPU, and for shapes that the kernels do not take, the backward pass is
XLA's of the same function.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ppn_jax.models import pallas_kernels

Array = jax.Array
Conv = Callable[[int, Array, Array], Array]  # (stride, x, kernel) -> y


class Raw(NamedTuple):
  """Stands for relu6(x * factor + offset), which `value` computes."""
  x: Array  # [B, H, W, C].
  factor: Array  # [G, C] float32, of each of G groups of neighbouring images.
  offset: Array  # [G, C] float32.

  def value(self) -> Array:
    """[B, H, W, C] in the type of x, which it is rounded to before the ReLU6."""
    groups = self.x.reshape(len(self.factor), -1, *self.x.shape[1:])
    factor, offset = (v[:, None, None, None] for v in (self.factor, self.offset))
    y = (groups.astype(self.factor.dtype) * factor + offset).astype(self.x.dtype)
    return lax.clamp(jnp.zeros((), y.dtype), y, jnp.full((), 6, y.dtype)).reshape(self.x.shape)


class Moments(NamedTuple):
  """Of a convolution's output, group by group."""
  mean: Array  # [G, C]
  square: Array  # [G, C], the mean of the squares.

  def variance(self) -> Array:
    """[G, C], the biased one."""
    return jnp.maximum(self.square - self.mean * self.mean, 0)


def moments(y: Array, groups: int) -> Moments:
  """In float32 or wider, in one pass over y [B, H, W, C]."""
  wide = y.astype(jnp.promote_types(y.dtype, jnp.float32)).reshape(groups, -1, *y.shape[1:])
  return Moments(jnp.mean(wide, (1, 2, 3)), jnp.mean(wide * wide, (1, 2, 3)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def conv_with_moments(conv: Conv, stride: int, interpret: bool, x: Raw, kernel: Array
                      ) -> tuple[Array, Moments]:
  """conv(stride, x.value(), kernel) and its moments in the groups of x.

  Args:
    conv: depthwise if the kernel is [3, 3, 1, C], pointwise if [1, 1, Cin, Cout].
    stride: 1 or 2.
    interpret: takes the kernels on any platform, in interpret mode: for tests.
    x: its value is the input.
    kernel: float32; `conv` rounds it to the type of x.
  """
  y = conv(stride, x.value(), kernel)
  return y, moments(y, len(x.factor))


def _forward(conv, stride, interpret, x, kernel):
  y, statistics = conv_with_moments(conv, stride, interpret, x, kernel)
  return (y, statistics), (x, kernel, y)


def _backward(conv, stride, interpret, residuals, cotangents):
  x, kernel, y = residuals
  dy, d = cotangents
  count = y.size // (y.shape[-1] * len(x.factor))
  c0, c1 = d.mean / count, d.square * (2 / count)
  mesh = jax.sharding.get_abstract_mesh()
  operands = (x, kernel, y, dy, c0, c1)
  plain = functools.partial(_plain, conv, stride)
  merged = functools.partial(_merged, stride, interpret, mesh)
  devices = max(mesh.size, 1)
  shapes = ((len(y) // devices, *shape[1:]) for shape in (x.x.shape, y.shape))
  if len(y) % devices or not (interpret or pallas_kernels.supported(*shapes, y.dtype)):
    return plain(*operands)
  if interpret:
    return merged(*operands)
  return lax.platform_dependent(*operands, tpu=merged, default=plain)


conv_with_moments.defvjp(_forward, _backward)


def _plain(conv: Conv, stride: int, x: Raw, kernel: Array, y: Array, dy: Array, c0: Array,
           c1: Array) -> tuple[Raw, Array]:
  """The gradients by XLA."""
  groups = y.reshape(len(c0), -1, *y.shape[1:]).astype(c0.dtype)
  shift = c0[:, None, None, None] + c1[:, None, None, None] * groups
  cotangent = (dy.astype(c0.dtype) + shift.reshape(dy.shape)).astype(dy.dtype)
  return jax.vjp(lambda x, kernel: conv(stride, x.value(), kernel), x, kernel)[1](cotangent)


def _merged(stride: int, interpret: bool, mesh: jax.sharding.AbstractMesh, x: Raw, kernel: Array,
            y: Array, dy: Array, c0: Array, c1: Array) -> tuple[Raw, Array]:
  """The gradients by one kernel on each device.

  XLA cannot divide a kernel over a mesh by itself. Each device takes its own images; sums over
  all of them are left to XLA, in float32: they come back for each image, the kernel's gradient
  for each device.
  """
  def local(*operands):
    g = pallas_kernels.backward(*operands, stride=stride, interpret=interpret)
    return g._replace(kernel=g.kernel[None])

  run = local
  if mesh.size > 1:
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    run = jax.shard_map(local, in_specs=(*(rows,) * 7, whole), out_specs=rows, check_vma=False)
  images = len(y) // len(c0)
  per_image = (jnp.repeat(v, images, 0) for v in (x.factor, x.offset, c0, c1))
  factor, offset, c0, c1 = per_image
  g = run(x.x, y, dy, factor, offset, c0, c1, kernel)
  df, db = (jnp.sum(v.reshape(-1, images, v.shape[-1]), 1) for v in (g.factor, g.offset))
  return Raw(g.x, df, db), jnp.sum(g.kernel, 0).astype(kernel.dtype)
