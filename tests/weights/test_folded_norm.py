"""Folded batch norm: names in frozen graphs, and what tells folded layers from others."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign import write_bundle, write_graph
from test_importer import shapes_of

from ppn_jax.config import ssd
from ppn_jax.errors import InputError
from ppn_jax.weights.folded_norm import EPSILON, check_epsilon, folded_layers, unfold
from ppn_jax.weights.importer import import_backbone, import_detector, import_matching
from ppn_jax.weights.read import read_weights

DEPTH = {'backbone.depth_multiplier': 0.25, 'neck.depths': (128, 64, 64, 32)}


def random_tensors(shapes, name_of):
  rng = np.random.default_rng(3)
  return {name_of(path): rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
          if 'depthwise' not in path or leaf.ndim < 4 else np.swapaxes(
              rng.normal(0, 1, leaf.shape), 2, 3).astype(np.float32)
          for path, leaf in flatten_dict(shapes).items()}


def detector_tensors(like):
  from ppn_jax.weights.names import detector_name
  return random_tensors(like, lambda path: detector_name(path).replace('#', '0'))


def folded(tensors, kernel, bias, scope=''):
  """Folds batch norm as tools do, which name kernels and biases in these ways."""
  found = {}
  for name, tensor in tensors.items():
    layer, _, leaf = name.rpartition('/')
    if leaf in ('weights', 'depthwise_weights') and f'{layer}/BatchNorm/gamma' in tensors:
      gamma, beta, mean, var = (tensors[f'{layer}/BatchNorm/{part}'] for part in (
          'gamma', 'beta', 'moving_mean', 'moving_variance'))
      factor = gamma / np.sqrt(var + EPSILON)
      op = 'depthwise' if leaf == 'depthwise_weights' else 'Conv2D'
      shape = (-1, 1) if leaf == 'depthwise_weights' else (-1,)
      layer = layer.replace('MobilenetV1/', scope + 'MobilenetV1/', 1)
      found[f'{layer}/{kernel.format(leaf=leaf, op=op)}'] = tensor * factor.reshape(shape)
      found[f'{layer}/{bias.format(op=op)}'] = beta - mean * factor
    elif '/BatchNorm/' not in name:
      found[name] = tensor
  return found


@pytest.fixture(scope='module')
def like():
  return shapes_of(ssd, **DEPTH)


@pytest.mark.parametrize('kernel, bias, scope', [
    ('{leaf}', '{op}_bn_offset', ''), ('{op}_weights', '{op}_bn_offset', ''),
    ('{leaf}', '{op}_Fold_bias', 'MobilenetV1/')])
def test_frozen_graphs_whose_batch_norm_is_folded(tmp_path, like, kernel, bias, scope):
  tensors = detector_tensors(like)
  write_graph(tmp_path / 'x.pb', folded(tensors, kernel, bias, scope))
  write_bundle(tmp_path / 'x', tensors)
  found, plain = (import_detector(read_weights(tmp_path / name), like) for name in ('x.pb', 'x'))
  assert found.report.matched == plain.report.matched == 199
  assert len(folded_layers(found.variables)) == 35 and not folded_layers(plain.variables)
  ours, theirs = (flatten_dict(i.variables) for i in (found, plain))
  for path in ours:
    if path[-1] != 'kernel':
      continue
    norms = [{leaf: tree[c, *path[1:-1], 'norm', leaf].astype(np.float64) for c, leaf in [
        ('params', 'scale'), ('params', 'bias'), ('batch_stats', 'mean'), ('batch_stats', 'var')]}
        for tree in (ours, theirs)]
    factors = [n['scale'] / np.sqrt(n['var'] + EPSILON) for n in norms]
    np.testing.assert_allclose(ours[path] * factors[0], theirs[path] * factors[1], rtol=1e-5)
    offsets = [n['bias'] - n['mean'] * f for n, f in zip(norms, factors, strict=True)]
    np.testing.assert_allclose(*offsets, rtol=1e-4, atol=1e-5)
  assert import_backbone(read_weights(tmp_path / 'x.pb'), like).report.matched == 135
  assert len(import_matching(read_weights(tmp_path / 'x.pb'), like).values) == 199


def test_names_that_are_no_folded_layers():
  tensors = {'MobilenetV1/Logits/Conv2d_1c_1x1/weights': np.ones(3, np.float32),
             'MobilenetV1/Logits/Conv2d_1c_1x1/biases': np.ones(3, np.float32),
             'BoxPredictor_0/ClassPredictor/weights': np.ones(3, np.float32),
             'BoxPredictor_0/ClassPredictor/biases': np.ones(3, np.float32),
             'MobilenetV1/Conv2d_0/weights': np.ones(3, np.float32),
             'MobilenetV1/Conv2d_0/BatchNorm/beta': np.ones(3, np.float32),
             'MobilenetV1/Conv2d_0/Conv2D_bn_offset': np.ones(3, np.float32),
             'MobilenetV1/Conv2d_1_depthwise/depthwise_weights': np.ones(3, np.float32)}
  assert unfold(tensors).keys() == tensors.keys()


def test_new_layers_and_trained_ones_are_not_folded():
  zeros, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
  tree = {'params': {'backbone': {'a': {'kernel': np.ones((1, 1, 2, 2)),
                                        'norm': {'scale': ones, 'bias': zeros}}}},
          'batch_stats': {'backbone': {'a': {'norm': {'mean': zeros, 'var': ones}}}}}
  assert folded_layers(tree) == ()
  stats = tree['batch_stats']['backbone']['a']['norm']
  stats['var'] = np.full(2, np.float32(1 - EPSILON))
  assert folded_layers(tree) == (('backbone', 'a'),)
  stats['mean'] = np.float32([0, 1e-9])
  assert folded_layers(tree) == ()


def test_another_epsilon_is_refused():
  check_epsilon((), 1e-5)
  check_epsilon((('backbone', 'a'),), EPSILON)
  with pytest.raises(InputError, match=r'model.layers.norm_epsilon=1e-05; set it to 0.001'):
    check_epsilon((('backbone', 'a'),), 1e-5)
