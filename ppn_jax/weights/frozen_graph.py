"""Frozen TensorFlow graphs: a GraphDef in which constants stand in for the variables.

Freezing keeps a variable's name for its constant, so that names are those of the checkpoint.
"""

import math
import pathlib

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.tensor_pb2 import TensorProto

from ppn_jax.errors import InputError
from ppn_jax.weights.dtypes import DTYPES, num_bytes, shape_of, type_name
from ppn_jax.weights.limits import Limit

# Where TensorProto has the values that are not in `tensor_content`. Half floats stand in integers.
_VALUES = {
    'DT_FLOAT': 'float_val', 'DT_DOUBLE': 'double_val', 'DT_HALF': 'half_val',
    'DT_BFLOAT16': 'half_val', 'DT_INT64': 'int64_val', 'DT_BOOL': 'bool_val',
    **{f'DT_{kind}': 'int_val' for kind in ('INT8', 'INT16', 'INT32', 'UINT8', 'UINT16')}}


def read_frozen_graph(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Every numeric constant of a GraphDef file, by the name of its node.

  Raises:
    InputError: no such file, no graph, or a graph without constants.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'no frozen graph at {path}')
  if path.name == 'saved_model.pb':
    raise InputError(f'{path}: a SavedModel, not a frozen graph; give its variables/variables')
  try:
    graph = GraphDef.FromString(path.read_bytes())
  except DecodeError as e:
    raise InputError(f'{path}: not a frozen graph, or cut short: {e}') from e
  constants = {node.name: node.attr['value'].tensor for node in graph.node
               if node.op == 'Const' and 'value' in node.attr}
  if not constants:
    kind = f'its {len(graph.node)} nodes have no constants' if graph.node else 'it has no nodes'
    raise InputError(f'{path}: not a frozen graph: {kind}')
  numeric = {name: tensor for name, tensor in constants.items()
             if type_name(tensor.dtype) in DTYPES}
  limit = Limit(str(path), path.stat().st_size)
  for name, tensor in numeric.items():
    shape = shape_of(tensor.tensor_shape)
    if shape is None:
      raise InputError(f'{path}: {name}: damaged: a constant of no known shape')
    limit.claim(name, shape, np.dtype(DTYPES[type_name(tensor.dtype)]).itemsize)
  return {name: _value(tensor, f'{path}: {name}') for name, tensor in numeric.items()}


def _value(tensor: TensorProto, what: str) -> np.ndarray:
  """The array that a TensorProto describes (tensorflow/core/framework/tensor.proto)."""
  kind, shape = type_name(tensor.dtype), shape_of(tensor.tensor_shape)
  dtype = DTYPES[kind]
  if tensor.tensor_content:
    if len(tensor.tensor_content) != num_bytes(shape, dtype):
      raise InputError(f'{what}: damaged: {len(tensor.tensor_content)} bytes for {kind} '
                       f'{list(shape)}')
    return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
  values = _listed(np.array(getattr(tensor, _VALUES[kind])), dtype)
  count = math.prod(shape)
  if len(values) > count or (count and not len(values)):
    raise InputError(f'{what}: damaged: {len(values)} values for {kind} {list(shape)}')
  if len(values) < 2:  # A view: graphs fill large arrays with one value.
    return np.broadcast_to(values[0] if count else np.zeros((), dtype), shape)
  # What is left out at the end repeats the last value.
  return np.pad(values, (0, count - len(values)), mode='edge').reshape(shape)


def _listed(values: np.ndarray, dtype: type) -> np.ndarray:
  if dtype in (np.float16, ml_dtypes.bfloat16):
    return values.astype(np.uint16).view(dtype)
  return values.astype(dtype)
