"""MobileNet-v3-small (Howard et al., arXiv 1905.02244) as a feature extractor."""

import flax.linen as nn
import jax

from ppn_jax.models.inverted_residual import Block, InvertedResidualNetwork, round_depth

Array = jax.Array
STEM = 16
_LAST_EXPANSION = 6  # Channels of the last convolution per channel of the last block.
_SWISH = 'hard_swish'
# Table 2. Slim and Keras count expanded channels from the block's input: 72, 88, 96, 240, ...
BLOCKS = (
    Block(1, 16, 2, 3, True, 'relu'), Block(72 / 16, 24, 2, 3, False, 'relu'),
    Block(88 / 24, 24, 1, 3, False, 'relu'), Block(4, 40, 2, 5, True, _SWISH),
    Block(6, 40, 1, 5, True, _SWISH), Block(6, 40, 1, 5, True, _SWISH),
    Block(3, 48, 1, 5, True, _SWISH), Block(3, 48, 1, 5, True, _SWISH),
    Block(6, 96, 2, 5, True, _SWISH), Block(6, 96, 1, 5, True, _SWISH),
    Block(6, 96, 1, 5, True, _SWISH))


class MobileNetV3Small(InvertedResidualNetwork):
  """MobileNet-v3-small: a 3x3 stride-2 convolution, 11 blocks, a 1x1 convolution.

  The blocks have 3x3 or 5x5 depthwise kernels, ReLU or hard swish, and most have squeeze and
  excitation. Parameters are named after slim's, as in MobileNetV2.

  Attributes:
    depth_multiplier: factor of every channel count, which is then rounded to a multiple of 8.
    last_stride: stride of the last map, 2 to 32, after which the network ends. PPN reads 16, SSD
      and FPN need 32.
    endpoint: map of each stride but 32: 'expansion', the expanded layer of the next block of stride
      2, as in the TF Object Detection API's SSD (layer_10/expansion_output); or 'output', that of
      the last block. Of stride 32 it is layer_13.
    min_depth: least channel count, whatever the multiplier.
    policy: see LayerPolicy.
  """

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> dict[int, Array]:
    """Extracts features from images [B, S, S, 3] in [-1, 1].

    Returns:
      {stride in pixels: feature map [B, s, s, d] of that stride}.
    """
    return self.extract_features(
        x, BLOCKS, stem=STEM, last=lambda depth: round_depth(depth * _LAST_EXPANSION),
        activation=_SWISH, train=train)
