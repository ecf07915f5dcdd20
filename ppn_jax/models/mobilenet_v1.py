"""MobileNet-v1 (Howard et al., arXiv 1704.04861) as a feature extractor."""

import flax.linen as nn
import jax

from ppn_jax.errors import InputError
from ppn_jax.models.layers import ConvNorm, DepthwiseSeparable, LayerPolicy

Array = jax.Array
MIN_DEPTH = 8
STEM = 32
# (features, stride) of blocks 1 to 13.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
          (512, 1), (512, 1), (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
  """MobileNet-v1: a 3x3 stride-2 convolution and up to 13 depthwise separable blocks.

  Parameters are named after the zoo's checkpoints: `conv2d_3/depthwise/kernel` is
  Conv2d_3_depthwise/depthwise_weights, its `norm` that layer's BatchNorm.

  Attributes:
    depth_multiplier: factor of every channel count.
    last_block: number of blocks. PPN reads nothing beyond 11, the last block of stride 16; SSD
      needs 13.
    min_depth: least channel count, whatever the multiplier; 16 in the TF Object Detection API's
      configs, which matters below a multiplier of 0.5.
    policy: see LayerPolicy.
  """
  depth_multiplier: float = 1.0
  last_block: int = 11
  min_depth: int = MIN_DEPTH
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    if not self.depth_multiplier > 0:
      raise InputError(f'backbone: depth_multiplier {self.depth_multiplier} must be positive')
    if self.last_block not in range(1, len(BLOCKS) + 1):
      raise InputError(f'backbone: last_block {self.last_block} must be 1 to {len(BLOCKS)}')
    if self.min_depth < 1:
      raise InputError(f'backbone: min_depth {self.min_depth} must be at least 1')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> dict[int, Array]:
    """Extracts features from images [B, S, S, 3] in [-1, 1].

    Returns:
      {stride in pixels: last feature map [B, s, s, d] of that stride}.
    """
    x = ConvNorm(self._depth(STEM), side=3, stride=2, policy=self.policy, name='conv2d_0')(
        x, train=train)
    features, stride = {}, 2
    for i, (depth, step) in enumerate(BLOCKS[:self.last_block], start=1):
      x = DepthwiseSeparable(self._depth(depth), step, self.policy, name=f'conv2d_{i}')(
          x, train=train)
      stride *= step
      features[stride] = x
    return features

  def _depth(self, depth: int) -> int:
    return max(int(depth * self.depth_multiplier), self.min_depth)
