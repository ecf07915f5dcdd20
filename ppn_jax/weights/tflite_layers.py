"""Finds the layers of a network in the graph of a TensorFlow Lite file."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.errors import InputError
from ppn_jax.weights.tflite_file import Graph, Operation

_LAYERS = ('CONV_2D', 'DEPTHWISE_CONV_2D', 'FULLY_CONNECTED')
# Operations whose output stands for the same values as their first input.
_SAME_VALUES = ('QUANTIZE', 'DEQUANTIZE', 'CAST', 'RESHAPE', 'SQUEEZE', 'EXPAND_DIMS', 'RELU6',
                'RELU', 'LOGISTIC', 'SOFTMAX')
_ARITHMETIC = {'MUL': np.multiply, 'DIV': np.divide, 'ADD': np.add, 'SUB': np.subtract}
_LARGEST = 6.05  # Of the values of a quantized ReLU6, whose range is rounded.


class Layer(NamedTuple):
  """Convolution or fully connected layer.

  Fields:
    operation: the operation.
    kind: 'conv', 'depthwise' or 'dense'.
    source: number of the tensor that it reads, before padding and changes of type.
    output: number of its output, before the activation if that is an operation of its own.
    shape: of the kernel, [out, height, width, in], or [1, height, width, channels] if depthwise.
    stride: 1 or 2, or another number.
    activation: 'RELU6', 'NONE' or another name in the schema.
    plain: whether its padding is SAME, both strides are equal, and it is not dilated.
  """
  operation: Operation
  kind: str
  source: int
  output: int
  shape: tuple[int, ...]
  stride: int
  activation: str
  plain: bool

  @property
  def side(self) -> int:
    """Side of the kernel in pixels."""
    return self.shape[1] if len(self.shape) == 4 else 1

  @property
  def features(self) -> int:
    """Number of output channels."""
    return self.shape[3] if self.kind == 'depthwise' else self.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerGraph:
  """Layers of a graph by what they read.

  Attributes:
    graph: the graph.
  """
  graph: Graph

  @functools.cached_property
  def layers(self) -> tuple[Layer, ...]:
    """All layers whose kernel is a constant, in the order in which they run."""
    return tuple(filter(None, map(self._layer, self.graph.operations)))

  @functools.cached_property
  def readers(self) -> dict[int, list[Layer]]:
    """Layers that read each tensor."""
    found: dict[int, list[Layer]] = {}
    for layer in self.layers:
      found.setdefault(layer.source, []).append(layer)
    return found

  @functools.cached_property
  def makers(self) -> dict[int, Layer]:
    """Layer that computes each tensor."""
    return {layer.output: layer for layer in self.layers}

  def origin(self, number: int) -> int:
    """Follows a tensor back to the one that it only reshapes, activates, pads or converts."""
    for _ in range(len(self.graph.operations)):
      op = self.graph.producers.get(number)
      if op is None or not op.inputs or op.kind not in (*_SAME_VALUES, 'PAD'):
        break
      number = op.inputs[0]
    return number

  def activations(self, number: int) -> set[str]:
    """Returns the kinds of the operations between `origin(number)` and a tensor."""
    found: set[str] = set()
    for _ in range(len(self.graph.operations)):
      op = self.graph.producers.get(number)
      if op is None or not op.inputs or op.kind not in _SAME_VALUES:
        break
      found.add(op.kind)
      number = op.inputs[0]
    return found

  def kernel(self, layer: Layer) -> np.ndarray:
    """Returns a kernel as float32 in slim's layout: [h, w, in, out]; depthwise [h, w, in, 1]."""
    value = self.graph.constant(layer.operation.inputs[1])
    if layer.kind == 'dense':
      return np.ascontiguousarray(value.T[None, None])
    return np.ascontiguousarray(value.transpose(1, 2, 3, 0))

  def bias(self, layer: Layer) -> np.ndarray:
    """Returns a bias, zeros if the layer has none.

    Raises:
      InputError: If it does not have a value for each output channel.
    """
    inputs = layer.operation.inputs
    value = self.graph.constant(inputs[2]) if len(inputs) > 2 and inputs[2] >= 0 else None
    if value is None:
      return np.zeros(layer.features, np.float32)
    if value.shape != (layer.features,):
      raise InputError(f'{self.graph.path}: damaged: the bias of {self.name(layer)} is '
                       f'{list(value.shape)}, but the layer has {layer.features} channels')
    return value

  def name(self, layer: Layer) -> str:
    """Returns the name of a layer's output, without others that the converter has joined to it."""
    return self.graph.tensors[layer.output].name.partition(';')[0]

  def pixel_range(self, layer: Layer) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the values that the first layer reads for pixels of 0 and of 255.

    A float input without arithmetic is taken to be -1 to 1, which the file cannot tell.

    Returns:
      Two scalars or arrays of one value per channel; None if other operations come before.
    """
    arithmetic, number = [], layer.operation.inputs[0]
    for _ in range(len(self.graph.operations)):
      op = self.graph.producers.get(number)
      if op is None:
        break
      if op.kind in _ARITHMETIC and len(op.inputs) == 2:
        constants = [self.graph.constant(i) for i in op.inputs]
        if (constants[0] is None) == (constants[1] is None):
          return None
        arithmetic.append((_ARITHMETIC[op.kind], *constants))
        number = op.inputs[0 if constants[0] is None else 1]
      elif op.kind in ('QUANTIZE', 'DEQUANTIZE', 'CAST', 'PAD', 'RESHAPE') and op.inputs:
        number = op.inputs[0]
      else:
        return None
    if number not in self.graph.inputs:
      return None
    tensor = self.graph.tensors[number]
    quantization = tensor.quantization
    if quantization is not None and tensor.type in ('UINT8', 'INT8'):
      least = 0 if tensor.type == 'UINT8' else -128
      ends = [(least + pixel - quantization.zero_point[0]) * quantization.scale[0]
              for pixel in (0, 255)]
    else:
      ends = [0.0, 255.0] if arithmetic or tensor.type == 'UINT8' else [-1.0, 1.0]
    for function, first, second in reversed(arithmetic):
      ends = [function(end if first is None else first, end if second is None else second)
              for end in ends]
    low, high = (np.asarray(end, np.float64).reshape(-1) for end in ends)
    if low.size not in (1, 3) or not np.isfinite([*low, *high]).all():
      return None
    return low, high

  def _layer(self, op: Operation) -> Layer | None:
    if op.kind not in _LAYERS or len(op.inputs) < 2 or not op.outputs:
      return None
    weights = op.inputs[1]
    if not self.graph.is_constant(weights):
      return None
    shape, kind = self.graph.tensors[weights].shape, {
        'CONV_2D': 'conv', 'DEPTHWISE_CONV_2D': 'depthwise'}.get(op.kind, 'dense')
    if len(shape) != (2 if kind == 'dense' else 4) or min(shape) < 1:
      return None
    options, output = op.options, op.outputs[0]
    stride = options.get('stride', 1)
    return Layer(op, kind, self.origin(op.inputs[0]), output, shape, stride,
                 self._activation(op, output), kind == 'dense' or (
                     options.get('stride_w') == stride and options.get('dilation', 1) == 1
                     and self._is_same_padding(op, shape, stride)))

  def _is_same_padding(self, op: Operation, shape: Sequence[int], stride: int) -> bool:
    """Returns whether a layer's padding equals SAME; Keras pads one row and column at the end."""
    before = self.graph.producers.get(op.inputs[0])
    padded = before is not None and before.kind == 'PAD'
    if op.options.get('padding') == 'SAME':
      return not padded
    if not padded:
      return tuple(shape[1:3]) == (1, 1)
    amounts = self.graph.constant(before.inputs[1]) if len(before.inputs) > 1 else None
    return (stride == 2 and tuple(shape[1:3]) == (3, 3) and amounts is not None
            and amounts.tolist() == [[0, 0], [0, 1], [0, 1], [0, 0]])

  def _activation(self, op: Operation, output: int) -> str:
    """Returns the activation of a layer, whether fused, an operation, or a range of integers."""
    activation = op.options.get('activation', 'NONE')
    after = {reader.kind for reader in self.graph.consumers.get(output, ())}
    if activation == 'NONE':
      for name in ('RELU6', 'RELU', 'LOGISTIC', 'HARD_SWISH', 'LEAKY_RELU', 'PRELU'):
        activation = name if name in after else activation
    tensor = self.graph.tensors[output]
    if activation in ('NONE', 'RELU') and tensor.quantization is not None and (
        tensor.type in ('UINT8', 'INT8')):
      # Quantized to 0 to 6, the clamping of the integers is the activation.
      least = 0 if tensor.type == 'UINT8' else -128
      low, high = ((least + end - tensor.quantization.zero_point[0]) * tensor.quantization.scale[0]
                   for end in (0, 255))
      if low == 0 and high <= _LARGEST:
        return 'RELU6'
    return activation


def sources_of(layers: LayerGraph, number: int) -> Iterator[int]:
  """Yields the tensors whose concatenation a tensor is, in order; itself if it is none."""
  number = layers.origin(number)
  op = layers.graph.producers.get(number)
  if op is not None and op.kind in ('CONCATENATION', 'PACK'):
    yield from (layers.origin(i) for i in op.inputs)
  else:
    yield number
