"""Names of the variables in other frameworks, and recognition of a network by its names.

There are three conventions: detectors of the TF Object Detection API
('FeatureExtractor/MobilenetV1/...' and a box predictor's scope, docs/reference.md section 13),
slim's classifiers ('MobilenetV1/...'), and Keras' MobileNet ('conv_dw_1/kernel'). Each has
MobileNet-v1, v2 and v3. Detectors of TensorFlow 2 get the first one's names when they are read, see
`object_graph`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

Path = tuple[str, ...]  # ('params', 'backbone', 'conv2d_0', 'kernel')

_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
_SHARED = 'WeightSharedConvolutionalBoxPredictor'
# Slim's scope of a network -> its first layer there, layers that Keras' has, and its name here.
NETWORKS = {
    'MobilenetV1': ('Conv2d_0', ('conv1', 'conv_dw_1', 'conv_pw_1'), 'mobilenet_v1'),
    'MobilenetV2': ('Conv', ('Conv1', 'expanded_conv_depthwise', 'block_1_expand'), 'mobilenet_v2'),
    'MobilenetV3': ('Conv', ('conv', 'expanded_conv_depthwise', 'expanded_conv_1_expand'),
                    'mobilenet_v3_small'),
}
AVERAGE = '/ExponentialMovingAverage'
# Endings of variable names, which tell them from the thousands of other constants in a graph.
_VARIABLE = re.compile(r'/(weights|depthwise_weights|biases|gamma|beta|moving_mean|'
                       r'moving_variance|kernel|bias)$')
_SLOT = re.compile(r'/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad)$|^optimizer/|/\.OPTIMIZER_SLOT/')


class Contents(NamedTuple):
  """Network that a file holds, recognised by its names.

  Fields:
    kind: 'ppn', 'ssd', 'ssdlite', 'fpn', 'slim', 'keras' or 'unknown'.
    root: prefix of all names, '' or such as 'import/'.
    description: the network in words, for messages.
    network: its backbone, one of `NETWORKS`.
  """
  kind: str
  root: str
  description: str
  network: str = 'MobilenetV1'


def in_words(network: str) -> str:
  """Returns a network of `NETWORKS` in words: 'MobileNet-v1'."""
  return network.replace('netV', 'Net-v')


def recognise(names: Iterable[str]) -> Contents:
  """Returns which known network a set of names belongs to."""
  names = sorted(names)
  scopes = {name.split('/')[0] for name in names}
  for network, (stem, layers, _) in NETWORKS.items():
    stem = f'{network}/{stem}/'
    roots = sorted({n[:n.index(stem)] for n in names if stem in n and _VARIABLE.search(n)}, key=len)
    if roots:
      return _with_scopes(names, roots[0], network)
    if set(layers) <= scopes:
      return Contents('keras', '', "Keras' MobileNet" + network.removeprefix('Mobilenet').replace(
          'V1', ''), network)
  shown = ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
  return Contents('unknown', '', f'no known MobileNet ({shown or "no names in it"})')


def _with_scopes(names: list[str], prefix: str, network: str) -> Contents:
  """Returns what a file with slim's names holds, whose network has this prefix."""
  root = prefix.removesuffix('FeatureExtractor/')
  inner = [n.removeprefix(root) for n in names if n.startswith(root)]
  if any('/fpn/' in n for n in inner):
    lite = any(n.endswith(('/pointwise_kernel', '/pointwise_weights')) for n in inner)
    return Contents('fpn', root, 'a MobileNet FPN detector'
                    + (' of separable convolutions (FPNLite)' if lite else ''), network)
  if any('Predictor_depthwise/' in n for n in inner):
    return Contents('ssdlite', root, 'an SSD detector of separable convolutions (SSDLite)', network)
  if any(n.startswith(f'{_SHARED}/') for n in inner):
    return Contents('ppn', root, f'a PPN detector ({_SHARED})', network)
  if any(n.startswith('BoxPredictor_0/') for n in inner):
    return Contents('ssd', root, 'an SSD detector (BoxPredictor_0 and so on)', network)
  return Contents('slim', prefix, f'a {in_words(network)} without a box predictor', network)


def backbone_network(paths: Iterable[Path]) -> str | None:
  """Returns the network of `NETWORKS` whose backbone has these variables, None if none has."""
  layers = {path[2:4] for path in paths if path[1] == 'backbone' and len(path) > 3}
  names = {layer[0] for layer in layers}
  if 'conv2d_0' in names:
    return 'MobilenetV1'
  if not {'conv', 'expanded_conv'} <= names:
    return None
  return 'MobilenetV3' if ('expanded_conv', 'squeeze_excite') in layers else 'MobilenetV2'


def detector_kind(paths: Iterable[Path]) -> str:
  """Returns the kind of detector with these variables: 'ppn', 'ssd', 'fpn' or 'unknown'."""
  layers = {path[1:3] for path in paths}
  if any(part == 'neck' and layer.startswith('lateral') for part, layer in layers):
    return 'fpn'
  if ('head', 'tower_kernel') in layers:
    return 'ppn'
  return 'ssd' if ('head', 'level_0') in layers else 'unknown'


def detector_name(path: Path, network: str = 'MobilenetV1') -> str | None:
  """Returns the Object Detection API's name of a variable, None if its detectors have none.

  '#' stands for a number that depends on the checkpoint. `network` is one of `NETWORKS`.
  """
  part, *layers, leaf = path[1:]
  if part == 'head':
    return _head_name(layers, leaf)
  if part == 'neck':
    layer = _neck_layer(layers, network)
    return layer and f'FeatureExtractor/{network}/{layer}/{_slim_leaf(layers, leaf)}'
  name = slim_name(path, network)
  return name and f'FeatureExtractor/{name}'


def slim_name(path: Path, network: str = 'MobilenetV1') -> str | None:
  """Returns slim's name of a backbone variable, None for other variables and networks."""
  part, *layers, leaf = path[1:]
  if part != 'backbone' or not layers or not _has_layer(network, layers[0]):
    return None
  kind = [layer for layer in layers[1:] if layer != 'norm']
  if network == 'MobilenetV1':
    layer = '_'.join([layers[0].capitalize(), *kind])
    return f'{network}/{layer}/{_slim_leaf(layers, leaf)}'
  # Only the scopes of the first and last convolution are capitalised.
  layer = '/'.join([layers[0].replace('conv', 'Conv') if not kind else layers[0], *kind])
  if layers[-1] == 'squeeze_excite':
    which, _, leaf = leaf.partition('_')
    layer += '/Conv' if which == 'reduce' else '/Conv_1'
    return f'{network}/{layer}/{"weights" if leaf == "kernel" else "biases"}'
  return f'{network}/{layer}/{_slim_leaf(layers, leaf)}'


def keras_name(path: Path, network: str = 'MobilenetV1') -> str | None:
  """Returns Keras' name of a backbone variable, None for other variables and networks."""
  part, *layers, leaf = path[1:]
  if part != 'backbone' or not layers or not _has_layer(network, layers[0]):
    return None
  if network != 'MobilenetV1':
    return _keras_name_of_blocks(layers, leaf, network)
  block = layers[0].removeprefix('conv2d_')
  layer = 'conv1' if block == '0' else {
      'depthwise': f'conv_dw_{block}', 'pointwise': f'conv_pw_{block}'}.get(layers[1])
  norm = layers[-1] == 'norm'
  return layer and f'{layer}{"_bn" if norm else ""}/{_NORM[leaf] if norm else leaf}'


def _has_layer(network: str, layer: str) -> bool:
  if network == 'MobilenetV1':
    return layer.startswith('conv2d_')
  return layer in ('conv', 'conv_1') or layer.startswith('expanded_conv')


def _keras_name_of_blocks(layers: list[str], leaf: str, network: str) -> str:
  """Returns Keras' name of a variable of MobileNet-v2 or v3."""
  first, *kind = [layer for layer in layers if layer != 'norm']
  if kind == ['squeeze_excite']:
    which, _, leaf = leaf.partition('_')
    return f'{first}_squeeze_excite_conv{"" if which == "reduce" else "_1"}/{leaf}'
  norm, number = '_bn', first.removeprefix('expanded_conv_')
  if network == 'MobilenetV2':
    first = {'conv': 'Conv1', 'conv_1': 'Conv_1'}.get(
        first, f'block_{number}' if number.isdecimal() else first)
    norm = '_BN' if kind else '_bn'
  layer = '_'.join([first, *kind])
  if layers[-1] != 'norm':
    return f'{layer}/{leaf}'
  return f'{"bn_Conv1" if layer == "Conv1" else layer + norm}/{_NORM[leaf]}'


def find(pattern: str, names: Iterable[str]) -> str | None:
  """Returns the name that matches `pattern`, where '#' is any number, or None."""
  if '#' not in pattern:
    return pattern if pattern in names else None
  exact = re.compile(re.escape(pattern).replace(r'\#', r'\d+'))
  return next((name for name in names if exact.fullmatch(name)), None)


def group(name: str) -> str:
  """Returns the group of an unused name, for a report."""
  if name.endswith(AVERAGE):
    return 'moving averages'
  if _SLOT.search(name):
    return "the optimizer's"
  if name.rpartition('/')[2] in ('global_step', 'learning_rate', 'step', 'save_counter'):
    return 'the global step'
  if not _VARIABLE.search(name):
    return 'other values'
  block = re.search(r'(?:MobilenetV1/Conv2d_|^conv_[dp]w_)(\d+)(?:_depthwise|_pointwise|_bn)?/',
                    name) or re.search(r'(?:^|/)(?:expanded_conv|block)_(\d+)[_/]', name)
  if block:
    return f'block {block[1]}'
  if re.search(r'(?:Aux)?Logits/|^conv_preds/|^predictions/|^logits/', name):
    return "the classifier's logits"
  if re.search(rf'(?:^|/)({_SHARED}|BoxPredictor_\d+)/', name):
    return 'box predictor'
  return 'other layers'


def _slim_leaf(layers: list[str], leaf: str) -> str:
  if layers[-1] == 'norm':
    return f'BatchNorm/{_NORM[leaf]}'
  return 'depthwise_weights' if layers[-1] == 'depthwise' else 'weights'


def _neck_layer(layers: list[str], network: str) -> str | None:
  if layers[0] == 'projection':
    return 'Base_Conv2d_1x1_#'
  i = layers[0].removeprefix('extra_')
  if len(layers) < 2 or not i.isdecimal():
    return None
  last = 'Conv2d_#_pointwise' if network == 'MobilenetV1' else 'layer_#'
  return {'reduce': f'{last}_1_Conv2d_{i}_1x1_#',
          'shrink': f'{last}_2_Conv2d_{i}_3x3_s2_#'}.get(layers[1])


def _head_name(layers: list[str], leaf: str) -> str | None:
  tower = f'{_SHARED}/PredictionTower/conv2d_0'
  if leaf == 'tower_kernel':
    return f'{tower}/weights'
  if layers and layers[0].startswith('norm'):
    level = layers[0].removeprefix('norm_')
    feature = f'feature_{level}/' if level.isdecimal() else ''
    return f'{tower}/BatchNorm/{feature}{_NORM[leaf]}'
  what, _, kind = leaf.partition('_')
  kind = {'kernel': 'weights', 'bias': 'biases'}.get(kind)
  if kind is None or what not in ('box', 'class'):
    return None
  if not layers:
    return f'{_SHARED}/{what.capitalize()}Predictor/{kind}'
  predictor = 'BoxEncodingPredictor' if what == 'box' else 'ClassPredictor'
  return f'BoxPredictor_{layers[0].removeprefix("level_")}/{predictor}/{kind}'
