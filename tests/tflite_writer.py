"""Writer of small TensorFlow Lite files: MobileNet-v1, SSD, and pieces of other networks.

Layouts were compared once with files of TensorFlow 2.21's converter.
"""

import pathlib
import zipfile

import flatbuffers
import numpy as np
import tflite
from flatbuffers import flexbuffers

from ppn_jax.models.mobilenet_v1 import BLOCKS, STEM

TYPES = {'FLOAT32': np.float32, 'FLOAT16': np.float16, 'UINT8': np.uint8, 'INT8': np.int8,
         'INT32': np.int32}
OPTIONS = {'CONV_2D': ('Conv2DOptions', 'Conv2DOptions'),
           'DEPTHWISE_CONV_2D': ('DepthwiseConv2DOptions', 'DepthwiseConv2DOptions'),
           'FULLY_CONNECTED': ('FullyConnectedOptions', 'FullyConnectedOptions')}


class TFLiteWriter:
  """Collects tensors and operations of one graph.

  Attributes:
    expected: float32 kernels and biases of the layers, in slim's layout, by the name that was given
      to `layer`.
  """

  def __init__(self, weights='UINT8', seed=0):
    self.weights, self.rng, self.expected = weights, np.random.default_rng(seed), {}
    self._tensors, self._operations, self._labels = [], [], {}

  def tensor(self, name, shape, type='FLOAT32', data=None, scale=(), zero=(), axis=0):
    self._tensors.append((name, shape, type, data, np.atleast_1d(scale), np.atleast_1d(zero), axis))
    return len(self._tensors) - 1

  def operation(self, kind, inputs, outputs, custom=b'', **options):
    self._operations.append((kind, inputs, outputs, options, custom))
    return outputs[0]

  def activation(self, name, shape, low=0.0, high=6.0):
    """Adds a computed tensor, quantized if the weights are integers."""
    if self.weights not in ('UINT8', 'INT8'):
      return self.tensor(name, shape)
    scale = (high - low) / 255
    zero = round(-low / scale) - (128 if self.weights == 'INT8' else 0)
    return self.tensor(name, shape, self.weights, scale=scale, zero=zero)

  def constant(self, name, values, axis=None):
    """Adds a constant in the type of the weights; returns its number and its float32 values."""
    kind, values = self.weights, np.asarray(values, np.float32)
    if kind == 'FLOAT32':
      return self.tensor(name, values.shape, kind, values), values
    if kind == 'FLOAT16':
      half = self.tensor(f'{name}_half', values.shape, kind, values.astype(np.float16))
      return self.operation('DEQUANTIZE', [half], [self.tensor(name, values.shape)]), values.astype(
          np.float16).astype(np.float32)
    if kind == 'INT8' and axis is not None:
      others = tuple(i for i in range(values.ndim) if i != axis)
      scale = np.float32(np.abs(values).max(others) / 127 + 1e-6)
      shape = [1] * values.ndim
      shape[axis] = -1
      integers = np.round(values / scale.reshape(shape)).astype(np.int8)
      return (self.tensor(name, values.shape, kind, integers, scale, np.zeros(len(scale)), axis),
              (integers * scale.reshape(shape).astype(np.float64)).astype(np.float32))
    low, high = values.min(initial=0), values.max(initial=0)
    scale, offset = np.float32((high - low) / 255 + 1e-6), 128 if kind == 'INT8' else 0
    zero = round(-low / float(scale)) - offset
    integers = np.clip(np.round(values / scale) + zero, -offset, 255 - offset).astype(TYPES[kind])
    return (self.tensor(name, values.shape, kind, integers, scale, zero),
            ((integers.astype(np.float64) - zero) * scale).astype(np.float32))

  def bias(self, name, values):
    values = np.asarray(values, np.float32)
    if self.weights not in ('UINT8', 'INT8'):
      number, values = self.constant(name, values)
      return number, values
    scale = np.float32(1e-4)
    integers = np.round(values / scale).astype(np.int32)
    return (self.tensor(name, values.shape, 'INT32', integers, scale, 0),
            (integers * float(scale)).astype(np.float32))

  def layer(self, key, source, features, *, side=1, stride=1, depthwise=False, name='',
            activation='RELU6', padding='SAME', tensor=None, high=6.0, low=0.0):
    """Adds a convolution with random weights; returns its output.

    Args:
      key: scope of its weights in `expected`.
      source: number of the tensor that it reads.
      name: what its tensors are called.
    """
    _, rows, columns, depth = self._tensors[source][1]
    shape = (1, side, side, depth) if depthwise else (features, side, side, depth)
    features = depth if depthwise else features
    kernel, values = self.constant(f'{name}/kernel', self.rng.normal(0, 0.2, shape),
                                   3 if depthwise else 0)
    bias, offsets = self.bias(f'{name}/bias', self.rng.normal(0, 0.2, features))
    leaf = 'depthwise_weights' if depthwise else 'weights'
    self.expected |= {f'{key}/{leaf}': values.transpose(1, 2, 3, 0), f'{key}/biases': offsets}
    out = (1, -(-rows // stride), -(-columns // stride), features)
    output = self.activation(f'{name}/out', out, low, high)
    return self.operation('DEPTHWISE_CONV_2D' if depthwise else 'CONV_2D', [source, kernel, bias],
                          [output], stride=stride, activation=activation, padding=padding)

  def image(self, size, low=-1.0, high=1.0):
    return self.activation('image', (1, size, size, 3), low, high)

  def write(self, path, inputs, outputs, labels=None):
    """Writes the file, with `labels` (text by file name) in an archive at its end."""
    b = flatbuffers.Builder(1 << 16)
    b.ForceDefaults(True)
    buffers, tensors, codes = [b''], [], []
    for _, _, _, data, *_ in self._tensors:
      if data is not None:
        buffers.append(np.ascontiguousarray(data).tobytes())
    made = []
    for content in buffers:
      vector = b.CreateByteVector(content) if content else None
      tflite.BufferStart(b)
      if vector is not None:
        tflite.BufferAddData(b, vector)
      made.append(tflite.BufferEnd(b))
    used = iter(range(1, len(buffers)))
    for name, shape, kind, data, scale, zero, axis in self._tensors:
      quantization = None
      if scale.size:
        scales = b.CreateNumpyVector(scale.astype(np.float32))
        zeros = b.CreateNumpyVector(zero.astype(np.int64))
        tflite.QuantizationParametersStart(b)
        tflite.QuantizationParametersAddScale(b, scales)
        tflite.QuantizationParametersAddZeroPoint(b, zeros)
        tflite.QuantizationParametersAddQuantizedDimension(b, axis)
        quantization = tflite.QuantizationParametersEnd(b)
      text, sides = b.CreateString(name), b.CreateNumpyVector(np.abs(np.array(shape, np.int32)))
      signature = b.CreateNumpyVector(np.array(shape, np.int32)) if min(shape, default=0) < 0 else 0
      tflite.TensorStart(b)
      tflite.TensorAddName(b, text)
      tflite.TensorAddShape(b, sides)
      if signature:
        tflite.TensorAddShapeSignature(b, signature)
      tflite.TensorAddType(b, getattr(tflite.TensorType, kind))
      tflite.TensorAddBuffer(b, next(used) if data is not None else 0)
      if quantization is not None:
        tflite.TensorAddQuantization(b, quantization)
      tensors.append(tflite.TensorEnd(b))
    operations = []
    for kind, reads, makes, options, custom in self._operations:
      code = kind if hasattr(tflite.BuiltinOperator, kind) else ('CUSTOM', kind)
      if code not in codes:
        codes.append(code)
      operations.append(self._operation(b, codes.index(code), kind, reads, makes, options, custom))
    entries = []
    for code in codes:
      kind, custom = code if isinstance(code, tuple) else (code, None)
      text = b.CreateString(custom) if custom else None
      tflite.OperatorCodeStart(b)
      number = getattr(tflite.BuiltinOperator, kind)
      tflite.OperatorCodeAddDeprecatedBuiltinCode(b, min(number, 127))
      tflite.OperatorCodeAddBuiltinCode(b, number)
      if text is not None:
        tflite.OperatorCodeAddCustomCode(b, text)
      entries.append(tflite.OperatorCodeEnd(b))
    parts = [_vector(b, tensors), _vector(b, operations),
             b.CreateNumpyVector(np.array(inputs, np.int32)),
             b.CreateNumpyVector(np.array(outputs, np.int32))]
    tflite.SubGraphStart(b)
    for add, part in zip((tflite.SubGraphAddTensors, tflite.SubGraphAddOperators,
                          tflite.SubGraphAddInputs, tflite.SubGraphAddOutputs), parts, strict=True):
      add(b, part)
    graphs = _vector(b, [tflite.SubGraphEnd(b)])
    made, entries = _vector(b, made), _vector(b, entries)
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddOperatorCodes(b, entries)
    tflite.ModelAddSubgraphs(b, graphs)
    tflite.ModelAddBuffers(b, made)
    b.Finish(tflite.ModelEnd(b), b'TFL3')
    pathlib.Path(path).write_bytes(b.Output())
    if labels:
      with zipfile.ZipFile(path, 'a') as archive:
        for name, text in labels.items():
          archive.writestr(name, text)
    return path

  def _operation(self, b, code, kind, reads, makes, options, custom):
    reads, makes = (b.CreateNumpyVector(np.array(x, np.int32)) for x in (reads, makes))
    table = None
    if kind in OPTIONS:
      name, union = OPTIONS[kind]
      getattr(tflite, f'{name}Start')(b)
      for field, value in [
          ('Padding', getattr(tflite.Padding, options.get('padding', 'SAME'))),
          ('StrideW', options.get('stride', 1)), ('StrideH', options.get('stride', 1)),
          ('DepthMultiplier', 1), ('DilationWFactor', 1), ('DilationHFactor', 1),
          ('FusedActivationFunction',
           getattr(tflite.ActivationFunctionType, options.get('activation', 'NONE')))]:
        if hasattr(tflite, f'{name}Add{field}'):
          getattr(tflite, f'{name}Add{field}')(b, value)
      table = getattr(tflite, f'{name}End')(b)
    extra = b.CreateByteVector(custom) if custom else None
    tflite.OperatorStart(b)
    tflite.OperatorAddOpcodeIndex(b, code)
    tflite.OperatorAddInputs(b, reads)
    tflite.OperatorAddOutputs(b, makes)
    if table is not None:
      tflite.OperatorAddBuiltinOptionsType(b, getattr(tflite.BuiltinOptions, union))
      tflite.OperatorAddBuiltinOptions(b, table)
    if extra is not None:
      tflite.OperatorAddCustomOptions(b, extra)
    return tflite.OperatorEnd(b)


def _vector(b, offsets):
  b.StartVector(4, len(offsets), 4)
  for offset in reversed(offsets):
    b.PrependUOffsetTRelative(offset)
  return b.EndVector()


def add_mobilenet(writer, image, *, multiplier=0.25, min_depth=8, blocks=13, names='slim',
                  scope='MobilenetV1', activation='RELU6'):
  """Adds a MobileNet-v1; returns the outputs of its stem and blocks."""
  def depth(d):
    return max(int(d * multiplier), min_depth)

  def called(layer):
    return f'{scope}/MobilenetV1/{layer}' if names == 'slim' else f'StatefulPartitionedCall/{layer}'

  root = f'{scope}/Conv2d_'
  outputs = [writer.layer(f'{root}0', image, depth(STEM), side=3, stride=2, name=called('Conv2d_0'),
                          activation=activation)]
  for i, (d, stride) in enumerate(BLOCKS[:blocks], start=1):
    x = writer.layer(f'{root}{i}_depthwise', outputs[-1], 0, side=3, stride=stride, depthwise=True,
                     name=called(f'Conv2d_{i}_depthwise'), activation=activation)
    outputs.append(writer.layer(f'{root}{i}_pointwise', x, depth(d), activation=activation,
                                name=called(f'Conv2d_{i}_pointwise')))
  return outputs


def write_classifier(path, *, weights='UINT8', classes=4, size=64, labels=None, **options):
  """Writes a classifier, without the classifier itself if `classes` is 0; returns its writer."""
  writer = TFLiteWriter(weights)
  image = writer.image(size)
  x = add_mobilenet(writer, image, **options)[-1]
  depth = writer._tensors[x][1][-1]
  x = writer.operation('AVERAGE_POOL_2D', [x], [writer.activation('pool', (1, 1, 1, depth))])
  if classes:
    x = writer.layer('MobilenetV1/Logits/Conv2d_1c_1x1', x, classes, activation='NONE',
                     name='logits', low=-9.0, high=9.0)
  writer.write(path, [image], [x], labels)
  return writer


def write_ssd(path, *, weights='UINT8', classes=5, size=300, multiplier=0.25, anchors=None,
              scales=(10.0, 10.0, 5.0, 5.0), post=True, background=True, labels=None,
              activation='LOGISTIC', change=None, counts=(3, 6), image=None, **options):
  """Writes an SSD detector as export_tflite_ssd_graph makes it; returns its writer."""
  writer = TFLiteWriter(weights)
  image = writer.activation('image', image or (1, size, size, 3), -1.0, 1.0)
  scope = 'FeatureExtractor/MobilenetV1'
  ends = add_mobilenet(writer, image, multiplier=multiplier, scope=scope, **options)
  levels = [ends[11], ends[13]]
  for i, depth in enumerate((512, 256, 256, 128), start=2):
    depth = int(depth * multiplier)
    x = writer.layer(f'{scope}/Conv2d_13_pointwise_1_Conv2d_{i}_1x1_{depth // 2}', levels[-1],
                     depth // 2, name=f'reduce_{i}')
    levels.append(writer.layer(f'{scope}/Conv2d_13_pointwise_2_Conv2d_{i}_3x3_s2_{depth}', x, depth,
                               side=3, stride=2, name=f'shrink_{i}'))
  rows, columns = {'box': [], 'class': []}, classes + background
  for level, x in enumerate(levels):
    _, h, w, _ = writer._tensors[x][1]
    count = counts[level > 0]
    for kind, scope, width in (('box', 'BoxEncodingPredictor', 4),
                               ('class', 'ClassPredictor', columns)):
      y = writer.layer(f'BoxPredictor_{level}/{scope}', x, count * width, activation='NONE',
                       name=f'{kind}_{level}', low=-9.0, high=9.0)
      shape = writer.constant('shape', [1, h * w * count, width])[0]
      rows[kind].append(writer.operation('RESHAPE', [y, shape], [
          writer.activation(f'{kind}_rows_{level}', (1, h * w * count, width), -9.0, 9.0)]))
  total = sum(writer._tensors[i][1][1] for i in rows['box'])
  boxes, scores = (writer.operation('CONCATENATION', rows[kind], [
      writer.activation(f'{kind}_all', (1, total, width), -9.0, 9.0)])
      for kind, width in (('box', 4), ('class', columns)))
  if activation:
    scores = writer.operation(activation, [scores], [
        writer.activation('scores', (1, total, columns), 0.0, 1.0)])
  outputs = [boxes, scores]
  if post:
    placed, _ = writer.constant('anchors', np.zeros((total, 4)) if anchors is None else anchors)
    outputs = [writer.tensor(f'out_{i}', (1, 10)) for i in range(4)]
    writer.operation('TFLite_Detection_PostProcess', [boxes, scores, placed], outputs,
                     custom=bytes(flexbuffers.Dumps({
                         'max_detections': 10, 'num_classes': classes, 'nms_score_threshold': 0.25,
                         'nms_iou_threshold': 0.5,
                         **{f'{axis}_scale': s for axis, s in zip('yxhw', scales, strict=True)}})))
  if change:
    change(writer)
  writer.write(path, [image], outputs, labels)
  return writer
