"""Reads TensorFlow's V2 checkpoints ("tensor bundles") without TensorFlow.

PREFIX.index is a table from variable names to entries: type, shape, and the place and checksum of
the raw little-endian values in the shards PREFIX.data-00000-of-00001
(tensorflow/core/util/tensor_bundle).

The table has the format of LevelDB (doc/table_format.md): blocks of entries, each followed by a
byte for the compression and a masked crc32c; an index block with a handle for every data block; and
a footer that holds the index block's handle. TensorFlow writes such tables uncompressed.
"""

import pathlib
from collections.abc import Iterator, Mapping

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

from ppn_jax.errors import InputError
from ppn_jax.weights.limits import Limit
from ppn_jax.weights.tf_protos import (
  DTYPES,
  BundleEntry,
  BundleHeader,
  num_bytes,
  shape_of,
  type_name,
)

# Entry of TensorFlow 2's object-based checkpoints, which name values by their path through Python
# objects; see `object_graph`.
OBJECT_GRAPH = '_CHECKPOINTABLE_OBJECT_GRAPH'
MAGIC = bytes.fromhex('57fb808b247547db')
FOOTER = 48  # Two handles, padded to 40 bytes, and the magic number.
TRAILER = 5  # Type and crc.

# Bytes of keys allowed for each byte of the table, plus a constant. Keys share prefixes, so a few
# bytes could expand to gigabytes; in a real index each entry has some 40 bytes of its own.
_MOST_SHARED, _FREE_KEYS = 16, 2**20


def read_tf_bundle(prefix: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all variables of a checkpoint.

  All checksums are verified.

  Args:
    prefix: PREFIX of PREFIX.index and its shards.

  Returns:
    Arrays by variable name, or by key in an object-based checkpoint. Strings are left out, except
    for the object graph: [n] uint8, the bytes of its protocol buffer, as `OBJECT_GRAPH`.

  Raises:
    InputError: If a file is missing, truncated or damaged, or the checkpoint is of a kind that is
      not supported: written on a big-endian machine, or with sliced variables.
  """
  prefix = pathlib.Path(prefix)
  index = prefix.with_name(prefix.name + '.index')
  if not index.is_file():
    raise InputError(f'no checkpoint at {prefix}: there is no file {index}')
  table = read_table(index.read_bytes(), str(index))
  header = _parse(BundleHeader, table.pop(b'', b''), index, 'header')
  if header.endianness:
    raise InputError(f'{index}: written on a big-endian machine, which is not supported')
  entries = {key.decode('utf-8', 'replace'): _parse(BundleEntry, value, index, repr(key))
             for key, value in table.items()}
  graph = entries.get(OBJECT_GRAPH)
  entries = {name: entry for name, entry in entries.items()
             if type_name(entry.dtype) != 'DT_STRING'}
  shards = _Shards(prefix, header.num_shards)
  shards.check(entries)
  tensors = {name: shards.read(name, entry) for name, entry in entries.items()}
  if graph is not None:
    tensors[OBJECT_GRAPH] = np.frombuffer(shards.read_string(OBJECT_GRAPH, graph), np.uint8)
  return tensors


def _parse(message: type, data: bytes, index: pathlib.Path, what: str):
  """Parses one entry of the index."""
  try:
    return message.FromString(data)
  except DecodeError as e:
    raise InputError(f'{index}: the entry of {what} cannot be read: {e}') from e


class _Shards:
  """Data files of a bundle, each read when it is first needed."""

  def __init__(self, prefix: pathlib.Path, count: int):
    self._prefix, self._count = prefix, count
    self._data: dict[int, memoryview] = {}

  def check(self, entries: Mapping[str, BundleEntry]) -> None:
    """Checks the types, shapes and sizes of all variables before any is read.

    Raises:
      InputError: If a type is unknown, a size does not match its shape, or the variables need more
        bytes than the shards have.
    """
    for name, entry in entries.items():
      kind, shape = type_name(entry.dtype), shape_of(entry.shape)
      if kind not in DTYPES:
        raise InputError(f'{self._prefix}: {name} is of type {kind}; legal: {", ".join(DTYPES)}')
      if entry.slices:
        raise InputError(f'{self._prefix}: {name} is stored in slices (a partitioned variable), '
                         'which are not read; save it unpartitioned')
      if shape is None or num_bytes(shape, DTYPES[kind]) != entry.size:
        raise InputError(f'{self._prefix}.index: damaged: {name} has {entry.size} bytes for {kind} '
                         f'{"of unknown shape" if shape is None else list(shape)}')
    stored = {shard: len(self._shard(shard)) for shard in {e.shard_id for e in entries.values()}}
    limit, left = Limit(f'{self._prefix}.index', sum(stored.values())), stored.copy()
    for name, entry in entries.items():
      limit.claim(name, shape_of(entry.shape), np.dtype(DTYPES[type_name(entry.dtype)]).itemsize)
      left[entry.shard_id] -= entry.size
    for shard, rest in left.items():
      # Variables must not share bytes. If a shard is truncated, `read` names the variable instead.
      if rest < 0 and all(0 <= e.offset <= stored[shard] - e.size for e in entries.values()
                          if e.shard_id == shard):
        raise InputError(f'{self._path(shard)}: damaged: its variables overlap; copy the '
                         'checkpoint again')

  def read(self, name: str, entry: BundleEntry) -> np.ndarray:
    """Returns the value of a variable that passed `check`.

    Raises:
      InputError: If its bytes are missing or do not match their checksum.
    """
    kind, shape = type_name(entry.dtype), shape_of(entry.shape)
    data = self._bytes(name, entry)
    self._check_crc(name, entry, data)
    return np.frombuffer(data, DTYPES[kind]).reshape(shape)

  def read_string(self, name: str, entry: BundleEntry) -> bytes:
    """Returns the only string of an entry.

    It is stored as its length, the masked crc32c of the length as 4 bytes, and its own bytes. The
    entry's checksum is that of all three, but with the length as 4 bytes.

    Raises:
      InputError: If it is not a single string, its bytes are missing or do not match their
        checksum.
    """
    data = bytes(self._bytes(name, entry))
    damaged = f'{self._path(entry.shard_id)}: damaged: {name}'
    try:
      length, start = read_varint(data, 0)
    except Damaged as e:
      raise InputError(f'{damaged}: {e}; copy the checkpoint again') from e
    if type_name(entry.dtype) != 'DT_STRING' or shape_of(entry.shape) != () or (
        length != len(data) - start - 4):
      raise InputError(f'{damaged} is not a single string; copy the checkpoint again')
    self._check_crc(name, entry, length.to_bytes(8, 'little')[:4] + data[start:])
    return data[start + 4:]

  def _bytes(self, name: str, entry: BundleEntry) -> memoryview:
    """Returns the bytes of an entry; raises InputError if some are missing."""
    data = self._shard(entry.shard_id)[max(entry.offset, 0):max(entry.offset, 0) + entry.size]
    if entry.offset < 0 or len(data) != entry.size:
      raise InputError(f'{self._path(entry.shard_id)}: truncated: {name} should be {entry.size} '
                       f'bytes at {entry.offset}; copy the checkpoint again')
    return data

  def _check_crc(self, name: str, entry: BundleEntry, data: bytes | memoryview) -> None:
    """Raises InputError if `data` does not have the checksum of an entry."""
    if masked_crc32c(bytes(data)) != entry.crc32c:
      raise InputError(f'{self._path(entry.shard_id)}: damaged: the checksum of {name} is wrong; '
                       'copy the checkpoint again')

  def _path(self, shard: int) -> pathlib.Path:
    return self._prefix.with_name(f'{self._prefix.name}.data-{shard:05}-of-{self._count:05}')

  def _shard(self, shard: int) -> memoryview:
    if shard not in self._data:
      if not 0 <= shard < self._count:
        raise InputError(f'{self._prefix}.index: damaged: it refers to shard {shard} of '
                         f'{self._count}')
      if not self._path(shard).is_file():
        raise InputError(f'{self._prefix}: no file {self._path(shard).name}, shard {shard + 1} of '
                         f'{self._count}')
      self._data[shard] = memoryview(self._path(shard).read_bytes())
    return self._data[shard]


class Damaged(Exception):
  """Raised if bytes do not follow the table format; the message says how."""


def masked_crc32c(data: bytes) -> int:
  """Returns the CRC-32C of `data`, rotated and offset as LevelDB and TensorFlow store it."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def read_table(data: bytes, name: str) -> dict[bytes, bytes]:
  """Returns all entries of a table.

  Args:
    data: the whole file.
    name: file name for error messages.

  Raises:
    InputError: If this is not such a table, or it is truncated, compressed, or fails a checksum.
  """
  if len(data) < FOOTER or not data.endswith(MAGIC):
    raise InputError(f'{name}: not the index of a TensorFlow checkpoint, or truncated: it does '
                     'not end in the magic number of one')
  try:
    _, position = _handle(data, len(data) - FOOTER)  # The meta index is empty.
    index, _ = _handle(data, position)
    entries, last, left = {}, None, _FREE_KEYS + _MOST_SHARED * len(data)
    for handle in [value for _, value in _entries(_block(data, *index), len(data))]:
      for key, value in _entries(_block(data, *_handle(handle, 0)[0]), left):
        if last is not None and key <= last:
          raise Damaged(f'its keys are not in order at {last[:80]!r}')
        entries[key], last, left = value, key, left - len(key)
    return entries
  except Damaged as e:
    raise InputError(f'{name}: damaged: {e}; copy the checkpoint again') from e


def read_varint(data: bytes, position: int) -> tuple[int, int]:
  """Returns the base-128 number at `position`, and the position after it."""
  value = 0
  for shift in range(0, 64, 7):
    if position >= len(data):
      raise Damaged('a number is truncated')
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, position
  raise Damaged('a number is longer than 64 bits')


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
  """Returns the (offset, size) of a block stored at `position`, and the position after it."""
  offset, position = read_varint(data, position)
  size, position = read_varint(data, position)
  return (offset, size), position


def _block(data: bytes, offset: int, size: int) -> bytes:
  """Returns the content of a block, its checksum verified."""
  end = offset + size
  if end + TRAILER > len(data) - FOOTER:
    raise Damaged(f'a block of {size} bytes at {offset} lies outside the file')
  stored = int.from_bytes(data[end + 1:end + TRAILER], 'little')
  if masked_crc32c(data[offset:end + 1]) != stored:
    raise Damaged(f'the checksum of the block at {offset} is wrong')
  if data[end] != 0:
    raise Damaged(f'the block at {offset} is compressed (type {data[end]}), which TensorFlow '
                  'never writes')
  return data[offset:end]


def _entries(block: bytes, max_key_bytes: int) -> Iterator[tuple[bytes, bytes]]:
  """Yields the (key, value) of each entry; a key shares a prefix with the one before it.

  `max_key_bytes` limits the total size of all keys once their shared prefixes are expanded.
  """
  restarts = int.from_bytes(block[-4:], 'little')
  end = len(block) - 4 - 4 * restarts
  if end < 0:
    raise Damaged('a block lacks its list of restarts')
  key, position = b'', 0
  while position < end:
    shared, position = read_varint(block, position)
    unshared, position = read_varint(block, position)
    length, position = read_varint(block, position)
    if shared > len(key) or position + unshared + length > end:
      raise Damaged('an entry extends beyond its block')
    max_key_bytes -= shared + unshared
    if max_key_bytes < 0:
      raise Damaged('its keys are too long for a file of this size')
    key = key[:shared] + block[position:position + unshared]
    position += unshared + length
    yield key, block[position - length:position]
