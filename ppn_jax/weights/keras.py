"""Keras' MobileNet: weights and models in HDF5, and .keras archives, of Keras 2 and 3.

The network is that of slim's: the same layers, scaling to [-1, 1] and batch norm's epsilon of 1e-3.
One thing differs. Before a convolution of stride 2, Keras pads by one row and column at the end,
always; slim, and so this package, pads 'SAME', which is (0, 1) for even sizes but (1, 1) for odd
ones. Keras' weights were learned at 224 px, where every such size is even.
"""

import io
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ppn_jax.errors import InputError
from ppn_jax.weights.limits import Limit

_NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')
# Filters of HDF5 that leave the number of bytes as it is, but for a checksum.
_PLAIN_FILTERS = {2: 'shuffle', 3: 'fletcher32'}
HDF5_MAGIC = b'\x89HDF\r\n\x1a\n'


def read_keras_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Every weight of a Keras file as 'layer/weight', such as 'conv_dw_1_bn/gamma'.

  A kernel is called 'kernel' whatever its layer, also where Keras 2 has 'depthwise_kernel'.
  Keras 3 numbers the weights of a layer, which are named here by what such layers have. It also
  numbers layers, and only since 3.6 names them too; those of a MobileNet are known by their order.

  Args:
    path: .h5, .hdf5, .weights.h5 or .keras.

  Raises:
    InputError: no such file, not one of Keras', damaged, or h5py is not installed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'no Keras file at {path}')
  try:
    import h5py
  except ImportError as e:
    raise InputError(f"{path}: reading Keras' files needs h5py; "
                     "pip install 'ppn_jax[keras]'") from e
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
  # Whatever HDF5 makes of bytes that are not its own.
  except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise InputError(f'{path}: cannot be read as a Keras file: {e}') from e
  if not tensors:
    raise InputError(f'{path}: no weights of a Keras model in it')
  return tensors


def _hdf5(path: pathlib.Path) -> str | io.BytesIO:
  """What h5py is to open: the file, or the weights in an archive."""
  if not zipfile.is_zipfile(path):
    return str(path)
  try:
    with zipfile.ZipFile(path) as archive:
      entry = archive.getinfo('model.weights.h5')
      if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks others without a limit.
        raise InputError(f'{path}: model.weights.h5 in it is packed as Keras never does')
      Limit(str(path), path.stat().st_size).claim('model.weights.h5', (entry.file_size,), 1)
      return io.BytesIO(archive.read(entry))
  except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError, RuntimeError, OSError,
          zipfile.zlib.error) as e:
    raise InputError(f'{path}: not a .keras archive with model.weights.h5 in it, or damaged: {e}'
                     ) from e


def _check(dataset: Any, name: str, limit: Limit, where: str) -> None:
  """Checks that a dataset can be read into as much memory as it declares, and counts that.

  HDF5 promises space that it does not have: what was never written reads as zeros, and a chunk can
  be larger than its dataset, or unpack to any size.
  """
  plan = dataset.id.get_create_plist()
  filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
  if dataset.dtype.kind not in 'fiub':
    raise InputError(f'{where}: damaged: {name} is of type {dataset.dtype}')
  if dataset.is_virtual or dataset.external:
    raise InputError(f'{where}: {name} is stored in another file, which is not read')
  if not filters <= _PLAIN_FILTERS.keys():
    raise InputError(f"{where}: {name} is compressed, as Keras' files never are; unpack it with "
                     '`h5repack -f NONE FILE NEW_FILE`')
  for shape in filter(None, (dataset.shape, dataset.chunks)):
    limit.claim(name, shape, dataset.dtype.itemsize)


def _named(found: Mapping[str, np.ndarray], name_of: Callable[[str], str | None]
           ) -> dict[str, np.ndarray]:
  """Weights by their path in the file -> by 'layer/weight'.

  Args:
    found: all datasets.
    name_of: the name that newer files of Keras 3 give a group of numbered weights.
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
      tensors[f'{folders[-1]}/{weight_name}'] = weight
  in_order = _mobilenet_layers([layer.rpartition('/')[2] for layer in layers])
  for layer, weights in layers.items():
    # Names are asked for last: damaged ones are what HDF5 is slowest to give up on.
    name = in_order.get(layer.rpartition('/')[2]) or name_of(f'{layer}/vars') or layer
    names = _NORM if len(weights) == 4 else ('kernel', 'bias')
    for number, weight in weights.items():
      known = number.isdecimal() and int(number) < len(names)
      tensors[f'{name}/{names[int(number)] if known else number}'] = weight
  return tensors


def _mobilenet_layers(classes: list[str]) -> dict[str, str]:
  """'batch_normalization_2' -> 'conv_pw_1_bn' for the layers of a MobileNet; {} for another net's.

  Keras 3 numbers the layers of each class in the order in which they were made.
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
