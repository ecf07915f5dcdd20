"""Convolution and pooling in several forms, with equal values and gradients.

'native' is the plain `lax` operation. 'shifted' is written for XLA's CPU backend, whose grouped
convolution takes up to a hundred times what its arithmetic needs, backward above all: a depthwise
convolution becomes nine shifted multiply-adds, the others matrix multiplications. 'dense' is for
TPUs, whose matrix unit is mostly idle in this network: a depthwise convolution of few channels
becomes a dense one with a diagonal kernel, which would take several times as long on the vector
unit, which also computes batch norm. Its kernel gradients are float32 from the start, since XLA
sums over devices in the type that a gradient is computed in. 'auto' uses 'shifted' in programs
lowered for CPUs, 'dense' for TPUs and 'native' for others; the machine that lowers a program need
not have the platform.

The operands of matrix products may be rounded to bfloat16 while everything else stays float32
(`conv`, `matmul_dtype`). Processors with instructions for it multiply them about twice as fast,
whereas the rest of a step is slower on CPUs in bfloat16.

Arrays are NHWC and kernels HWIO; a depthwise kernel is [k, k, 1, C], Flax's convention (the TF
Object Detection API's is [k, k, C, 1]). Padding is TensorFlow's SAME: of the total
max((ceil(n / s) - 1) s + k - n, 0) the smaller half goes in front.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.processor import multiplies_bfloat16

Array = jax.Array
CONV_FORMS = ('auto', 'native', 'shifted', 'dense')
MATMUL_DTYPES = ('same', 'bfloat16', 'auto')

# The 'dense' form is used up to this many channels; with more, multiplying zeros takes longer than
# it saves.
DENSE_CHANNELS = 64
# Rows in each step of a depthwise kernel gradient on CPUs: the fastest of 1 to 8 for most layers.
_ROWS = 5
# Matrix products are only rounded if each sum has at least this many terms, and a row that many
# sums; in smaller ones, rounding takes longer than it saves.
_ROUNDED_TERMS = 32
# Most rows of a chunk. Gradients of kernels are sums of products over chunks of rows, whose
# operands stay in a cache of the processor.
_CHUNK_ROWS = 6_000
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def same_padding(size: int, stride: int, window: int = 3) -> tuple[int, int]:
  """Returns the rows that TensorFlow's SAME padding adds in front and behind.

  The output has ceil(size / stride) rows.
  """
  total = max((-(-size // stride) - 1) * stride + window - size, 0)
  return total // 2, total - total // 2


def _taps(side: int) -> tuple[tuple[int, int], ...]:
  """Returns the rows and columns of a square kernel's entries."""
  return tuple((i, j) for i in range(side) for j in range(side))


def accumulator(dtype: Any) -> Any:
  """Returns the type in which values of `dtype` are summed: float32 or wider."""
  return jnp.promote_types(dtype, jnp.float32)


def _choose(form: str, forms: dict[str, Callable], *operands: Any) -> Any:
  """Calls the given form of an operation, or its native one if it has no such form."""
  native = forms['native']
  if form == 'auto':
    return lax.platform_dependent(*operands, cpu=forms.get('shifted', native),
                                  tpu=forms.get('dense', native), default=native)
  return forms.get(form, native)(*operands)


def _with_forms(native: Callable, *, vjps: Mapping[str, Callable], **others: Callable) -> Callable:
  """Returns op(form, stride, *operands), which computes `native` or another form, and its gradient.

  In place of the stride, an operation may take any options that can be hashed.

  The form is chosen inside a custom gradient, because differentiating a conditional would keep the
  residuals of all its branches.

  Args:
    native: the plain operation, called as native(stride, *operands).
    vjps: gradients of forms that are not to be differentiated by JAX; they take the cotangent last.
    **others: further forms by name, called as `native`.
  """
  forms = {'native': native, **others}

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
  def op(form, stride, *operands):
    return _choose(form, {name: functools.partial(function, stride)
                          for name, function in forms.items()}, *operands)

  def forward(form, stride, *operands):
    return op(form, stride, *operands), operands

  def backward(form, stride, operands, g):
    gradients = {name: functools.partial(vjps[name], stride) if name in vjps
                 else functools.partial(_plain_vjp(function), stride)
                 for name, function in forms.items()}
    return _choose(form, gradients, *operands, g)

  op.defvjp(forward, backward)
  return op


def _plain_vjp(function: Callable) -> Callable:
  """Returns the gradient of an operation as JAX derives it."""
  def backward(stride, *operands_and_cotangent):
    *operands, g = operands_and_cotangent
    return jax.vjp(functools.partial(function, stride), *operands)[1](g)
  return backward


def _wide_vjp(function: Callable) -> Callable:
  """Returns the gradient of a convolution with a float32 kernel gradient for any input type."""
  def backward(stride, x, kernel, g):
    wide = accumulator(x.dtype)
    of_x, = jax.vjp(lambda x: function(stride, x, kernel), x)[1](g)
    of_kernel, = jax.vjp(lambda k: function(stride, x.astype(wide), k), kernel)[1](g.astype(wide))
    return of_x, of_kernel
  return backward


def _pad(x: Array, side: int, stride: int, rows: int = 0, multiple: int = 1) -> Array:
  """Pads `x` with zeros as SAME does.

  The optimization barrier makes XLA write the result once, instead of computing it again for each
  shift that reads it.

  Args:
    x: [B, H, W, C].
    side: side of the kernel.
    stride: stride of the convolution.
    rows: output rows that windows are read for, if more than the output has.
    multiple: height and width of the result are multiples of this.
  """
  padding = []
  for size, count in zip(x.shape[1:3], (rows, 0), strict=True):
    front, behind = same_padding(size, stride, side)
    read = (max(count, -(-size // stride)) - 1) * stride + side
    whole = -(-max(read, front + size + behind) // multiple) * multiple
    padding.append((front, whole - front - size))
  return lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))


def _strided(size: int, start: int, stride: int) -> slice:
  """Returns the slice of `size` entries from `start` on, `stride` apart."""
  return slice(start, start + (size - 1) * stride + 1, stride)


def _depthwise_native(stride: int, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), 'SAME',
                                  dimension_numbers=_DIMENSIONS, feature_group_count=x.shape[-1])


def _depthwise_dense(stride: int, x: Array, kernel: Array) -> Array:
  """Convolves densely with a diagonal kernel; adding zeros changes no digit of a finite sum."""
  channels = x.shape[-1]
  if channels > DENSE_CHANNELS:
    return _depthwise_native(stride, x, kernel)
  return _conv_native(_ConvOptions(stride), x, kernel * jnp.eye(channels, dtype=kernel.dtype))


def _depthwise_shifted(stride: int, x: Array, kernel: Array) -> Array:
  """Convolves by shifted multiply-adds, nine for a 3x3 kernel."""
  h, w = (-(-n // stride) for n in x.shape[1:3])
  side = len(kernel)
  padded, kernel = _pad(x, side, stride), kernel.astype(x.dtype).astype(accumulator(x.dtype))
  return sum(padded[:, _strided(h, i, stride), _strided(w, j, stride)] * kernel[i, j, 0]
             for i, j in _taps(side)).astype(x.dtype)


def _depthwise_vjp(stride: int, x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  return (_depthwise_input_gradient(stride, x.shape, kernel, g),
          _depthwise_kernel_gradient(stride, len(kernel), x, g).astype(kernel.dtype))


def _depthwise_input_gradient(stride: int, shape: tuple[int, ...], kernel: Array,
                              g: Array) -> Array:
  """Computes the input gradient of a depthwise convolution, phase by phase.

  The rows and columns p, q (mod stride) of the padded input are only read by the taps p, q (mod
  stride), so the gradient of each such phase is a stride-1 correlation of the cotangent.
  """
  side = len(kernel)
  margin = (side - 1) // stride
  h, w = (n + margin for n in g.shape[1:3])
  padded = lax.optimization_barrier(
      jnp.pad(g, ((0, 0), (margin, margin), (margin, margin), (0, 0))))
  kernel = kernel.astype(g.dtype).astype(accumulator(g.dtype))

  def phase(p, q):
    def tap(i, j):
      row, column = margin - i // stride, margin - j // stride
      return padded[:, row:row + h, column:column + w] * kernel[i, j, 0]
    return sum(tap(i, j) for i, j in _taps(side)
               if (i % stride, j % stride) == (p, q)).astype(g.dtype)

  phases = [[phase(p, q) for q in range(stride)] for p in range(stride)]
  (top, _), (left, _) = (same_padding(n, stride, side) for n in shape[1:3])
  return _interleave(phases, *shape[1:3], top, left)


def _interleave(phases: list[list[Array]], height: int, width: int, top: int = 0,
                left: int = 0) -> Array:
  """Interleaves s x s phases [B, h, w, C] to [B, H, W, C].

  The first `top` rows and `left` columns are left out.
  """
  s = len(phases)

  def padding(offset, count, size):
    return offset, size - offset - ((count - 1) * s + 1), s - 1

  def dilated(p, q):
    x = phases[p][q]
    _, h, w, _ = x.shape
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), padding(p - top, h, height),
                                              padding(q - left, w, width), (0, 0, 0)))

  if s > 1:
    phases = lax.optimization_barrier(phases)
  return sum(dilated(p, q) for p in range(s) for q in range(s))


def _depthwise_kernel_gradient(stride: int, side: int, x: Array, g: Array) -> Array:
  """Computes the kernel gradient of a depthwise convolution, a few rows at a time.

  The rows are added to an accumulator [B, w, C] of each tap. A plain sum of each tap's products
  would write the products to memory first, or read memory in strides.
  """
  b, h, w, c = g.shape
  dtype = accumulator(x.dtype)
  rows = min(_ROWS, h)
  steps = -(-h // rows)
  g = lax.optimization_barrier(jnp.pad(g, ((0, 0), (0, steps * rows - h), (0, 0), (0, 0))))
  padded = _pad(x, side, stride, rows=steps * rows)

  def row(x, k):
    return lax.dynamic_index_in_dim(x, k, 1, keepdims=False).astype(dtype)

  def body(step, totals):
    first = step * rows
    images = [row(padded, first * stride + i) for i in range((rows - 1) * stride + side)]
    cotangents = [row(g, first + k) for k in range(rows)]
    return tuple(
        total + sum(images[k * stride + i][:, _strided(w, j, stride)] * cotangents[k]
                    for k in range(rows))
        for total, (i, j) in zip(totals, _taps(side), strict=True))

  totals = lax.fori_loop(0, steps, body, (jnp.zeros((b, w, c), dtype),) * side**2)
  return jnp.stack([jnp.sum(t, (0, 1)) for t in totals]).reshape(side, side, 1, c)


_depthwise = _with_forms(_depthwise_native, shifted=_depthwise_shifted, dense=_depthwise_dense,
                       vjps={'shifted': _depthwise_vjp, 'dense': _wide_vjp(_depthwise_dense)})


def depthwise_conv(x: Array, kernel: Array, *, stride: int = 1, form: str = 'auto') -> Array:
  """Convolves each channel with its own kernel, with SAME padding.

  Args:
    x: [B, H, W, C].
    kernel: [k, k, 1, C], rounded to the type of `x`; its gradient keeps the kernel's own type.
    stride: 1 or 2.
    form: one of `CONV_FORMS`.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), C].
  """
  return _depthwise(form, stride, x, kernel)


class _ConvOptions(NamedTuple):
  """Stride of a convolution, and `matmul_dtype` as in `conv`."""
  stride: int
  matmul_dtype: str = 'same'


def _is_rounded(options: _ConvOptions, kernel: Array, *, auto: bool = False) -> bool:
  """Returns whether the operands are rounded; `auto` tells what 'auto' means."""
  return _is_large(kernel) and (options.matmul_dtype == 'bfloat16'
                                or (auto and options.matmul_dtype == 'auto'))


def _is_large(kernel: Array) -> bool:
  side, _, depth, features = kernel.shape
  return min(side * side * depth, features) >= _ROUNDED_TERMS


def _round(x: Array) -> Array:
  """Rounds to the values of bfloat16, without changing the type."""
  return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _conv_native(options: _ConvOptions, x: Array, kernel: Array) -> Array:
  kernel = kernel.astype(x.dtype)
  if _is_rounded(options, kernel):
    x, kernel = _round(x), _round(kernel)
  return lax.conv_general_dilated(x, kernel, (options.stride,) * 2, 'SAME',
                                  dimension_numbers=_DIMENSIONS)


def _conv_vjp(options: _ConvOptions, x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  """Computes the gradients of `_conv_native`; where it rounds, the cotangent is rounded too."""
  return _plain_vjp(_conv_native)(*_rounded_operands(options, x, kernel, g))


def _conv_dense_vjp(options: _ConvOptions, x: Array, kernel: Array, g: Array
                    ) -> tuple[Array, Array]:
  """Computes the gradients as `_conv_vjp`, that of the kernel in float32."""
  return _wide_vjp(_conv_native)(*_rounded_operands(options, x, kernel, g))


def _rounded_operands(options: _ConvOptions, x: Array, kernel: Array, g: Array
                      ) -> tuple[_ConvOptions, Array, Array, Array]:
  """Rounds operands and cotangent where `options` say so; returns options that no longer do."""
  if _is_rounded(options, kernel):
    x, kernel, g = map(_round, (x, kernel, g))
  return options._replace(matmul_dtype='same'), x, kernel, g


def _conv_matmul(options: _ConvOptions, x: Array, kernel: Array) -> Array:
  """Convolves by one matrix product of all patches with the kernel (im2col)."""
  side, _, depth, features = kernel.shape
  # A gradient is a sum too, over the patches that share a pixel.
  wide = accumulator(x.dtype)
  patches = x.astype(wide)
  if (side, options.stride) != (1, 1):
    patches = _patches(patches, side, options.stride)
  shape = patches.shape[:-1]
  patches = patches.reshape(-1, side * side * depth)
  matrix = kernel.astype(x.dtype).astype(wide).reshape(-1, features)
  fast = multiplies_bfloat16()
  rounded = _is_rounded(options, kernel, auto=fast)
  if rounded or (fast and x.dtype == jnp.bfloat16 and _is_large(kernel)):
    y = _rounded_product(fast, len(x), patches, matrix)
  else:
    y = patches @ matrix
  return y.astype(x.dtype).reshape(*shape, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_product(narrow: bool, images: int, a: Array, b: Array) -> Array:
  """Computes the product of two float32 matrices, of operands rounded to bfloat16.

  Args:
    narrow: whether the operands are multiplied in bfloat16, or in float32 with the same values.
    images: number of images whose rows follow one another in `a`, the same number for each.
    a, b: [N, K] and [K, M].
  """
  return _multiply(_narrowed(narrow, a), _narrowed(narrow, b), a.dtype)


def _narrowed(narrow: bool, x: Array) -> Array:
  return x.astype(jnp.bfloat16) if narrow else _round(x)


def _multiply(a: Array, b: Array, dtype: Any) -> Array:
  return jnp.matmul(a, b, preferred_element_type=dtype)


def _rounded_product_forward(narrow: bool, images: int, a: Array, b: Array
                             ) -> tuple[Array, tuple[Array, Array]]:
  # The barriers make XLA write operands once, in the narrow type, that several products read.
  operands = lax.optimization_barrier((_narrowed(narrow, a), _narrowed(narrow, b)))
  return _multiply(*operands, a.dtype), operands


def _rounded_product_backward(narrow: bool, images: int, operands: tuple[Array, Array], g: Array
                              ) -> tuple[Array, Array]:
  a, b = operands
  rounded = lax.optimization_barrier(_narrowed(narrow, g))
  if not narrow:
    return _multiply(rounded, b.T, g.dtype), _multiply(a.T, rounded, g.dtype)
  chunks = _num_chunks(images, len(a) // images)
  of_b = _multiply(_transposed(a.reshape(chunks, -1, a.shape[1])),
                   rounded.reshape(chunks, -1, g.shape[1]), g.dtype)
  return _multiply(rounded, _transposed(b), g.dtype), jnp.sum(of_b, axis=0)


_rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def _num_chunks(images: int, rows: int) -> int:
  """Returns the number of chunks of about `_CHUNK_ROWS` rows that images of `rows` each make.

  A chunk is some whole images or an equal part of one, so that rows of images which lie on several
  devices stay there.
  """
  if rows <= _CHUNK_ROWS:
    return next(n for n in range(1, images + 1)
                if images % n == 0 and images // n * rows <= _CHUNK_ROWS)
  parts = next(n for n in range(-(-rows // _CHUNK_ROWS), rows + 1) if rows % n == 0)
  return images * (parts if rows // parts >= _CHUNK_ROWS // 8 else 1)


def _transposed(x: Array) -> Array:
  """Transposes the last two axes, and makes XLA write the result to memory.

  XLA's CPU backend multiplies in bfloat16 only if both operands are stored by rows; otherwise it
  widens them to float32. It decides this before it optimises the program, when a transpose counts
  as stored by columns and one that was flattened does not.
  """
  transposed = jnp.swapaxes(x, -1, -2)
  return lax.optimization_barrier(transposed.reshape(-1)).reshape(transposed.shape)


def _patches(x: Array, side: int, stride: int) -> Array:
  """Returns the window of each output, row by row: [B, H, W, C] -> [B, h, w, side * side * C]."""
  b, _, _, c = x.shape
  h, w = (-(-n // stride) for n in x.shape[1:3])
  padded = _pad(x, side, stride, multiple=stride)
  # Pixels of one stride lie side by side in memory, so they are copied together.
  cells = padded.reshape(b, padded.shape[1] // stride, stride, -1, stride * c)

  def tap(i, j):
    row, column = i // stride, j // stride
    return cells[:, row:row + h, i % stride, column:column + w, :min(stride, side - j) * c]

  return jnp.concatenate([tap(i, j) for i in range(side) for j in range(0, side, stride)], axis=-1)


_conv = _with_forms(_conv_native, shifted=_conv_matmul, dense=_conv_native,
                  vjps={'native': _conv_vjp, 'dense': _conv_dense_vjp})


def conv(x: Array, kernel: Array, *, stride: int = 1, form: str = 'auto',
         matmul_dtype: str = 'same') -> Array:
  """Convolves with SAME padding.

  Args:
    x: [B, H, W, Cin].
    kernel: [k, k, Cin, Cout], rounded to the type of `x`; its gradient keeps the kernel's own type.
    stride: 1 or 2.
    form: one of `CONV_FORMS`.
    matmul_dtype: one of `MATMUL_DTYPES`, see `LayerPolicy`.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), Cout].
  """
  return _conv(form, _ConvOptions(stride, matmul_dtype), x, kernel)


def _max_pool_native(stride: int, x: Array) -> Array:
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1),
                           (1, stride, stride, 1), 'SAME')


def _quarters(x: Array) -> list[list[Array]]:
  """Returns the pixels of all 2x2 windows: [row][column] of [B, ceil(H / 2), ceil(W / 2), C]."""
  h, w = (n + n % 2 for n in x.shape[1:3])
  x = jnp.pad(x, ((0, 0), (0, h - x.shape[1]), (0, w - x.shape[2]), (0, 0)),
              constant_values=-jnp.inf)
  return [[x[:, p::2, q::2] for q in range(2)] for p in range(2)]


def _max_pool_shifted(stride: int, x: Array) -> Array:
  (a, b), (c, d) = _quarters(x)
  return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_pool_vjp(stride: int, x: Array, g: Array) -> tuple[Array]:
  maximum = _max_pool_shifted(stride, x)
  taken = jnp.zeros(g.shape, bool)
  phases = [[], []]
  for p, quarters in enumerate(_quarters(x)):
    for quarter in quarters:
      wins = (quarter == maximum) & ~taken
      phases[p].append(jnp.where(wins, g, 0))
      taken |= wins
  return (_interleave(phases, *x.shape[1:3]),)


_max_pool = _with_forms(_max_pool_native, shifted=_max_pool_shifted,
                      vjps={'shifted': _max_pool_vjp})


def max_pool(x: Array, *, form: str = 'auto') -> Array:
  """Max-pools with a 2x2 window and stride 2: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

  An odd row or column is padded at the end with -inf. The gradient of equal maxima goes to the
  first in row-major order, as in XLA's select-and-scatter. `form` is one of `CONV_FORMS`.
  """
  return _max_pool(form, 2, x)
