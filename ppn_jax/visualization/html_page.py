"""Builds reports as one HTML file that needs no server, network or scripts."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from ppn_jax.detection.structures import Array
from ppn_jax.visualization.drawing import class_colour, reduced

_JPEG_QUALITY = 88
_PHOTO_COLOURS = 4096  # Images with more distinct colours are photographs, too large as PNG.


class Table(NamedTuple):
  """Rows of text."""
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  caption: str = ''
  colours: Sequence[str] = ()  # CSS colours shown in front of the rows.
  words: Sequence[int] = ()  # Columns of words, in addition to the first.


class Picture(NamedTuple):
  """Image embedded in the page."""
  source: str  # A data: URL.
  width: int  # In pixels of the page.
  alt: str
  caption: str = ''


class Group(NamedTuple):
  """Pictures in one or several rows."""
  pictures: Sequence[Picture]
  heading: str = ''


class Section(NamedTuple):
  """Heading followed by text, tables and pictures."""
  heading: str
  text: str = ''
  tables: Sequence[Table] = ()
  groups: Sequence[Group] = ()


def picture(image: Array, alt: str, caption: str = '', *, width: int = 0) -> Picture:
  """Embeds an image in the page: plots as PNG, photographs as JPEG.

  Args:
    image: u8 [H, W, 3].
    alt: describes the picture for readers who cannot see it.
    caption: shown below it.
    width: on the page, in pixels; by default that of the image. A wider image is reduced to twice
      that, as much as fine screens show.
  """
  if width:
    image = reduced(image, 2 * width, len(image))
  made = Image.fromarray(np.ascontiguousarray(image))
  buffer = io.BytesIO()
  is_plot = made.resize((256, 256), Image.Resampling.NEAREST).getcolors(_PHOTO_COLOURS) is not None
  if is_plot:
    made.save(buffer, 'PNG', optimize=True)
  else:
    made.save(buffer, 'JPEG', quality=_JPEG_QUALITY, subsampling=0)
  data = base64.b64encode(buffer.getvalue()).decode()
  return Picture(f'data:image/{"png" if is_plot else "jpeg"};base64,{data}', width or made.width,
                 alt, caption)


def plot(image: Array, alt: str) -> Group:
  """Returns a group of one plot."""
  return Group([picture(image, alt)])


def class_swatches(labels: Sequence[int]) -> list[str]:
  """Returns the colours of classes for `Table.colours`."""
  return ['#{:02x}{:02x}{:02x}'.format(*class_colour(label)) for label in labels]


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
  """Returns the HTML of a page; all text is escaped."""
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('ppn_jax.visualization'), autoescape=True, trim_blocks=True,
      lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  return environment.get_template('page.html').render(title=title, subtitle=subtitle,
                                                      sections=sections)
