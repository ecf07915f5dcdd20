"""From a backbone's features to the pyramid of maps that the head reads."""

from collections.abc import Mapping

import flax.linen as nn
import jax

from ppn_jax.errors import InputError
from ppn_jax.models.layers import ConvNorm, LayerPolicy, max_pool

Array = jax.Array


class PoolingPyramid(nn.Module):
  """PPN's neck: one feature map, max-pooled to every coarser scale.

  It has no parameters, so all levels live in one feature space and one predictor serves them
  (section 2.2). 19x19 becomes 19, 10, 5, 3, 2, 1 with six levels.

  Attributes:
    stride: which of the backbone's maps to start from, in input pixels per cell.
    num_levels: how many levels to return, the first being the map itself.
    projection: depth of a 1x1 ConvNorm before the first level; 0 for none.
    policy: see LayerPolicy.
  """
  stride: int = 16
  num_levels: int = 6
  projection: int = 0
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    if self.num_levels < 1:
      raise InputError(f'neck: num_levels {self.num_levels} is not at least 1')
    if self.projection < 0:
      raise InputError(f'neck: projection {self.projection} is not a depth; 0 is for none')
    super().__post_init__()

  @nn.compact
  def __call__(self, features: Mapping[int, Array], *, train: bool) -> tuple[Array, ...]:
    """[B, h, w, d] at `stride` -> num_levels maps of one depth, finest first.

    Raises:
      InputError: the backbone has no map at `stride`, or it is 1x1 before the last level.
    """
    if self.stride not in features:
      raise InputError(f'neck: the backbone has no map of stride {self.stride}; '
                       f"it has {', '.join(str(s) for s in sorted(features))}")
    x = features[self.stride]
    if self.projection:
      x = ConvNorm(self.projection, policy=self.policy, name='projection')(x, train=train)
    levels = [x]
    while len(levels) < self.num_levels:
      if levels[-1].shape[1:3] == (1, 1):
        raise InputError(f'neck: num_levels {self.num_levels} is too many: a '
                         f'{x.shape[1]}x{x.shape[2]} map is 1x1 after {len(levels)}')
      levels.append(max_pool(levels[-1], form=self.policy.conv_form))
    return tuple(levels)
