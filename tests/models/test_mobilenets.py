"""MobileNet-v2 and v3-small: shapes, published counts, names, import, and Keras' own outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign import keras_names, write_keras_2

from ppn_jax.errors import InputError
from ppn_jax.models.inverted_residual import hard_swish, round_depth
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.mobilenet_v1 import MobileNetV1
from ppn_jax.models.mobilenet_v2 import MobileNetV2
from ppn_jax.models.mobilenet_v3 import MobileNetV3Small
from ppn_jax.models.network import build_network
from ppn_jax.weights import names
from ppn_jax.weights.importer import import_backbone
from ppn_jax.weights.read import read_weights

NATIVE = LayerPolicy(conv_form='native')
NETWORKS = {'MobilenetV2': MobileNetV2, 'MobilenetV3': MobileNetV3Small}


@functools.cache
def traced(module, side=64):
  """Returns the shapes of features and variables; convolutions are traced in one form only."""
  module = module.clone(policy=NATIVE)
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(functools.partial(module.init_with_output, train=False), jax.random.key(0),
                        x)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def variables_of(module):
  """Returns random variables under the path of a detector's backbone, batch norm included."""
  rng = np.random.default_rng(0)
  shapes = traced(module)[1]
  return {collection: {'backbone': jax.tree.map(
      lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes[collection])}
          for collection in ('params', 'batch_stats')}


@pytest.mark.parametrize('module, trained, total', [
    # Keras' and, for 1.0, the papers': 3.4 and 2.5 million with their classifiers.
    (MobileNetV2(last_stride=32), 2_223_872, 2_257_984),
    (MobileNetV3Small(last_stride=32), 927_008, 939_120)])
def test_published_numbers_of_parameters(module, trained, total):
  variables = traced(module)[1]
  assert count(variables['params']) == trained and count(variables) == total


@pytest.mark.parametrize('module, depths', [
    (MobileNetV2(last_stride=32), {2: 96, 4: 144, 8: 192, 16: 576, 32: 1280}),
    (MobileNetV2(last_stride=32, endpoint='output'), {2: 16, 4: 24, 8: 32, 16: 96, 32: 1280}),
    (MobileNetV2(0.35, last_depth=1280, last_stride=32),
     {2: 48, 4: 48, 8: 96, 16: 192, 32: 1280}),
    (MobileNetV3Small(last_stride=32), {2: 16, 4: 72, 8: 96, 16: 288, 32: 576}),
    (MobileNetV3Small(last_stride=32, endpoint='output'), {2: 16, 4: 16, 8: 24, 16: 48, 32: 576})])
def test_maps_of_each_stride(module, depths):
  assert {stride: f.shape for stride, f in traced(module)[0].items()} == {
      stride: (1, 64 // stride, 64 // stride, depth) for stride, depth in depths.items()}


def test_layers_behind_the_last_map_are_left_out():
  # Layers without a gradient would only be decayed.
  for endpoint, last, absent in (('expansion', 'expanded_conv_13', 'depthwise'),
                                 ('output', 'expanded_conv_12', '')):
    features, variables = traced(MobileNetV2(endpoint=endpoint))
    layers = variables['params']
    assert list(features) == [2, 4, 8, 16] and 'conv_1' not in layers
    number = int(last.removeprefix('expanded_conv_'))
    assert last in layers and f'expanded_conv_{number + 1}' not in layers
    assert absent not in layers[last]


@pytest.mark.parametrize('options, message', [
    (dict(depth_multiplier=0.0), 'depth_multiplier 0.0 must be positive'),
    (dict(last_stride=24), 'last_stride 24 must be one of 2, 4, 8, 16, 32'),
    (dict(endpoint='expand'), "unknown endpoint 'expand'; did you mean 'expansion'"),
    (dict(min_depth=0), 'min_depth 0 must be at least 1')])
@pytest.mark.parametrize('network', NETWORKS)
def test_options_out_of_range(network, options, message):
  with pytest.raises(InputError, match=message):
    NETWORKS[network](**options)


def test_last_depth_out_of_range():
  with pytest.raises(InputError, match='last_depth -1'):
    MobileNetV2(last_depth=-1)


@pytest.mark.parametrize('depth, expected', [
    (3, 8), (11.2, 16), (12, 16), (33.6, 32), (44.8, 48), (88.0000001, 88), (18, 24)])
def test_channels_are_multiples_of_eight(depth, expected):
  assert round_depth(depth) == expected


def test_hard_swish():
  np.testing.assert_allclose(hard_swish(jnp.array([-4., -3., 0., 1., 3., 5.])),
                             [0, 0, 0, 4 / 6, 3, 5], rtol=1e-6)


@pytest.mark.parametrize('backbone, neck, head, last', [
    ('mobilenet_v2', 'pooling_pyramid', 'shared_box_predictor', 16),
    ('mobilenet_v3_small', 'conv_pyramid', 'per_level_box_predictor', 32),
    ('mobilenet_v2', 'feature_pyramid', 'shared_box_predictor', 32)])
def test_every_neck_takes_them(backbone, neck, head, last):
  network = build_network(
      backbone=dict(name=backbone, depth_multiplier=0.35, last_stride=last), neck=dict(name=neck),
      head=dict(name=head), num_classes=3, anchors_per_cell=(6,) * 6, policy=NATIVE)
  images = jax.ShapeDtypeStruct((1, 300, 300, 3), jnp.uint8)
  outputs, _ = jax.eval_shape(functools.partial(network.init_with_output, train=True),
                              jax.random.key(0), images)
  assert outputs.box_codes.shape == (1, 3000, 4)


@pytest.mark.parametrize('network, expected', [
    ('MobilenetV2', {
        'conv/kernel': ('Conv/weights', 'Conv1/kernel'),
        'conv/norm/var': ('Conv/BatchNorm/moving_variance', 'bn_Conv1/moving_variance'),
        'expanded_conv/depthwise/kernel': ('expanded_conv/depthwise/depthwise_weights',
                                           'expanded_conv_depthwise/kernel'),
        'expanded_conv_16/expand/norm/scale': ('expanded_conv_16/expand/BatchNorm/gamma',
                                               'block_16_expand_BN/gamma'),
        'conv_1/norm/bias': ('Conv_1/BatchNorm/beta', 'Conv_1_bn/beta')}),
    ('MobilenetV3', {
        'conv/norm/mean': ('Conv/BatchNorm/moving_mean', 'conv_bn/moving_mean'),
        'expanded_conv/squeeze_excite/reduce_bias': (
            'expanded_conv/squeeze_excite/Conv/biases',
            'expanded_conv_squeeze_excite_conv/bias'),
        'expanded_conv_10/squeeze_excite/expand_kernel': (
            'expanded_conv_10/squeeze_excite/Conv_1/weights',
            'expanded_conv_10_squeeze_excite_conv_1/kernel'),
        'expanded_conv_10/project/kernel': ('expanded_conv_10/project/weights',
                                            'expanded_conv_10_project/kernel')})])
def test_names_elsewhere(network, expected):
  paths = list(flatten_dict({'params': {'backbone': traced(
      NETWORKS[network](last_stride=32))[1]['params']}}))
  assert names.backbone_network(paths) == network
  for name_of in (names.slim_name, names.keras_name):
    found = {name_of(path, network) for path in paths}
    assert None not in found and len(found) == len(paths)
  for path, (slim, keras) in expected.items():
    path = ('params', 'backbone', *path.split('/'))
    assert names.slim_name(path, network) == f'{network}/{slim}'
    assert names.detector_name(path, network) == f'FeatureExtractor/{network}/{slim}'
    assert names.keras_name(path, network) == keras
  neck = ('params', 'neck', 'extra_2', 'shrink', 'kernel')
  assert names.detector_name(neck, network) == (
      f'FeatureExtractor/{network}/layer_#_2_Conv2d_2_3x3_s2_#/weights')
  assert names.recognise([names.slim_name(path, network) for path in paths]).network == network


def old_name(layer):
  """Returns the name that the MobileNet-v3 of Keras 2 gives a layer of Keras 3."""
  layer = layer.replace('_bn', '/BatchNorm').replace('_squeeze_excite_conv', '/squeeze_excite/Conv')
  for part in ('expand', 'depthwise', 'project'):
    layer = layer.replace(f'_{part}', f'/{part}') if f'conv_{part}' in layer or layer[
        len('expanded_conv_'):].lstrip('0123456789').startswith(f'_{part}') else layer
  return layer.replace('conv', 'Conv') if layer.startswith('conv') else layer


@pytest.mark.parametrize('network, rename', [
    ('MobilenetV2', str), ('MobilenetV3', str), ('MobilenetV3', old_name)])
def test_backbone_from_a_keras_file(tmp_path, network, rename):
  pytest.importorskip('h5py')
  variables = variables_of(NETWORKS[network](0.35))
  weights = {(rename(layer), weight): value for (layer, weight), value in keras_names(
      variables, network).items()}
  write_keras_2(tmp_path / 'x.h5', weights, model=True)
  found = import_backbone(read_weights(tmp_path / 'x.h5'), variables)
  assert 'MobileNetV' + network[-1] in found.report.description
  jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
  other = {'params': {'backbone': traced(MobileNetV1(0.25))[1]['params']}}
  with pytest.raises(InputError, match=f'set model.backbone.name=mobilenet_v{network[-1]}'):
    import_backbone(read_weights(tmp_path / 'x.h5'), other)


@pytest.mark.slow
@pytest.mark.parametrize('side', [96, 101])
@pytest.mark.parametrize('network, alpha', [
    ('MobilenetV2', 1.0), ('MobilenetV2', 0.35), ('MobilenetV3', 1.0), ('MobilenetV3', 0.75)])
def test_features_equal_keras(tmp_path, network, alpha, side):
  keras = pytest.importorskip('keras', reason='pip install tensorflow')
  if network == 'MobilenetV2':
    module = MobileNetV2(alpha, last_stride=32, last_depth=1280)
    layers = {4: 'block_3_expand_relu', 8: 'block_6_expand_relu', 16: 'block_13_expand_relu',
              32: 'out_relu'}
    whole = keras.applications.MobileNetV2((side, side, 3), alpha=alpha, include_top=False,
                                           weights=None)
  else:
    module = MobileNetV3Small(alpha, last_stride=32)
    layers = {4: 'expanded_conv_1_expand_bn', 8: 'expanded_conv_3_expand_bn',
              16: 'expanded_conv_8_expand_bn', 32: None}
    whole = keras.applications.MobileNetV3Small((side, side, 3), alpha=alpha, include_top=False,
                                                weights=None, include_preprocessing=False)
  rng = np.random.default_rng(0)
  for layer in whole.layers:
    layer.set_weights([value * rng.uniform(0.8, 1.2, value.shape)
                       + (value.ndim == 1) * rng.uniform(0, 0.3, value.shape)
                       for value in layer.get_weights()])
  whole.save_weights(tmp_path / 'x.weights.h5')
  like = {collection: {'backbone': tree} for collection, tree in traced(module)[1].items()}
  found = import_backbone(read_weights(tmp_path / 'x.weights.h5'), like)
  assert not found.report.unused
  x = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
  features = jax.jit(functools.partial(module.apply, train=False))(
      {collection: tree['backbone'] for collection, tree in found.variables.items()}, x)
  outputs = [whole.get_layer(name).output if name else whole.output for name in layers.values()]
  expected = keras.Model(whole.input, outputs).predict(x, verbose=0)
  for stride, theirs in zip(layers, expected, strict=True):
    if network == 'MobilenetV3' and stride != 32:  # Its activations have no names of their own.
      theirs = np.maximum(theirs, 0) if stride == 4 else np.asarray(hard_swish(theirs))
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(features[stride], theirs, atol=1e-4 * np.abs(theirs).max())
