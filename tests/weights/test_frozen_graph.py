import random

import ml_dtypes
import numpy as np
import pytest
from foreign import write_graph
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.types_pb2 import DataType

from ppn_jax.errors import InputError
from ppn_jax.weights.frozen_graph import read_frozen_graph

TENSORS = {'a/weights': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
           'a/half': np.float16([1, 2.5]), 'a/step': np.int64([7]),
           'a/bfloat16': np.array([1.5, 3], ml_dtypes.bfloat16), 'a/double': np.float64([[0.1]])}


def graph_of(tmp_path, shape, kind='DT_FLOAT', **values):
  """Writes a graph with one constant 'x' whose values are in typed fields."""
  graph = GraphDef()
  proto = graph.node.add(name='x', op='Const').attr['value'].tensor
  proto.dtype = DataType.Value(kind)
  for side in shape:
    proto.tensor_shape.dim.add(size=side)
  for field, value in values.items():
    getattr(proto, field).extend(value)
  (tmp_path / 'g.pb').write_bytes(graph.SerializeToString())
  return tmp_path / 'g.pb'


def test_contents(tmp_path):
  write_graph(tmp_path / 'g.pb', TENSORS)
  found = read_frozen_graph(tmp_path / 'g.pb')
  assert found.keys() == TENSORS.keys()
  for name, value in TENSORS.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize('shape, kind, values, expected', [
    ([2, 2], 'DT_FLOAT', {'float_val': [1, 2, 3, 4]}, np.float32([[1, 2], [3, 4]])),
    ([2, 3], 'DT_FLOAT', {'float_val': [1, 2, 3]}, np.float32([[1, 2, 3], [3, 3, 3]])),
    ([5], 'DT_DOUBLE', {'double_val': [0.5]}, np.full(5, 0.5)),
    ([], 'DT_FLOAT', {'float_val': [7]}, np.float32(7)),
    ([0, 3], 'DT_FLOAT', {}, np.zeros((0, 3), np.float32)),
    ([2], 'DT_HALF', {'half_val': [0x3c00, 0xc000]}, np.float16([1, -2])),
    ([2], 'DT_BFLOAT16', {'half_val': [0x3f80]}, np.array([1, 1], ml_dtypes.bfloat16)),
    ([2], 'DT_INT32', {'int_val': [-3, 4]}, np.int32([-3, 4])),
    ([1], 'DT_INT64', {'int64_val': [2**40]}, np.int64([2**40])),
    ([2], 'DT_BOOL', {'bool_val': [True]}, np.array([True, True])),
])
def test_values_one_by_one(tmp_path, shape, kind, values, expected):
  found = read_frozen_graph(graph_of(tmp_path, shape, kind, **values))['x']
  assert found.dtype == expected.dtype and found.shape == expected.shape
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('shape, values, message', [
    ([2], {'float_val': [1, 2, 3]}, '3 values'), ([2], {}, '0 values'),
    ([-1], {'float_val': [1]}, 'of unknown shape'),
    ([2**40, 2**40], {'float_val': [1]}, 'damaged')])
def test_values_that_do_not_fit(tmp_path, shape, values, message):
  with pytest.raises(InputError, match=message):
    read_frozen_graph(graph_of(tmp_path, shape, **values))


@pytest.mark.parametrize('name, content, message', [
    ('g.pb', b'', 'it has no nodes'), ('g.pb', b'# a text file\n' * 9, 'not a frozen graph'),
    ('g.pb', GraphDef(node=[{'name': 'x', 'op': 'Relu'}]).SerializeToString(), 'no constants'),
    ('saved_model.pb', b'', 'a SavedModel'), ('g.pb', None, 'no frozen graph at')])
def test_not_a_frozen_graph(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    read_frozen_graph(tmp_path / name)


def test_damage_is_an_input_error_or_another_value(tmp_path):
  """Without a checksum, damage may go unnoticed, but it must not raise anything else."""
  path = tmp_path / 'g.pb'
  write_graph(path, TENSORS)
  whole, choose = path.read_bytes(), random.Random(0)
  changed = [whole[:length] for length in range(0, len(whole), 3)]
  for at in range(len(whole)):
    changed.append(whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1:])
  rejected = 0
  for content in changed:
    path.write_bytes(content)
    try:
      read_frozen_graph(path)
    except InputError:
      rejected += 1
  assert rejected > len(changed) / 4
