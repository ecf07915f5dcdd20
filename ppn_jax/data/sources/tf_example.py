"""Reads TFRecord files and the tf.train.Examples in them, without TensorFlow.

Only what is asked for is read: the parser works on a memory-mapped file and steps over the image of
a record, of which it returns the place.
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import numpy as np

from ppn_jax.errors import InputError

_HEADER = struct.Struct('<QI')  # Length of the data, and the masked CRC32C of the length.
_FOOTER = 4  # Bytes of the CRC32C of the data.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # Wire types of protocol buffers.
Values = list[tuple[int, int]] | np.ndarray  # Places of byte strings, or numbers.


class Span(NamedTuple):
  """Bytes of a file."""
  start: int
  end: int


@contextlib.contextmanager
def mapped(path: str) -> Iterator[memoryview]:
  """Maps a file into memory.

  Raises:
    InputError: If it cannot be read.
  """
  try:
    with open(path, 'rb') as file:
      if not os.fstat(file.fileno()).st_size:  # It cannot be mapped.
        yield memoryview(b'')
        return
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
          yield view
        finally:
          view.release()
  except OSError as e:
    raise InputError(f'{path}: cannot be read: {e.strerror}') from e


def index_records(data: memoryview, path: str) -> tuple[list[Span], str]:
  """Finds the records of a TFRecord file by their lengths, whose checksums are checked.

  Args:
    data: The file.
    path: Its name, for messages.

  Returns:
    The place of each record, and the reason why what follows is no record, '' if nothing follows.

  Raises:
    InputError: If it is not a TFRecord file or is compressed.
  """
  spans, at, size = [], 0, len(data)
  if size >= 2 and bytes(data[:2]) == b'\x1f\x8b':
    raise InputError(f'{path}: compressed; decompress it with gunzip, since its records cannot be '
                     'found otherwise')
  while at < size:
    if at + _HEADER.size > size:
      return spans, f'{path}: byte {at:,}: ends within the length of record {len(spans)}'
    length, checksum = _HEADER.unpack(data[at:at + _HEADER.size])
    if checksum != masked_crc(bytes(data[at:at + 8])):
      if not spans:
        raise InputError(f'{path}: not a TFRecord file: its first length has a wrong checksum')
      return spans, f'{path}: byte {at:,}: the length of record {len(spans)} has a wrong checksum'
    end = at + _HEADER.size + length
    if end + _FOOTER > size:
      return spans, (f'{path}: byte {at:,}: record {len(spans)} has {length:,} bytes, but the file '
                     f'ends after {max(size - at - _HEADER.size, 0):,}')
    spans.append(Span(at + _HEADER.size, end))
    at = end + _FOOTER
  return spans, ''


def masked_crc(data: bytes) -> int:
  """Computes TFRecord's checksum: a rotated CRC32C plus a constant."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: memoryview, span: Span) -> dict[str, Values]:
  """Parses a tf.train.Example.

  Args:
    data: The file.
    span: The place of the message in it.

  Returns:
    Name of a feature -> f32 or i64 [N], or N places of byte strings in the file.

  Raises:
    ValueError: If it is not one.
  """
  features: dict[str, Values] = {}
  for number, kind, example in _fields(data, span):
    if (number, kind) != (1, _BYTES):  # Example.features
      continue
    for number, kind, entry in _fields(data, example):
      if (number, kind) == (1, _BYTES):  # Features.feature, a map
        key, value = '', Span(0, 0)
        for number, kind, part in _fields(data, entry):
          if kind == _BYTES and number == 1:
            key = bytes(data[part.start:part.end]).decode('utf-8', 'replace')
          elif kind == _BYTES and number == 2:
            value = part
        features[key] = _values(data, value)
  return features


def _values(data: memoryview, feature: Span) -> Values:
  """Returns the values of a Feature: a list of bytes (1), floats (2) or integers (3)."""
  for number, kind, content in _fields(data, feature):
    if kind == _BYTES and number == 1:
      return [(s.start, s.end) for n, k, s in _fields(data, content) if (n, k) == (1, _BYTES)]
    if kind == _BYTES and number in (2, 3):
      parts = []
      for field, wire, values in _fields(data, content):
        if field != 1:
          continue
        if number == 3:
          parts += _varints(data, values)
        elif wire in (_BYTES, _FIXED32):  # Packed, or one at a time.
          raw = data[values.start:values.end]
          if len(raw) % 4:
            raise ValueError(f'{len(raw)} bytes of 32-bit numbers')
          parts += np.frombuffer(raw, '<f4').tolist()
      return np.array(parts, np.float32 if number == 2 else np.int64)
  return []


def _fields(data: memoryview, span: Span) -> Iterator[tuple[int, int, Span]]:
  """Yields number, wire type and place of the content of each field of a message."""
  at, end = span
  while at < end:
    tag, at = _varint(data, at, end)
    number, kind = tag >> 3, tag & 7
    start = at
    if kind == _VARINT:
      _, at = _varint(data, at, end)
    elif kind in (_FIXED64, _FIXED32):
      at += 8 if kind == _FIXED64 else 4
    elif kind == _BYTES:
      length, start = _varint(data, at, end)
      at = start + length
    else:
      raise ValueError(f'no protocol buffer: wire type {kind} at byte {start:,}')
    if at > end:
      raise ValueError(f'no protocol buffer: a field ends {at - end:,} bytes after its message')
    yield number, kind, Span(start, at)


def _varints(data: memoryview, span: Span) -> list[int]:
  """Returns signed integers of 64 bits."""
  at, values = span.start, []
  while at < span.end:
    value, at = _varint(data, at, span.end)
    values.append(value - (1 << 64) if value >> 63 else value)
  return values


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
  """Returns an unsigned integer of 64 bits, and the place behind it."""
  value = shift = 0
  while at < end and shift < 70:
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value & 0xFFFFFFFFFFFFFFFF, at
    shift += 7
  raise ValueError(f'no protocol buffer: a number does not end at byte {at:,}')
