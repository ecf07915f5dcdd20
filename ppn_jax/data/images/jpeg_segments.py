"""Reads the segments of a JPEG file for its metadata and to check that its scans are complete."""

from collections.abc import Iterator

_XMP_START = b'http://ns.adobe.com/xap/1.0/\0'


def read_metadata(data: bytes) -> tuple[bytes, bytes]:
  """Returns the EXIF block and the XMP block before the first scan, b'' for one that is missing.

  Pillow is not used because few files of a data set have these blocks, and opening every file with
  it would hold the interpreter's lock longer than everything else.
  """
  exif = xmp = b''
  for kind, start, end in _segments(data):
    if kind == 0xda:
      break
    segment = data[start:end] if kind == 0xe1 else b''
    if segment.startswith(b'Exif\0\0'):
      exif = exif or segment
    elif segment.startswith(_XMP_START):
      xmp = xmp or segment
  return exif, xmp


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields (marker, start, end) of the content of each segment of a JPEG file.

  The coded data of a scan, with its restart markers, is not a segment and is skipped.
  """
  at = 2
  while at + 4 <= len(data):
    if data[at] != 0xff:
      at = data.find(b'\xff', at)
      if not 0 <= at <= len(data) - 4:
        return
    kind = data[at + 1]
    if kind == 0xff:  # A filler byte.
      at += 1
    elif kind in (0x00, 0x01, *range(0xd0, 0xd9)):  # Parts of a scan, and markers without content.
      at += 2
    elif kind == 0xd9:
      return
    else:
      length = int.from_bytes(data[at + 2:at + 4], 'big')
      yield kind, at + 4, at + 2 + length
      at += 2 + length


def scans_are_complete(data: bytes) -> bool:
  """Returns whether a JPEG's scans have all bits of all coefficients of all components.

  A progressive file that ends between two scans looks complete to the decoder, but is blurred. Only
  Huffman-coded files count as complete, since their decoder notices missing bits.
  """
  missing: dict[int, set[int]] = {}  # Component -> coefficients whose last bit is missing.
  for kind, start, end in _segments(data):
    body = data[start:end]
    if kind in (0xc0, 0xc1, 0xc2) and len(body) >= 6 and len(body) >= 6 + 3 * body[5]:
      missing = {body[6 + 3 * k]: set(range(64)) for k in range(body[5])}
    elif kind == 0xda:
      count = body[0] if body else 0
      if len(body) < 4 + 2 * count:
        return False
      first, last, bits = body[1 + 2 * count:4 + 2 * count]
      for component in body[1:1 + 2 * count:2]:
        if component not in missing:
          return False
        if not bits & 15:
          missing[component] -= set(range(first, last + 1))
  return bool(missing) and not any(missing.values())
