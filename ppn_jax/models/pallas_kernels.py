"""Backward passes for TPU that take the two gradients of a convolution in one go.

A layer here is y = conv(relu6(x * factor + offset), kernel): the batch norm and ReLU6 of the
layer before have become the convolution's prologue. Its backward pass needs x, y and the
cotangent of y twice if XLA makes it, once for the gradient of x and once for that of the kernel.
These layers wait for memory, so one kernel that reads them once takes about half the time.

What a kernel is given as the cotangent of y is a part of it: batch norm's statistics of y add
c0 + c1 * y, which the kernel adds itself. Factors, offsets, c0, c1 and the sums that come back
are for each image, so that the kernels know nothing of norm groups or devices.

Arrays lie in memory as XLA has them on TPU: pixel by pixel a tile of two dimensions, [B, C]
where the channels fill the 128 lanes of a register, else [C, B]. A transposition to [H, W, tile]
then moves nothing.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
LANES, SUBLANES = 128, 8  # Of a register of 32 bits.
# Bytes of the blocks that a pointwise kernel holds, twice: while it works on one the next comes.
_BLOCK = 12 * 2**20
# That a kernel may use. v5e and v6e have 128 MB, v5p takes the kernels at 300 pixels; v4 does not,
# with 16 MB.
_VMEM = 100 * 2**20
_UNROLL = 6  # Pixels (pairs with stride 2) of a loop's body, for the scheduler to overlap.


class Gradients(NamedTuple):
  """Of a layer."""
  x: Array  # [B, H, W, Cin], the type of x.
  kernel: Array  # The kernel's shape, float32.
  factor: Array  # [B, Cin] float32, of each image.
  offset: Array  # [B, Cin] float32.


def supported(x: tuple[int, ...], y: tuple[int, ...], dtype: jnp.dtype) -> bool:
  """Whether the kernels take a layer with so many images, pixels and channels on a device.

  Args:
    x: [B, H, W, Cin], the shape of its input.
    y: [B, h, w, Cout], that of its output.
    dtype: of both.
  """
  if (x[0] % LANES or any(shape[3] % SUBLANES for shape in (x, y))
      or dtype not in (jnp.bfloat16, jnp.float32)):
    return False
  # A depthwise kernel holds rows: of x, y and the gradients, of which the next come meanwhile,
  # and three in float32.
  tile, size = LANES * _part(x[3]), jnp.dtype(dtype).itemsize
  stride = -(-x[1] // y[1])
  return tile * (size * 4 * (stride * x[2] + y[2]) + 12 * (y[2] + 2)) < 0.8 * _VMEM


def _part(size: int) -> int:
  """Of a tile's dimension: what a block takes, in whole registers of those who have any."""
  step = 1 if size % SUBLANES else SUBLANES
  return max(n for n in range(step, LANES + 1, step) if size % n == 0)


def backward(x: Array, y: Array, dy: Array, factor: Array, offset: Array, c0: Array, c1: Array,
             kernel: Array, *, stride: int = 1, interpret: bool = False) -> Gradients:
  """Gradients of y = conv(relu6(x * factor + offset), kernel), SAME as TensorFlow's.

  The derivative of ReLU6 is zero at both corners, judged as `x.dtype` rounds its argument.

  Args:
    x: [B, H, W, Cin].
    y: [B, h, w, Cout], as the layer gave it, h = ceil(H / stride).
    dy: as y. y's cotangent is dy + c0 + c1 * y.
    factor, offset: [B, Cin].
    c0, c1: [B, Cout].
    kernel: [3, 3, 1, C] for a depthwise convolution, [1, 1, Cin, Cout] for a pointwise one.
    stride: 1 or 2; 1 if pointwise.
    interpret: runs on any backend, slowly.
  """
  inside, outside = _lanes_of(x), _lanes_of(y)
  tiles = (_to_tiles(y, outside), _to_tiles(dy, outside), _to_tiles(x, inside),
           _tiles_of(factor, offset, inside), _tiles_of(c0, c1, outside))
  kernel = kernel.astype(x.dtype)
  if kernel.shape[0] == 1:
    dx, dk, sums = _pointwise(*tiles, kernel[0, 0], inside=inside, outside=outside,
                              interpret=interpret)
  else:
    dx, dk, sums = _depthwise(*tiles, _kernel_tiles(kernel, len(x), inside), stride=stride,
                              interpret=interpret)
    dk = jnp.sum(dk, 1 if inside else 2)
  df, db = sums if inside else sums.mT
  return Gradients(_from_tiles(dx, inside), dk.reshape(kernel.shape), df, db)


def _lanes_of(x: Array) -> int:
  """Which dimension of x's tile the channels are: 1, the lanes, if they fill them, else 0."""
  return int(x.shape[-1] % LANES == 0)


def _to_tiles(x: Array, channel: int) -> Array:
  return x.transpose(1, 2, 0, 3) if channel else x.transpose(1, 2, 3, 0)


def _from_tiles(x: Array, channel: int) -> Array:
  return x.transpose(2, 0, 1, 3) if channel else x.transpose(3, 0, 1, 2)


def _tiles_of(factor: Array, offset: Array, channel: int) -> Array:
  """[B, C] twice -> [2, tile] float32."""
  pair = jnp.stack([factor, offset]).astype(jnp.float32)
  return pair if channel else pair.mT


def _kernel_tiles(kernel: Array, batch: int, channel: int) -> Array:
  """[3, 3, 1, C] -> [9, tile] float32, the same for each image; rounded as x would have it."""
  taps = kernel.astype(jnp.float32).reshape(9, 1, -1)
  tiles = jnp.broadcast_to(taps, (9, batch, taps.shape[-1]))
  return tiles if channel else tiles.mT


def _highest(dtype: jnp.dtype) -> float:
  """The least argument that `dtype` rounds to 6, or is 6: ReLU6's upper corner."""
  return 6 - (0 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps))


class _Prologue(NamedTuple):
  """relu6(x * factor + offset) of a tile of x, and the way back."""
  x: Array
  factor: Array
  argument: Array
  highest: float

  @classmethod
  def of(cls, x: Array, factor: Array, offset: Array) -> '_Prologue':
    wide = x.astype(jnp.float32)
    return cls(wide, factor, wide * factor + offset, _highest(x.dtype))

  def value(self) -> Array:
    return jnp.clip(self.argument, 0., 6.)

  def back(self, dh: Array) -> tuple[Array, Array, Array]:
    """The value's cotangent -> those of x, factor and offset."""
    d = jnp.where((self.argument > 0) & (self.argument < self.highest), dh, 0.)
    return d * self.factor, d * self.x, d


def _cotangent(y: Array, dy: Array, c0: Array, c1: Array) -> Array:
  return dy.astype(jnp.float32) + (c0 + c1 * y.astype(jnp.float32))


def _call(kernel: Callable, name: str, interpret: bool, *, grid: tuple[int, ...], **specs
          ) -> Callable:
  return pl.pallas_call(
      kernel, name=name, interpret=interpret, grid=grid,
      compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',) * len(grid),
                                           vmem_limit_bytes=_VMEM), **specs)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


# Pointwise: pixel by pixel two multiplications by the matrix unit. The grid is (blocks of images,
# blocks of pixels); channels stay together.


def _pointwise(y: Array, dy: Array, x: Array, affine: Array, c: Array, kernel: Array, *,
               inside: int, outside: int, interpret: bool) -> tuple[Array, Array, Array]:
  """[H, W, tile], ... -> dx [H, W, tile], dk [Cin, Cout], sums [2, tile]."""
  shape, batch = x.shape, x.shape[3 - inside]
  images = _part(batch)
  x, y, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, y, dy))
  pixels = _pixels_of_block(len(x), 2 * images * sum(kernel.shape) * x.dtype.itemsize)

  def block(count, channel, depth, index):
    tile = (images, depth) if channel else (depth, images)
    return pl.BlockSpec((count, *tile),
                        lambda b, i: (index(i), b, 0) if channel else (index(i), 0, b))

  depth_in, depth_out = kernel.shape
  x_block = block(pixels, inside, depth_in, lambda i: i)
  y_block = block(pixels, outside, depth_out, lambda i: i)
  x_pair, y_pair = (block(2, channel, depth, lambda i: 0)
                    for channel, depth in ((inside, depth_in), (outside, depth_out)))
  matrix = pl.BlockSpec(kernel.shape, lambda b, i: (0, 0))
  dx, dk, sums = _call(
      functools.partial(_pointwise_kernel, inside, outside), 'pointwise_backward', interpret,
      grid=(batch // images, len(x) // pixels),
      in_specs=[y_block, y_block, x_block, x_pair, y_pair, matrix],
      out_specs=[x_block, matrix, x_pair],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype),
                 jax.ShapeDtypeStruct(kernel.shape, jnp.float32),
                 jax.ShapeDtypeStruct(affine.shape, jnp.float32)],
  )(y, dy, x, affine, c, kernel)
  return dx.reshape(shape), dk, sums


def _pixels_of_block(pixels: int, size: int) -> int:
  """The most, of `size` bytes each, that divide all of them and fit."""
  return max(n for n in range(1, pixels + 1)
             if pixels % n == 0 and (n == 1 or n * size <= _BLOCK))


def _pointwise_kernel(inside, outside, y, dy, x, affine, c, kernel, dx, dk, sums):
  @pl.when(pl.program_id(1) == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
  def _():
    dk[...] = jnp.zeros_like(dk)

  def pixel(p):
    g = _cotangent(y[p], dy[p], c[0], c[1]).astype(x.dtype)
    prologue = _Prologue.of(x[p], affine[0], affine[1])
    dk[...] += _dot(prologue.value().astype(x.dtype), g, 1 - inside, 1 - outside)
    dh = _dot(g, kernel[...], outside, 1) if inside else _dot(kernel[...], g, 1, outside)
    dx_, df, db = prologue.back(dh)
    dx[p] = dx_.astype(dx.dtype)
    sums[0] += df
    sums[1] += db

  # Where one pixel keeps the matrix unit busy, there is nothing to overlap.
  _each(x.shape[0], pixel, unroll=2 if max(kernel.shape) <= LANES else 1)


# Depthwise: nine multiply-adds by the vector unit for either gradient, both from the same nine
# cotangents around a pixel. The grid is (blocks of lanes, blocks of sublanes, rows of y). A step
# makes the cotangents of a row of y and puts them into a ring of three such rows; then it goes
# through the `stride` rows of x whose windows end there.


class _Geometry(NamedTuple):
  """Along one axis: x has `size` pixels, y `count`, with `front` of SAME's zeros before x.

  Tap i takes x's pixel s m + phase to y's pixel m + offset, offset = (phase + front - i) / s.
  """
  size: int
  count: int
  stride: int
  front: int

  def taps(self, phase: int) -> Iterator[tuple[int, int]]:
    """(tap, offset) of the taps that meet a phase."""
    for tap in range(3):
      offset, rest = divmod(phase + self.front - tap, self.stride)
      if not rest:
        yield tap, offset

  @property
  def delay(self) -> int:
    """The furthest that an x looks ahead in y."""
    return (self.stride - 1 + self.front) // self.stride


def _depthwise(y: Array, dy: Array, x: Array, affine: Array, c: Array, kernel: Array, *,
               stride: int, interpret: bool) -> tuple[Array, Array, Array]:
  """[H, W, tile], ..., kernel [9, tile] -> dx [H, W, tile], dk [9, tile], sums [2, tile]."""
  def geometry(size, count):
    return _Geometry(size, count, stride, max((count - 1) * stride + 3 - size, 0) // 2)

  (height, width, *tile), (rows, columns) = x.shape, y.shape[:2]
  down, across = geometry(height, rows), geometry(width, columns)
  part = tuple(map(_part, tile))

  def block(*leading, index=lambda t: 0):
    rest = (0,) * (len(leading) - 1)
    return pl.BlockSpec((*leading, *part), lambda lane, sub, t: (index(t), *rest, sub, lane))

  x_block = block(stride, width, index=lambda t: jnp.maximum(t - down.delay, 0))
  y_block = block(1, columns, index=lambda t: jnp.minimum(t, rows - 1))
  dx, dk, sums = _call(
      functools.partial(_depthwise_kernel, down, across), 'depthwise_backward', interpret,
      grid=(tile[1] // part[1], tile[0] // part[0], rows + down.delay),
      in_specs=[y_block, y_block, x_block, block(2), block(2), block(9)],
      out_specs=[x_block, block(9), block(2)],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype),
                 jax.ShapeDtypeStruct(kernel.shape, jnp.float32),
                 jax.ShapeDtypeStruct(affine.shape, jnp.float32)],
      # A column of zeros on either side.
      scratch_shapes=[pltpu.VMEM((3, columns + 2, *part), jnp.float32)],
  )(y, dy, x, affine, c, kernel)
  return dx, dk, sums


def _depthwise_kernel(down, across, y, dy, x, affine, c, kernel, dx, dk, sums, ring):
  t = pl.program_id(2)
  newest = lax.rem(t, 3)

  def clear(rows, q):
    for r in rows:
      ring[r, q] = jnp.zeros(ring.shape[2:], jnp.float32)

  @pl.when(t == 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    sums[...] = jnp.zeros_like(sums)
    _each(ring.shape[1], functools.partial(clear, range(3)))

  @pl.when(t < down.count)
  def _():
    def column(q):
      ring[newest, q + 1] = _cotangent(y[0, q], dy[0, q], c[0], c[1])
    _each(across.count, column)

  @pl.when(t >= down.count)
  def _():
    _each(ring.shape[1], functools.partial(clear, (newest,)))

  for phase in range(down.stride):
    row = (t - down.delay) * down.stride + phase

    @pl.when((row >= 0) & (row < down.size))
    def _(phase=phase):
      # Tap -> the place in the ring of the row of y that it goes to.
      places = {tap: lax.rem(t + 3 - (down.delay - offset), 3) for tap, offset in down.taps(phase)}
      _depthwise_row(phase, places, across, x, affine, kernel, dx, dk, sums, ring)


def _depthwise_row(phase, places, across, x, affine, kernel, dx, dk, sums, ring):
  """A row of x, register by register of the tile: the sums of a row stay in registers."""
  taps = [3 * i + j for i in places for j in range(3)]
  sublanes = x.shape[2] if x.shape[2] % SUBLANES else SUBLANES

  def register(n, _):
    part = pl.ds(pl.multiple_of(n * sublanes, sublanes), sublanes)
    factor, offset = affine[0, part], affine[1, part]
    weights = {tap: kernel[tap, part] for tap in taps}

    def pixels(m, totals, phases=range(across.stride)):
      kernel_sums, df, db = totals
      for side in phases:
        column = m * across.stride + side
        prologue = _Prologue.of(x[phase, column, part], factor, offset)
        h, dh = prologue.value(), 0.
        for (i, place), (j, ahead) in itertools.product(places.items(), across.taps(side)):
          g = ring[place, m + 1 + ahead, part]
          dh += g * weights[3 * i + j]
          kernel_sums = kernel_sums | {3 * i + j: kernel_sums[3 * i + j] + h * g}
        dx_, df_, db_ = prologue.back(dh)
        dx[phase, column, part] = dx_.astype(dx.dtype)
        df, db = df + df_, db + db_
      return kernel_sums, df, db

    zero = jnp.zeros_like(factor)
    whole, rest = divmod(across.size, across.stride)
    totals = _unrolled(whole, pixels, ({tap: zero for tap in taps}, zero, zero))
    kernel_sums, df, db = pixels(whole, totals, range(rest))
    for tap in taps:
      dk[tap, part] += kernel_sums[tap]
    sums[0, part] += df
    sums[1, part] += db
    return 0

  lax.fori_loop(0, x.shape[2] // sublanes, register, 0)


def _each(count: int, body: Callable[[Array], None], unroll: int | None = None) -> None:
  def step(n, _):
    body(n)

  _unrolled(count, step, None, unroll)


def _unrolled(count: int, body: Callable, carry: Any, unroll: int | None = None) -> Any:
  """`fori_loop`, several steps a time; the rest one by one."""
  unroll = unroll or _UNROLL
  whole, rest = divmod(count, unroll)

  def several(k, carry):
    for n in range(unroll):
      carry = body(k * unroll + n, carry)
    return carry

  carry = lax.fori_loop(0, whole, several, carry)
  for n in range(count - rest, count):
    carry = body(n, carry)
  return carry
