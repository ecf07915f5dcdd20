"""Weights files: the variables of a detector with all that rebuilds it, in one file to share.

A safetensors file. Tensors go by their path, such as 'params/backbone/conv2d_0/kernel'. Everything
else is JSON under one key of the file's metadata, since the library writes several in any order:

  version          of this layout
  precision        'float32' or 'float16'
  step             of the run
  config           blocks of the config that describe the detector and its input
  categories       [{'id': 1, 'name': 'cat'}, ...], in order of label
  preprocessing    what the input is and how it is resized, in words
  thresholds       scores and overlaps of post-processing, by name
  operating_point  best threshold of each class and calibration, if the step was evaluated; see
                   `metrics.operating_point`
  provenance       where the weights come from
  sha256           of all of the above and of the tensors

It holds no code. Arrays of one axis (biases, batch norm) are always float32: they are 2% of the
file, and a variance may be too large for float16.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ppn_jax import storage
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, StoreError

VERSION = 1
PRECISIONS = ('float32', 'float16')
SUFFIX = '.safetensors'
_KEY = 'ppn_jax'
_START = 8  # Bytes of the header's length, with which a safetensors file starts.
_MADE_BY = 'give a file of `ppn export --format=weights`'

# ('params', 'backbone', 'conv2d_0', 'kernel')
Path = tuple[str, ...]


class WeightsFile(NamedTuple):
  """Contents of a weights file, checked.

  Fields:
    path: path, for messages.
    values: NumPy arrays by path; float32 if they are numbers with a fraction.
    categories: classes in order of label.
    step: step of the run.
    header: everything else, see the module.
  """
  path: str
  values: dict[Path, np.ndarray]
  categories: tuple[Category, ...]
  step: int
  header: dict[str, Any]

  @property
  def description(self) -> str:
    """The file in words, for messages."""
    count = len(self.categories)
    return (f'a weights file of {count} class{"" if count == 1 else "es"}, step {self.step:,}'
            + (', float16' if self.header.get('precision') == 'float16' else ''))


def is_weights_file(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is that of a weights file, by its name or, if it exists, its start."""
  text = os.fspath(path)
  if '://' in text:
    return text.endswith(SUFFIX)
  local = storage.local_path(path)
  if local.is_dir() or text.lower().endswith(SUFFIX):
    return not local.is_dir()
  try:
    with local.open('rb') as file:
      start = file.read(_START + 1)
    return (start[_START:] == b'{' and
            2 <= int.from_bytes(start[:_START], 'little') <= local.stat().st_size - _START)
  except OSError:
    return False


def write_weights_file(path: str | os.PathLike[str], values: Mapping[Path, np.ndarray], *,
                       precision: str, step: int, categories: tuple[Category, ...],
                       **header: Any) -> None:
  """Writes a weights file; the same arguments give the same bytes.

  Args:
    path: path of the local file, which is replaced.
    values: arrays by path.
    precision: one of `PRECISIONS`, of arrays with two or more axes.
    step, categories: see `WeightsFile`.
    **header: further entries, as values of JSON.

  Raises:
    InputError: If a value is not finite, or too large for float16.
  """
  tensors = {'/'.join(key): _stored(key, value, precision) for key, value in values.items()}
  described = {'version': VERSION, 'precision': precision, 'step': step,
               'categories': [c._asdict() for c in categories], **header}
  text = json.dumps(described | {'sha256': _digest(described, tensors)}, allow_nan=False)
  # The library's own `save_file` makes files that only their owner can read.
  storage.local_path(path).write_bytes(safetensors.numpy.save(tensors, metadata={_KEY: text}))


def read_weights_file(path: str | os.PathLike[str]) -> WeightsFile:
  """Reads and checks a weights file, local or gs://BUCKET/FILE.

  Raises:
    InputError: If there is no such file, it is damaged, of another program, or of a newer version
      of this package, or it holds values that no weights have.
  """
  where = storage.folder_path(path, 'the file')
  try:
    data = storage.read_bytes(where)
  except FileNotFoundError as e:
    raise InputError(f'no file {path}; {_MADE_BY}') from e
  except StoreError:
    raise
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}') from e
  header, tensors = _parse(data, str(path))
  digest = header.pop('sha256', None)
  if digest != _digest(header, tensors):
    raise InputError(f'{path}: damaged: its contents differ from its checksum; copy it again')
  try:
    step, categories = header.pop('step'), _categories(header.pop('categories'))
    if type(step) is not int or step < 0 or not isinstance(header['config'], dict):
      raise ValueError('no step or config')
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(f'{path}: its description cannot be used: {e!r}; {_MADE_BY}') from e
  values = {tuple(name.split('/')): _read_value(str(path), name, tensor)
            for name, tensor in tensors.items()}
  return WeightsFile(str(storage.absolute(where)), values, categories, step, header)


def _parse(data: bytes, path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns the metadata and the tensors; raises InputError if they are not of a weights file."""
  if not data:
    raise InputError(f'{path}: the file is empty; copy it again')
  try:
    tensors = safetensors.numpy.load(data)
    length = int.from_bytes(data[:_START], 'little')
    metadata = json.loads(data[_START:_START + length]).get('__metadata__') or {}
  except Exception as e:  # The library raises its own, and KeyError or others for unknown types.
    raise InputError(f'{path}: damaged, or not a safetensors file: '
                     f'{" ".join(str(e).split())[:200]}; copy it again') from e
  try:
    header = json.loads(metadata[_KEY])
    version = header['version']
  except (KeyError, ValueError, TypeError, RecursionError) as e:
    names = ', '.join(sorted(tensors)[:3]) or 'none'
    raise InputError(f'{path}: a safetensors file of another program (tensors: {names}, ...), '
                     f'without the description of a detector; {_MADE_BY}') from e
  if version != VERSION:
    raise InputError(f'{path}: layout {version!r}, and this version of ppn_jax reads {VERSION}; '
                     'install the ppn_jax that wrote it, or a newer one')
  return header, tensors


def _digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 of a header and of names, types, shapes and bytes of tensors."""
  digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
  for name, tensor in sorted(tensors.items()):
    digest.update(json.dumps([name, tensor.dtype.str, tensor.shape]).encode())
    digest.update(np.ascontiguousarray(tensor).tobytes())
  return digest.hexdigest()


def _categories(rows: Any) -> tuple[Category, ...]:
  categories = tuple(Category(row['id'], row['name']) for row in rows)
  for number, name in categories:
    if type(number) is not int or not isinstance(name, str):
      raise ValueError(f'class {name!r} with id {number!r}')
  if not categories or len({c.id for c in categories}) < len(categories):
    raise ValueError('no classes, or two with the same id')
  return categories


def _stored(path: Path, value: np.ndarray, precision: str) -> np.ndarray:
  """Returns an array as the file holds it."""
  value, name = np.asarray(value), '/'.join(path)
  if value.dtype.kind in 'iub':
    return np.array(value, order='C')
  kind = np.float16 if precision == 'float16' and value.ndim > 1 else np.float32
  if not np.isfinite(value).all():
    raise InputError(f'{name} has values that are not finite; use another step')
  with np.errstate(over='ignore'):
    stored = np.array(value, kind, order='C')
  if not np.isfinite(stored).all():
    raise InputError(f'{name} has a value of {np.abs(value).max():.3g}, and {kind.__name__} ends '
                     f'at {np.finfo(kind).max:.3g}; use --precision=float32')
  return stored


def _read_value(path: str, name: str, tensor: np.ndarray) -> np.ndarray:
  """Returns an array in memory of its own, fractions as float32."""
  if tensor.dtype.kind in 'iub':
    return np.array(tensor)
  if tensor.dtype not in (np.float16, np.float32):
    raise InputError(f'{path}: {name} is {tensor.dtype}, not float16 or float32')
  value = np.array(tensor, np.float32)
  if not np.isfinite(value).all():
    raise InputError(f'{path}: {name} has values that are not finite')
  if name.endswith('/var') and value.min(initial=math.inf) < 0:
    raise InputError(f'{path}: {name} is a variance and has negative values')
  return value
