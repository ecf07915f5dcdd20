"""Backbone, neck and head put together: uint8 images in, predictions for every anchor out."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppn_jax import registry
from ppn_jax.detection.structures import Outputs
from ppn_jax.errors import InputError
from ppn_jax.models.layers import LayerPolicy

Array = jax.Array
BACKBONES = {
    'mobilenet_v1': 'ppn_jax.models.mobilenet_v1:MobileNetV1',
    'mobilenet_v2': 'ppn_jax.models.mobilenet_v2:MobileNetV2',
    'mobilenet_v3_small': 'ppn_jax.models.mobilenet_v3:MobileNetV3Small',
}
NECKS = {
    'pooling_pyramid': 'ppn_jax.models.necks:PoolingPyramid',
    'conv_pyramid': 'ppn_jax.models.necks:ConvPyramid',
    'feature_pyramid': 'ppn_jax.models.necks:FeaturePyramid',
}
HEADS = {
    'shared_box_predictor': 'ppn_jax.models.heads:SharedBoxPredictor',
    'per_level_box_predictor': 'ppn_jax.models.heads:PerLevelBoxPredictor',
}


class Network(nn.Module):
  """Network of a single-stage detector, without anchors and loss.

  Attributes:
    backbone: maps images [B, S, S, 3] in [-1, 1] to {stride: features}.
    neck: maps {stride: features} to feature maps, finest first.
    head: maps feature maps to Outputs.
    policy: see LayerPolicy; each part has the same one.
  """
  backbone: nn.Module
  neck: nn.Module
  head: nn.Module
  policy: LayerPolicy = LayerPolicy()

  def __call__(self, images: Array, *, train: bool) -> Outputs:
    """Predicts from images, uint8 [B, S, S, 3].

    Returns:
      Outputs of all anchors, in order of level, y, x and shape.

    Raises:
      InputError: If the images are not uint8 [B, S, S, 3].
    """
    return self.head(self.pyramid(images, train=train), train=train)

  def pyramid(self, images: Array, *, train: bool) -> tuple[Array, ...]:
    """Computes the maps that the head reads from images, uint8 [B, S, S, 3]; finest first.

    Its shapes are the grid sizes that the anchors need.
    """
    return self._features(self.scaled(images), train=train)

  def predict_scaled(self, x: Array) -> Outputs:
    """Predicts, for inference, from images float32 [B, S, S, 3] as `scaled` returns them.

    For files whose input is quantised: they have no operation on floats before the first layer.
    """
    return self.head(self._features(x, train=False), train=False)

  def scaled(self, images: Array) -> Array:
    """Returns images uint8 [B, S, S, 3] as float32 in [-1, 1]; raises InputError for others."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise InputError(f'images are {images.dtype} {list(images.shape)}; '
                       'the network takes uint8 [B, S, S, 3], 0 to 255')
    # In float32: bfloat16 has eight bits for the 256 levels, and scaling would round them.
    return images.astype(jnp.float32) * (2 / 255) - 1

  def _features(self, x: Array, *, train: bool) -> tuple[Array, ...]:
    return self.neck(self.backbone(x.astype(self.policy.dtype), train=train), train=train)


def build_network(*, backbone: Mapping[str, Any], neck: Mapping[str, Any],
                  head: Mapping[str, Any], num_classes: int, anchors_per_cell: tuple[int, ...],
                  policy: LayerPolicy) -> Network:
  """Builds a network from three config blocks.

  Args:
    backbone: {'name': a name of BACKBONES or a dotted path, **its arguments}.
    neck: likewise, of NECKS.
    head: likewise, of HEADS.
    num_classes: logits per anchor, including the background if there is one.
    anchors_per_cell: anchors of a cell of each level, finest first.
    policy: passed to all three and to the network.

  Raises:
    InputError: If a name is unknown, a component does not have an option, or a value is outside its
      range.
  """
  return Network(
      backbone=registry.build('backbone', backbone, BACKBONES, policy=policy),
      neck=registry.build('neck', neck, NECKS, policy=policy),
      head=registry.build('head', head, HEADS, num_classes=num_classes,
                          anchors_per_cell=anchors_per_cell, policy=policy),
      policy=policy)
