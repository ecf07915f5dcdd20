"""TensorFlow's V2 checkpoints ("tensor bundles"), without TensorFlow.

PREFIX.index is a table (`sstable`) from variable names to entries: type, shape, and where in the
shards PREFIX.data-00000-of-00001 the raw little-endian values lie, with their checksum
(tensorflow/core/util/tensor_bundle).
"""

import pathlib
from collections.abc import Mapping

import numpy as np
from google.protobuf.message import DecodeError

from ppn_jax.errors import InputError
from ppn_jax.weights.dtypes import DTYPES, num_bytes, shape_of, type_name
from ppn_jax.weights.limits import Limit
from ppn_jax.weights.protos import BundleEntry, BundleHeader
from ppn_jax.weights.sstable import masked_crc32c, read_table

# TF 2's object-based checkpoints name values by their way through objects, not by variable.
OBJECT_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'


def read_tf_bundle(prefix: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Every variable of PREFIX.index and its shards, by name; strings are left out.

  All checksums are checked, also those of variables that nobody will ask for.

  Raises:
    InputError: a file that is missing, cut short or damaged, or a kind of checkpoint that this
      does not read: of a big-endian machine, object-based, or with variables in slices.
  """
  prefix = pathlib.Path(prefix)
  index = prefix.with_name(prefix.name + '.index')
  if not index.is_file():
    raise InputError(f'no checkpoint at {prefix}: there is no file {index}')
  table = read_table(index.read_bytes(), str(index))
  header = _parse(BundleHeader, table.pop(b'', b''), index, 'header')
  if header.endianness:
    raise InputError(f'{index}: written on a big-endian machine, which is not supported')
  if OBJECT_GRAPH.encode() in table:
    raise InputError(
        f'{index}: an object-based checkpoint of TensorFlow 2, whose values are not named after '
        'variables; import the frozen graph or the Keras file of this model instead')
  entries = {key.decode('utf-8', 'replace'): _parse(BundleEntry, value, index, repr(key))
             for key, value in table.items()}
  entries = {name: entry for name, entry in entries.items()
             if type_name(entry.dtype) != 'DT_STRING'}
  shards = _Shards(prefix, header.num_shards)
  shards.check(entries)
  return {name: shards.read(name, entry) for name, entry in entries.items()}


def _parse(message: type, data: bytes, index: pathlib.Path, what: str):
  try:
    return message.FromString(data)
  except DecodeError as e:
    raise InputError(f'{index}: the entry of {what} cannot be read: {e}') from e


class _Shards:
  """The data files of a bundle, each read when it is first needed."""

  def __init__(self, prefix: pathlib.Path, count: int):
    self._prefix, self._count = prefix, count
    self._data: dict[int, memoryview] = {}

  def check(self, entries: Mapping[str, BundleEntry]) -> None:
    """Checks all that can be known of the variables before one is read.

    Raises:
      InputError: a type that is not known, a shape and a size that differ, or more bytes of
        variables than the shards have.
    """
    for name, entry in entries.items():
      kind, shape = type_name(entry.dtype), shape_of(entry.shape)
      if kind not in DTYPES:
        raise InputError(f'{self._prefix}: {name} is of type {kind}; legal: {", ".join(DTYPES)}')
      if entry.slices:
        raise InputError(f'{self._prefix}: {name} is stored in slices (a partitioned variable); '
                         'save it whole')
      if shape is None or num_bytes(shape, DTYPES[kind]) != entry.size:
        raise InputError(f'{self._prefix}.index: damaged: {name} has {entry.size} bytes for {kind} '
                         f'{"of no known shape" if shape is None else list(shape)}')
    stored = {shard: len(self._shard(shard)) for shard in {e.shard_id for e in entries.values()}}
    limit, left = Limit(f'{self._prefix}.index', sum(stored.values())), stored.copy()
    for name, entry in entries.items():
      limit.claim(name, shape_of(entry.shape), np.dtype(DTYPES[type_name(entry.dtype)]).itemsize)
      left[entry.shard_id] -= entry.size
    for shard, rest in left.items():
      # Each variable has bytes of its own. Where one shard is cut short, `read` says which it is.
      if rest < 0 and all(0 <= e.offset <= stored[shard] - e.size for e in entries.values()
                          if e.shard_id == shard):
        raise InputError(f'{self._path(shard)}: damaged: its variables overlap; copy the '
                         'checkpoint again')

  def read(self, name: str, entry: BundleEntry) -> np.ndarray:
    """The value of a variable that `check` has passed.

    Raises:
      InputError: values that are not there, whole and unchanged.
    """
    kind, shape = type_name(entry.dtype), shape_of(entry.shape)
    data = self._shard(entry.shard_id)[max(entry.offset, 0):max(entry.offset, 0) + entry.size]
    if entry.offset < 0 or len(data) != entry.size:
      raise InputError(f'{self._path(entry.shard_id)}: cut short: {name} should be {entry.size} '
                       f'bytes at {entry.offset}; copy the checkpoint again')
    if masked_crc32c(bytes(data)) != entry.crc32c:
      raise InputError(f'{self._path(entry.shard_id)}: damaged: the checksum of {name} is wrong; '
                       'copy the checkpoint again')
    return np.frombuffer(data, DTYPES[kind]).reshape(shape)

  def _path(self, shard: int) -> pathlib.Path:
    return self._prefix.with_name(f'{self._prefix.name}.data-{shard:05}-of-{self._count:05}')

  def _shard(self, shard: int) -> memoryview:
    if shard not in self._data:
      if not 0 <= shard < self._count:
        raise InputError(f'{self._prefix}.index: damaged: it names shard {shard} of {self._count}')
      if not self._path(shard).is_file():
        raise InputError(f'{self._prefix}: no file {self._path(shard).name}, shard {shard + 1} of '
                         f'{self._count}')
      self._data[shard] = memoryview(self._path(shard).read_bytes())
    return self._data[shard]
