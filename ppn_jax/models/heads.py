"""Heads: predict box codes and class logits from the pyramid's feature maps."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Outputs
from ppn_jax.errors import InputError
from ppn_jax.models.convolution import accumulator
from ppn_jax.models.layers import BatchNorm, LayerPolicy, relu6

Array = jax.Array


class SharedBoxPredictor(nn.Module):
  """PPN's head: one predictor for all levels (section 2.1, docs/reference.md 4).

  A shared 1x1 convolution without bias, batch norm, ReLU6; then one 1x1 convolution for boxes
  and one for classes. Every level passes through the same kernels.

  Attributes:
    num_classes: logits per anchor, including the background if there is one.
    anchors_per_cell: anchors of a cell of each level; here all the same.
    depth: channels of the shared layer.
    norm_per_level: whether each level has its own batch norm, as in the reference; False shares
      one.
    prior: initial probability of every class, set by the biases (focal loss, section 4.1).
    policy: see LayerPolicy.
  """
  num_classes: int
  anchors_per_cell: tuple[int, ...]
  depth: int = 512
  norm_per_level: bool = True
  prior: float = 0.01
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    _check(self)
    if self.depth < 1:
      raise InputError(f'head: depth {self.depth} must be at least 1')
    if len(set(self.anchors_per_cell)) != 1:
      raise InputError(
          f'a head shared by all levels needs the same number of anchors per cell on each, but '
          f'the levels have {tuple(self.anchors_per_cell)}; set anchors.reduce_lowest_level=False')
    super().__post_init__()

  @nn.compact
  def __call__(self, levels: tuple[Array, ...], *, train: bool) -> Outputs:
    """Predicts from maps [B, h, w, d] of equal depth.

    Returns:
      Float32 Outputs, with anchors in order of level, y, x and shape.
    """
    # One matrix product for all levels: small ones waste a TPU's matrix unit, and with one per
    # level each would all-reduce its own part of the kernels' gradients.
    x = jnp.concatenate([_as_rows(level) for level in levels], axis=1)
    x = self._tower(x, [level.shape[1] * level.shape[2] for level in levels], train)
    return _predict(self, x[:, :, None], self.anchors_per_cell[0])

  def _tower(self, x: Array, cells: list[int], train: bool) -> Array:
    policy = self.policy
    kernel = self.param('tower_kernel', policy.kernel_init, (1, 1, x.shape[-1], self.depth),
                        jnp.float32)
    x = policy.conv(x[:, :, None].astype(policy.dtype), kernel)[:, :, 0]
    if not self.norm_per_level:
      return relu6(BatchNorm(policy, name='norm')(x, train=train))
    starts = [sum(cells[:i]) for i in range(1, len(cells))]
    levels = [BatchNorm(policy, name=f'norm_{i}')(level, train=train)
              for i, level in enumerate(jnp.split(x, starts, axis=1))]
    return relu6(jnp.concatenate(levels, axis=1))


class PerLevelBoxPredictor(nn.Module):
  """Vanilla SSD's head: a separate predictor for every level (docs/reference.md 4).

  A convolution with bias for boxes and one for classes, straight from the map; nothing is
  shared. Level i's parameters are those of `level_{i}`.

  Attributes:
    num_classes: logits per anchor, including the background if there is one.
    anchors_per_cell: anchors of a cell of each level, finest first.
    side: side of the square kernels; the reference has 1, the SSD paper 3.
    prior: initial probability of every class, set by the biases; 0.5 makes them zero.
    policy: see LayerPolicy.
  """
  num_classes: int
  anchors_per_cell: tuple[int, ...]
  side: int = 1
  prior: float = 0.01
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    _check(self)
    if self.side not in (1, 3):
      raise InputError(f'head: side {self.side} of the kernels must be 1 or 3')
    super().__post_init__()

  @nn.compact
  def __call__(self, levels: tuple[Array, ...], *, train: bool) -> Outputs:
    """Predicts from maps [B, h, w, d_i] of any depths.

    Returns:
      Float32 Outputs, with anchors in order of level, y, x and shape.

    Raises:
      InputError: If the number of levels is not that of `anchors_per_cell`.
    """
    del train  # There is no batch norm here.
    if len(levels) != len(self.anchors_per_cell):
      raise InputError(f'head: there are {len(levels)} levels, but anchors_per_cell '
                       f'{tuple(self.anchors_per_cell)} is for {len(self.anchors_per_cell)}')
    outputs = [_LevelPredictor(self.num_classes, anchors, self.side, self.prior, self.policy,
                               name=f'level_{i}')(level)
               for i, (level, anchors) in enumerate(
                   zip(levels, self.anchors_per_cell, strict=True))]
    return Outputs(*(jnp.concatenate(rows, axis=1) for rows in zip(*outputs, strict=True)))


class _LevelPredictor(nn.Module):
  """Two convolutions of one level."""
  num_classes: int
  anchors: int
  side: int
  prior: float
  policy: LayerPolicy

  @nn.compact
  def __call__(self, x: Array) -> Outputs:
    return _predict(self, x, self.anchors, side=self.side)


def _predict(head: nn.Module, x: Array, anchors: int, *, side: int = 1) -> Outputs:
  """Predicts the h * w * anchors rows of a map [B, h, w, d], with parameters of `head`."""
  # In bfloat16, sums of gradients over thousands of rows would lose the biases' last digits.
  x = x.astype(accumulator(head.policy.dtype))

  def convolve(name: str, width: int, bias: float) -> Array:
    kernel = head.param(f'{name}_kernel', nn.initializers.normal(0.01),
                        (side, side, x.shape[-1], anchors * width), jnp.float32)
    b = head.param(f'{name}_bias', nn.initializers.constant(bias), (anchors * width,), jnp.float32)
    y = head.policy.conv(x, kernel) + b
    return y.reshape(x.shape[0], -1, width)

  boxes = convolve('box', 4, 0.0)
  classes = convolve('class', head.num_classes, -math.log((1 - head.prior) / head.prior))
  return Outputs(box_codes=boxes, class_logits=classes)


def _check(head: nn.Module) -> None:
  """Raises InputError if an attribute that all heads have is outside its range."""
  if head.num_classes < 1:
    raise InputError(f'head: num_classes {head.num_classes} must be at least 1')
  if not head.anchors_per_cell or min(head.anchors_per_cell) < 1:
    raise InputError(f'head: anchors_per_cell {tuple(head.anchors_per_cell)} must be at least 1 '
                     'for each level')
  if not 0 < head.prior < 1:
    raise InputError(f'head: prior {head.prior} must be between 0 and 1')


def _as_rows(x: Array) -> Array:
  """Reshapes [B, h, w, d] to [B, h * w, d]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])
