"""Recognises MobileNet-v1 in TensorFlow Lite files, and names its weights as checkpoints do.

Layers are found by what they read, not by name: the names in a file are slim's, Keras' or the
converter's own. A MobileNet-v1 is a 3x3 convolution of stride 2 on the image and then pairs of a
depthwise and a 1x1 convolution with its strides, depths and ReLU6.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection.boxes import CODE_SCALES
from ppn_jax.errors import InputError
from ppn_jax.models.mobilenet_v1 import BLOCKS
from ppn_jax.weights.architecture import depth_multiplier
from ppn_jax.weights.tflite_file import Graph, Operation, custom_options, read_tflite
from ppn_jax.weights.tflite_layers import Layer, LayerGraph, sources_of

_POSTPROCESS = 'TFLite_Detection_PostProcess'
_LEAST_BLOCKS = 5  # Fewer may be the beginning of another network.
_UNUSED_LABEL = '???'
_MOST_COLUMNS = 100_000
# Networks by what their files call their tensors.
_FAMILIES = (
    ('mobilenet_?v3', 'MobileNet-v3'), ('mobilenet_?v2|mobilenetv2', 'MobileNet-v2'),
    ('efficientdet|bifpn|fpn_cells', 'EfficientDet'), ('efficientnet', 'EfficientNet'),
    ('mnasnet', 'MnasNet'), ('inception', 'Inception'), ('resnet', 'ResNet'), ('yolo', 'YOLO'),
    ('blazeface', 'BlazeFace'), ('densenet', 'DenseNet'), ('nasnet', 'NASNet'),
    ('squeezenet|fire\\d', 'SqueezeNet'), ('mobiledet', 'MobileDet'))


class PostProcessing(NamedTuple):
  """What a file does with the outputs of its network.

  Fields:
    anchors: float32 [A, 4] (yc, xc, height, width), 0 to 1; None if the file has none.
    anchor_step: the distance of values that the anchors can have; 0 if they are floats.
    score_activation: 'sigmoid', 'softmax', or '' if it is not in the file.
    options: those of TFLite_Detection_PostProcess by name.
  """
  anchors: np.ndarray | None
  anchor_step: float
  score_activation: str
  options: dict[str, Any]


class TFLiteNetwork(NamedTuple):
  """Network in a TensorFlow Lite file.

  Fields:
    description: the network in words, for messages.
    tensors: its weights, float32, by the name that they have in checkpoints. Biases stand where
      batch norm was; see `folded_norm`. {} for other networks.
    image_size: side of its input in pixels; 0 if it is not square, or of any size.
    labels: class names in its metadata, '' for ids that are not used; () if there are none.
    postprocessing: what follows the network of a detector; None for others.
  """
  description: str
  tensors: dict[str, np.ndarray]
  image_size: int
  labels: tuple[str, ...] = ()
  postprocessing: PostProcessing | None = None


class _Backbone(NamedTuple):
  """Layers of a MobileNet-v1."""
  stem: Layer
  blocks: list[tuple[Layer, Layer]]
  multiplier: float

  def end(self, block: int) -> int:
    """Returns the tensor that a block computes."""
    return self.blocks[block - 1][1].output


class _Heads(NamedTuple):
  """Layers of SSD after the backbone."""
  extras: list[tuple[Layer, Layer]]
  levels: list[tuple[Layer, Layer]]  # (boxes, classes).
  columns: int


def read_tflite_network(path: str | pathlib.Path) -> TFLiteNetwork:
  """Reads the MobileNet-v1 of a .tflite file, as a whole SSD detector where it is one.

  Raises:
    InputError: See `tflite_file.read_tflite`; also for files that have no weights to read.
  """
  graph = read_tflite(path)
  _check_origin(graph)
  layers = LayerGraph(graph)
  backbone = _backbone(layers)
  post = next((op for op in graph.operations if op.kind == _POSTPROCESS), None)
  if backbone is None:
    return TFLiteNetwork(_family(layers, post), {}, 0)
  tensors = _backbone_tensors(layers, backbone)
  height, width = _image_sides(layers, backbone.stem)
  size = height if height == width else 0
  pixels = (f'{size} px' if size else f'{height}x{width} px' if height and width else
            'any image size')
  what = (f'MobileNet-v1 with depth multiplier {backbone.multiplier:g}, {pixels}, '
          f'{_precision(graph, backbone.blocks[-1][1])}')
  if len(backbone.blocks) < 11:
    what += f', the first {len(backbone.blocks)} of its 13 blocks'
  found = _heads(layers, backbone, post)
  if isinstance(found, str):
    return TFLiteNetwork(f'{found}, {what}', tensors, size)
  if found is None:
    return TFLiteNetwork(f'{_classifier(layers, backbone)}, {what}', tensors, size)
  postprocessing = _postprocessing(layers, post, found)
  tensors = ({f'FeatureExtractor/{name}': value for name, value in tensors.items()}
             | _head_tensors(layers, found, postprocessing.options))
  classes = postprocessing.options.get('num_classes', found.columns - 1)
  described = (f'{classes} class{"" if classes == 1 else "es"}'
               + (' and a background' if classes == found.columns - 1 else ''))
  return TFLiteNetwork(f'an SSD detector of {described}, {what}', tensors, size,
                       _labels(graph, found.columns, classes), postprocessing)


def _check_origin(graph: Graph) -> None:
  """Raises InputError for files whose weights are somewhere else."""
  if any(op.kind == 'edgetpu-custom-op' for op in graph.operations):
    raise InputError(f'{graph.path}: compiled for the Edge TPU, which hides the weights; give the '
                     'file that edgetpu_compiler was given')
  try:
    metadata = json.loads(graph.attached.get('metadata.json', '{}'))
  except ValueError:
    metadata = {}
  if isinstance(metadata, dict) and {'category_ids', 'step', 'model'} <= metadata.keys():
    raise InputError(f'{graph.path}: an export of `ppn export`, from which no run is made; use the '
                     'workdir that it was exported from, or a weights file '
                     '(`ppn export --format=weights`)')


def _backbone(layers: LayerGraph) -> _Backbone | None:
  """Returns the MobileNet-v1 in a graph, None if there is none."""
  stem = next((layer for layer in layers.layers if layer.kind == 'conv'), None)
  if stem is None or stem.shape[1:] != (3, 3, 3) or not _is_normal(stem, 2):
    return None
  blocks, last = [], stem
  for _, stride in BLOCKS:
    depthwise = [layer for layer in layers.readers.get(last.output, ())
                 if layer.kind == 'depthwise' and layer.shape[1:3] == (3, 3)]
    if len(depthwise) != 1 or not _is_normal(depthwise[0], stride) or (
        depthwise[0].features != last.features):
      break
    pointwise = layers.readers.get(depthwise[0].output, ())
    if len(pointwise) != 1 or pointwise[0].kind != 'conv' or pointwise[0].side != 1 or (
        not _is_normal(pointwise[0], 1)):
      break
    last = pointwise[0]
    blocks.append((depthwise[0], last))
  fitting = depth_multiplier([stem.features, *(pointwise.features for _, pointwise in blocks)])
  if len(blocks) < _LEAST_BLOCKS or fitting is None:
    return None
  return _Backbone(stem, blocks, fitting[0])


def _is_normal(layer: Layer, stride: int) -> bool:
  return layer.plain and layer.stride == stride and layer.activation == 'RELU6'


def _backbone_tensors(layers: LayerGraph, backbone: _Backbone) -> dict[str, np.ndarray]:
  """Returns the weights of a backbone under slim's names, for pixels from -1 to 1."""
  tensors = _named(layers, 'MobilenetV1/Conv2d_0', backbone.stem)
  for i, (depthwise, pointwise) in enumerate(backbone.blocks, start=1):
    tensors |= _named(layers, f'MobilenetV1/Conv2d_{i}_depthwise', depthwise)
    tensors |= _named(layers, f'MobilenetV1/Conv2d_{i}_pointwise', pointwise)
  ends = layers.pixel_range(backbone.stem)
  if ends is None:
    raise InputError(f'{layers.graph.path}: operations before {layers.name(backbone.stem)} change '
                     'the image in a way that this package does not have')
  low, high = ends
  if max(np.abs(low + 1).max(), np.abs(high - 1).max()) > 0.02:
    # Such as 0 to 1. The same function but at the image's edge, where padding is zero.
    kernel, bias = 'MobilenetV1/Conv2d_0/weights', 'MobilenetV1/Conv2d_0/biases'
    factor, offset = (high - low) / 2, (high + low) / 2
    tensors[bias] = (tensors[bias] + np.sum(
        tensors[kernel] * np.broadcast_to(offset, 3)[:, None], (0, 1, 2))).astype(np.float32)
    tensors[kernel] = (tensors[kernel] * np.broadcast_to(factor, 3)[:, None]).astype(np.float32)
  return tensors


def _named(layers: LayerGraph, scope: str, layer: Layer) -> dict[str, np.ndarray]:
  kind = 'depthwise_weights' if layer.kind == 'depthwise' else 'weights'
  return {f'{scope}/{kind}': layers.kernel(layer), f'{scope}/biases': layers.bias(layer)}


def _image_sides(layers: LayerGraph, stem: Layer) -> tuple[int, int]:
  """Returns height and width of the input in pixels, 0 for a side of any length."""
  shape = layers.graph.tensors[stem.source].shape
  return (max(shape[1], 0), max(shape[2], 0)) if len(shape) == 4 else (0, 0)


def _precision(graph: Graph, layer: Layer) -> str:
  weights = layer.operation.inputs[1]
  return graph.stored_type(weights).lower() + (' by channel' if graph.by_channel(weights) else '')


def _heads(layers: LayerGraph, backbone: _Backbone, post: Operation | None
           ) -> _Heads | str | None:
  """Returns the layers of SSD's heads; None for no detector, words for another detector."""
  outputs = _box_and_class_tensors(layers, post)
  other = 'a detector other than SSD' + (
      ' (FPN)' if any(op.kind.startswith('RESIZE_') for op in layers.graph.operations) else
      ' (PPN)' if any(op.kind == 'MAX_POOL_2D' for op in layers.graph.operations) else '')
  if outputs is None:
    return other if post is not None else None
  boxes, classes = ([layers.makers.get(i) for i in sources_of(layers, output)]
                    for output in outputs)
  if len(boxes) != len(classes) or None in (*boxes, *classes) or len(backbone.blocks) < 13:
    return other
  levels, extras, expected = list(zip(boxes, classes, strict=True)), [], [11, 13]
  columns = 0
  for i, (box, class_) in enumerate(levels):
    count, rest = divmod(4 * class_.features, box.features)
    if box.source != class_.source or rest or box.features % 4 or columns not in (0, count) or (
        box.shape[1:3] != class_.shape[1:3] or not {box.activation, class_.activation} <= {
            'NONE', 'LOGISTIC'} or not (box.plain and class_.plain)):
      return other
    columns = count
    if i < len(expected):
      if box.source != backbone.end(expected[i]):
        return other
      continue
    shrink = layers.makers.get(box.source)
    reduce = layers.makers.get(shrink.source) if shrink else None
    if reduce is None or reduce.source != levels[i - 1][0].source or reduce.side != 1 or (
        shrink.side != 3 or not _is_normal(shrink, 2) or not _is_normal(reduce, 1)):
      return other
    extras.append((reduce, shrink))
  if columns > _MOST_COLUMNS:
    raise InputError(f'{layers.graph.path}: {columns:,} class columns are too many; is the file '
                     'damaged?')
  return _Heads(extras, levels, columns)


def _box_and_class_tensors(layers: LayerGraph, post: Operation | None) -> tuple[int, int] | None:
  """Returns the tensors of all box codes and class scores, None if there are none."""
  graph = layers.graph
  if post is not None:
    return (post.inputs[0], post.inputs[1]) if len(post.inputs) > 1 else None
  pairs = [i for i in graph.outputs if 0 <= i < len(graph.tensors)
           and graph.tensors[i].shape and len(list(sources_of(layers, i))) > 1]
  if len(pairs) != 2:
    return None
  # Scores are activated, or else box codes are the ones with four columns.
  scored = [bool(layers.activations(i) & {'LOGISTIC', 'SOFTMAX'}) for i in pairs]
  four = [graph.tensors[i].shape[-1] == 4 for i in pairs]
  if scored in ([True, False], [False, True]):
    return (pairs[scored.index(False)], pairs[scored.index(True)])
  return (pairs[four.index(True)], pairs[four.index(False)]) if sum(four) == 1 else None


def _head_tensors(layers: LayerGraph, heads: _Heads, options: dict[str, Any]
                  ) -> dict[str, np.ndarray]:
  """Returns the weights of SSD's heads under the Object Detection API's names."""
  tensors, scope = {}, 'FeatureExtractor/MobilenetV1/Conv2d_13_pointwise'
  for i, (reduce, shrink) in enumerate(heads.extras, start=2):
    tensors |= _named(layers, f'{scope}_1_Conv2d_{i}_1x1_{reduce.features}', reduce)
    tensors |= _named(layers, f'{scope}_2_Conv2d_{i}_3x3_s2_{shrink.features}', shrink)
  # Box codes are in units that the file gives; these are the Object Detection API's only ones.
  scales = [options.get(f'{axis}_scale', ours) or ours
            for axis, ours in zip('yxhw', CODE_SCALES, strict=True)]
  factors = np.array([ours / theirs for ours, theirs in zip(CODE_SCALES, scales, strict=True)],
                     np.float32)
  for i, (box, class_) in enumerate(heads.levels):
    boxes = _named(layers, f'BoxPredictor_{i}/BoxEncodingPredictor', box)
    tensors |= {name: value * np.tile(factors, box.features // 4) for name, value in boxes.items()}
    tensors |= _named(layers, f'BoxPredictor_{i}/ClassPredictor', class_)
  return tensors


def _postprocessing(layers: LayerGraph, post: Operation | None, heads: _Heads) -> PostProcessing:
  _, classes = _box_and_class_tensors(layers, post)
  kinds = layers.activations(classes) | {heads.levels[0][1].activation}
  activation = ('softmax' if 'SOFTMAX' in kinds else 'sigmoid' if 'LOGISTIC' in kinds else '')
  if post is None:
    return PostProcessing(None, 0, activation, {})
  anchors, step = None, 0.0
  if len(post.inputs) > 2 and layers.graph.is_constant(post.inputs[2]):
    anchors = layers.graph.constant(post.inputs[2])
    quantization = layers.graph.tensors[post.inputs[2]].quantization
    step = float(quantization.scale[0]) if quantization else 0.0
    if anchors.ndim != 2 or anchors.shape[1] != 4:
      raise InputError(f'{layers.graph.path}: damaged: its anchors are {list(anchors.shape)}, not '
                       '[count, 4]')
  options = {key: value for key, value in custom_options(post).items()
             if isinstance(value, (bool, int, float))}
  if not 0 < options.get('num_classes', 1) <= heads.columns:
    raise InputError(f'{layers.graph.path}: damaged: {options["num_classes"]} classes in '
                     f'{heads.columns} columns')
  return PostProcessing(anchors, step, activation, options)


def _labels(graph: Graph, columns: int, classes: int) -> tuple[str, ...]:
  """Returns the class names of the first list of labels that has as many as there are classes.

  Files that are called labels come first. A list may begin with a name for the background; ids that
  are not used are called ???.
  """
  for name in sorted(graph.attached, key=lambda name: 'label' not in name.lower()):
    lines = [line.strip() for line in graph.attached[name].rstrip().splitlines()]
    if not name.endswith('.txt') or 'calibration' in name.lower() or (
        len(lines) not in (classes, columns)):
      continue
    return tuple('' if line == _UNUSED_LABEL else line for line in lines[-classes:])
  return ()


def _classifier(layers: LayerGraph, backbone: _Backbone) -> str:
  """Describes what follows the backbone of a network that is no detector."""
  later = [layer for layer in layers.layers if layer.operation is not backbone.stem.operation
           and layer.side == 1 and layer.kind != 'depthwise'
           and layers.graph.tensors[layer.source].shape[1:-1] in ((), (1, 1))]
  return (f'a classifier of {later[-1].features:,} classes' if later else
          'an extractor of features')


def _family(layers: LayerGraph, post: Operation | None) -> str:
  """Describes a network other than MobileNet-v1, by its names or by its operations."""
  graph, found = layers.graph, layers.layers
  kinds = {op.kind for op in graph.operations}
  what = 'detector' if post is not None else 'network'
  if not any(layer.kind == 'conv' for layer in found):
    return 'a network without convolutions on an image'
  if not any(layer.shape[-1] == 3 for layer in found if layer.kind == 'conv'):
    return ('the classifier of a network, without its backbone' if len(found) == 1 else
            'a network that does not read an image of three colours')
  names = ' '.join(tensor.name for tensor in graph.tensors).lower()
  for pattern, family in _FAMILIES:
    if re.search(pattern, names):
      return f'{family} ({what}), not MobileNet-v1'
  depthwise = any(layer.kind == 'depthwise' for layer in found)
  adds = any(op.kind == 'ADD' and not any(map(graph.is_constant, op.inputs))
             for op in graph.operations)
  swish = any(op.kind == 'MUL' and any(
      graph.producers.get(i) and graph.producers[i].kind == 'LOGISTIC' for i in op.inputs)
      for op in graph.operations)
  linear = any(layer.kind == 'conv' and layer.side == 1 and layer.activation == 'NONE'
               and layers.makers.get(layer.source, layer).kind == 'depthwise' for layer in found)
  if 'HARD_SWISH' in kinds:
    return f'MobileNet-v3 (a {what} with hard swish), not MobileNet-v1'
  if swish and depthwise:
    return (f'EfficientDet (a {what} with swish and a pyramid of sums), not MobileNet-v1'
            if adds and 'RESIZE_NEAREST_NEIGHBOR' in kinds and post is not None else
            f'EfficientNet (a {what} with swish), not MobileNet-v1')
  if adds and depthwise and linear:
    if 'RESIZE_NEAREST_NEIGHBOR' in kinds and 'MAX_POOL_2D' in kinds:
      return (f'EfficientDet-Lite (a {what} with inverted residuals and a pyramid of sums), not '
              'MobileNet-v1')
    return f'MobileNet-v2 (a {what} with inverted residuals), not MobileNet-v1'
  if not depthwise and 'RESIZE_NEAREST_NEIGHBOR' in kinds and (swish or 'LEAKY_RELU' in kinds):
    return f'YOLO (a {what}), not MobileNet-v1'
  if adds and not depthwise:
    return f'a residual {what} such as ResNet, not MobileNet-v1'
  return f'a {what} of {len(found)} layers that is not MobileNet-v1'
