"""Backbone, neck and head put together: uint8 images in, one row for every anchor out."""

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
BACKBONES = {'mobilenet_v1': 'ppn_jax.models.mobilenet_v1:MobileNetV1'}
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
  """A single-stage detector's network; it knows no anchors and no loss.

  Attributes:
    backbone: images [B, S, S, 3] in [-1, 1] -> {stride: features}.
    neck: {stride: features} -> maps, finest first.
    head: maps -> Outputs.
    policy: see LayerPolicy; each part has been given the same one.
  """
  backbone: nn.Module
  neck: nn.Module
  head: nn.Module
  policy: LayerPolicy = LayerPolicy()

  def __call__(self, images: Array, *, train: bool) -> Outputs:
    """uint8 [B, S, S, 3] -> Outputs of all anchors, by level, y, x, anchor.

    Raises:
      InputError: images that are not uint8 [B, S, S, 3].
    """
    return self.head(self.pyramid(images, train=train), train=train)

  def pyramid(self, images: Array, *, train: bool) -> tuple[Array, ...]:
    """uint8 [B, S, S, 3] -> the maps that the head reads, finest first.

    `jax.eval_shape` of it gives the grid sizes that the anchors need.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise InputError(f'images are {images.dtype} {list(images.shape)}; '
                       'the network takes uint8 [B, S, S, 3], 0 to 255')
    # In float32: bfloat16 has eight bits for 256 levels and the scaling would round them.
    x = images.astype(jnp.float32) * (2 / 255) - 1
    return self.neck(self.backbone(x.astype(self.policy.dtype), train=train), train=train)


def build_network(*, backbone: Mapping[str, Any], neck: Mapping[str, Any],
                  head: Mapping[str, Any], num_classes: int, anchors_per_cell: tuple[int, ...],
                  policy: LayerPolicy) -> Network:
  """The network that three config blocks name.

  Args:
    backbone: {'name': 'mobilenet_v1' or a dotted path, **its arguments}.
    neck: the same of NECKS.
    head: the same of HEADS.
    num_classes: logits of an anchor, a background column included.
    anchors_per_cell: anchors of a cell of each level, finest first.
    policy: given to all three and to the network.

  Raises:
    InputError: an unknown name, an option that the component does not have, or a value
      outside of its range.
  """
  return Network(
      backbone=registry.build('backbone', backbone, BACKBONES, policy=policy),
      neck=registry.build('neck', neck, NECKS, policy=policy),
      head=registry.build('head', head, HEADS, num_classes=num_classes,
                          anchors_per_cell=anchors_per_cell, policy=policy),
      policy=policy)
