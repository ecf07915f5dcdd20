"""Puts batch norm back into layers that it was folded into.

A folded layer computes W * x + b. With mean m and variance v of W * x over real images, it is
replaced by

  kernel W / s, mean m / s, variance v / s^2, scale s sqrt(v / s^2 + epsilon), bias b + m,

where s = sqrt(v), or more for channels that hardly move. The layer's function is the same, whatever
its input; only channels that never move become constants, with a kernel of zeros. In training,
statistics of a batch take the place of mean and variance; since those of the images are close to
them, training continues from that function, with kernels of a size that weight decay and learning
rates are made for.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.detection.structures import Array
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import coordination
from ppn_jax.models.layers import BatchNorm

Path = tuple[str, ...]  # ('backbone', 'conv2d_0')

# A channel whose output deviates less than this, relative to its mean, never moves, up to rounding.
_STILL = 1e-6
# Largest Euclidean norm of the kernel of a channel. Those of trained networks end below 13; it
# concerns channels that hardly move, which weight decay would not leave as they are.
_MOST_NORM = 32.0


class Moments(NamedTuple):
  """Moments of a layer's output without bias, over all positions of all images.

  Fields:
    mean, var: float64 [C]; the variance is biased.
  """
  mean: np.ndarray
  var: np.ndarray


class RestoredNorms(NamedTuple):
  """Variables of layers with their batch norm.

  Fields:
    variables: {'params': ..., 'batch_stats': ...}, NumPy float32; those of the layers only.
    still: number of channels whose output never moved, and whose kernels are now zero.
    channels: number of channels of all layers.
  """
  variables: Mapping[str, Any]
  still: int
  channels: int


def restore_batch_norm(detector: Detector, variables: Variables, layers: Sequence[Path],
                       batches: Iterator[np.ndarray]) -> RestoredNorms:
  """Returns the variables of folded layers with the batch norm of the given images.

  All processes call it together, with the same images; the moments are those that the first
  computes, so all get the same bits.

  Args:
    detector: the detector; in float32, whatever type it is trained in.
    variables: its variables.
    layers: paths of layers with 'kernel' and 'norm'.
    batches: images u8 [B, S, S, 3] each, at least one batch.
  """
  moments = measure(detector, variables, layers, batches)
  moments = {layer: Moments(*_from_first(m)) for layer, m in moments.items()}
  params, stats = flatten_dict(variables['params']), flatten_dict(variables['batch_stats'])
  restored, still = {}, 0
  for layer in layers:
    own = {leaf: np.asarray(tree[(*layer, *leaf)], np.float64) for tree, leaf in [
        (params, ('kernel',)), (params, ('norm', 'scale')), (params, ('norm', 'bias')),
        (stats, ('norm', 'mean')), (stats, ('norm', 'var'))]}
    values = _restored(*own.values(), moments[layer],
                       detector.network.policy.norm_epsilon)  # pyright: ignore
    still += int((values['kernel'] == 0).all(axis=(0, 1, 2)).sum())
    for collection, leaf in [('params', 'kernel'), ('params', 'scale'), ('params', 'bias'),
                             ('batch_stats', 'mean'), ('batch_stats', 'var')]:
      path = layer if leaf == 'kernel' else (*layer, 'norm')
      restored[(collection, *path, leaf)] = values[leaf].astype(np.float32)
  channels = sum(len(m.mean) for m in moments.values())
  return RestoredNorms(unflatten_dict(restored), still, channels)


def measure(detector: Detector, variables: Variables, layers: Sequence[Path],
            batches: Iterator[np.ndarray]) -> dict[Path, Moments]:
  """Computes the moments of what the batch norms of some layers read, in inference.

  One pass suffices for all layers, since putting back a batch norm changes no layer's output.
  """
  chosen = frozenset(layers)

  @jax.jit
  def moments(variables: Variables, images: Array) -> dict[str, tuple[Array, Array]]:
    found = {}

    def intercept(call, args, kwargs, context):
      layer = context.module.path[:-1]
      if isinstance(context.module, BatchNorm) and layer in chosen:
        x = args[0].astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        found['/'.join(layer)] = jnp.mean(x, axes), jnp.var(x, axes)
      return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
      detector.network.apply(variables, images, train=False)
    return found

  local = jax.local_devices()[0]
  variables = jax.device_put(jax.tree.map(np.asarray, variables), local)
  parts = [(len(images), jax.device_get(moments(variables, jax.device_put(images, local))))
           for images in batches]
  weights = np.array([count for count, _ in parts], np.float64)
  return {layer: _combined(weights, *(np.array([part['/'.join(layer)][i] for _, part in parts],
                                               np.float64) for i in (0, 1)))
          for layer in layers}


def _combined(weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> Moments:
  """Combines the moments [N, C] of N batches of the given sizes."""
  share = (weights / weights.sum())[:, None]
  mean = np.sum(share * means, axis=0)
  return Moments(mean, np.sum(share * (variances + (means - mean) ** 2), axis=0))


def _from_first(moments: Moments) -> np.ndarray:
  """Returns the moments that the first process passes, in all processes."""
  data = coordination.broadcast(np.stack(moments).tobytes())
  return np.frombuffer(data, np.float64).reshape(2, -1)


def _restored(kernel: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray,
              var: np.ndarray, moments: Moments, epsilon: float) -> dict[str, np.ndarray]:
  """Returns the variables of one layer after batch norm is put back.

  Args:
    kernel: [k, k, Cin, C], or [3, 3, 1, C].
    scale, bias, mean, var: [C], the batch norm that the layer has now.
    moments: moments of the output of `kernel`.
    epsilon: added to variances.
  """
  # What the layer computes now: factor * (W * x) + offset.
  factor = scale / np.sqrt(var + epsilon)
  offset = bias - mean * factor
  deviation = np.sqrt(moments.var)
  still = deviation <= _STILL * np.maximum(1, np.abs(moments.mean))
  norm = np.sqrt((kernel**2).sum(axis=(0, 1, 2)))
  size = np.where(still, 1, np.maximum(deviation, norm / _MOST_NORM))
  var = moments.var / size**2
  alive = {'kernel': kernel / size, 'mean': moments.mean / size, 'var': var,
           'scale': factor * size * np.sqrt(var + epsilon),
           'bias': offset + factor * moments.mean}
  constant = {'kernel': np.zeros_like(kernel), 'mean': np.zeros_like(size),
              'var': np.ones_like(size), 'scale': np.ones_like(size), 'bias': alive['bias']}
  return {name: np.where(still, constant[name], value) for name, value in alive.items()}
