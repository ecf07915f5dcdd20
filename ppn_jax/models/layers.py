"""Flax modules that all networks here are made of, and the policy that they share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection.batch_groups import check_group_size, num_groups
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.models.convolution import (
  CONV_FORMS,
  MATMUL_DTYPES,
  accumulator,
  conv,
  depthwise_conv,
)

Array = jax.Array
NORMS = ('batch', 'frozen')


@dataclasses.dataclass(frozen=True)
class LayerPolicy:
  """Options that all layers of a network share.

  Attributes:
    dtype: float type of the computation. Parameters, statistics and the heads' outputs are float32
      in any case.
    matmul_dtype: type of the numbers that matrix products multiply, if each sum has at least 32
      terms and each row at least 32 sums. 'same' is `dtype`. 'bfloat16' rounds them, and gradients
      before they are multiplied; everything else keeps `dtype`, and sums are float32. It is faster
      on CPUs with instructions for it (avx512_bf16, amx_bf16), slower on other CPUs and of no use
      on GPUs and TPUs. 'auto' rounds on CPUs with these instructions alone; the machine that
      compiles the program decides.
    norm: 'batch', or 'frozen': batch norm uses its moving averages in training too and does not
      update them, as the reference's freeze_batchnorm; its scales and biases are still trained. For
      small batches, from pretrained weights.
    norm_decay: decay of batch norm's moving averages: new = decay * old + (1 - decay) * batch.
    norm_epsilon: added to the variance. Both defaults are the reference's (docs/reference.md 2).
    norm_group_size: images over which batch norm computes its statistics in training: 0 for the
      whole batch, on whatever devices they are; otherwise groups of this size, see `batch_groups`.
      The moving averages follow the mean of the groups' statistics.
    conv_form: 'native', 'shifted', 'dense', or 'auto': chosen by the platform that the program is
      lowered for (which need not be the one that lowers it), 'shifted' for CPUs, 'dense' for TPUs
      and 'native' for others.
    kernel_stddev: standard deviation of the normal distribution that kernels are drawn from. None
      uses He et al.'s, sqrt(2 / fan-in), which keeps the variance from layer to layer. The
      reference's 0.01 does not: the variance after a depthwise kernel is then about 1e-3, no more
      than `norm_epsilon`, so that training from random weights starts with a fading signal.

  Raises:
    InputError: If a value is outside its range.
  """
  dtype: Any = jnp.float32
  matmul_dtype: str = 'same'
  norm: str = 'batch'
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
      raise InputError(f"dtype {self.dtype!r} is not a float type; use 'float32' or 'bfloat16'")
    if self.matmul_dtype not in MATMUL_DTYPES:
      raise InputError(f'unknown matmul_dtype {self.matmul_dtype!r}; '
                       f'{did_you_mean(str(self.matmul_dtype), MATMUL_DTYPES)}')
    if self.norm not in NORMS:
      raise InputError(f'unknown norm {self.norm!r}; {did_you_mean(str(self.norm), NORMS)}')
    if not 0 <= self.norm_decay < 1:
      raise InputError(f'norm_decay {self.norm_decay} is not in [0, 1)')
    if not self.norm_epsilon > 0:
      raise InputError(f'norm_epsilon {self.norm_epsilon} is not positive')
    check_group_size('norm_group_size', self.norm_group_size)
    if self.kernel_stddev is not None and not self.kernel_stddev > 0:
      raise InputError(f"kernel_stddev {self.kernel_stddev} is not positive; None uses He et al.'s")

  def conv(self, x: Array, kernel: Array, *, stride: int = 1) -> Array:
    """Convolves, see `convolution.conv`."""
    return conv(x, kernel, stride=stride, form=self.conv_form, matmul_dtype=self.matmul_dtype)

  @property
  def kernel_init(self) -> Callable[..., Array]:
    """Initializer of convolution kernels."""
    if self.kernel_stddev is None:
      return nn.initializers.he_normal()
    return nn.initializers.normal(self.kernel_stddev)


def relu6(x: Array) -> Array:
  """Computes min(max(x, 0), 6); its gradient is zero at both corners, as TensorFlow's."""
  return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


class BatchNorm(nn.Module):
  """Batch norm as TensorFlow's fused kernel computes it (docs/reference.md 9).

  A batch is normalised with its biased variance; the moving average follows the unbiased one,
  N / (N - 1) times as large, which matters where N is small, as at a 1x1 pyramid level. Statistics
  are float32 for any input. Parameters: scale, bias [C]; collection batch_stats: mean, var [C].
  """
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Normalises [..., C] in the input's dtype; updates batch_stats if `train` and not frozen."""
    c = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (c,), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (c,), jnp.float32)
    moving_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    moving_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)
    wide = x.astype(accumulator(x.dtype))
    if not train or self.policy.norm == 'frozen':
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
      self._update_average(moving_mean, mean)
      self._update_average(moving_var, var * (n / max(n - 1, 1)))
    return y.reshape(x.shape).astype(x.dtype)

  def _normalise(self, x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
    factor = scale * lax.rsqrt(var + self.policy.norm_epsilon)
    return x * factor + (bias - mean * factor)

  def _update_average(self, average: nn.Variable, batch: Array) -> None:
    decay = self.policy.norm_decay
    updated = decay * average.value + (1 - decay) * lax.stop_gradient(batch)
    # Float32 even if the layers compute in float64: a step must return the types that it takes.
    average.value = updated.astype(average.value.dtype)


def _moments(x: Array) -> tuple[Array, Array]:
  """Computes mean and biased variance over all axes but the last, in one pass over `x`."""
  axes = tuple(range(x.ndim - 1))
  mean, square = jnp.mean(x, axes), jnp.mean(x * x, axes)
  return mean, jnp.maximum(square - mean * mean, 0)


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU6.

  Attributes:
    features: output channels; ignored if `depthwise`.
    side: side of the square kernel; a depthwise one has at least 3.
    stride: 1 or 2.
    depthwise: whether each channel has its own kernel.
    activation: whether ReLU6 follows.
    policy: see LayerPolicy.
  """
  features: int
  side: int = 1
  stride: int = 1
  depthwise: bool = False
  activation: bool = True
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps [B, H, W, Cin] to [B, ceil(H / stride), ceil(W / stride), features]."""
    policy = self.policy
    depth = x.shape[-1]
    side = max(self.side, 3) if self.depthwise else self.side
    shape = (side, side, 1, depth) if self.depthwise else (side, side, depth, self.features)
    kernel = self.param('kernel', policy.kernel_init, shape, jnp.float32)
    x = x.astype(policy.dtype)
    if self.depthwise:
      y = depthwise_conv(x, kernel, stride=self.stride, form=policy.conv_form)
    else:
      y = policy.conv(x, kernel, stride=self.stride)
    y = BatchNorm(policy, name='norm')(y, train=train)
    return relu6(y) if self.activation else y


class DepthwiseSeparable(nn.Module):
  """MobileNet's block: a 3x3 depthwise ConvNorm, then a 1x1 ConvNorm to `features`."""
  features: int
  stride: int = 1
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps [B, H, W, Cin] to [B, ceil(H / stride), ceil(W / stride), features]."""
    x = ConvNorm(x.shape[-1], stride=self.stride, depthwise=True, policy=self.policy,
                 name='depthwise')(x, train=train)
    return ConvNorm(self.features, policy=self.policy, name='pointwise')(x, train=train)
