"""TensorFlow's protocol buffers: messages that tensorboardX lacks, and element types as NumPy's."""

import math

import ml_dtypes
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboardX.proto import tensor_shape_pb2, versions_pb2
from tensorboardX.proto.types_pb2 import DataType

DTYPES = {
    'DT_FLOAT': np.float32, 'DT_DOUBLE': np.float64, 'DT_HALF': np.float16,
    'DT_BFLOAT16': ml_dtypes.bfloat16, 'DT_INT8': np.int8, 'DT_INT16': np.int16,
    'DT_INT32': np.int32, 'DT_INT64': np.int64, 'DT_UINT8': np.uint8, 'DT_UINT16': np.uint16,
    'DT_BOOL': np.bool_}

_FIELD = descriptor_pb2.FieldDescriptorProto
_SHAPE = '.tensorboardX.TensorShapeProto'
_VERSION = '.tensorboardX.VersionDef'

# Message -> {field: (number, type, repeated)}; a type with a dot is a message's or an enum's name.
# From tensor_bundle.proto and trackable_object_graph.proto in tensorflow/core/protobuf, and from
# python/training/checkpoint_state.proto. Other fields are left out.
_MESSAGES = {
    'BundleHeaderProto': {
        'num_shards': (1, _FIELD.TYPE_INT32, False), 'endianness': (2, _FIELD.TYPE_INT32, False),
        'version': (3, _VERSION, False)},
    'BundleEntryProto': {
        'dtype': (1, _FIELD.TYPE_INT32, False), 'shape': (2, _SHAPE, False),
        'shard_id': (3, _FIELD.TYPE_INT32, False), 'offset': (4, _FIELD.TYPE_INT64, False),
        'size': (5, _FIELD.TYPE_INT64, False), 'crc32c': (6, _FIELD.TYPE_FIXED32, False),
        'slices': (7, _FIELD.TYPE_BYTES, True)},
    'CheckpointState': {
        'model_checkpoint_path': (1, _FIELD.TYPE_STRING, False),
        'all_model_checkpoint_paths': (2, _FIELD.TYPE_STRING, True)},
    'SerializedTensor': {
        'name': (1, _FIELD.TYPE_STRING, False), 'full_name': (2, _FIELD.TYPE_STRING, False),
        'checkpoint_key': (3, _FIELD.TYPE_STRING, False)},
    'TrackableObject': {'attributes': (2, '.ppn_jax.weights.SerializedTensor', True)},
    'TrackableObjectGraph': {'nodes': (1, '.ppn_jax.weights.TrackableObject', True)},
}


def _define() -> dict[str, type]:
  """Returns a class for each of `_MESSAGES`, made at run time."""
  file = descriptor_pb2.FileDescriptorProto(
      name='ppn_jax/weights.proto', package='ppn_jax.weights', syntax='proto3',
      dependency=[m.DESCRIPTOR.name for m in (tensor_shape_pb2, versions_pb2)])
  for message, fields in _MESSAGES.items():
    described = file.message_type.add(name=message)
    for name, (number, kind, repeated) in fields.items():
      field = described.field.add(
          name=name, number=number,
          label=_FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL)
      if isinstance(kind, str):
        field.type_name, field.type = kind, _FIELD.TYPE_MESSAGE
      else:
        field.type = kind
  pool = descriptor_pool.Default()
  pool.Add(file)
  return {message: message_factory.GetMessageClass(
      pool.FindMessageTypeByName(f'ppn_jax.weights.{message}')) for message in _MESSAGES}


_CLASSES = _define()
BundleHeader = _CLASSES['BundleHeaderProto']
BundleEntry = _CLASSES['BundleEntryProto']
CheckpointState = _CLASSES['CheckpointState']
TrackableObjectGraph = _CLASSES['TrackableObjectGraph']


def type_name(number: int) -> str:
  """Returns the name of an element type, such as 'DT_FLOAT' for 1, or its number if unknown."""
  return DataType.Name(number) if number in DataType.values() else f'DataType {number}'


def shape_of(proto: object) -> tuple[int, ...] | None:
  """Returns the shape in a TensorShapeProto, or None if it is not fully known."""
  shape = tuple(dim.size for dim in proto.dim)
  return None if proto.unknown_rank or min(shape, default=0) < 0 else shape


def num_bytes(shape: tuple[int, ...], dtype: type) -> int:
  """Returns the size of an array in bytes, as a Python integer, which cannot overflow."""
  return math.prod(shape) * np.dtype(dtype).itemsize
