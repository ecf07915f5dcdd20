"""The layers of every network here, and the policy that they share.

Convolution and pooling have several forms, with equal values and gradients.
'native' is the plain `lax` operation. 'shifted' is written for XLA's CPU backend, whose grouped
convolution takes up to a hundred times what its arithmetic needs, backward above all: a
depthwise convolution becomes nine shifted multiply-adds, the others matrix multiplications.
'dense' is for TPUs, whose matrix unit has nothing to do in this network: it takes a depthwise
convolution of few channels as a dense one with a diagonal kernel, where the vector unit, which
has batch norm to do, would need several times as long. Its kernel gradients are float32 from the
start, since XLA sums over devices in the type that a gradient is computed in. 'auto' takes
'shifted' in programs lowered for cpu, 'dense' for tpu and 'native' for others; the machine that
lowers need not have the platform.

Arrays are NHWC and kernels HWIO; a depthwise kernel is [3, 3, 1, C], Flax's convention (the TF
Object Detection API's is [3, 3, C, 1]). Padding is TensorFlow's SAME: of the total
max((ceil(n / s) - 1) s + k - n, 0) the smaller half goes in front.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection.batch_groups import check_group_size, num_groups
from ppn_jax.errors import InputError, did_you_mean

Array = jax.Array
CONV_FORMS = ('auto', 'native', 'shifted', 'dense')

# Depthwise convolutions of no more channels are 'dense' ones; with more, multiplying zeros takes
# longer than it saves.
DENSE_CHANNELS = 64
_TAPS = tuple((i, j) for i in range(3) for j in range(3))
_ROWS = 5  # Of a depthwise kernel gradient's step on CPUs: the fastest of 1 to 8 for most layers.
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


@dataclasses.dataclass(frozen=True)
class LayerPolicy:
  """What all layers of a network have in common.

  Attributes:
    dtype: of the computation, a float type. Parameters, statistics and the heads' outputs are
      float32 whatever it is.
    norm_decay: of batch norm's moving averages: new = decay * old + (1 - decay) * batch.
    norm_epsilon: added to the variance. Both defaults are the reference's (docs/reference.md 2).
    norm_group_size: images that batch norm takes its statistics over in training: 0 all of a
      batch, on whatever devices they are; else groups of so many, see `groups`. The moving
      averages follow the mean of the groups' statistics.
    conv_form: 'native', 'shifted', 'dense', or 'auto': by the platform that the program is lowered
      for (which need not be the one that lowers it), 'shifted' for cpu, 'dense' for tpu and
      'native' for others.
    kernel_stddev: of the normal distribution that kernels start from. None takes He et al.'s
      (sqrt(2 / fan-in)), which keeps the variance from layer to layer. The reference's 0.01
      does not: it makes the variance after a depthwise kernel about 1e-3, no more than
      `norm_epsilon`, so that training from random weights starts with a fading signal.
  """
  dtype: Any = jnp.float32
  norm_decay: float = 0.97
  norm_epsilon: float = 1e-3
  norm_group_size: int = 0
  conv_form: str = 'auto'
  kernel_stddev: float | None = None

  def __post_init__(self):
    if self.conv_form not in CONV_FORMS:
      raise InputError(
          f'unknown conv_form {self.conv_form!r}; {did_you_mean(str(self.conv_form), CONV_FORMS)}')
    try:
      is_float = jnp.issubdtype(self.dtype, jnp.floating)
    except TypeError:
      is_float = False
    if not is_float:
      raise InputError(f"dtype {self.dtype!r} is not a float type; take 'float32' or 'bfloat16'")
    if not 0 <= self.norm_decay < 1:
      raise InputError(f'norm_decay {self.norm_decay} is not in [0, 1)')
    if not self.norm_epsilon > 0:
      raise InputError(f'norm_epsilon {self.norm_epsilon} is not positive')
    check_group_size('norm_group_size', self.norm_group_size)
    if self.kernel_stddev is not None and not self.kernel_stddev > 0:
      raise InputError(f'kernel_stddev {self.kernel_stddev} is not positive (None takes He init)')

  @property
  def kernel_init(self) -> Callable[..., Array]:
    if self.kernel_stddev is None:
      return nn.initializers.he_normal()
    return nn.initializers.normal(self.kernel_stddev)


def same_padding(size: int, stride: int, window: int = 3) -> tuple[int, int]:
  """Rows that TensorFlow's SAME adds in front and behind; the output has ceil(size / stride)."""
  total = max((-(-size // stride) - 1) * stride + window - size, 0)
  return total // 2, total - total // 2


def accumulator(dtype: Any) -> Any:
  """The type that sums of `dtype` are made in: float32 or wider."""
  return jnp.promote_types(dtype, jnp.float32)


def _choose(form: str, forms: dict[str, Callable], *operands: Any) -> Any:
  """Calls the form; one that an operation lacks is its native one."""
  native = forms['native']
  if form == 'auto':
    return lax.platform_dependent(*operands, cpu=forms.get('shifted', native),
                                  tpu=forms.get('dense', native), default=native)
  return forms.get(form, native)(*operands)


def _in_forms(native: Callable, *, vjps: Mapping[str, Callable], **others: Callable) -> Callable:
  """op(form, stride, *operands) that computes `native` or another form, gradients alike.

  The choice is made inside a custom gradient: differentiating a conditional would keep the
  residuals of all its branches. All take the stride before the operands. `vjps` have the
  gradients of forms that are not differentiated as they stand; they take the cotangent last.
  """
  forms = {'native': native, **others}

  def vjp_of(function, stride):
    def backward(*operands_and_cotangent):
      *operands, g = operands_and_cotangent
      return jax.vjp(functools.partial(function, stride), *operands)[1](g)
    return backward

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
  def op(form, stride, *operands):
    return _choose(form, {name: functools.partial(function, stride)
                          for name, function in forms.items()}, *operands)

  def forward(form, stride, *operands):
    return op(form, stride, *operands), operands

  def backward(form, stride, operands, g):
    gradients = {name: functools.partial(vjps[name], stride) if name in vjps
                 else vjp_of(function, stride) for name, function in forms.items()}
    return _choose(form, gradients, *operands, g)

  op.defvjp(forward, backward)
  return op


def _wide_vjp(function: Callable) -> Callable:
  """The gradient of a convolution whose kernel gradient is float32 whatever the image's type."""
  def backward(stride, x, kernel, g):
    wide = accumulator(x.dtype)
    of_x, = jax.vjp(lambda x: function(stride, x, kernel), x)[1](g)
    of_kernel, = jax.vjp(lambda k: function(stride, x.astype(wide), k), kernel)[1](g.astype(wide))
    return of_x, of_kernel
  return backward


def _pad(x: Array, side: int, stride: int, rows: int = 0, multiple: int = 1) -> Array:
  """`x` with SAME's zeros around it. The barrier has it written once, not computed anew at
  each of the shifts that read it.

  Args:
    rows: of the output that windows are read for, if more than there are.
    multiple: of which height and width have to be.
  """
  padding = []
  for size, count in zip(x.shape[1:3], (rows, 0), strict=True):
    front, behind = same_padding(size, stride, side)
    read = (max(count, -(-size // stride)) - 1) * stride + side
    whole = -(-max(read, front + size + behind) // multiple) * multiple
    padding.append((front, whole - front - size))
  return lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))


def _every(size: int, start: int, stride: int) -> slice:
  return slice(start, start + (size - 1) * stride + 1, stride)


def _depthwise_native(stride: int, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), 'SAME',
                                  dimension_numbers=_DIMENSIONS, feature_group_count=x.shape[-1])


def _depthwise_dense(stride: int, x: Array, kernel: Array) -> Array:
  """Adds what other channels give times zero, which changes no digit of a finite sum."""
  channels = x.shape[-1]
  if channels > DENSE_CHANNELS:
    return _depthwise_native(stride, x, kernel)
  return _conv_native(stride, x, kernel * jnp.eye(channels, dtype=kernel.dtype))


def _depthwise_shifted(stride: int, x: Array, kernel: Array) -> Array:
  """Nine shifted multiply-adds."""
  h, w = (-(-n // stride) for n in x.shape[1:3])
  padded, kernel = _pad(x, 3, stride), kernel.astype(x.dtype).astype(accumulator(x.dtype))
  return sum(padded[:, _every(h, i, stride), _every(w, j, stride)] * kernel[i, j, 0]
             for i, j in _TAPS).astype(x.dtype)


def _depthwise_vjp(stride: int, x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
  return (_depthwise_input_gradient(stride, x.shape, kernel, g),
          _depthwise_kernel_gradient(stride, x, g).astype(kernel.dtype))


def _depthwise_input_gradient(stride: int, shape: tuple[int, ...], kernel: Array,
                              g: Array) -> Array:
  """The rows and columns p, q (mod stride) of the padded input are met by the taps p, q (mod
  stride) only: each such phase is a stride-1 correlation of the cotangent."""
  margin = 2 // stride
  h, w = (n + margin for n in g.shape[1:3])
  padded = lax.optimization_barrier(
      jnp.pad(g, ((0, 0), (margin, margin), (margin, margin), (0, 0))))
  kernel = kernel.astype(g.dtype).astype(accumulator(g.dtype))

  def phase(p, q):
    def tap(i, j):
      row, column = margin - i // stride, margin - j // stride
      return padded[:, row:row + h, column:column + w] * kernel[i, j, 0]
    return sum(tap(i, j) for i, j in _TAPS
               if (i % stride, j % stride) == (p, q)).astype(g.dtype)

  phases = [[phase(p, q) for q in range(stride)] for p in range(stride)]
  (top, _), (left, _) = (same_padding(n, stride) for n in shape[1:3])
  return _interleave(phases, *shape[1:3], top, left)


def _interleave(phases: list[list[Array]], height: int, width: int, top: int = 0,
                left: int = 0) -> Array:
  """s x s phases [B, h, w, C] -> [B, H, W, C], without the first `top` rows and `left` columns."""
  s = len(phases)

  def padding(offset, count, size):
    return offset, size - offset - ((count - 1) * s + 1), s - 1

  def spread(p, q):
    x = phases[p][q]
    _, h, w, _ = x.shape
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), padding(p - top, h, height),
                                              padding(q - left, w, width), (0, 0, 0)))

  if s > 1:
    phases = lax.optimization_barrier(phases)
  return sum(spread(p, q) for p in range(s) for q in range(s))


def _depthwise_kernel_gradient(stride: int, x: Array, g: Array) -> Array:
  """Some rows at a time into nine accumulators [B, w, C]. A plain sum of each tap's products
  would write them out first, or walk memory in strides."""
  b, h, w, c = g.shape
  dtype = accumulator(x.dtype)
  rows = min(_ROWS, h)
  steps = -(-h // rows)
  g = lax.optimization_barrier(jnp.pad(g, ((0, 0), (0, steps * rows - h), (0, 0), (0, 0))))
  padded = _pad(x, 3, stride, rows=steps * rows)

  def row(x, k):
    return lax.dynamic_index_in_dim(x, k, 1, keepdims=False).astype(dtype)

  def body(step, totals):
    first = step * rows
    images = [row(padded, first * stride + i) for i in range((rows - 1) * stride + 3)]
    cotangents = [row(g, first + k) for k in range(rows)]
    return tuple(
        total + sum(images[k * stride + i][:, _every(w, j, stride)] * cotangents[k]
                    for k in range(rows))
        for total, (i, j) in zip(totals, _TAPS, strict=True))

  totals = lax.fori_loop(0, steps, body, (jnp.zeros((b, w, c), dtype),) * len(_TAPS))
  return jnp.stack([jnp.sum(t, (0, 1)) for t in totals]).reshape(3, 3, 1, c)


_depthwise = _in_forms(_depthwise_native, shifted=_depthwise_shifted, dense=_depthwise_dense,
                       vjps={'shifted': _depthwise_vjp, 'dense': _wide_vjp(_depthwise_dense)})


def depthwise_conv(x: Array, kernel: Array, *, stride: int = 1, form: str = 'auto') -> Array:
  """3x3 SAME convolution of each channel with its own kernel.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, 1, C], rounded to the type of `x`; its gradient keeps its own.
    stride: 1 or 2.
    form: see `LayerPolicy.conv_form`.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), C].
  """
  return _depthwise(form, stride, x, kernel)


def _conv_native(stride: int, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(x, kernel.astype(x.dtype), (stride, stride), 'SAME',
                                  dimension_numbers=_DIMENSIONS)


def _conv_matmul(stride: int, x: Array, kernel: Array) -> Array:
  """One multiplication of all patches (im2col) with the kernel."""
  side, _, depth, features = kernel.shape
  wide = accumulator(x.dtype)  # A gradient too is a sum, over the patches that share a pixel.
  patches = x.astype(wide)
  if (side, stride) != (1, 1):
    patches = _patches(patches, side, stride)
  kernel = kernel.astype(x.dtype).astype(wide)
  y = patches.reshape(-1, side * side * depth) @ kernel.reshape(-1, features)
  return y.astype(x.dtype).reshape(*patches.shape[:-1], features)


def _patches(x: Array, side: int, stride: int) -> Array:
  """[B, H, W, C] -> [B, h, w, side * side * C], the window under each output, row by row."""
  b, _, _, c = x.shape
  h, w = (-(-n // stride) for n in x.shape[1:3])
  padded = _pad(x, side, stride, multiple=stride)
  # Pixels that a stride passes over lie beside one another, so they are copied together.
  cells = padded.reshape(b, padded.shape[1] // stride, stride, -1, stride * c)

  def columns(i, j):
    row, column = i // stride, j // stride
    return cells[:, row:row + h, i % stride, column:column + w, :min(stride, side - j) * c]

  return jnp.concatenate([columns(i, j) for i in range(side) for j in range(0, side, stride)],
                         axis=-1)


_conv = _in_forms(_conv_native, shifted=_conv_matmul, dense=_conv_native,
                  vjps={'dense': _wide_vjp(_conv_native)})


def conv(x: Array, kernel: Array, *, stride: int = 1, form: str = 'auto') -> Array:
  """SAME convolution: [B, H, W, Cin] with [k, k, Cin, Cout] -> [B, ceil(H/s), ceil(W/s), Cout].

  The kernel is rounded to the type of `x`; its gradient keeps its own.
  """
  return _conv(form, stride, x, kernel)


def _max_pool_native(stride: int, x: Array) -> Array:
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1),
                           (1, stride, stride, 1), 'SAME')


def _quarters(x: Array) -> list[list[Array]]:
  h, w = (n + n % 2 for n in x.shape[1:3])
  x = jnp.pad(x, ((0, 0), (0, h - x.shape[1]), (0, w - x.shape[2]), (0, 0)),
              constant_values=-jnp.inf)
  return [[x[:, p::2, q::2] for q in range(2)] for p in range(2)]


def _max_pool_shifted(stride: int, x: Array) -> Array:
  (a, b), (c, d) = _quarters(x)
  return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _max_pool_vjp(stride: int, x: Array, g: Array) -> tuple[Array]:
  top = _max_pool_shifted(stride, x)
  taken = jnp.zeros(g.shape, bool)
  phases = [[], []]
  for p, quarters in enumerate(_quarters(x)):
    for quarter in quarters:
      wins = (quarter == top) & ~taken
      phases[p].append(jnp.where(wins, g, 0))
      taken |= wins
  return (_interleave(phases, *x.shape[1:3]),)


_max_pool = _in_forms(_max_pool_native, shifted=_max_pool_shifted,
                      vjps={'shifted': _max_pool_vjp})


def max_pool(x: Array, *, form: str = 'auto') -> Array:
  """2x2 stride-2 SAME max pooling: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

  An odd row or column is padded at the end with -inf. The gradient of equal maxima goes to the
  first in row-major order, as in XLA's select-and-scatter.
  """
  return _max_pool(form, 2, x)


def relu6(x: Array) -> Array:
  """min(max(x, 0), 6); its gradient is zero at both corners, as TensorFlow's."""
  return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


class BatchNorm(nn.Module):
  """Batch norm as TensorFlow's fused kernel computes it (docs/reference.md 9).

  A batch is normalised with its biased variance; the moving average takes the unbiased one,
  N / (N - 1) of it, which matters where N is small, as at a 1x1 pyramid level. Statistics are
  float32 for any input. Parameters scale, bias [C]; collection batch_stats: mean, var [C].
  """
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """[..., C] -> [..., C] in the input's dtype; updates batch_stats if it trains."""
    c = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (c,), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (c,), jnp.float32)
    moving_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    moving_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)
    wide = x.astype(accumulator(x.dtype))
    if not train:
      return self._normalise(wide, moving_mean.value, moving_var.value, scale, bias).astype(x.dtype)
    groups = num_groups('norm_group_size', self.policy.norm_group_size, len(x))
    if groups == 1:
      mean, var = _moments(wide)
      y = self._normalise(wide, mean, var, scale, bias)
    else:
      wide = wide.reshape(groups, -1, *x.shape[1:])
      means, variances = jax.vmap(_moments)(wide)
      y = jax.vmap(self._normalise, (0, 0, 0, None, None))(wide, means, variances, scale, bias)
      mean, var = jnp.mean(means, axis=0), jnp.mean(variances, axis=0)
    if not self.is_initializing():
      n = x.size // (c * groups)
      self._follow(moving_mean, mean)
      self._follow(moving_var, var * (n / max(n - 1, 1)))
    return y.reshape(x.shape).astype(x.dtype)

  def _normalise(self, x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
    factor = scale * lax.rsqrt(var + self.policy.norm_epsilon)
    return x * factor + (bias - mean * factor)

  def _follow(self, average: nn.Variable, batch: Array):
    decay = self.policy.norm_decay
    # Float32 also where the layers compute in float64: a step returns the types that it takes.
    followed = decay * average.value + (1 - decay) * lax.stop_gradient(batch)
    average.value = followed.astype(average.value.dtype)


def _moments(x: Array) -> tuple[Array, Array]:
  """Mean and biased variance over all axes but the last, in one pass over `x`."""
  axes = tuple(range(x.ndim - 1))
  mean, square = jnp.mean(x, axes), jnp.mean(x * x, axes)
  return mean, jnp.maximum(square - mean * mean, 0)


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU6.

  Attributes:
    features: output channels; ignored where `depthwise`.
    side: of the square kernel; a depthwise one has 3.
    stride: 1 or 2.
    depthwise: one kernel for each channel.
    activation: False leaves out the ReLU6.
  """
  features: int
  side: int = 1
  stride: int = 1
  depthwise: bool = False
  activation: bool = True
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """[B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), features]."""
    policy = self.policy
    depth = x.shape[-1]
    shape = (3, 3, 1, depth) if self.depthwise else (self.side, self.side, depth, self.features)
    kernel = self.param('kernel', policy.kernel_init, shape, jnp.float32)
    op = functools.partial(_depthwise if self.depthwise else _conv, policy.conv_form)
    y = op(self.stride, x.astype(policy.dtype), kernel)
    y = BatchNorm(policy, name='norm')(y, train=train)
    return relu6(y) if self.activation else y


class DepthwiseSeparable(nn.Module):
  """MobileNet's block: a 3x3 depthwise ConvNorm, then a 1x1 ConvNorm to `features`."""
  features: int
  stride: int = 1
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """[B, H, W, Cin] -> [B, ceil(H / stride), ceil(W / stride), features]."""
    x = ConvNorm(x.shape[-1], stride=self.stride, depthwise=True, policy=self.policy,
                 name='depthwise')(x, train=train)
    return ConvNorm(self.features, policy=self.policy, name='pointwise')(x, train=train)
