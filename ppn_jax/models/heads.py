"""From the pyramid's maps to box codes and class logits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Outputs
from ppn_jax.errors import InputError
from ppn_jax.models.layers import BatchNorm, LayerPolicy, accumulator, conv, relu6

Array = jax.Array


class SharedBoxPredictor(nn.Module):
  """PPN's head: one predictor for all levels (section 2.3, REFERENCE.md 4).

  A shared 1x1 convolution without bias, batch norm, ReLU6; then one 1x1 convolution for boxes
  and one for classes. Every level passes through the same kernels.

  Attributes:
    num_classes: logits of an anchor, C.
    anchors_per_cell: anchors of a cell, the same at every level.
    depth: channels of the shared layer.
    norm_per_level: each level has its own batch norm, as in the reference; False shares one.
    prior: probability that the classes' biases start from (focal loss, section 4.1).
    policy: see LayerPolicy.
  """
  num_classes: int
  anchors_per_cell: int
  depth: int = 512
  norm_per_level: bool = True
  prior: float = 0.01
  policy: LayerPolicy = LayerPolicy()

  def __post_init__(self):
    for field in ('num_classes', 'anchors_per_cell', 'depth'):
      if getattr(self, field) < 1:
        raise InputError(f'head: {field} {getattr(self, field)} is not at least 1')
    if not 0 < self.prior < 1:
      raise InputError(f'head: prior {self.prior} is not between 0 and 1')
    super().__post_init__()

  @nn.compact
  def __call__(self, levels: tuple[Array, ...], *, train: bool) -> Outputs:
    """Maps [B, h, w, d] of one depth -> float32 Outputs; rows by level, y, x, anchor."""
    # One matrix multiplication for all levels: on a TPU small ones waste the matrix unit, and
    # each level's own would all-reduce its own part of the kernels' gradients.
    x = jnp.concatenate([_as_rows(level) for level in levels], axis=1)
    x = self._tower(x, [level.shape[1] * level.shape[2] for level in levels], train)
    # bfloat16 would sum the gradients of thousands of rows and lose the biases' last digits.
    x = x.astype(accumulator(self.policy.dtype))
    bias = -math.log((1 - self.prior) / self.prior)
    boxes = self._predict(x, 'box', self.anchors_per_cell, 4, 0.0)
    classes = self._predict(x, 'class', self.anchors_per_cell, self.num_classes, bias)
    return Outputs(box_codes=boxes, class_logits=classes)

  def _tower(self, x: Array, cells: list[int], train: bool) -> Array:
    policy = self.policy
    kernel = self.param('tower_kernel', policy.kernel_init, (1, 1, x.shape[-1], self.depth),
                        jnp.float32)
    x = conv(x[:, :, None].astype(policy.dtype), kernel.astype(policy.dtype),
             form=policy.conv_form)[:, :, 0]
    if not self.norm_per_level:
      return relu6(BatchNorm(policy, name='norm')(x, train=train))
    starts = [sum(cells[:i]) for i in range(1, len(cells))]
    levels = [BatchNorm(policy, name=f'norm_{i}')(level, train=train)
              for i, level in enumerate(jnp.split(x, starts, axis=1))]
    return relu6(jnp.concatenate(levels, axis=1))

  def _predict(self, x: Array, name: str, anchors: int, width: int, bias: float) -> Array:
    """[B, N, d] -> [B, N * anchors, width]."""
    kernel = self.param(f'{name}_kernel', nn.initializers.normal(0.01),
                        (1, 1, x.shape[-1], anchors * width), jnp.float32)
    b = self.param(f'{name}_bias', nn.initializers.constant(bias), (anchors * width,), jnp.float32)
    y = conv(x[:, :, None], kernel.astype(x.dtype), form=self.policy.conv_form) + b
    return y.reshape(x.shape[0], -1, width)


def _as_rows(x: Array) -> Array:
  return x.reshape(x.shape[0], -1, x.shape[-1])
