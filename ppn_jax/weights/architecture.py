"""Finds the config entries of a network from the shapes of its weights."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppn_jax.models import mobilenet_v2
from ppn_jax.models.inverted_residual import round_depth
from ppn_jax.models.mobilenet_v1 import BLOCKS, MIN_DEPTH, STEM
from ppn_jax.weights import names

_MULTIPLIERS = (1.0, 0.75, 0.5, 0.25, 1.4, 0.35)  # The usual ones.
_OTHER_MIN_DEPTH = 16  # `min_depth` in the Object Detection API's configs; slim's is 8.


def depth_multiplier(features: Sequence[int], network: str = 'MobilenetV1'
                     ) -> tuple[float, int] | None:
  """Returns the depth multiplier and least depth that give a MobileNet its channels.

  Args:
    features: channels of the stem and of the first, second, ... block.
    network: 'MobilenetV1' or 'MobilenetV2'.

  Returns:
    (multiplier, least depth), the usual ones if several fit; None if none do.
  """
  depths = _depths(network)[:len(features)]
  if not features or len(depths) < len(features):
    return None
  rounded = round_depth if network == 'MobilenetV2' else lambda depth, least: max(int(depth), least)
  quotients = sorted({count / depth for depth, count in zip(depths, features, strict=True)})
  for multiplier in (*_MULTIPLIERS, *quotients):
    for least in (MIN_DEPTH, _OTHER_MIN_DEPTH):
      if list(features) == [rounded(depth * multiplier, least) for depth in depths]:
        return multiplier, least
  return None


def _depths(network: str) -> list[int]:
  """Returns the channels of a network's stem and blocks at a multiplier of 1; [] if unknown."""
  return {'MobilenetV1': [STEM, *(depth for depth, _ in BLOCKS)],
          'MobilenetV2': [mobilenet_v2.STEM, *(block.depth for block in mobilenet_v2.BLOCKS)]
          }.get(network, [])


def model_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  """Returns the config entries that the shapes of a known network's weights imply.

  Args:
    shapes: shapes of the weights by name, see `names`.

  Returns:
    Values by dotted key, such as {'model.backbone.depth_multiplier': 0.75}. Keys are left out where
    the shapes imply nothing.
  """
  contents = names.recognise(shapes)
  if contents.kind == 'unknown':
    return {}
  settings: dict[str, Any] = {}
  fitting = depth_multiplier(_backbone_features(shapes, contents), contents.network)
  if fitting is not None:
    settings['model.backbone.depth_multiplier'], least = fitting
    if least != MIN_DEPTH:
      settings['model.backbone.min_depth'] = least
    if contents.network == 'MobilenetV2':
      last = _channels(shapes, contents, ('conv_1', 'kernel'))
      if last not in (None, round_depth(mobilenet_v2.LAST * fitting[0], least)):
        settings['model.backbone.last_depth'] = last
  if contents.kind == 'ssd':
    settings |= _ssd_settings(shapes, contents.root)
  if contents.kind == 'ppn':
    tower = shapes.get(contents.root + str(names.detector_name(('params', 'head', 'tower_kernel'))))
    if tower is not None and len(tower) == 4:
      settings['model.head.depth'] = int(tower[-1])
  return settings


def _backbone_features(shapes: Mapping[str, tuple[int, ...]], contents: names.Contents
                       ) -> list[int]:
  """Returns the output channels of the stem and of the blocks that follow without a gap."""
  if contents.network == 'MobilenetV1':
    layers = [('conv2d_0', 'kernel'), *((f'conv2d_{i}', 'pointwise', 'kernel')
                                        for i in range(1, len(BLOCKS) + 1))]
  else:
    layers = [('conv', 'kernel'), *((f'expanded_conv_{i}' if i else 'expanded_conv', 'project',
                                     'kernel') for i in range(len(mobilenet_v2.BLOCKS)))]
  channels = (_channels(shapes, contents, layer) for layer in layers)
  return list(itertools.takewhile(lambda count: count is not None, channels))


def _channels(shapes: Mapping[str, tuple[int, ...]], contents: names.Contents,
              layer: tuple[str, ...]) -> int | None:
  """Returns the output channels of a backbone's kernel, None if there is none."""
  name_of = {'keras': names.keras_name, 'slim': names.slim_name}.get(
      contents.kind, names.detector_name)
  name = name_of(('params', 'backbone', *layer), contents.network)
  kernel = shapes.get(contents.root + str(name))
  return int(kernel[-1]) if kernel is not None and len(kernel) == 4 else None


def _ssd_settings(shapes: Mapping[str, tuple[int, ...]], root: str) -> dict[str, Any]:
  depths = {}
  for name, shape in shapes.items():
    found = re.search(
        r'/(?:Conv2d_\d+_pointwise|layer_\d+)_2_Conv2d_(\d+)_3x3_s2_\d+/weights$', name)
    if found and len(shape) == 4:
      depths[int(found[1])] = int(shape[-1])
  settings: dict[str, Any] = {}
  if depths:
    settings['model.neck.depths'] = tuple(depths[i] for i in sorted(depths))
  boxes = [shapes.get(f'{root}BoxPredictor_{level}/BoxEncodingPredictor/weights')
           for level in (0, 1)]
  if boxes[0] is not None and len(boxes[0]) == 4:
    settings['model.head.side'] = int(boxes[0][0])
    if boxes[1] is not None and len(boxes[1]) == 4:
      counts = [int(box[-1]) // 4 for box in boxes]
      if counts[0] in (3, counts[1]):
        settings['model.anchors.reduce_lowest_level'] = counts[0] < counts[1]
  return settings


def describe(settings: Mapping[str, Any]) -> str:
  """Writes entries as they are given on the command line: 'model.neck.depths=384,192'."""
  return ' '.join(f'{key}={",".join(map(str, value)) if isinstance(value, tuple) else value}'
                  for key, value in settings.items())
