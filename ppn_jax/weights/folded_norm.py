"""Batch norm that was folded into convolutions, as in TFLite files and optimised frozen graphs.

Such a layer has a kernel and a bias. It becomes a convolution whose batch norm does nothing but add
that bias: mean 0, variance 1 - epsilon, scale 1. That is right for evaluation. In training, where
batch statistics take the place of mean and variance, it would rescale every layer;
`training.batch_norm` therefore puts the statistics back first.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from ppn_jax.errors import InputError
from ppn_jax.weights.names import Path

# Batch norm's epsilon in MobileNet-v1, by slim, Keras and the Object Detection API.
EPSILON = 1e-3
VARIANCE = np.float32(1 - EPSILON)
# Kernels of layers that have a batch norm in checkpoints; predictors and logits have none.
_KERNEL = re.compile(r'(.*MobilenetV1/Conv2d_[^/]+)/(?:depthwise_)?weights')
# What tools call the bias of such a layer: this package's reader of TFLite files; TensorFlow's
# optimize_for_inference and the graph transform tool; training with quantisation.
_BIASES = ('biases', 'Conv2D_bn_offset', 'depthwise_bn_offset', 'separable_conv2d_bn_offset',
           'Conv2D_Fold_bias', 'depthwise_Fold_bias', 'BatchNorm_Fold/bias')
# What newer versions of optimize_for_inference call the kernel.
_RENAMED = re.compile(r'/(?:Conv2D|(depthwise|separable_conv2d))_weights$')


def unfold(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns tensors by name with a batch norm that adds the bias, where it was folded.

  Layers that have a batch norm are left as they are.
  """
  found = {_RENAMED.sub(lambda m: '/depthwise_weights' if m[1] else '/weights', name): value
           for name, value in tensors.items()}
  for name in list(found):
    match = _KERNEL.fullmatch(name)
    if match is None:
      continue
    layer = match[1]
    bias = next((found[f'{layer}/{b}'] for b in _BIASES if f'{layer}/{b}' in found), None)
    if bias is None or f'{layer}/BatchNorm/beta' in found or (
        bias.ndim != 1 or not np.issubdtype(bias.dtype, np.floating)):
      continue
    for kind in _BIASES:
      found.pop(f'{layer}/{kind}', None)
    found |= {f'{layer}/BatchNorm/gamma': np.ones(bias.shape, np.float32),
              f'{layer}/BatchNorm/beta': bias,
              f'{layer}/BatchNorm/moving_mean': np.zeros(bias.shape, np.float32),
              f'{layer}/BatchNorm/moving_variance': np.full(bias.shape, VARIANCE)}
  return found


def folded_layers(variables: Mapping[str, Any]) -> tuple[Path, ...]:
  """Returns the layers whose batch norm is that of `unfold`, by their values.

  Training changes all of these values in its first step, and new layers have variance 1.

  Args:
    variables: the detector's variables, or some of them.

  Returns:
    Paths such as ('backbone', 'conv2d_0'), below which there are 'kernel' and 'norm'.
  """
  params, stats = (flatten_dict(variables.get(name, {})) for name in ('params', 'batch_stats'))
  layers = [path[:-2] for path in stats if path[-2:] == ('norm', 'var')
            and (*path[:-2], 'kernel') in params and (*path[:-1], 'scale') in params]

  def is_all(array: Any, value: float) -> bool:
    return bool((np.asarray(array) == np.float32(value)).all())

  return tuple(layer for layer in layers
               if is_all(stats[*layer, 'norm', 'var'], VARIANCE)
               and is_all(stats[*layer, 'norm', 'mean'], 0)
               and is_all(params[*layer, 'norm', 'scale'], 1))


def check_epsilon(layers: Sequence[Path], norm_epsilon: float) -> None:
  """Raises InputError if a config has another epsilon than that of folded layers."""
  if layers and norm_epsilon != EPSILON:
    raise InputError(f'batch norm was folded with an epsilon of {EPSILON}, but '
                     f'model.layers.norm_epsilon={norm_epsilon}; set it to {EPSILON}')
