import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign import keras_mobilenet, write_bundle, write_keras_2

from ppn_jax import zoo
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState
from ppn_jax.weights.initial import AUTO, initial_weights, with_weights
from ppn_jax.weights.shared import read_shared


@pytest.mark.parametrize('averaging', [False, True])
def test_variables_are_replaced_in_the_average_too(averaging):
  variables = {'params': {'backbone': {'a': jnp.zeros(3)}, 'head': {'b': jnp.ones(2)}}}
  average = {'params': {'backbone': {'a': jnp.ones(3)}, 'head': {'b': jnp.ones(2)}}}
  state = TrainState(jnp.int32(0), variables, (), average if averaging else {})
  found = with_weights(state, {'params': {'backbone': {'a': np.float32([4, 5, 6])}}})
  for tree in [found.variables, found.average][:1 + averaging]:
    np.testing.assert_array_equal(tree['params']['backbone']['a'], [4, 5, 6])
    np.testing.assert_array_equal(tree['params']['head']['b'], [1, 1])
  assert averaging or found.average == {}
  buffers = {leaf.unsafe_buffer_pointer() for leaf in (
      found.variables['params']['backbone']['a'],
      *([found.average['params']['backbone']['a']] if averaging else []))}
  assert len(buffers) == 1 + averaging


def test_any_kind_of_file(tmp_path):
  pytest.importorskip('h5py')
  weights = keras_mobilenet()
  write_keras_2(tmp_path / 'x.h5', weights)
  write_bundle(tmp_path / 'x', {'MobilenetV1/Conv2d_0/weights': weights['conv1', 'kernel']})
  like = {'params': {'backbone': {'conv2d_0': {'kernel': np.zeros((3, 3, 3, 8))}}}}
  for name in ('x.h5', 'x'):
    kernel = initial_weights(like, (), backbone=str(tmp_path / name)).variables[
        'params']['backbone']['conv2d_0']['kernel']
    np.testing.assert_array_equal(kernel, weights['conv1', 'kernel'])


def test_ninety_classes_of_a_file_are_those_of_coco(tmp_path):
  head = 'WeightSharedConvolutionalBoxPredictor'
  bias = np.arange(2 * 91, dtype=np.float32)
  write_bundle(tmp_path / 'x', {
      'FeatureExtractor/MobilenetV1/Conv2d_0/weights': np.ones((3, 3, 3, 8), np.float32),
      f'{head}/BoxPredictor/biases': np.ones(8, np.float32),
      f'{head}/ClassPredictor/biases': bias})
  like = {'params': {'backbone': {'conv2d_0': {'kernel': np.zeros((3, 3, 3, 8))}},
                     'head': {'box_bias': np.zeros(8), 'class_bias': np.zeros(2 * 3)}}}
  found = initial_weights(like, [Category(i, n) for i, n in enumerate(('zebra', 'x', 'person'))],
                          weights=str(tmp_path / 'x'))
  indices, values = found.partial['params', 'head', 'class_bias']
  assert indices.tolist() == [0, 2, 3, 5]  # No background here; in the file it is column 0.
  np.testing.assert_array_equal(values, bias.reshape(2, 91)[:, [24, 1]].reshape(-1))
  assert "2 of 3 by name (zebra, person); random: x" in str(found.report)
  assert "taken to be COCO's" in str(found.report)


@pytest.mark.parametrize('name', ['a.tflite', 'a.h5', 'a.pb', 'a.ckpt', 'a'])
def test_a_path_to_nothing_names_all_that_is_legal(tmp_path, name):
  message = rf'{name}: no .*; give the PREFIX .*\.keras\), or the workdir of a run .*, or a weights'
  with pytest.raises(InputError, match=message) as e:
    initial_weights({}, (), weights=str(tmp_path / name))
  assert str(e.value).count('give the PREFIX') == 1


def test_no_weights():
  assert initial_weights({}, (), backbone='') is None
  with pytest.raises(InputError, match=r'init\.backbone=3 is not a path'):
    initial_weights({}, (), backbone=3)


@pytest.fixture(scope='module')
def variables_of_ppn_voc():
  return unflatten_dict(read_shared(zoo.model_file('ppn_voc')).values)


def test_auto_is_the_model_of_the_zoo_with_this_backbone(variables_of_ppn_voc, log_lines, tmp_path,
                                                         monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'ppn_voc').mkdir()  # Such as the workdir of this run.
  found = initial_weights(variables_of_ppn_voc, read_shared(zoo.model_file('ppn_voc')).categories,
                          weights=AUTO)
  assert 'ppn_voc.safetensors' in found.report.origin and '20 of 20 by name' in str(found.report)
  assert len(flatten_dict(found.variables)) > 100 and not log_lines


@pytest.mark.parametrize('change', ['a kernel of another width', 'a further layer'])
def test_auto_without_such_a_model_starts_from_random_values(variables_of_ppn_voc, log_lines,
                                                             change):
  like = flatten_dict(variables_of_ppn_voc)
  path = next(path for path in like if path[1] == 'backbone' and path[-1] == 'kernel')
  if change == 'a further layer':
    like['params', 'backbone', 'conv2d_99', 'kernel'] = np.zeros((1, 1, 8, 8), np.float32)
  else:
    like[path] = np.zeros((*like[path].shape[:-1], 999), np.float32)
  assert initial_weights(unflatten_dict(like), (), weights=AUTO) is None
  assert len(log_lines) == 1 and 'training starts from random values' in log_lines[0]


def test_auto_leaves_the_backbone_to_its_file(tmp_path, log_lines):
  write_bundle(tmp_path / 'x', {'MobilenetV1/Conv2d_0/weights': np.ones((3, 3, 3, 8), np.float32)})
  like = {'params': {'backbone': {'conv2d_0': {'kernel': np.zeros((3, 3, 3, 8))}}}}
  found = initial_weights(like, (), weights=AUTO, backbone=str(tmp_path / 'x'))
  assert found.variables['params']['backbone']['conv2d_0']['kernel'].all() and not log_lines
