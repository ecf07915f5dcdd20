"""Element types of TensorFlow tensors as NumPy's."""

import math

import ml_dtypes
import numpy as np
from tensorboardX.proto.types_pb2 import DataType

DTYPES = {
    'DT_FLOAT': np.float32, 'DT_DOUBLE': np.float64, 'DT_HALF': np.float16,
    'DT_BFLOAT16': ml_dtypes.bfloat16, 'DT_INT8': np.int8, 'DT_INT16': np.int16,
    'DT_INT32': np.int32, 'DT_INT64': np.int64, 'DT_UINT8': np.uint8, 'DT_UINT16': np.uint16,
    'DT_BOOL': np.bool_}


def type_name(number: int) -> str:
  """'DT_FLOAT' of 1; the number itself for one that is not known."""
  return DataType.Name(number) if number in DataType.values() else f'DataType {number}'


def shape_of(proto: object) -> tuple[int, ...] | None:
  """The shape of a TensorShapeProto, or None if it is not wholly known."""
  shape = tuple(dim.size for dim in proto.dim)
  return None if proto.unknown_rank or min(shape, default=0) < 0 else shape


def num_bytes(shape: tuple[int, ...], dtype: type) -> int:
  """Bytes of such an array; of any length, as Python's integers are."""
  return math.prod(shape) * np.dtype(dtype).itemsize
