"""LevelDB's sorted string table, the format of a TensorFlow bundle's index.

Blocks of entries, each followed by a byte for the compression and a masked crc32c; an index block
with a handle for every data block; and a footer that holds the index block's handle (LevelDB,
doc/table_format.md). TensorFlow writes such tables uncompressed.
"""

from collections.abc import Iterator

import google_crc32c

from ppn_jax.errors import InputError

MAGIC = bytes.fromhex('57fb808b247547db')
FOOTER = 48  # Two handles, padded to 40 bytes, and the magic number.
TRAILER = 5  # Type and crc.

# Bytes of keys for a byte of the table, and besides. Names of variables share prefixes, but each
# entry has some 40 bytes of its own.
_MOST_SHARED, _FREE_KEYS = 16, 2**20


class Damaged(Exception):
  """The bytes are not what a writer of this format leaves; the message says in what."""


def masked_crc32c(data: bytes) -> int:
  """CRC-32C of `data`, rotated and shifted as LevelDB and TensorFlow store it."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def read_table(data: bytes, name: str) -> dict[bytes, bytes]:
  """All entries of a table.

  Args:
    data: the whole file.
    name: of the file, for messages.

  Raises:
    InputError: not such a table, cut short, a checksum that is not right, or a compression.
  """
  if len(data) < FOOTER or not data.endswith(MAGIC):
    raise InputError(f'{name}: not the index of a TensorFlow checkpoint, or cut short: it does not '
                     'end in the magic number of one')
  try:
    _, position = _handle(data, len(data) - FOOTER)  # The meta index, empty in TensorFlow's.
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
  """(value, position behind it) of the base-128 number at `position`."""
  value = 0
  for shift in range(0, 64, 7):
    if position >= len(data):
      raise Damaged('a number is cut short')
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, position
  raise Damaged('a number is longer than 64 bits')


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
  offset, position = read_varint(data, position)
  size, position = read_varint(data, position)
  return (offset, size), position


def _block(data: bytes, offset: int, size: int) -> bytes:
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


def _entries(block: bytes, most: int) -> Iterator[tuple[bytes, bytes]]:
  """(key, value) of each entry; a key shares a prefix with the one before it.

  All keys together have at most so many bytes: what they share stands in the block once only.
  """
  restarts = int.from_bytes(block[-4:], 'little')
  end = len(block) - 4 - 4 * restarts
  if end < 0:
    raise Damaged('a block without its list of restarts')
  key, position = b'', 0
  while position < end:
    shared, position = read_varint(block, position)
    unshared, position = read_varint(block, position)
    length, position = read_varint(block, position)
    if shared > len(key) or position + unshared + length > end:
      raise Damaged('an entry reaches beyond its block')
    most -= shared + unshared
    if most < 0:
      raise Damaged('its keys are longer than so few bytes can tell')
    key = key[:shared] + block[position:position + unshared]
    position += unshared + length
    yield key, block[position - length:position]
