"""MobileNet-v2 (Sandler et al., arXiv 1801.04381) as a feature extractor."""

import flax.linen as nn
import jax

from ppn_jax.errors import InputError
from ppn_jax.models.inverted_residual import Block, InvertedResidualNetwork

Array = jax.Array
STEM, LAST = 32, 1280
# Table 2: (expansion, channels, number of blocks, stride of the first).
_TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
          (6, 320, 1, 1))
BLOCKS = tuple(Block(expansion, depth, stride if i == 0 else 1)
               for expansion, depth, count, stride in _TABLE for i in range(count))


class MobileNetV2(InvertedResidualNetwork):
  """MobileNet-v2: a 3x3 stride-2 convolution, 17 inverted residual blocks, a 1x1 convolution.

  Parameters are named after slim's: `expanded_conv_3/depthwise/kernel` is
  MobilenetV2/expanded_conv_3/depthwise/depthwise_weights.

  Attributes:
    depth_multiplier: factor of every channel count, which is then rounded to a multiple of 8.
    last_stride: stride of the last map, 2 to 32, after which the network ends. PPN reads 16, SSD
      and FPN need 32.
    endpoint: map of each stride but 32: 'expansion', the expanded layer of the next block of stride
      2, as in the TF Object Detection API's SSD (layer_15/expansion_output); or 'output', that of
      the last block, as in its FPN (layer_4, layer_7, layer_14). Of stride 32 it is layer_19.
    last_depth: channels of layer_19; 0 for 1280 times the multiplier, as in detectors. ImageNet
      classifiers of Keras and slim have 1280 also with a multiplier below 1.
    min_depth: least channel count, whatever the multiplier.
    policy: see LayerPolicy.
  """
  last_depth: int = 0

  def __post_init__(self):
    if self.last_depth < 0:
      raise InputError(f'backbone: last_depth {self.last_depth} must be a number of channels, or 0')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> dict[int, Array]:
    """Extracts features from images [B, S, S, 3] in [-1, 1].

    Returns:
      {stride in pixels: feature map [B, s, s, d] of that stride}.
    """
    return self.extract_features(
        x, BLOCKS, stem=STEM, last=lambda _: self.last_depth or self.depth(LAST),
        activation='relu6', train=train)
