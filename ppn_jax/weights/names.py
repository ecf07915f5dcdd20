"""Names of the variables in other frameworks, and recognition of a network by its names.

There are three conventions: detectors of the TF Object Detection API
('FeatureExtractor/MobilenetV1/...' and a box predictor's scope, docs/reference.md section 13),
slim's classifiers ('MobilenetV1/...'), and Keras' MobileNet ('conv_dw_1/kernel').
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

Path = tuple[str, ...]  # ('params', 'backbone', 'conv2d_0', 'kernel')

_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
_SHARED = 'WeightSharedConvolutionalBoxPredictor'
_STEM = 'MobilenetV1/Conv2d_0/'
AVERAGE = '/ExponentialMovingAverage'
# Endings of variable names, which tell them from the thousands of other constants in a graph.
_VARIABLE = re.compile(r'/(weights|depthwise_weights|biases|gamma|beta|moving_mean|'
                       r'moving_variance|kernel|bias)$')
_SLOT = re.compile(r'/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad)$')


class Contents(NamedTuple):
  """Network that a file holds, recognised by its names.

  Fields:
    kind: 'ppn', 'ssd', 'fpn', 'slim', 'keras' or 'unknown'.
    root: prefix of all names, '' or such as 'import/'.
    description: the network in words, for messages.
  """
  kind: str
  root: str
  description: str


def recognise(names: Iterable[str]) -> Contents:
  """Returns which known network a set of names belongs to."""
  names = sorted(names)
  scopes = {name.split('/')[0] for name in names}
  roots = sorted({n[:n.index(_STEM)] for n in names if _STEM in n and _VARIABLE.search(n)}, key=len)
  if roots:
    root = roots[0].removesuffix('FeatureExtractor/')
    inner = [n.removeprefix(root) for n in names if n.startswith(root)]
    if any('/fpn/' in n for n in inner):
      return Contents('fpn', root, 'a MobileNet FPN detector')
    if any(n.startswith(f'{_SHARED}/') for n in inner):
      return Contents('ppn', root, f'a PPN detector ({_SHARED})')
    if any(n.startswith('BoxPredictor_0/') for n in inner):
      return Contents('ssd', root, 'an SSD detector (BoxPredictor_0 and so on)')
    return Contents('slim', roots[0], 'a MobileNet-v1 without a box predictor')
  if {'conv1', 'conv_dw_1', 'conv_pw_1'} <= scopes:
    return Contents('keras', '', "Keras' MobileNet")
  shown = ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
  return Contents('unknown', '', f'no known MobileNet-v1 ({shown or "no names in it"})')


def detector_kind(paths: Iterable[Path]) -> str:
  """Returns the kind of detector with these variables: 'ppn', 'ssd', 'fpn' or 'unknown'."""
  layers = {path[1:3] for path in paths}
  if any(part == 'neck' and layer.startswith('lateral') for part, layer in layers):
    return 'fpn'
  if ('head', 'tower_kernel') in layers:
    return 'ppn'
  return 'ssd' if ('head', 'level_0') in layers else 'unknown'


def detector_name(path: Path) -> str | None:
  """Returns the Object Detection API's name of a variable, None if its detectors have none.

  '#' stands for a number that depends on the checkpoint.
  """
  part, *layers, leaf = path[1:]
  if part == 'head':
    return _head_name(layers, leaf)
  if part == 'neck':
    layer = _neck_layer(layers)
    return layer and f'FeatureExtractor/MobilenetV1/{layer}/{_slim_leaf(layers, leaf)}'
  name = slim_name(path)
  return name and f'FeatureExtractor/{name}'


def slim_name(path: Path) -> str | None:
  """Returns slim's name of a backbone variable, None for other variables."""
  part, *layers, leaf = path[1:]
  if part != 'backbone' or not layers or not layers[0].startswith('conv2d_'):
    return None
  kind = [layer for layer in layers[1:] if layer != 'norm']
  layer = '_'.join([layers[0].capitalize(), *kind])
  return f'MobilenetV1/{layer}/{_slim_leaf(layers, leaf)}'


def keras_name(path: Path) -> str | None:
  """Returns Keras' name of a backbone variable, None for other variables."""
  part, *layers, leaf = path[1:]
  if part != 'backbone' or not layers or not layers[0].startswith('conv2d_'):
    return None
  block = layers[0].removeprefix('conv2d_')
  layer = 'conv1' if block == '0' else {
      'depthwise': f'conv_dw_{block}', 'pointwise': f'conv_pw_{block}'}.get(layers[1])
  norm = layers[-1] == 'norm'
  return layer and f'{layer}{"_bn" if norm else ""}/{_NORM[leaf] if norm else leaf}'


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
  if name.rpartition('/')[2] in ('global_step', 'learning_rate'):
    return 'the global step'
  if not _VARIABLE.search(name):
    return 'other values'
  block = re.search(r'(?:MobilenetV1/Conv2d_|^conv_[dp]w_)(\d+)(?:_depthwise|_pointwise|_bn)?/',
                    name)
  if block:
    return f'block {block[1]}'
  if re.search(r'(?:Aux)?Logits/|^conv_preds/', name):
    return "the classifier's logits"
  if re.search(rf'(?:^|/)({_SHARED}|BoxPredictor_\d+)/', name):
    return 'box predictor'
  return 'other layers'


def _slim_leaf(layers: list[str], leaf: str) -> str:
  if layers[-1] == 'norm':
    return f'BatchNorm/{_NORM[leaf]}'
  return 'depthwise_weights' if layers[-1] == 'depthwise' else 'weights'


def _neck_layer(layers: list[str]) -> str | None:
  if layers[0] == 'projection':
    return 'Base_Conv2d_1x1_#'
  i = layers[0].removeprefix('extra_')
  if len(layers) < 2 or not i.isdecimal():
    return None
  return {'reduce': f'Conv2d_#_pointwise_1_Conv2d_{i}_1x1_#',
          'shrink': f'Conv2d_#_pointwise_2_Conv2d_{i}_3x3_s2_#'}.get(layers[1])


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
