"""Names for the values of TensorFlow 2's object-based checkpoints, as of its detection zoo.

The keys of such a file are paths through Python objects:
'model/_feature_extractor/classification_backbone/layer_with_weights-0/kernel', followed by
'/.ATTRIBUTES/VARIABLE_VALUE'. Its object graph, a protocol buffer, has the name that the variable
had in the program: 'Conv1/kernel'. Where it has none, the path tells it, since Keras numbers the
layers of a network in their order.

Layers of the TF Object Detection API's MobileNet detectors get the names that its checkpoints of
TensorFlow 1 have for them, 'FeatureExtractor/MobilenetV2/Conv/weights', so that `names` describes
both. All other values keep the name in the program, or the path.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np
from google.protobuf.message import DecodeError

from ppn_jax.errors import InputError
from ppn_jax.models import mobilenet_v1, mobilenet_v2
from ppn_jax.weights import names
from ppn_jax.weights.tf_bundle import OBJECT_GRAPH
from ppn_jax.weights.tf_protos import TrackableObjectGraph

_VALUE = '/.ATTRIBUTES/VARIABLE_VALUE'
_SLOT = '/.OPTIMIZER_SLOT/'
_LEAVES = {'kernel': 'weights', 'bias': 'biases'}
# Name of the last layer of the backbone, after which the further levels of an SSD are named.
_LAST = {'MobilenetV1': 'Conv2d_13_pointwise', 'MobilenetV2': 'layer_19'}
_NUMBERED = re.compile(r'(?:^|/)layer_with_weights-(\d+)/(\w+)$')
_LEVEL_LAYER = re.compile(r'(?:^|/)feature_map_generator/convolutions/(\d+)/(\d+)/(\w+)$')
_HEAD_LAYER = re.compile(
    r'(?:^|/)_prediction_heads/(box|class)_\w+/(\d+)/_\w+_layers/\d+/(kernel|bias)$')
_PYRAMID = re.compile(
    r'(?:^|/)_feature_extractor/_((?:fpn_features_generator|coarse_feature_layers)/.*)$')
# The same layers by the variable's name in the program.
_LEVEL_NAME = re.compile(
    r'(?:^|/)FeatureMaps/(\w+_[12]_Conv2d_\d+_\w+)_(conv|batchnorm)/(\w+)$')
_HEAD_NAME = re.compile(r'(?:^|/)Convolutional(?:Box|Class)Head_(\d+)/'
                        r'(BoxEncodingPredictor|ClassPredictor)/(kernel|bias)$')


def with_variable_names(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """Returns the values of a checkpoint by variable name.

  Checkpoints that are not object-based are returned as they are.

  Args:
    tensors: values by key, see `read_tf_bundle`.
    where: the file, for messages.

  Raises:
    InputError: If the object graph cannot be parsed.
  """
  if OBJECT_GRAPH not in tensors:
    return dict(tensors)
  try:
    graph = TrackableObjectGraph.FromString(tensors[OBJECT_GRAPH].tobytes())
  except DecodeError as e:
    raise InputError(f'{where}: damaged: its object graph cannot be read: {e}') from e
  full = {a.checkpoint_key: a.full_name.replace('/depthwise_kernel', '/kernel')
          for node in graph.nodes for a in node.attributes if a.full_name}
  named: dict[str, np.ndarray] = {}
  values = {key: value for key, value in tensors.items() if key != OBJECT_GRAPH}
  name_of = _Names(values, full)
  # If a layer is there twice, as with a copy that has moving averages, the model's is meant.
  for key in sorted(values, key=lambda key: (not key.startswith('model/'), key)):
    name = name_of(key)
    named[key.removesuffix(_VALUE) if name in named else name] = values[key]
  return named


class _Names:
  """Finds the name of each key of a checkpoint.

  Args:
    values: arrays by key.
    full: names in the program by key.
  """

  def __init__(self, values: Mapping[str, np.ndarray], full: Mapping[str, str]):
    self._values, self._full = values, full
    self.network = _network(full.values())
    self._numbered = not self.network
    if self._numbered:
      self.network = _network_of_numbers(values)

  def __call__(self, key: str) -> str:
    """Returns the name for a key."""
    path = key.removesuffix(_VALUE)
    variable, slot, which = path.partition(_SLOT)
    if slot:
      average = which.rpartition('/')[2] == 'average'
      return self(variable + _VALUE) + (names.AVERAGE if average else slot + which)
    if path.startswith('optimizer/'):
      return path
    name = self._full.get(key, '')
    if key not in self._values:  # Of an optimizer's slot.
      return name or path
    return (self._known(name) or self._known(self._name_in_program(path, self._values[key]))
            or self._pyramid(path) or name or path)

  def _known(self, name: str) -> str:
    """Returns TensorFlow 1's name for a name in the program; '' if it has none."""
    if name in _keras_names(self.network):
      return _keras_names(self.network)[name]
    if match := _LEVEL_NAME.search(name):
      layer, kind, leaf = match.groups()
      leaf = 'weights' if kind == 'conv' else f'BatchNorm/{leaf}'
      return f'FeatureExtractor/{self.network}/{layer}/{leaf}'
    if match := _HEAD_NAME.search(name):
      level, layer, leaf = match.groups()
      return f'BoxPredictor_{level}/{layer}/{_LEAVES[leaf]}'
    return ''

  def _pyramid(self, path: str) -> str:
    """Returns a name that `names` takes for that of an FPN; '' if the path is not one's."""
    match = _PYRAMID.search(path)
    return f'FeatureExtractor/{self.network}/fpn/{match[1]}' if match else ''

  def _name_in_program(self, path: str, value: np.ndarray) -> str:
    """Returns the name that the variable at a path must have had; '' if that is unknown."""
    if match := _NUMBERED.search(path):
      number, leaf = int(match[1]), match[2].replace('depthwise_kernel', 'kernel')
      layers = _keras_layers(self.network) if self._numbered else ()
      return f'{layers[number]}/{leaf}' if number < len(layers) else ''
    if match := _LEVEL_LAYER.search(path):
      level, place, leaf = match.groups()
      # A 1x1 convolution, its batch norm and activation; then the same of a 3x3 one.
      layer = f'1_Conv2d_{level}_1x1' if int(place) < 3 else f'2_Conv2d_{level}_3x3_s2'
      depth, kind = value.shape[-1:], 'conv' if leaf == 'kernel' else 'batchnorm'
      return f'FeatureMaps/{_LAST.get(self.network)}_{layer}_{sum(depth)}_{kind}/{leaf}'
    if match := _HEAD_LAYER.search(path):
      kind, level, leaf = match.groups()
      layer = 'BoxEncodingPredictor' if kind == 'box' else 'ClassPredictor'
      return f'Convolutional{kind.capitalize()}Head_{level}/{layer}/{leaf}'
    return ''


def _network(full: Iterable[str]) -> str:
  """Returns the network of `names.NETWORKS` that has these names in the program; '' if none."""
  layers = {name.partition('/')[0] for name in full}
  return next((network for network in _LAST if {*names.NETWORKS[network][1]} <= layers), '')


def _network_of_numbers(keys: Iterable[str]) -> str:
  """Returns the network of `names.NETWORKS` whose layers are numbered so; '' if none.

  Networks differ in which of their layers are depthwise.
  """
  kinds = {int(match[1]): match[2] for key in keys
           if (match := _NUMBERED.search(key.removesuffix(_VALUE)))}
  for network in _LAST:
    depthwise = {i for i, layer in enumerate(_keras_layers(network))
                 if re.search(r'_dw_\d+$|_depthwise$', layer)}
    if depthwise == {i for i, kind in kinds.items() if kind == 'depthwise_kernel'}:
      return network
  return ''


@functools.cache
def _layers(network: str) -> tuple[tuple[str, ...], ...]:
  """Returns the paths of a backbone's convolutions in their order; () for other networks."""
  if network == 'MobilenetV1':
    return ('conv2d_0',), *((f'conv2d_{i}', part) for i in range(1, len(mobilenet_v1.BLOCKS) + 1)
                            for part in ('depthwise', 'pointwise'))
  if network != 'MobilenetV2':
    return ()
  blocks = [(f'expanded_conv_{i}' if i else 'expanded_conv', part)
            for i, block in enumerate(mobilenet_v2.BLOCKS)
            for part in ('expand', 'depthwise', 'project')
            if part != 'expand' or block.expansion != 1]
  return ('conv',), *blocks, ('conv_1',)


@functools.cache
def _keras_layers(network: str) -> tuple[str, ...]:
  """Returns the names of a backbone's layers in their order: a convolution, its batch norm, ..."""
  variables = (names.keras_name(('params', 'backbone', *layer, *leaf), network)
               for layer in _layers(network) for leaf in (('kernel',), ('norm', 'scale')))
  return tuple(str(name).partition('/')[0] for name in variables)


@functools.cache
def _keras_names(network: str) -> Mapping[str, str]:
  """Returns TensorFlow 1's names of a backbone's variables by those in the program."""
  paths = [('params', 'backbone', *layer, *leaf) for layer in _layers(network)
           for leaf in (('kernel',), *(('norm', n) for n in ('scale', 'bias', 'mean', 'var')))]
  return {str(names.keras_name(path, network)): str(names.detector_name(path, network))
          for path in paths}
