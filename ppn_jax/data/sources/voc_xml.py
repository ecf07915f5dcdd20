"""The xml file of one image in Pascal VOC's format. Errors name the file and the object."""

import re
from typing import NamedTuple
from xml.etree import ElementTree

from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.sources.coco_json import quote
from ppn_jax.errors import InputError

CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
_MAX_BYTES = 16 << 20  # A few thousand times a large file.


class Annotation(NamedTuple):
  """What one xml file says."""
  file: str
  size: tuple[int, int]  # (height, width); zeros where it says none.
  classes: list[str]
  corners: list  # [xmin, ymin, xmax, ymax] as floats; shorter where some are no numbers.
  difficult: list[bool]


def read_xml(file: str) -> Annotation:
  """What one xml file says of its image.

  Raises:
    InputError: not xml, not of this sort, or an object without a name.
  """
  root = _parse_xml(file)
  if root.tag != 'annotation':
    raise InputError(f'{file}: its outermost element is <{root.tag[:100]}>, legal: <annotation>')
  result = Annotation(file, _stated_size(root), [], [], [])
  for number, found in enumerate(root.findall('object'), start=1):
    name = (found.findtext('name') or '').strip()
    if not name:
      raise InputError(f'{file}: object {number} has no name')
    difficult = (found.findtext('difficult') or '0').strip()
    if difficult not in ('0', '1'):
      raise InputError(f'{file}: object {number}: difficult is {quote(difficult)}, legal: 0, 1')
    result.classes.append(name)
    result.difficult.append(difficult == '1')
    box = found.find('bndbox')
    texts = () if box is None else [box.findtext(corner) for corner in CORNERS]
    result.corners.append([n for n in map(_number, texts) if n is not None])
  return result


def _parse_xml(file: str) -> ElementTree.Element:
  """The standard library's parser suffices: it never fetches external entities, and Expat since
  2.4.1 stops those that multiply. No annotation has any, so that none are let in at all."""
  data = image_files.read(file)
  if len(data) > _MAX_BYTES:
    raise InputError(f'{file}: {len(data):,} bytes, legal: up to {_MAX_BYTES:,}')
  # Without the zeros of encodings of two and four bytes.
  if re.search(rb'<!(DOCTYPE|ENTITY)', data.replace(b'\0', b'')):
    raise InputError(f'{file}: has a document type or entities, which no annotation needs')
  try:
    return ElementTree.fromstring(data)
  except (ElementTree.ParseError, LookupError, ValueError) as e:  # The last two: its encoding.
    raise InputError(f'{file}: not valid xml: {e}') from e


def _stated_size(root: ElementTree.Element) -> tuple[int, int]:
  """(height, width) of an annotation's <size>; what is no whole number above 0 becomes 0."""
  numbers = [_number(root.findtext(f'size/{side}')) for side in ('height', 'width')]
  height, width = (n if n and 1 <= n < 1e9 and n.is_integer() else 0 for n in numbers)
  return int(height), int(width)


def _number(text: str | None) -> float | None:
  try:
    return float(text) if text else None
  except ValueError:
    return None
