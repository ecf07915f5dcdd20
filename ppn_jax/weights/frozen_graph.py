"""Reads frozen TensorFlow graphs: GraphDefs in which constants replace the variables.

A constant keeps the name of its variable, so names are those of the checkpoint.
"""

import math
import pathlib

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.tensor_pb2 import TensorProto

from ppn_jax.errors import InputError
from ppn_jax.weights.limits import Limit
from ppn_jax.weights.tf_protos import DTYPES, num_bytes, shape_of, type_name

# Field of TensorProto with the values of a type, if they are not in `tensor_content`. 16-bit floats
# are stored as the integers of their bits.
_VALUES = {
    'DT_FLOAT': 'float_val', 'DT_DOUBLE': 'double_val', 'DT_HALF': 'half_val',
    'DT_BFLOAT16': 'half_val', 'DT_INT64': 'int64_val', 'DT_BOOL': 'bool_val',
    **{f'DT_{kind}': 'int_val' for kind in ('INT8', 'INT16', 'INT32', 'UINT8', 'UINT16')}}


def read_frozen_graph(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all numeric constants of a GraphDef file, by node name.

  Raises:
    InputError: If there is no such file, or it is not a graph or has no constants.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'no frozen graph at {path}')
  if path.name == 'saved_model.pb':
    raise InputError(f'{path}: a SavedModel, not a frozen graph; give the path of its '
                     'variables/variables')
  try:
    graph = GraphDef.FromString(path.read_bytes())
  except DecodeError as e:
    raise InputError(f'{path}: not a frozen graph, or truncated: {e}') from e
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
      raise InputError(f'{path}: {name}: damaged: a constant of unknown shape')
    limit.claim(name, shape, np.dtype(DTYPES[type_name(tensor.dtype)]).itemsize)
  return {name: _value(tensor, f'{path}: {name}') for name, tensor in numeric.items()}


def _value(tensor: TensorProto, what: str) -> np.ndarray:
  """Returns the array in a TensorProto (tensorflow/core/framework/tensor.proto)."""
  kind, shape = type_name(tensor.dtype), shape_of(tensor.tensor_shape)
  dtype = DTYPES[kind]
  if tensor.tensor_content:
    if len(tensor.tensor_content) != num_bytes(shape, dtype):
      raise InputError(f'{what}: damaged: {len(tensor.tensor_content)} bytes for {kind} '
                       f'{list(shape)}')
    return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
  values = _cast(np.array(getattr(tensor, _VALUES[kind])), dtype)
  count = math.prod(shape)
  if len(values) > count or (count and not len(values)):
    raise InputError(f'{what}: damaged: {len(values)} values for {kind} {list(shape)}')
  if len(values) < 2:  # A view takes no memory, and graphs fill large arrays with one value.
    return np.broadcast_to(values[0] if count else np.zeros((), dtype), shape)
  # Values that are missing at the end repeat the last one.
  return np.pad(values, (0, count - len(values)), mode='edge').reshape(shape)


def _cast(values: np.ndarray, dtype: type) -> np.ndarray:
  """Converts values from a field of TensorProto to `dtype`."""
  if dtype in (np.float16, ml_dtypes.bfloat16):
    return values.astype(np.uint16).view(dtype)
  return values.astype(dtype)
