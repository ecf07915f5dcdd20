"""Inverted residual blocks, and the networks made of them: MobileNet-v2 and v3."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.models.convolution import accumulator
from ppn_jax.models.layers import ConvNorm, LayerPolicy, relu6

Array = jax.Array
MIN_DEPTH = 8
DIVISOR = 8  # All channel counts are multiples of it.
STRIDES = (2, 4, 8, 16, 32)
ENDPOINTS = ('expansion', 'output')
_SQUEEZE = 4  # Channels per channel of the squeezed layer.


class Block(NamedTuple):
  """Inverted residual block of a network at a multiplier of 1.

  Fields:
    expansion: channels of the expanded layer per input channel; 1 for no expansion.
    depth: output channels.
    stride: 1 or 2.
    side: side of the depthwise kernel.
    squeeze: whether squeeze and excitation follows the depthwise convolution.
    activation: a name of `ACTIVATIONS`.
  """
  expansion: float
  depth: int
  stride: int
  side: int = 3
  squeeze: bool = False
  activation: str = 'relu6'


def round_depth(depth: float, least: int = DIVISOR) -> int:
  """Rounds a channel count to a multiple of 8, at least `least` and at least 90% of the count."""
  rounded = max(least, int(depth + DIVISOR / 2) // DIVISOR * DIVISOR)
  return rounded + DIVISOR if rounded < 0.9 * depth else rounded


def hard_sigmoid(x: Array) -> Array:
  """Computes relu6(x + 3) / 6."""
  return relu6(x + 3) * (1 / 6)


def hard_swish(x: Array) -> Array:
  """Computes x relu6(x + 3) / 6 (Howard et al., arXiv 1905.02244, section 5.2)."""
  return x * hard_sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu6': relu6, 'relu': jax.nn.relu, 'hard_swish': hard_swish}


class SqueezeExcite(nn.Module):
  """Scales each channel by a factor that depends on the mean of all (MobileNet-v3, figure 4).

  Two 1x1 convolutions with bias, to a quarter of the channels and back, and a hard sigmoid.
  """
  policy: LayerPolicy = LayerPolicy()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to the same shape."""
    depth = x.shape[-1]
    mean = jnp.mean(x.astype(accumulator(x.dtype)), (1, 2), keepdims=True).astype(x.dtype)
    squeezed = jax.nn.relu(self._convolve('reduce', mean, round_depth(depth / _SQUEEZE)))
    return x * hard_sigmoid(self._convolve('expand', squeezed, depth))

  def _convolve(self, name: str, x: Array, features: int) -> Array:
    kernel = self.param(f'{name}_kernel', self.policy.kernel_init, (1, 1, x.shape[-1], features),
                        jnp.float32)
    bias = self.param(f'{name}_bias', nn.initializers.zeros, (features,), jnp.float32)
    return self.policy.conv(x, kernel) + bias.astype(x.dtype)


class InvertedResidual(nn.Module):
  """Expands channels, convolves each by itself, and projects them linearly.

  The input is added to the output if their shapes are equal (Sandler et al., arXiv 1801.04381,
  section 3.3).

  Attributes:
    features: output channels.
    expanded: channels of the expanded layer; 0 for none.
    stride, side, squeeze, activation: see `Block`.
    policy: see LayerPolicy.
  """
  features: int
  expanded: int
  stride: int = 1
  side: int = 3
  squeeze: bool = False
  activation: str = 'relu6'
  policy: LayerPolicy = LayerPolicy()

  def setup(self):
    if self.expanded:
      self.expand = ConvNorm(self.expanded, activation=False, policy=self.policy)
    self.depthwise = ConvNorm(self.expanded, side=self.side, stride=self.stride, depthwise=True,
                              activation=False, policy=self.policy)
    if self.squeeze:
      self.squeeze_excite = SqueezeExcite(self.policy)
    self.project = ConvNorm(self.features, activation=False, policy=self.policy)

  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps [B, H, W, Cin] to [B, ceil(H / stride), ceil(W / stride), features]."""
    return self.convolved(x, self.expansion(x, train=train), train=train)

  def expansion(self, x: Array, *, train: bool) -> Array:
    """Computes the expanded layer [B, H, W, expanded]; `x` itself if there is none."""
    return self._activate(self.expand(x, train=train)) if self.expanded else x

  def convolved(self, x: Array, expanded: Array, *, train: bool) -> Array:
    """Computes the output from the input and its expansion."""
    y = self._activate(self.depthwise(expanded, train=train))
    if self.squeeze:
      y = self.squeeze_excite(y)
    y = self.project(y, train=train)
    return x + y if x.shape == y.shape else y

  def _activate(self, x: Array) -> Array:
    return ACTIVATIONS[self.activation](x)


class InvertedResidualNetwork(nn.Module):
  """Base of the networks of inverted residual blocks: their options, and how maps are taken.

  Attributes:
    depth_multiplier: factor of every channel count, which is then rounded to a multiple of 8.
    last_stride: stride of the last map, after which the network ends, one of `STRIDES`.
    endpoint: map of each stride but 32, one of `ENDPOINTS`; see `MobileNetV2`.
    min_depth: least channel count, whatever the multiplier.
    policy: see LayerPolicy.
  """
  depth_multiplier: float = 1.0
  last_stride: int = 16
  endpoint: str = 'expansion'
  min_depth: int = MIN_DEPTH
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    if not self.depth_multiplier > 0:
      raise InputError(f'backbone: depth_multiplier {self.depth_multiplier} must be positive')
    if self.last_stride not in STRIDES:
      raise InputError(f'backbone: last_stride {self.last_stride} must be one of '
                       f'{", ".join(map(str, STRIDES))}')
    if self.endpoint not in ENDPOINTS:
      raise InputError(f'backbone: unknown endpoint {self.endpoint!r}; '
                       f'{did_you_mean(str(self.endpoint), ENDPOINTS)}')
    if self.min_depth < 1:
      raise InputError(f'backbone: min_depth {self.min_depth} must be at least 1')
    super().__post_init__()

  def depth(self, depth: int) -> int:
    """Returns the number of channels for that at a multiplier of 1."""
    return round_depth(depth * self.depth_multiplier, self.min_depth)

  def extract_features(self, x: Array, blocks: Sequence[Block], *, stem: int,
                       last: Callable[[int], int], activation: str, train: bool
                       ) -> dict[int, Array]:
    """Computes the feature maps, in a compact method.

    The layers are `conv`, `expanded_conv`, `expanded_conv_1` and so on, and `conv_1`, as in slim.

    Args:
      x: images [B, S, S, 3] in [-1, 1].
      blocks: the blocks; each of stride 2 ends the maps of a stride.
      stem: output channels of the first convolution, which has stride 2.
      last: output channels of the last convolution, from those of the last block.
      activation: of the first and last convolution.
      train: whether batch norm uses statistics of the batch.

    Returns:
      {stride in pixels: feature map [B, s, s, d]}, up to `last_stride`.
    """
    activate, policy = ACTIVATIONS[activation], self.policy
    x = activate(ConvNorm(self.depth(stem), side=3, stride=2, activation=False, policy=policy,
                          name='conv')(x, train=train))
    features, stride = {}, 2
    for i, block in enumerate(blocks):
      if block.stride == 2 and self.endpoint == 'output':
        features[stride] = x
        if stride == self.last_stride:
          return features
      expanded = round_depth(x.shape[-1] * block.expansion) if block.expansion != 1 else 0
      module = InvertedResidual(
          self.depth(block.depth), expanded, block.stride, block.side, block.squeeze,
          block.activation, policy, name=f'expanded_conv_{i}' if i else 'expanded_conv')
      y = module.expansion(x, train=train)
      if block.stride == 2 and self.endpoint == 'expansion':
        features[stride] = y
        if stride == self.last_stride:
          return features
      stride *= block.stride
      x = module.convolved(x, y, train=train)
    x = ConvNorm(last(x.shape[-1]), activation=False, policy=policy, name='conv_1')(x, train=train)
    return {**features, stride: activate(x)}
