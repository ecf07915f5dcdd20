"""Writers of weight files in the layouts of TensorFlow and Keras.

Checked once against TensorFlow 2.21 and Keras 3.0 and 3.15.
"""

import pathlib
import re

import numpy as np
from tensorboardX.proto import types_pb2
from tensorboardX.proto.graph_pb2 import GraphDef

from ppn_jax.weights.tf_bundle import MAGIC, masked_crc32c
from ppn_jax.weights.tf_protos import BundleEntry, BundleHeader

TYPES = {'float32': 'DT_FLOAT', 'float64': 'DT_DOUBLE', 'float16': 'DT_HALF', 'int64': 'DT_INT64',
         'bfloat16': 'DT_BFLOAT16', 'int32': 'DT_INT32', 'bool': 'DT_BOOL'}
NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')


def write_bundle(prefix, tensors, *, shards=1, block_size=2000, header=None, compression=0,
                 change=lambda name, entry: None):
  """Writes PREFIX.index and its shards, over which tensors are distributed in turn."""
  entries = {b'': (header or BundleHeader(num_shards=shards)).SerializeToString()}
  data = [b''] * shards
  for i, name in enumerate(sorted(tensors)):
    array = np.asarray(tensors[name])
    raw, shard = array.tobytes(), i % shards
    entry = BundleEntry(dtype=types_pb2.DataType.Value(TYPES[array.dtype.name]), shard_id=shard,
                        offset=len(data[shard]), size=len(raw), crc32c=masked_crc32c(raw))
    for side in array.shape:
      entry.shape.dim.add(size=side)
    change(name, entry)
    entries[name.encode()] = entry.SerializeToString()
    data[shard] += raw
  prefix = pathlib.Path(prefix)
  for i, raw in enumerate(data):
    prefix.with_name(f'{prefix.name}.data-{i:05}-of-{shards:05}').write_bytes(raw)
  prefix.with_name(prefix.name + '.index').write_bytes(table(entries, block_size, compression))
  return prefix


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
