"""Names, shapes and layouts, on the reference's checkpoints and modified copies of them."""

import functools
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign import keras_mobilenet, write_bundle, write_graph

from ppn_jax.config import base_config, ssd, tf_reference
from ppn_jax.errors import InputError
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.network import build_network
from ppn_jax.weights.importer import class_columns, import_backbone, import_detector
from ppn_jax.weights.read import WeightFile, read_weights

HEAD = 'WeightSharedConvolutionalBoxPredictor/'


@functools.cache
def shapes_of(*differences, **model):
  config = base_config()
  for difference in (tf_reference, *differences):
    difference(config)
  config.model.num_classes = 90
  config.model.update_from_flattened_dict(model)
  model = config.model
  columns = model.num_classes + model.background_column
  anchors = (3, *[6] * 5) if ssd in differences else (6,) * model.neck.num_levels
  network = build_network(**{part: model[part].to_dict() for part in ('backbone', 'neck', 'head')},
                          num_classes=columns, anchors_per_cell=anchors, policy=LayerPolicy())
  images = jax.ShapeDtypeStruct((1, 300, 300, 3), np.uint8)
  return jax.eval_shape(lambda i: network.init(jax.random.key(0), i, train=False), images)


@pytest.fixture(scope='module')
def like():
  return {'ppn': shapes_of(), 'ssd': shapes_of(ssd)}


@pytest.fixture(scope='module')
def golden(shared):
  return {model: read_weights(shared / f'golden/ckpt_{model}_s1') for model in ('ppn', 'ssd')}


def changed(file, change):
  """Returns a file whose tensors are `change(name, tensor)`: None, a tensor or (name, tensor)."""
  tensors = {}
  for name, tensor in file.tensors.items():
    new = change(name, tensor)
    name, new = new if isinstance(new, tuple) else (name, new)
    if new is not None:
      tensors[name] = new
  return file._replace(tensors=tensors)


@pytest.mark.parametrize('model', ['ppn', 'ssd'])
def test_every_variable_of_a_detector(golden, like, shared, model):
  imported = import_detector(golden[model], like[model])
  values, shapes = flatten_dict(imported.variables), flatten_dict(like[model])
  assert {path: v.shape for path, v in values.items()} == {p: s.shape for p, s in shapes.items()}
  assert all(v.dtype == np.float32 for v in values.values())
  text = (shared / f'golden/variables_{model}.txt').read_text()
  unused = [name for group in imported.report.unused.values() for name in group]
  assert unused == re.findall(r'(\S+) .* UNUSED_AT_INFERENCE', text)
  assert imported.report.matched == len(values) == len(golden[model].tensors) - len(unused)


def test_values_and_layout(golden, like):
  tensors = golden['ssd'].tensors
  variables = import_detector(golden['ssd'], like['ssd']).variables
  params, stats = variables['params'], variables['batch_stats']
  scope = 'FeatureExtractor/MobilenetV1/'
  depthwise = tensors[f'{scope}Conv2d_4_depthwise/depthwise_weights']
  for ours, theirs in [
      (params['backbone']['conv2d_4']['depthwise']['kernel'][:, :, 0], depthwise[..., 0]),
      (params['backbone']['conv2d_0']['kernel'], tensors[f'{scope}Conv2d_0/weights']),
      (stats['backbone']['conv2d_13']['pointwise']['norm']['var'],
       tensors[f'{scope}Conv2d_13_pointwise/BatchNorm/moving_variance']),
      (params['neck']['extra_3']['reduce']['norm']['bias'],
       tensors[f'{scope}Conv2d_13_pointwise_1_Conv2d_3_1x1_128/BatchNorm/beta']),
      (params['neck']['extra_5']['shrink']['kernel'],
       tensors[f'{scope}Conv2d_13_pointwise_2_Conv2d_5_3x3_s2_128/weights']),
      (params['head']['level_2']['class_bias'], tensors['BoxPredictor_2/ClassPredictor/biases'])]:
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('model', ['ppn', 'ssd'])
def test_frozen_graph_of_the_same(golden, like, tmp_path, model):
  others = {'Preprocessor/mul/x': np.float32([2 / 255]),
            'FeatureExtractor/MobilenetV1/MobilenetV1/Conv2d_0/BatchNorm/Const': np.zeros(3, 'f'),
            'FeatureExtractor/MobilenetV1/zeros': np.int32([1])}
  write_graph(tmp_path / 'frozen_inference_graph.pb', golden[model].tensors | others)
  frozen = read_weights(tmp_path / 'frozen_inference_graph.pb')
  a, b = (flatten_dict(import_detector(file, like[model]).variables)
          for file in (golden[model], frozen))
  assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_levels_keep_their_norms(golden, like):
  variables = import_detector(golden['ppn'], like['ppn']).variables
  for level in range(6):
    np.testing.assert_array_equal(
        variables['batch_stats']['head'][f'norm_{level}']['mean'],
        golden['ppn'].tensors[f'{HEAD}PredictionTower/conv2d_0/BatchNorm/feature_{level}/'
                              'moving_mean'])


def test_class_columns(golden):
  assert class_columns(golden['ppn']) == class_columns(golden['ssd']) == 91


def test_values_that_training_leaves_in_checkpoints(golden, like):
  def train(name, tensor):
    return (f'{name}/Momentum', tensor) if name.endswith('gamma') else None
  slots = changed(golden['ppn'], train).tensors
  shadows = {f'{n}/ExponentialMovingAverage': t + 1 for n, t in golden['ppn'].tensors.items()
             if n.endswith('weights')}
  file = golden['ppn']._replace(tensors={**golden['ppn'].tensors, **slots, **shadows,
                                         'global_step': np.int64(5)})
  plain, averaged = (import_detector(file, like['ppn'], average=a) for a in (False, True))
  assert {'block 12', 'block 13', "the optimizer's", 'moving averages', 'the global step'
          } == set(plain.report.unused)
  kernels = [v['params']['head']['tower_kernel'] for v in (plain.variables, averaged.variables)]
  np.testing.assert_array_equal(kernels[0] + 1, kernels[1])
  assert str(plain.report).splitlines()[1] == (
      f'  matched 144 of 144 variables, missing 0, unused {20 + len(slots) + len(shadows) + 1}:')
  assert len(str(plain.report).splitlines()) == 7


@pytest.mark.parametrize('change, message', [
    (lambda n, t: None if n == f'{HEAD}BoxPredictor/biases' else t,
     f'1 of the 144 variables .* missing: {HEAD}BoxPredictor/biases$'),
    (lambda n, t: t[..., :-6] if n == f'{HEAD}ClassPredictor/weights' else t,
     r'weights is \[1, 1, 512, 540\], but params/head/class_kernel .* is \[1, 1, 512, 546\]'),
    (lambda n, t: t[:1] if n.endswith('Conv2d_3_depthwise/depthwise_weights') else t,
     r'\[1, 3, 128, 1\], but params/backbone/conv2d_3/depthwise/kernel .* is \[3, 3, 1, 128\]'),
    (lambda n, t: t * np.float32(np.inf) if n.endswith('feature_3/beta') else t,
     'feature_3/beta has values that are not finite'),
    (lambda n, t: -t if n.endswith('Conv2d_1_depthwise/BatchNorm/moving_variance') else t,
     'is a variance and has negative values'),
    (lambda n, t: t.astype(np.int8) if n.endswith('Conv2d_0/weights') else t, 'is int8'),
    (lambda n, t: (n.replace('conv2d_0', 'conv2d_1'), t) if 'PredictionTower' in n else t,
     'variables that the config asks for are missing'),
    (lambda n, t: (n.replace('feature_0', 'feature_6'), t) if 'feature_0' in n else t,
     'missing: .*; in checkpoints each level of PPN has a batch norm'),
])
def test_checkpoints_that_do_not_fit(golden, like, change, message):
  with pytest.raises(InputError, match=message):
    import_detector(changed(golden['ppn'], change), like['ppn'])


@pytest.mark.parametrize('name', [
    f'{HEAD}PredictionTower/conv2d_1/weights', 'FeatureExtractor/MobilenetV1/Conv2d_11x/weights',
    'FeatureExtractor/MobilenetV1/Base_Conv2d_1x1_64/weights',
    f'{HEAD}PredictionTower/conv2d_0/BatchNorm/feature_6/beta'])
def test_unknown_layers_are_rejected(golden, like, name):
  file = golden['ppn']._replace(tensors={**golden['ppn'].tensors, name: np.zeros(3)})
  with pytest.raises(InputError, match=f'no place for 1 of its variables: {name}'):
    import_detector(file, like['ppn'])


@pytest.mark.parametrize('model, message', [
    ({'head.norm_per_level': False}, r'norm of its own \(model.head.norm_per_level=True\)'),
    ({'neck.projection': 64}, r'missing: .*Base_Conv2d_1x1_\{depth\}'),
    ({'neck.num_levels': 5}, 'no place for 4 of its variables'),
    ({'backbone.last_block': 8}, 'no place for 10 of its variables: .*Conv2d_9_depthwise'),
    ({'backbone.depth_multiplier': 0.5}, 'set model.backbone.depth_multiplier=1.0'),
    ({'background_column': False}, 'set model.background_column=True'),
    ({'num_classes': 91}, 'set model.num_classes=90 if the first'),
    ({'num_classes': 20}, 'which are 91 and 21 class columns .* set model.num_classes to 0'),
])
def test_configs_that_do_not_fit(golden, model, message):
  with pytest.raises(InputError, match=message):
    import_detector(golden['ppn'], shapes_of(**model))


def test_wrong_model(golden, like):
  with pytest.raises(InputError, match=r'like an SSD detector.* describes a whole PPN detector'):
    import_detector(golden['ssd'], like['ppn'])
  with pytest.raises(InputError, match=r'like a PPN detector.* describes a whole SSD detector'):
    import_detector(golden['ppn'], like['ssd'])
  with pytest.raises(InputError, match=r'without a box predictor.*; use --kind=backbone'):
    import_detector(slim(golden['ppn']), like['ppn'])
  fpn = changed(golden['ppn'], lambda n, t: (n.replace('Conv2d_13', 'fpn/smoothing_1'), t))
  with pytest.raises(InputError, match='looks like a MobileNet FPN'):
    import_detector(fpn, like['ppn'])
  v2 = WeightFile('v2', 'checkpoint', {'MobilenetV2/Conv/weights': np.zeros(3)})
  with pytest.raises(InputError, match=r'looks like a MobileNet-v2.*backbone is a MobileNet-v1'):
    import_backbone(v2, like['ppn'])
  v4 = WeightFile('v4', 'checkpoint', {'MobilenetV4/Conv/weights': np.zeros(3)})
  for read in (import_detector, import_backbone):
    with pytest.raises(InputError, match=r'no known MobileNet .MobilenetV4/Conv/weights'):
      read(v4, like['ppn'])


def slim(file):
  """Returns a classifier's checkpoint made from a detector's."""
  found = changed(file, lambda n, t: (n.removeprefix('FeatureExtractor/'), t)
                  if n.startswith('FeatureExtractor/') else None)
  found.tensors['MobilenetV1/Logits/Conv2d_1c_1x1/weights'] = np.zeros((1, 1, 1024, 1001), 'f')
  found.tensors['global_step'] = np.int64(9)
  return found


def test_backbone_of_slim_and_of_a_detector(golden, like, tmp_path):
  write_bundle(tmp_path / 'slim.ckpt', slim(golden['ppn']).tensors)
  from_slim = import_backbone(read_weights(tmp_path / 'slim.ckpt'), like['ppn'])
  from_detector = import_backbone(golden['ppn'], like['ppn'])
  assert set(from_slim.report.unused) == {'block 12', 'block 13', "the classifier's logits",
                                          'the global step'}
  assert set(from_detector.report.unused) == {'block 12', 'block 13', 'box predictor'}
  a, b = (flatten_dict(i.variables) for i in (from_slim, from_detector))
  assert a.keys() == b.keys() and len(a) == 115 and {path[1] for path in a} == {'backbone'}
  assert all(np.array_equal(a[path], b[path]) for path in a)
  whole = flatten_dict(import_detector(golden['ppn'], like['ppn']).variables)
  assert all(np.array_equal(a[path], whole[path]) for path in a)


def test_folded_batch_norm(golden, like):
  folded = changed(golden['ppn'], lambda n, t: None if '/BatchNorm/' in n else t)
  with pytest.raises(InputError, match='folded into the convolutions, so import the checkpoint'):
    import_detector(folded._replace(kind='frozen graph'), like['ppn'])


def test_keras_names():
  weights = {'/'.join(key): value for key, value in keras_mobilenet(alpha=0.25).items()}
  file = WeightFile('x.h5', 'Keras file', weights)
  like = shapes_of(**{'backbone.depth_multiplier': 0.25})
  imported = import_backbone(file, like)
  params = imported.variables['params']['backbone']
  assert imported.report.matched == 115 and set(imported.report.unused) == {'block 12', 'block 13'}
  np.testing.assert_array_equal(params['conv2d_2']['depthwise']['kernel'][:, :, 0],
                                weights['conv_dw_2/kernel'][..., 0])
  np.testing.assert_array_equal(params['conv2d_11']['pointwise']['norm']['scale'],
                                weights['conv_pw_11_bn/gamma'])
  np.testing.assert_array_equal(imported.variables['batch_stats']['backbone']['conv2d_0']['norm'][
      'mean'], weights['conv1_bn/moving_mean'])
