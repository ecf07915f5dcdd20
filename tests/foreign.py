"""Writers of weight files in the layouts of TensorFlow and Keras.

Checked once against TensorFlow 2.21 and Keras 3.0 and 3.15, and the names and shapes of
`object_detector` against detectors that the TF Object Detection API built with TensorFlow 2.15.
"""

import pathlib
import re

import numpy as np
from tensorboardX.proto import types_pb2
from tensorboardX.proto.graph_pb2 import GraphDef

from ppn_jax.weights.tf_bundle import MAGIC, OBJECT_GRAPH, masked_crc32c
from ppn_jax.weights.tf_protos import BundleEntry, BundleHeader, TrackableObjectGraph

TYPES = {'float32': 'DT_FLOAT', 'float64': 'DT_DOUBLE', 'float16': 'DT_HALF', 'int64': 'DT_INT64',
         'bfloat16': 'DT_BFLOAT16', 'int32': 'DT_INT32', 'bool': 'DT_BOOL'}
NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')


def write_bundle(prefix, tensors, *, shards=1, block_size=2000, header=None, compression=0,
                 change=lambda name, entry: None):
  """Writes PREFIX.index and its shards, over which tensors are distributed in turn.

  A tensor may also be a string, given as bytes.
  """
  entries = {b'': (header or BundleHeader(num_shards=shards)).SerializeToString()}
  data = [b''] * shards
  for i, name in enumerate(sorted(tensors)):
    shard = i % shards
    if isinstance(tensors[name], bytes):
      kind, shape, (raw, crc) = 'DT_STRING', (), _string(tensors[name])
    else:
      array = np.asarray(tensors[name])
      kind, shape, raw = TYPES[array.dtype.name], array.shape, array.tobytes()
      crc = masked_crc32c(raw)
    entry = BundleEntry(dtype=types_pb2.DataType.Value(kind), shard_id=shard,
                        offset=len(data[shard]), size=len(raw), crc32c=crc)
    for side in shape:
      entry.shape.dim.add(size=side)
    change(name, entry)
    entries[name.encode()] = entry.SerializeToString()
    data[shard] += raw
  prefix = pathlib.Path(prefix)
  for i, raw in enumerate(data):
    prefix.with_name(f'{prefix.name}.data-{i:05}-of-{shards:05}').write_bytes(raw)
  prefix.with_name(prefix.name + '.index').write_bytes(table(entries, block_size, compression))
  return prefix


def _string(value):
  """Returns a string as it is stored, and its checksum."""
  length = len(value).to_bytes(4, 'little')
  rest = masked_crc32c(length).to_bytes(4, 'little') + value
  return varint(len(value)) + rest, masked_crc32c(length + rest)


VALUE = '/.ATTRIBUTES/VARIABLE_VALUE'


def write_objects(prefix, variables, *, full_names=True, **options):
  """Writes an object-based checkpoint of {path: (name in the program, array)}."""
  graph = TrackableObjectGraph()
  for path, (name, _) in variables.items():
    graph.nodes.add().attributes.add(name='VARIABLE_VALUE', checkpoint_key=path + VALUE,
                                     full_name=name if full_names else '')
  tensors = {path + VALUE: array for path, (_, array) in variables.items()}
  return write_bundle(prefix, {**tensors, OBJECT_GRAPH: graph.SerializeToString()}, **options)


def object_detector(kind='ssd', *, alpha=0.35, columns=4, seed=0):
  """Makes {path: (name in the program, array)} of a detector of TensorFlow 2's detection zoo.

  Args:
    kind: 'ssd' (ssd_mobilenet_v2_320x320), 'fpn' (ssd_mobilenet_v1_fpn_640x640) or 'fpnlite'
      (ssd_mobilenet_v2_fpnlite_320x320); of the two FPNs only some layers beside the backbone.
    alpha: depth multiplier.
    columns: class columns, background included.
  """
  rng, found, count, fine = np.random.default_rng(seed), {}, 0, 0
  extractor = 'model/_feature_extractor'
  version = 1 if kind == 'fpn' else 2

  def add(path, name, *shape):
    found[path] = name, rng.uniform(0.5, 1.5, shape).astype(np.float32)

  def add_norm(path, name, channels):
    for leaf in NORM:
      add(f'{path}/{leaf}', f'{name}/{leaf}', channels)

  def add_layer(layer, norm, *shape, leaf='kernel'):
    nonlocal count
    path = f'{extractor}/classification_backbone/layer_with_weights-'
    add(f'{path}{count}/{leaf}', f'{layer}/{leaf}', *shape)
    add_norm(f'{path}{count + 1}', norm, shape[2] if leaf == 'depthwise_kernel' else shape[3])
    count += 2

  def rounded(depth):
    if version == 1:
      return max(int(depth * alpha), 16)
    near = max(16, int(depth * alpha + 4) // 8 * 8)
    return near + 8 if near < 0.9 * depth * alpha else near

  channels = rounded(32)
  if version == 1:
    add_layer('conv1', 'conv1_bn', 3, 3, 3, channels)
    for i, depth in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024], start=1):
      add_layer(f'conv_dw_{i}', f'conv_dw_{i}_bn', 3, 3, channels, 1, leaf='depthwise_kernel')
      add_layer(f'conv_pw_{i}', f'conv_pw_{i}_bn', 1, 1, channels, rounded(depth))
      channels = rounded(depth)
  else:
    add_layer('Conv1', 'bn_Conv1', 3, 3, 3, channels)
    depths = [16, 24, 24, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    for i, depth in enumerate(depths):
      block, wide = (f'block_{i}', 6 * channels) if i else ('expanded_conv', channels)
      if i:
        add_layer(f'{block}_expand', f'{block}_expand_BN', 1, 1, channels, wide)
      fine = wide if i == 13 else fine
      add_layer(f'{block}_depthwise', f'{block}_depthwise_BN', 3, 3, wide, 1,
                leaf='depthwise_kernel')
      add_layer(f'{block}_project', f'{block}_project_BN', 1, 1, wide, rounded(depth))
      channels = rounded(depth)
    coarse = rounded(1280) if alpha < 1 else 1280
    add_layer('Conv_1', 'Conv_1_bn', 1, 1, channels, coarse)
    channels = coarse
  if kind == 'ssd':
    maps = [fine, coarse]
    for i, depth in enumerate([512, 256, 256, 128], start=2):
      narrow, depth = int(depth / 2 * alpha), int(depth * alpha)
      path = f'{extractor}/feature_map_generator/convolutions/{i}'
      name = 'ssd_mobile_net_v2_keras_feature_extractor/FeatureMaps/layer_19'
      for place, layer, *shape in [(0, f'1_Conv2d_{i}_1x1_{narrow}', 1, 1, maps[-1], narrow),
                                   (3, f'2_Conv2d_{i}_3x3_s2_{depth}', 3, 3, narrow, depth)]:
        add(f'{path}/{place}/kernel', f'{name}_{layer}_conv/kernel', *shape)
        add_norm(f'{path}/{place + 1}', f'{name}_{layer}_batchnorm', shape[-1])
      maps.append(depth)
    for i, depth in enumerate(maps):
      for what, part, layer, outputs in [
          ('box_encodings', 'box_encoder', 'ConvolutionalBoxHead_{}/BoxEncodingPredictor', 4),
          ('class_predictions_with_background', 'class_predictor',
           'ConvolutionalClassHead_{}/ClassPredictor', columns)]:
        path = f'model/_box_predictor/_prediction_heads/{what}/{i}/_{part}_layers/0'
        name = f'BoxPredictor/{layer.format(i)}'
        outputs *= 6 if i else 3
        add(f'{path}/kernel', f'{name}/kernel', 1, 1, depth, outputs)
        add(f'{path}/bias', f'{name}/bias', outputs)
  else:
    name = f'ssd_mobile_net_v{version}_fpn_keras_feature_extractor'
    shared = 'WeightSharedConvolutionalBoxPredictor'
    top = f'{extractor}/_fpn_features_generator/top_layers/0'
    first = f'{extractor}/_coarse_feature_layers/0'
    if kind == 'fpn':
      depth, coarse, tower, parts = 256, 'bottom_up_Conv2d_14', 'BoxPredictionTower', ['kernel']
    else:
      depth, coarse, tower = 128, 'bottom_up_Conv2d_20', 'PredictionTower'
      parts = ['depthwise_kernel', 'pointwise_kernel']
    add(f'{top}/kernel', f'{name}/FeatureMaps/top_down/projection_3/kernel', 1, 1, channels, depth)
    add(f'{top}/bias', f'{name}/FeatureMaps/top_down/projection_3/bias', depth)
    for leaf in parts:
      shape = {'kernel': (3, 3, depth, depth), 'depthwise_kernel': (3, 3, depth, 1),
               'pointwise_kernel': (1, 1, depth, depth)}[leaf]
      kind_of = '' if leaf == 'kernel' else '_depthwise'
      add(f'{first}/0/{leaf}', f'{name}/{coarse}{kind_of}_conv/{leaf}', *shape)
      add(f'model/_box_predictor/_head_scope_conv_layers/{tower}/0/{leaf}',
          f'{shared}/{tower}/conv2d_0/{leaf}', *shape)
    add_norm(f'{first}/1', f'{name}/{coarse}_batchnorm', depth)
    add_norm('model/_box_predictor/_base_tower_layers_for_heads/box_encodings/0/1',
             f'{shared}/{tower}/conv2d_0/BatchNorm/feature_0', depth)
  found['save_counter'] = 'save_counter', np.int64(1)
  return found


def table(entries, block_size=2000, compression=0):
  """Makes a sorted string table of several blocks whose keys share prefixes."""
  file, handles, block, size = b'', {}, {}, 0

  def add(entries):
    nonlocal file
    raw = _block(entries) + bytes([compression])
    handle = varint(len(file)) + varint(len(raw) - 1)
    file += raw + masked_crc32c(raw).to_bytes(4, 'little')
    return handle

  for key, value in sorted(entries.items()):
    block[key] = value
    size += len(key) + len(value)
    if size > block_size:
      handles[key], block, size = add(block), {}, 0
  if block:
    handles[max(block)] = add(block)
  footer = add({}) + add(handles)
  return file + footer.ljust(40, b'\0') + MAGIC


def varint(n):
  return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def _block(entries, restart_every=16):
  raw, restarts, last = b'', [], b''
  for i, (key, value) in enumerate(entries.items()):
    shared = 0
    if i % restart_every == 0:
      restarts.append(len(raw))
    else:
      while shared < min(len(key), len(last)) and key[shared] == last[shared]:
        shared += 1
    raw += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
    last = key
  restarts = restarts or [0]
  return raw + b''.join(r.to_bytes(4, 'little') for r in [*restarts, len(restarts)])


def write_graph(path, tensors):
  """Writes a frozen graph of constants, each read by an Identity."""
  graph = GraphDef()
  graph.node.add(name='image_tensor', op='Placeholder')
  for name, array in tensors.items():
    node = graph.node.add(name=name, op='Const')
    proto = node.attr['value'].tensor
    proto.dtype = types_pb2.DataType.Value(TYPES[array.dtype.name])
    proto.tensor_content = array.tobytes()
    for side in array.shape:
      proto.tensor_shape.dim.add(size=side)
    graph.node.add(name=f'{name}/read', op='Identity', input=[name])
  pathlib.Path(path).write_bytes(graph.SerializeToString())


def keras_mobilenet(alpha=0.25, seed=0):
  """Makes {(layer, weight): array} of a MobileNet without classifier, in order of layers."""
  rng = np.random.default_rng(seed)
  weights = {}

  def add(layer, *shape):
    weights[layer, 'kernel'] = rng.normal(size=shape).astype(np.float32)
    channels = shape[3] if layer != 'conv_dw' and shape[3] > 1 else shape[2]
    for name in NORM:
      weights[f'{layer}_bn', name] = rng.uniform(0.5, 1, channels).astype(np.float32)

  depths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
  depths = [max(int(d * alpha), 8) for d in depths]
  add('conv1', 3, 3, 3, depths[0])
  for i in range(1, 14):
    add(f'conv_dw_{i}', 3, 3, depths[i - 1], 1)
    add(f'conv_pw_{i}', 1, 1, depths[i - 1], depths[i])
  return weights


def keras_names(variables, network):
  """Returns {(layer, weight): array} of a backbone's variables, in Keras' names and layout."""
  from flax.traverse_util import flatten_dict

  from ppn_jax.weights.names import keras_name
  named = {}
  for path, value in flatten_dict(variables).items():
    name = keras_name(path, network)
    depthwise = path[-2:] == ('depthwise', 'kernel')
    named[tuple(name.split('/'))] = np.swapaxes(value, 2, 3) if depthwise else np.asarray(value)
  return named


def write_keras_2(path, weights, *, model=False, depthwise='depthwise_kernel', suffix=':0'):
  """Writes HDF5 weights or a model of Keras 2; for Keras 3's .h5 change the last two options."""
  import h5py
  with h5py.File(path, 'w') as file:
    group = file.create_group('model_weights') if model else file
    layers = list(dict.fromkeys(layer for layer, _ in weights))
    group.attrs['layer_names'] = [n.encode() for n in layers]
    for (layer, name), array in weights.items():
      name = depthwise if re.search('conv_dw|depthwise$', layer) and name == 'kernel' else name
      group.require_group(layer)[f'{layer}/{name}{suffix}'] = array
    if model:
      file['optimizer_weights/Adam/conv1/kernel:0'] = np.zeros(3)


def write_keras_3(file, weights, *, layer_names=True):
  """Writes .weights.h5 of Keras 3; files before 3.6 have no `layer_names`."""
  import h5py
  counts, numbers = {}, {}
  with h5py.File(file, 'w') as h5:
    h5.create_group('vars')
    for (layer, _), array in weights.items():
      if layer not in numbers:
        kind = ('batch_normalization' if layer.endswith('_bn') else
                'depthwise_conv2d' if layer.startswith('conv_dw') else 'conv2d')
        number = counts[kind] = counts.get(kind, -1) + 1
        numbers[layer] = f'layers/{kind}_{number}/vars' if number else f'layers/{kind}/vars'
        if layer_names:
          h5.create_group(numbers[layer]).attrs['name'] = layer
      group = h5.require_group(numbers[layer])
      group[str(len(group))] = array
