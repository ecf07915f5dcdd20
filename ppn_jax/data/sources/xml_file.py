"""Reads XML files of annotations."""

import re
from xml.etree import ElementTree

from ppn_jax.data.images import decoding as image_files
from ppn_jax.errors import InputError

MAX_BYTES = 16 << 20  # Thousands of times the size of a large file about one image.


def parse_xml(file: str, max_bytes: int = MAX_BYTES) -> ElementTree.Element:
  """Parses an XML file with the standard library.

  It never fetches external entities, and Expat since 2.4.1 limits their expansion. As no annotation
  needs entities, they are rejected altogether.

  Raises:
    InputError: If it cannot be read, is too large or is not XML.
  """
  data = image_files.read(file)
  if len(data) > max_bytes:
    raise InputError(f'{file}: {len(data):,} bytes, legal: up to {max_bytes:,}')
  # Zeros are removed because of encodings with two and four bytes.
  if re.search(rb'<!(DOCTYPE|ENTITY)', data.replace(b'\0', b'')):
    raise InputError(f'{file}: has a document type or entities, which no annotation needs')
  try:
    return ElementTree.fromstring(data)
  except (ElementTree.ParseError, LookupError, ValueError) as e:  # The last two: bad encodings.
    raise InputError(f'{file}: not valid xml: {e}') from e
