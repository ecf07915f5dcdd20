"""Necks: build the pyramid of feature maps that the head reads from a backbone's features."""

import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax

from ppn_jax.errors import InputError
from ppn_jax.models.convolution import max_pool
from ppn_jax.models.layers import ConvNorm, LayerPolicy

Array = jax.Array


class PoolingPyramid(nn.Module):
  """PPN's neck: one feature map, max-pooled to every coarser scale.

  It has no parameters, so all levels live in one feature space and one predictor serves them
  (section 2.2). 19x19 becomes 19, 10, 5, 3, 2, 1 with six levels.

  Attributes:
    stride: stride of the backbone's map to start from, in input pixels per cell.
    num_levels: number of levels, the first being the map itself; 0 for all levels down to 1x1.
    projection: depth of a 1x1 ConvNorm before the first level; 0 for none.
    repeat_1x1: whether levels may follow a 1x1 one, 1x1 as well, as in detectors of the Object
      Detection API for images of up to 256 px; otherwise they are an error. With num_levels=0 there
      are none.
    policy: see LayerPolicy.
  """
  stride: int = 16
  num_levels: int = 6
  projection: int = 0
  repeat_1x1: bool = False
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    _check_num_levels(self.num_levels)
    if self.projection < 0:
      raise InputError(f'neck: projection {self.projection} must be a depth, or 0 for none')
    super().__post_init__()

  @nn.compact
  def __call__(self, features: Mapping[int, Array], *, train: bool) -> tuple[Array, ...]:
    """Builds the pyramid from the map [B, h, w, d] at `stride`.

    Returns:
      `num_levels` maps of equal depth, finest first.

    Raises:
      InputError: If the backbone has no map at `stride`, or a map is 1x1 before the last level
        without `repeat_1x1`.
    """
    x = _feature_map(features, self.stride)
    if self.projection:
      x = ConvNorm(self.projection, policy=self.policy, name='projection')(x, train=train)
    levels = [x]
    while _needs_level(levels, self.num_levels, self.repeat_1x1):
      levels.append(max_pool(levels[-1], form=self.policy.conv_form))
    return tuple(levels)


class ConvPyramid(nn.Module):
  """Vanilla SSD's neck: maps of the backbone, then further convolutions (docs/reference.md 3).

  The first levels are the backbone's maps. Each further one is made from the one before it by a 1x1
  ConvNorm to half its own depth and a 3x3 stride-2 ConvNorm. With the defaults, an image of 300 px
  has levels of side 19, 10, 5, 3, 2, 1.

  Attributes:
    strides: strides of the backbone's maps to use, in input pixels per cell, finest first.
    depths: depth of each further level; half of it is rounded down.
    repeat_1x1: whether levels may follow a 1x1 one, 1x1 as well, as in detectors of the Object
      Detection API for images of up to 256 px; otherwise they are an error.
    policy: see LayerPolicy.
  """
  strides: tuple[int, ...] = (16, 32)
  depths: tuple[int, ...] = (512, 256, 256, 128)
  repeat_1x1: bool = False
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    _check_strides(self.strides)
    if any(depth < 2 for depth in self.depths):
      raise InputError(f'neck: depths {tuple(self.depths)} must be at least 2')
    super().__post_init__()

  @nn.compact
  def __call__(self, features: Mapping[int, Array], *, train: bool) -> tuple[Array, ...]:
    """Builds the pyramid from maps [B, h, w, d] by stride.

    Returns:
      len(strides) + len(depths) maps, finest first.

    Raises:
      InputError: If the backbone lacks one of `strides`, or a map is 1x1 before the last level
        without `repeat_1x1`.
    """
    levels = [_feature_map(features, stride) for stride in self.strides]
    # Numbered as in the model zoo, where Conv2d_13_pointwise_2_Conv2d_2 is the first.
    for i, depth in enumerate(self.depths, start=2):
      if not self.repeat_1x1:
        _check_shrinkable(levels, f'depths {tuple(self.depths)}',
                          f'keep the first {len(levels) - len(self.strides)} of model.neck.depths')
      levels.append(_Shrink(depth, self.policy, name=f'extra_{i}')(levels[-1], train=train))
    return tuple(levels)


class _Shrink(nn.Module):
  """Two ConvNorms that halve a map: 1x1 to half of `depth`, then 3x3 with stride 2."""
  depth: int
  policy: LayerPolicy

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    x = ConvNorm(self.depth // 2, policy=self.policy, name='reduce')(x, train=train)
    return ConvNorm(self.depth, side=3, stride=2, policy=self.policy, name='shrink')(
        x, train=train)


class FeaturePyramid(nn.Module):
  """FPN's neck: a top-down path with skip connections (Lin et al., arXiv 1612.03144, section 3).

  A linear 1x1 convolution brings each of the backbone's maps to the same depth; from the coarsest
  on, each is upsampled by nearest neighbours and added to the next finer one; a 3x3 ConvNorm
  smooths every sum. Levels coarser than the backbone's are made from the last by 3x3 stride-2
  ConvNorms, as in RetinaNet. PPN's section 2.2 names this neck as the alternative; like the pooled
  maps, its levels share one depth and so may share a head.

  Attributes:
    strides: strides of the backbone's maps to use, in input pixels per cell, finest first.
    num_levels: number of levels, at least one for each stride; 0 for all levels down to 1x1.
    depth: depth of every level.
    repeat_1x1: see PoolingPyramid.
    policy: see LayerPolicy.
  """
  strides: tuple[int, ...] = (16, 32)
  num_levels: int = 6
  depth: int = 256
  repeat_1x1: bool = False
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    _check_strides(self.strides)
    _check_num_levels(self.num_levels)
    if 0 < self.num_levels < len(self.strides):
      raise InputError(f'neck: num_levels {self.num_levels} is below the number of strides '
                       f'{tuple(self.strides)}')
    if self.depth < 1:
      raise InputError(f'neck: depth {self.depth} must be at least 1')
    super().__post_init__()

  @nn.compact
  def __call__(self, features: Mapping[int, Array], *, train: bool) -> tuple[Array, ...]:
    """Builds the pyramid from maps [B, h, w, d] by stride.

    Returns:
      `num_levels` maps of depth `depth`, finest first.

    Raises:
      InputError: If the backbone lacks one of `strides`, or a map is 1x1 before the last level
        without `repeat_1x1`.
    """
    sums = []  # Coarsest first.
    for i in reversed(range(len(self.strides))):
      x = _feature_map(features, self.strides[i])
      x = ConvNorm(self.depth, activation=False, policy=self.policy, name=f'lateral_{i}')(
          x, train=train)
      sums.append(x + _upsample(sums[-1], x.shape[1:3]) if sums else x)
    levels = [ConvNorm(self.depth, side=3, policy=self.policy, name=f'smooth_{i}')(x, train=train)
              for i, x in enumerate(reversed(sums))]
    while _needs_level(levels, self.num_levels, self.repeat_1x1):
      levels.append(ConvNorm(self.depth, side=3, stride=2, policy=self.policy,
                             name=f'coarse_{len(levels)}')(levels[-1], train=train))
    return tuple(levels)


def _upsample(x: Array, size: tuple[int, int]) -> Array:
  """Repeats each cell of [B, h, w, d] to [B, *size, d]; sides are 2h or 2h - 1, 2w or 2w - 1."""
  return x.repeat(2, axis=1).repeat(2, axis=2)[:, :size[0], :size[1]]


def _feature_map(features: Mapping[int, Array], stride: int) -> Array:
  """Returns the backbone's map of a stride; raises InputError if there is none."""
  if stride not in features:
    raise InputError(f'neck: the backbone has no map of stride {stride}; '
                     f"it has {', '.join(str(s) for s in sorted(features))}")
  return features[stride]


def _check_strides(strides: tuple[int, ...]) -> None:
  if not strides or any(b != 2 * a for a, b in itertools.pairwise(strides)):
    raise InputError(f'neck: strides {tuple(strides)} must double from one to the next')


def _check_num_levels(num_levels: int) -> None:
  if not isinstance(num_levels, int) or num_levels < 0:
    raise InputError(f'neck: num_levels {num_levels} must be a whole number of at least 1, or 0 '
                     'for as many as the image size allows')


def _needs_level(levels: list[Array], num_levels: int, repeat_1x1: bool) -> bool:
  """Returns whether a pyramid needs a level after these; raises InputError if it cannot have it."""
  if num_levels == 0:
    return levels[-1].shape[1:3] != (1, 1)
  if len(levels) < num_levels and not repeat_1x1:
    _check_shrinkable(levels, f'num_levels={num_levels}',
                      f'set model.neck.num_levels={len(levels)}, or 0 for all levels down to 1x1')
  return len(levels) < num_levels


def _check_shrinkable(levels: list[Array], option: str, fix: str) -> None:
  """Raises InputError if the last level is 1x1, naming the option that needs another level."""
  if levels[-1].shape[1:3] == (1, 1):
    _, rows, columns, _ = levels[0].shape
    raise InputError(f'neck: {option} needs more levels than there are: a {rows}x{columns} map '
                     f'is 1x1 after {len(levels)} levels; {fix}; or use a larger model.image_size')
