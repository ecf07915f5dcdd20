"""Helpers that parse an HTML page strictly by the standard."""

import base64
import io
import re

import html5lib
from PIL import Image

XHTML = '{http://www.w3.org/1999/xhtml}'


def parse(html):
  """Returns the tree of a page, which must have no parse error, and its decoded pictures."""
  tree = html5lib.HTMLParser(strict=True).parse(html)
  pictures = []
  for image in tree.iter(f'{XHTML}img'):
    head, _, data = image.get('src').partition(',')
    assert re.fullmatch('data:image/(png|jpeg);base64', head) and image.get('alt')
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    pictures.append(picture)
  return tree, pictures


def check_self_contained(tree):
  """Asserts that the page fetches, runs and links to nothing outside it."""
  for element in tree.iter():
    assert element.tag not in (f'{XHTML}script', f'{XHTML}link', f'{XHTML}iframe')
    for name in ('src', 'href', 'srcset', 'action'):
      assert re.match('data:|#', element.get(name, '#')), (element.tag, element.get(name)[:80])
  assert not any('url(' in style.text or '@import' in style.text
                 for style in tree.iter(f'{XHTML}style'))
