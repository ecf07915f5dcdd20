"""Reads the graph of a TensorFlow Lite file (.tflite), a flatbuffer, without TensorFlow.

The schema is tensorflow/compiler/mlir/lite/schema/schema.fbs; package `tflite` holds the classes
that the flatbuffers compiler makes of it.
"""

import dataclasses
import functools
import math
import pathlib
import struct
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.errors import InputError, install_command
from ppn_jax.weights.limits import Limit

MAGIC = b'TFL3'  # From byte 4.
# What reading a damaged flatbuffer can raise: offsets lead outside the file or to other types.
_DAMAGE = (struct.error, IndexError, ValueError, TypeError, AttributeError, KeyError, OverflowError,
           RecursionError, MemoryError)
_DTYPES = {'FLOAT32': np.float32, 'FLOAT16': np.float16, 'FLOAT64': np.float64, 'INT8': np.int8,
           'UINT8': np.uint8, 'INT16': np.int16, 'INT32': np.int32, 'INT64': np.int64}
_OPTIONS = {
    'CONV_2D': ('Conv2DOptions', {'stride': 'StrideH', 'stride_w': 'StrideW', 'padding': 'Padding',
                                  'dilation': 'DilationHFactor',
                                  'activation': 'FusedActivationFunction'}),
    'DEPTHWISE_CONV_2D': ('DepthwiseConv2DOptions', {
        'stride': 'StrideH', 'stride_w': 'StrideW', 'padding': 'Padding',
        'dilation': 'DilationHFactor', 'activation': 'FusedActivationFunction'}),
    'FULLY_CONNECTED': ('FullyConnectedOptions', {'activation': 'FusedActivationFunction'})}
_MOST_LABELS_BYTES = 1 << 20
_MOST_ARCHIVE_ENTRIES = 100


class Quantization(NamedTuple):
  """Maps integers to real values: scale * (integer - zero_point).

  Fields:
    scale: float64 [1], or [C] with one value per channel.
    zero_point: int64 of the same shape.
    axis: the axis of the channels.
  """
  scale: np.ndarray
  zero_point: np.ndarray
  axis: int


class Tensor(NamedTuple):
  """Tensor of a graph.

  Fields:
    name: name in the file.
    shape: its axes; -1 for one of any length.
    type: type in the schema, such as 'UINT8'.
    quantization: how integers stand for real values, None if they do not.
    data: bytes of a constant, None if the graph computes the tensor.
  """
  name: str
  shape: tuple[int, ...]
  type: str
  quantization: Quantization | None
  data: np.ndarray | None


class Operation(NamedTuple):
  """Operation of a graph.

  Fields:
    kind: its name in the schema, such as 'CONV_2D'; a custom operation's own name.
    inputs: numbers of tensors; -1 stands for an optional one that is absent.
    outputs: numbers of tensors.
    options: stride, padding ('SAME' or 'VALID'), dilation, and activation of a layer.
    custom: options of a custom operation, a flexbuffer.
  """
  kind: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  options: Mapping[str, Any]
  custom: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """Main graph of a TensorFlow Lite file.

  Attributes:
    path: path of the file, for messages.
    tensors: all tensors.
    operations: all operations, in the order in which they run.
    inputs: numbers of the tensors that the caller supplies.
    outputs: numbers of the tensors that the caller gets.
    attached: text files in the archive that metadata adds at the end of the file, by name.
  """
  path: str
  tensors: tuple[Tensor, ...]
  operations: tuple[Operation, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  attached: Mapping[str, str]

  @functools.cached_property
  def producers(self) -> dict[int, Operation]:
    """Operation that computes each tensor, by the number of the tensor."""
    return {number: op for op in self.operations for number in op.outputs}

  @functools.cached_property
  def consumers(self) -> dict[int, list[Operation]]:
    """Operations that read each tensor, by the number of the tensor."""
    found: dict[int, list[Operation]] = {}
    for op in self.operations:
      for number in op.inputs:
        found.setdefault(number, []).append(op)
    return found

  def is_constant(self, number: int) -> bool:
    """Returns whether a tensor is a constant, or one that an operation only dequantizes."""
    return self._stored(number) is not None

  def stored_type(self, number: int) -> str:
    """Returns the type that a constant is stored in, such as 'FLOAT16'."""
    stored = self._stored(number)
    return stored.type if stored else self.tensors[number].type

  def by_channel(self, number: int) -> bool:
    """Returns whether a constant has a scale for each channel."""
    stored = self._stored(number)
    return bool(stored and stored.quantization and stored.quantization.scale.size > 1)

  def constant(self, number: int) -> np.ndarray | None:
    """Returns a constant as float32, dequantized; None if the tensor is computed.

    Raises:
      InputError: If its type is unknown or its bytes do not fit its shape.
    """
    stored = self._stored(number)
    return None if stored is None else _dequantize(stored, self.path)

  def _stored(self, number: int) -> Tensor | None:
    """Returns the constant that a tensor stands for."""
    for _ in range(3):  # Float16 weights are behind one DEQUANTIZE.
      if not 0 <= number < len(self.tensors):
        return None
      if self.tensors[number].data is not None:
        return self.tensors[number]
      producer = self.producers.get(number)
      if producer is None or producer.kind not in ('DEQUANTIZE', 'CAST') or not producer.inputs:
        return None
      number = producer.inputs[0]
    return None


def read_tflite(path: str | pathlib.Path) -> Graph:
  """Reads the main graph of a .tflite file.

  Raises:
    InputError: If there is no such file, it is another one or damaged, or package `tflite` is not
      installed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'no TFLite file at {path}')
  content = path.read_bytes()
  if content[4:8] != MAGIC:
    what = 'empty' if not content else 'not a TFLite file: its bytes 5 to 8 are not TFL3'
    raise InputError(f'{path}: {what}')
  try:
    import tflite
  except ImportError as e:
    raise InputError(f"{path}: reading .tflite files needs package tflite; "
                     f"{install_command('tflite_import')}") from e
  try:
    return _graph(tflite, content, path)
  except InputError:
    raise
  except _DAMAGE as e:
    raise InputError(f'{path}: damaged or truncated: {" ".join(str(e).split())[:200]}') from e


def _graph(tflite: types.ModuleType, content: bytes, path: pathlib.Path) -> Graph:
  """Reads the first subgraph, which is the model; others are bodies of loops."""
  types_ = _names(tflite.TensorType)
  kinds, paddings = _names(tflite.BuiltinOperator), _names(tflite.Padding)
  activations = _names(tflite.ActivationFunctionType)
  model = tflite.Model.GetRootAs(content, 0)

  def count(length: int) -> range:
    if not 0 <= length <= len(content) // 4:  # Each entry of a vector takes 4 bytes or more.
      raise ValueError(f'a list of {length:,} entries')
    return range(length)

  if not model.SubgraphsLength():
    raise ValueError('it holds no graph')
  graph, limit = model.Subgraphs(0), Limit(str(path), len(content))

  def tensor(number: int) -> Tensor:
    found = graph.Tensors(number)
    name = (found.Name() or b'').decode('utf-8', 'replace')
    shape = tuple(int(found.Shape(i)) for i in count(found.ShapeLength()))
    # Axes of any length have length 1 in the shape, and -1 in its signature.
    signature = tuple(int(found.ShapeSignature(i)) for i in count(found.ShapeSignatureLength()))
    kind = types_.get(found.Type(), f'type {found.Type()}')
    data = _data(model, found, content)
    if data is None and len(signature) == len(shape):
      shape = signature
    if data is not None and kind in _DTYPES:
      limit.claim(name, shape, np.dtype(_DTYPES[kind]).itemsize)
      if found.Sparsity() is not None:
        kind = f'sparse {kind}'
    return Tensor(name, shape, kind, _quantization(found.Quantization(), count), data)

  def operation(number: int) -> Operation:
    found = graph.Operators(number)
    code = model.OperatorCodes(found.OpcodeIndex())
    # Files from before 2020 have only the first, of one byte.
    builtin = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
    kind = kinds.get(builtin, f'operation {builtin}')
    custom = b''
    if kind == 'CUSTOM':
      kind = (code.CustomCode() or b'').decode('utf-8', 'replace')
      custom = bytes(found.CustomOptions(i) for i in count(found.CustomOptionsLength()))
    options = {}
    if kind in _OPTIONS and found.BuiltinOptions() is not None:
      table, fields = _OPTIONS[kind]
      options_of = getattr(tflite, table)()
      options_of.Init(found.BuiltinOptions().Bytes, found.BuiltinOptions().Pos)
      options = {name: getattr(options_of, field)() for name, field in fields.items()}
      options['activation'] = activations[options['activation']]
      if 'padding' in options:
        options['padding'] = paddings[options['padding']]
    return Operation(kind, _integers(found.Inputs, count(found.InputsLength())),
                     _integers(found.Outputs, count(found.OutputsLength())), options, custom)

  tensors = tuple(map(tensor, count(graph.TensorsLength())))
  operations = tuple(map(operation, count(graph.OperatorsLength())))
  for op in operations:
    if not all(-1 <= i < len(tensors) for i in (*op.inputs, *op.outputs)):
      raise ValueError(f'{op.kind} has a tensor that does not exist')
  return Graph(str(path), tensors, operations,
               _integers(graph.Inputs, count(graph.InputsLength())),
               _integers(graph.Outputs, count(graph.OutputsLength())), _attached(path))


def _names(enumeration: Any) -> dict[int, str]:
  """Returns the names of an enumeration of the schema, by value."""
  return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _integers(entry: Callable[[int], int], numbers: range) -> tuple[int, ...]:
  return tuple(int(entry(i)) for i in numbers)


def _data(model: Any, tensor: Any, content: bytes) -> np.ndarray | None:
  """Returns the bytes of a constant, None for a tensor that is computed."""
  number = tensor.Buffer()
  if not number or number >= model.BuffersLength():
    return None
  buffer = model.Buffers(number)
  if buffer.DataLength():
    return buffer.DataAsNumpy()
  # Files of more than 2 GB keep their constants behind the flatbuffer.
  start, size = (getattr(buffer, field, int)() for field in ('Offset', 'Size'))
  return np.frombuffer(content, np.uint8, size, start) if size and start > 1 else None


def _quantization(found: Any, count: Callable[[int], range]) -> Quantization | None:
  if found is None or not found.ScaleLength():
    return None
  scale = np.array([found.Scale(i) for i in count(found.ScaleLength())], np.float64)
  zero = np.array([found.ZeroPoint(i) for i in count(found.ZeroPointLength())], np.int64)
  zero = zero if zero.size else np.zeros(1, np.int64)
  return Quantization(scale, np.broadcast_to(zero, scale.shape) if zero.size == 1 else zero,
                      int(found.QuantizedDimension()))


def _dequantize(tensor: Tensor, path: str) -> np.ndarray:
  """Returns the values of a constant as float32."""
  if tensor.type not in _DTYPES:
    raise InputError(f'{path}: {tensor.name} is of type {tensor.type}, which cannot be read; '
                     f'legal: {", ".join(sorted(_DTYPES)).lower()}')
  dtype = np.dtype(_DTYPES[tensor.type]).newbyteorder('<')
  if min(tensor.shape, default=0) < 0 or (
      len(tensor.data) != math.prod(tensor.shape) * dtype.itemsize):
    raise InputError(f'{path}: damaged: {tensor.name} has {len(tensor.data)} bytes for '
                     f'{tensor.type} {list(tensor.shape)}')
  values = np.frombuffer(np.ascontiguousarray(tensor.data), dtype).reshape(tensor.shape)
  quantization = tensor.quantization
  if quantization is None or dtype.kind == 'f':
    with np.errstate(over='ignore'):
      return values.astype(np.float32)
  scale, zero, axis = quantization
  if scale.shape != zero.shape or (scale.size > 1 and (
      not 0 <= axis < values.ndim or values.shape[axis] != scale.size)):
    raise InputError(f'{path}: damaged: {tensor.name} {list(tensor.shape)} has {scale.size} scales '
                     f'and {zero.size} zero points')
  shape = [1] * values.ndim
  if scale.size > 1:
    shape[axis] = scale.size
  # Rounded once, to float32.
  return ((values.astype(np.float64) - zero.reshape(shape)) * scale.reshape(shape)
          ).astype(np.float32)


def _attached(path: pathlib.Path) -> dict[str, str]:
  """Returns the text files in the archive at the end of a file; {} if there is none."""
  try:
    with zipfile.ZipFile(path) as archive:
      # Python unpacks other formats without a limit.
      chosen = [entry for entry in archive.infolist()[:_MOST_ARCHIVE_ENTRIES]
                if entry.filename.endswith(('.txt', '.json'))
                and entry.file_size <= _MOST_LABELS_BYTES
                and entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
      return {entry.filename: archive.read(entry).decode('utf-8-sig', 'replace')
              for entry in chosen}
  except (zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError, EOFError, OSError,
          RuntimeError, ValueError):
    return {}  # Metadata is optional, and so is that it can be read.


def custom_options(operation: Operation) -> dict[str, Any]:
  """Returns the options of a custom operation by name; {} if they cannot be read."""
  from flatbuffers import flexbuffers
  try:
    found = flexbuffers.Loads(operation.custom) if operation.custom else {}
  except _DAMAGE:
    return {}
  return found if isinstance(found, dict) else {}
