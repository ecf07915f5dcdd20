import jax.numpy as jnp
import numpy as np
import pytest
from foreign import keras_mobilenet, write_bundle, write_keras_2

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState
from ppn_jax.weights.initial import initial_weights, with_weights


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
