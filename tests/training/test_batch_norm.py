"""Batch norm put back: the same function, on images that were not used for it."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny import tiny_config

from ppn_jax.config import fpn, ssd
from ppn_jax.run import build_detector
from ppn_jax.training.batch_norm import measure, restore_batch_norm
from ppn_jax.weights.folded_norm import VARIANCE, folded_layers


def detector_of(kind):
  config = tiny_config().copy_and_resolve_references().unlock()
  if kind != 'ppn':
    {'ssd': ssd, 'fpn': fpn}[kind](config)
    config.model.neck.update(
        dict(strides=(8, 16), depths=(24,)) if kind == 'ssd' else
        dict(strides=(8, 16), num_levels=3, depth=16))
    config.model.backbone.last_block = 7
  config.model.num_classes = 3
  config.model.layers.norm_decay = 0.0
  return build_detector(config.lock())


def folded_variables(detector, *, parts=('backbone', 'neck'), dead=False):
  """Returns variables with folded batch norm in some parts, as a TFLite file gives.

  The statistics that are folded are those of images, so that no channel is always 0 or 6.
  """
  rng = np.random.default_rng(1)
  flat = {path: np.array(leaf) for path, leaf in flatten_dict(
      jax.device_get(detector.init(jax.random.key(0)))).items()}
  for path, leaf in flat.items():
    if path[-2:] in (('norm', 'scale'), ('norm', 'bias')):
      flat[path] = rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
  _, stats = detector.forward_train(unflatten_dict(flat), images(5, 32))  # With a decay of 0.
  for path, var in flatten_dict({'batch_stats': jax.device_get(stats)}).items():
    if path[1] not in parts or path[-1] != 'var':
      continue
    layer = path[1:-1]
    mean = stats[layer[0]]
    for name in layer[1:]:
      mean = mean[name]
    scale, bias = ('params', *layer, 'scale'), ('params', *layer, 'bias')
    factor = flat[scale] / np.sqrt(var + 1e-3)
    flat['params', *layer[:-1], 'kernel'] = flat['params', *layer[:-1], 'kernel'] * factor
    flat[bias] = flat[bias] - np.asarray(mean['mean']) * factor
    flat[scale], flat[path] = np.ones_like(factor), np.full(var.shape, VARIANCE)
  if dead:  # Channel 0 of the stem is always zero, which block 1 multiplies by large weights.
    flat['params', 'backbone', 'conv2d_0', 'norm', 'bias'][0] = -50
    flat['params', 'backbone', 'conv2d_1', 'depthwise', 'kernel'][..., 0] = 7
  return unflatten_dict(flat)


def images(seed, count=8):
  """Returns images with structure: noise of several sizes."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (count, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
  return np.clip(coarse + rng.integers(-40, 40, coarse.shape), 0, 255).astype(np.uint8)


def merged(variables, restored):
  return unflatten_dict(flatten_dict(variables) | flatten_dict(restored))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ppn', 'ssd', 'fpn'])
def test_the_function_is_the_same_on_other_images(kind):
  detector = detector_of(kind)
  variables = folded_variables(detector)
  layers = folded_layers(variables)
  assert {layer[0] for layer in layers} == ({'backbone'} if kind == 'ppn' else
                                            {'backbone', 'neck'})
  restored = restore_batch_norm(detector, variables, layers, iter([images(0), images(1)]))
  after = merged(variables, restored.variables)
  assert not folded_layers(after) and restored.still == 0
  for seed in (0, 7):
    for a, b in zip(detector.forward(variables, images(seed)),
                    detector.forward(after, images(seed)), strict=True):
      assert np.std(a) > 1e-3
      np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(np.abs(a).max())))


@pytest.mark.slow
def test_training_continues_from_the_function():
  """With batch statistics the identity changes the outputs, batch norm that was put back hardly."""
  detector = detector_of('ppn')
  variables = folded_variables(detector)
  layers, batch = folded_layers(variables), images(3, 16)
  restored = restore_batch_norm(detector, variables, layers, iter([batch]))
  after = merged(variables, restored.variables)

  def features(variables, train):
    found, _ = detector.network.apply(variables, batch, train=train, mutable=['batch_stats'],
                                      method='pyramid')
    return np.asarray(found[0])

  expected = features(variables, False)
  error = lambda found: np.abs(found - expected).mean() / np.abs(expected).mean()
  assert error(features(after, True)) < 1e-3 < 0.1 < error(features(variables, True))


@pytest.mark.slow
def test_kernels_get_unit_outputs_and_untouched_layers_stay():
  detector = detector_of('ssd')
  variables = folded_variables(detector, parts=('backbone',))
  layers = folded_layers(variables)
  restored = restore_batch_norm(detector, variables, layers, iter([images(0)]))
  assert set(restored.variables['params']) == {'backbone'}
  after = merged(variables, restored.variables)
  for moments in measure(detector, after, layers, iter([images(0)])).values():
    np.testing.assert_allclose(moments.var, 1, rtol=2e-3)
  assert restored.still == 0 and restored.channels == sum(
      len(norm) for path, norm in flatten_dict(variables['batch_stats']['backbone']).items()
      if path[-1] == 'var')


@pytest.mark.slow
def test_channels_that_never_move_get_zero_kernels():
  detector = detector_of('ppn')
  variables = folded_variables(detector, dead=True)
  restored = restore_batch_norm(detector, variables, folded_layers(variables),
                                iter([images(0), images(1)]))
  kernel = restored.variables['params']['backbone']['conv2d_1']['depthwise']['kernel']
  assert restored.still == 1 and not kernel[..., 0].any() and kernel[..., 1:].all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.variables))
  after = merged(variables, restored.variables)
  for a, b in zip(detector.forward(variables, images(9)), detector.forward(after, images(9)),
                  strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_moments_of_unequal_batches_are_those_of_all_images():
  detector = detector_of('ppn')
  variables = folded_variables(detector)
  layers, all_images = folded_layers(variables)[:3], images(2, 10)
  together = measure(detector, variables, layers, iter([all_images]))
  apart = measure(detector, variables, layers, iter([all_images[:7], all_images[7:]]))
  for layer in layers:
    for a, b in zip(together[layer], apart[layer], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
