"""Reads Keras' MobileNets: HDF5 files of weights or models and .keras archives, of Keras 2 and 3.

MobileNet-v1 equals slim's, with the same layers, scaling to [-1, 1] and a batch norm epsilon of
1e-3, but for one thing: before a convolution of stride 2, Keras always pads one row and column at
the end, whereas slim, and so this package, pads 'SAME', which is (0, 1) for even sizes and (1, 1)
for odd ones. Keras' weights were trained at 224 px, where all of these sizes are even.
Its MobileNet-v2 and v3 pad as 'SAME' does.
"""

import io
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ppn_jax.errors import InputError, install_command
from ppn_jax.weights.limits import Limit

_NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')
# HDF5 filters that keep the number of bytes, apart from a checksum.
_PLAIN_FILTERS = {2: 'shuffle', 3: 'fletcher32'}
HDF5_MAGIC = b'\x89HDF\r\n\x1a\n'


def read_keras_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all weights of a Keras file by 'layer/weight', such as 'conv_dw_1_bn/gamma'.

  All kernels are called 'kernel', also those that Keras 2 calls 'depthwise_kernel'. Keras 3
  numbers the weights of a layer; they get the names that such layers use. Before 3.6 it also
  numbers layers without naming them; those of a MobileNet are identified by their order.

  Args:
    path: a .h5, .hdf5, .weights.h5 or .keras file.

  Raises:
    InputError: If there is no such file, it is not a Keras file or damaged, or h5py is not
      installed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'no Keras file at {path}')
  try:
    import h5py
  except ImportError as e:
    raise InputError(f"{path}: reading Keras' files needs h5py; {install_command('keras')}") from e
  try:
    with h5py.File(_hdf5(path), 'r') as file:
      found, limit = {}, Limit(str(path), path.stat().st_size)
      file.visititems(lambda name, entry: (
          found.update({str(name): entry}) if isinstance(entry, h5py.Dataset) else None))
      for name, dataset in found.items():
        _check(dataset, name, limit, str(path))
      weights = {name: np.asarray(dataset[()]) for name, dataset in found.items()}
      tensors = _named(weights, lambda group: file[group].attrs.get('name'))
  except InputError:
    raise
  # HDF5 raises any of these for bytes that it cannot parse.
  except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise InputError(f'{path}: cannot be read as a Keras file: {e}') from e
  if not tensors:
    raise InputError(f'{path}: it contains no weights of a Keras model')
  return tensors


def _hdf5(path: pathlib.Path) -> str | io.BytesIO:
  """Returns what h5py should open: the path, or the weights in a .keras archive."""
  if not zipfile.is_zipfile(path):
    return str(path)
  try:
    with zipfile.ZipFile(path) as archive:
      entry = archive.getinfo('model.weights.h5')
      if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks other formats without a limit.
        raise InputError(f'{path}: model.weights.h5 in it is compressed in a way that Keras never '
                         'uses')
      Limit(str(path), path.stat().st_size).claim('model.weights.h5', (entry.file_size,), 1)
      return io.BytesIO(archive.read(entry))
  except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError, RuntimeError, OSError,
          zipfile.zlib.error) as e:
    raise InputError(f'{path}: not a .keras archive with model.weights.h5 in it, or damaged: {e}'
                     ) from e


def _check(dataset: Any, name: str, limit: Limit, where: str) -> None:
  """Checks that a dataset takes no more memory than it declares, and counts that memory.

  A small HDF5 file can declare any size: parts that were never written read as zeros, and a chunk
  can be larger than its dataset, or unpack to any size.
  """
  properties = dataset.id.get_create_plist()
  filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
  if dataset.dtype.kind not in 'fiub':
    raise InputError(f'{where}: damaged: {name} is of type {dataset.dtype}')
  if dataset.is_virtual or dataset.external:
    raise InputError(f'{where}: {name} is stored in another file, which is not read')
  if not filters <= _PLAIN_FILTERS.keys():
    raise InputError(f"{where}: {name} is compressed, which Keras' files never are; unpack it "
                     'with `h5repack -f NONE FILE NEW_FILE`')
  for shape in filter(None, (dataset.shape, dataset.chunks)):
    limit.claim(name, shape, dataset.dtype.itemsize)


def _named(found: Mapping[str, np.ndarray], name_of: Callable[[str], str | None]
           ) -> dict[str, np.ndarray]:
  """Returns weights by 'layer/weight' instead of their path in the file.

  Args:
    found: all datasets by path.
    name_of: returns the name that newer files of Keras 3 give a group of numbered weights.
  """
  layers, tensors = {}, {}
  for path, weight in found.items():
    *folders, last = path.split('/')
    if folders[:1] in (['optimizer'], ['optimizer_weights']) or not folders:
      continue
    if folders[-1] == 'vars':
      layers.setdefault('/'.join(folders[:-1]), {})[last] = weight
    else:
      weight_name = last.partition(':')[0].replace('depthwise_kernel', 'kernel')
      tensors[f'{_layer_name(folders)}/{weight_name}'] = weight
  if 'conv_bn/gamma' in tensors:  # Keras 2's v3: its layers without a slash have a capital.
    tensors = {name.replace('Conv', 'conv'): tensor for name, tensor in tensors.items()}
  in_order = _mobilenet_layers([layer.rpartition('/')[2] for layer in layers])
  for layer, weights in layers.items():
    # Names are read only if needed, because HDF5 takes long to reject damaged ones.
    name = in_order.get(layer.rpartition('/')[2]) or name_of(f'{layer}/vars') or layer
    names = _NORM if len(weights) == 4 else ('kernel', 'bias')
    for number, weight in weights.items():
      known = number.isdecimal() and int(number) < len(names)
      tensors[f'{name}/{names[int(number)] if known else number}'] = weight
  return tensors


def _layer_name(folders: list[str]) -> str:
  """Returns the layer of a weight of Keras 2, whose path repeats the layer's name.

  The MobileNet-v3 of Keras 2 has slashes in these names; they are given those of Keras 3:
  'expanded_conv_1/expand/BatchNorm' becomes 'expanded_conv_1_expand_bn'.
  """
  folders = folders[folders[0] == 'model_weights':]
  half = folders[:len(folders) // 2]
  if len(half) < 2 or folders != half * 2:
    return folders[-1]
  return '_'.join(half).replace('BatchNorm', 'bn').replace('Conv', 'conv')


def _mobilenet_layers(classes: list[str]) -> dict[str, str]:
  """Maps numbered layers of a MobileNet to names: 'batch_normalization_2' -> 'conv_pw_1_bn'.

  Keras 3 numbers the layers of each class in the order in which they were created. The mapping is
  empty for another network.
  """
  counts = {kind: sum(bool(re.fullmatch(rf'{kind}(_\d+)?', c)) for c in classes)
            for kind in ('conv2d', 'depthwise_conv2d', 'batch_normalization')}
  if counts not in ({'conv2d': n, 'depthwise_conv2d': 13, 'batch_normalization': 27}
                    for n in (14, 15)):  # The fifteenth is the classifier's.
    return {}
  names = {'conv2d': 'conv1', 'batch_normalization': 'conv1_bn', 'conv2d_14': 'conv_preds'}
  for i in range(1, 14):
    names |= {f'depthwise_conv2d_{i - 1}' if i > 1 else 'depthwise_conv2d': f'conv_dw_{i}',
              f'batch_normalization_{2 * i - 1}': f'conv_dw_{i}_bn',
              f'conv2d_{i}': f'conv_pw_{i}', f'batch_normalization_{2 * i}': f'conv_pw_{i}_bn'}
  return names
