"""Draws boxes on images.

Everything scales with the picture: lines, tags and type look the same on 100 and on 4,000 pixels,
unless most boxes are so small that the type would cover them. Detections are solid in the colour of
their class, ground truth is dashed in white, so both can be drawn on the same image.
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ppn_jax import storage
from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array
from ppn_jax.visualization.fonts import Font

Colour = tuple[int, int, int]

_INK, _PAPER = (16, 16, 16), (255, 255, 255)
# Okabe and Ito's colours, distinct with any kind of colour vision, bright ones first.
_FIRST_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
                  (204, 121, 167), (213, 94, 0), (0, 114, 178))
# Type is 6.6 units high. Small boxes lead at least to the unit of a picture of 600 pixels, type of
# 13 pixels; a box of 13 units is twice as high as the type.
_SMALLEST_UNIT, _SIDE_OF_UNIT = 2.0, 13.0
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_PHASE = 5.5  # Keeps the colours of later classes far from those of the first.


def class_colour(label: int) -> Colour:
  """Returns the RGB of a class, which depends on the label alone.

  After the first seven, hues advance by the golden angle, so that neighbouring labels are far apart
  on the colour circle, and lightness cycles, so that they also differ without hue.
  """
  if label < len(_FIRST_COLOURS):
    return _FIRST_COLOURS[label]
  lightness, chroma = ((0.55, 0.15), (0.70, 0.16), (0.85, 0.12))[label % 3]
  return _from_oklch(lightness, chroma, label * _GOLDEN_ANGLE + _PHASE)


def draw_boxes(image: Array, boxes: Array, labels: Array, names: Sequence[str],
               scores: Array | None = None, *, notes: Sequence[str] | None = None,
               ground_truth: bool = False, min_side: int = 0, weight: float = 1.0) -> np.ndarray:
  """Draws boxes and their names on a copy of an image, the best score on top.

  Args:
    image: u8 [H, W, 3].
    boxes: [N, 4], 0 to 1 of the image, clipped to it. Boxes without area inside the image are
      left out.
    labels: [N], indices into `names`.
    names: of the classes; an empty name draws the box without a tag.
    scores: [N], shown after the names if given.
    notes: N words shown after those, '' for none.
    ground_truth: draws in the style of ground truth instead of that of detections.
    min_side: images whose longer side is shorter are first enlarged to this, in pixels.
    weight: scales lines and type; 2 doubles them.

  Returns:
    u8 [H', W', 3], of the image's size unless enlarged.
  """
  picture = _enlarge(_to_picture(image), min_side)
  boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
  shown = np.isfinite(boxes).all(axis=1) & (box_ops.area(box_ops.clip(boxes)) > 0)
  style = _Style.of(picture.size, weight, ground_truth, boxes[shown])
  order = np.arange(len(boxes)) if scores is None else np.argsort(-np.asarray(scores))
  marks, occupied = [], []
  for i in order[shown[order]]:
    text = str(names[labels[i]])
    if text and scores is not None:
      text = f'{text} {float(scores[i]):.2f}'
    if text and notes is not None and notes[i]:
      text = f'{text} {notes[i]}'
    corners = _to_pixels(boxes[i], picture.size)
    tag = _place_tag(corners, text, style, picture.size, occupied)
    marks.append((corners, tag, text, class_colour(int(labels[i]))))
  draw = ImageDraw.Draw(picture, 'RGBA')
  for corners, _, _, colour in reversed(marks):
    (_draw_dashed if ground_truth else _draw_solid)(draw, corners, colour, style)
  for _, tag, text, colour in reversed(marks):
    if tag:
      _draw_tag(draw, tag, text, colour, style)
  return np.asarray(picture)


def contact_sheet(images: Sequence[Array], columns: int | None = None, *,
                  background: Colour = (28, 28, 30)) -> np.ndarray:
  """Arranges images of any sizes on one sheet, row by row, each in a cell of the median size.

  Args:
    images: u8 [H, W, 3] each, at least one.
    columns: images per row; by default the sheet is about as wide as it is high.
    background: RGB between and around the images.

  Returns:
    u8 [H', W', 3].
  """
  pictures = [_to_picture(image) for image in images]
  columns = columns or math.ceil(math.sqrt(len(pictures)))
  rows = math.ceil(len(pictures) / columns)
  width, height = (max(1, int(np.median([p.size[axis] for p in pictures]))) for axis in (0, 1))
  gap = max(2, round(0.02 * min(width, height)))
  sheet = Image.new('RGB', (columns * (width + gap) + gap, rows * (height + gap) + gap),
                    background)
  for i, picture in enumerate(pictures):
    fitted = _fit(picture, width, height)
    row, column = divmod(i, columns)
    sheet.paste(fitted, (gap + column * (width + gap) + (width - fitted.width) // 2,
                         gap + row * (height + gap) + (height - fitted.height) // 2))
  return np.asarray(sheet)


def save_picture(path: storage.Path, image: Array) -> None:
  """Writes an image, u8 [H, W, 3], atomically; creates the folder if needed.

  A path that ends in .jpg becomes a JPEG file, which of a large photograph takes a twentieth of the
  time; any other a PNG file.
  """
  if path.suffix == '.jpg':
    storage.write_bytes(path, encode_jpeg(np.asarray(image)))
    return
  png = io.BytesIO()
  _to_picture(image).save(png, format='PNG')
  storage.write_bytes(path, png.getvalue())


def reduced(image: Array, width: int, height: int) -> np.ndarray:
  """Reduces an image, u8 [H, W, 3], that is larger than this many pixels; its shape stays."""
  picture = _to_picture(image)
  picture.thumbnail((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
  return np.asarray(picture)


class _Style(NamedTuple):
  """Line widths and type in pixels of one picture."""
  line: int
  halo: int  # Dark rim on both sides of a line, which makes it visible on any background.
  pad: int
  font: Font
  ground_truth: bool

  @classmethod
  def of(cls, size: tuple[int, int], weight: float, ground_truth: bool,
         boxes: Sequence | np.ndarray = ()) -> '_Style':
    unit = weight * math.sqrt(size[0] * size[1]) / 300
    if len(boxes):
      # In pixels; type is at most half as high as the usual box, and never too small to read.
      side = float(np.median(np.sqrt(box_ops.area(box_ops.clip(np.asarray(boxes))))))
      side *= 300 * unit / weight
      unit = min(unit, max(_SMALLEST_UNIT * weight, side / _SIDE_OF_UNIT))
    type_size = max(11, round((6.2 if ground_truth else 6.6) * unit))
    line = max(1, round((0.8 if ground_truth else 1.3) * unit))
    return cls(line=line, halo=max(1, round(0.3 * unit)), pad=max(1, round(1.4 * unit)),
               font=Font(type_size), ground_truth=ground_truth)


Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last inclusive.


def _to_pixels(box: np.ndarray, size: tuple[int, int]) -> Rectangle:
  width, height = size
  ymin, xmin, ymax, xmax = box_ops.clip(box).tolist()
  left, top = min(round(xmin * width), width - 1), min(round(ymin * height), height - 1)
  return left, top, max(left, round(xmax * width) - 1), max(top, round(ymax * height) - 1)


def _place_tag(corners: Rectangle, text: str, style: _Style, size: tuple[int, int],
               occupied: list[Rectangle]) -> Rectangle | None:
  """Finds a place for a tag inside the picture that covers least of the tags placed before it."""
  if not text:
    return None
  left, top, right, bottom = corners
  width = math.ceil(style.font.length(text)) + 2 * style.pad
  height = style.font.ascent + style.font.descent + style.pad
  above, under = (left, top - height), (left, bottom + 1)
  inside, inside_under = (left, top), (left, bottom + 1 - height)
  far = right + 1 - width
  places = ([under, inside_under, (far, bottom + 1), above] if style.ground_truth else
            [above, inside, (far, top - height), (far, top), under, inside_under])
  best = None
  for rank, (x, y) in enumerate(places):
    x_in = min(max(x, 0), max(size[0] - width, 0))
    y_in = min(max(y, 0), max(size[1] - height, 0))
    tag = (x_in, y_in, x_in + width - 1, y_in + height - 1)
    # A tag that is moved into the picture covers its own box; covering other tags weighs more.
    cost = (sum(_overlap(tag, other) for other in occupied), abs(x - x_in) + abs(y - y_in), rank)
    if best is None or cost < best[0]:
      best = cost, tag
  occupied.append(best[1])
  return best[1]


def _overlap(a: Rectangle, b: Rectangle) -> int:
  return (max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
          * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1))


def _grow(corners: Rectangle, by: int) -> Rectangle:
  left, top, right, bottom = corners
  left, top, right, bottom = left - by, top - by, right + by, bottom + by
  return (left, top, max(left, right), max(top, bottom))


def _draw_solid(draw: ImageDraw.ImageDraw, corners: Rectangle, colour: Colour,
                style: _Style) -> None:
  draw.rectangle(_grow(corners, style.halo), outline=(*_INK, 150), width=style.halo)
  if min(corners[2] - corners[0], corners[3] - corners[1]) > 4 * (style.line + style.halo):
    draw.rectangle(_grow(corners, -style.line), outline=(*_INK, 110), width=style.halo)
  draw.rectangle(corners, outline=colour, width=style.line)


def _draw_dashed(draw: ImageDraw.ImageDraw, corners: Rectangle, _: Colour,
                 style: _Style) -> None:
  """Draws white dashes in a dark line, so that one of the two is visible on any background."""
  left, top, right, bottom = corners
  draw.rectangle(_grow(corners, style.halo), outline=(*_INK, 170),
                 width=style.line + 2 * style.halo)
  thick, dash = style.line - 1, 5 * style.line
  for x in range(left, right + 1, 2 * dash):
    end = min(x + dash - 1, right)
    draw.rectangle((x, top, end, min(top + thick, bottom)), fill=_PAPER)
    draw.rectangle((x, max(bottom - thick, top), end, bottom), fill=_PAPER)
  for y in range(top, bottom + 1, 2 * dash):
    end = min(y + dash - 1, bottom)
    draw.rectangle((left, y, min(left + thick, right), end), fill=_PAPER)
    draw.rectangle((max(right - thick, left), y, right, end), fill=_PAPER)


def _draw_tag(draw: ImageDraw.ImageDraw, tag: Rectangle, text: str, colour: Colour,
              style: _Style) -> None:
  back, ink = (_INK, _PAPER) if style.ground_truth else (colour, _legible_on(colour))
  draw.rectangle(tag, fill=(*back, 190 if style.ground_truth else 255))
  style.font.draw(draw, tag[0] + style.pad, tag[1] + style.pad / 2 + style.font.ascent, text, ink)


def _legible_on(colour: Colour) -> Colour:
  """Returns black or white, whichever has the larger contrast (WCAG 2's relative luminance)."""
  red, green, blue = _to_linear(np.array(colour) / 255)
  return _INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _PAPER


def _to_linear(srgb: np.ndarray) -> np.ndarray:
  return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _from_oklch(lightness: float, chroma: float, hue: float) -> Colour:
  """Converts Oklab in polar form (Ottosson, 2020) to sRGB, clipped to its gamut."""
  a, b = chroma * math.cos(hue), chroma * math.sin(hue)
  cones = np.array([lightness + 0.3963377774 * a + 0.2158037573 * b,
                    lightness - 0.1055613458 * a - 0.0638541728 * b,
                    lightness - 0.0894841775 * a - 1.2914855480 * b]) ** 3
  linear = np.clip(np.array([[4.0767416621, -3.3077115913, 0.2309699292],
                             [-1.2684380046, 2.6097574011, -0.3413193965],
                             [-0.0041960863, -0.7034186147, 1.7076147010]]) @ cones, 0, 1)
  srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  return tuple(int(c) for c in np.round(255 * srgb))


def _to_picture(image: Array) -> Image.Image:
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise ValueError(f'an image is u8 [H, W, 3], not {image.dtype} {list(image.shape)}')
  return Image.fromarray(np.ascontiguousarray(image))


def _enlarge(picture: Image.Image, min_side: int) -> Image.Image:
  if max(picture.size) >= min_side:
    return picture.copy()
  factor = min_side / max(picture.size)
  return picture.resize(tuple(max(1, round(side * factor)) for side in picture.size),
                        Image.Resampling.BICUBIC)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
  factor = min(width / picture.width, height / picture.height)
  size = tuple(max(1, round(side * factor)) for side in picture.size)
  return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
