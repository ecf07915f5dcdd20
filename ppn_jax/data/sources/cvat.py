"""CVAT's files: `CVAT for images 1.1`, one XML file for all images."""

import os
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from ppn_jax.data.checks import check_bool, check_on_bad_example
from ppn_jax.data.contents import counted
from ppn_jax.data.sources.annotations import check_choices, check_paths, quote
from ppn_jax.data.sources.labelled_images import (
  ImageFinder,
  LabelledImage,
  LabelledImages,
  box_around_points,
  find_all,
  name_categories,
  stated_size,
  turned_box,
)
from ppn_jax.data.sources.xml_file import parse_xml
from ppn_jax.errors import InputError

_MAX_BYTES = 1 << 30
_CORNERS = ('xtl', 'ytl', 'xbr', 'ybr')
_SHAPES = ('box', 'polygon', 'mask', 'ellipse')  # Others are left out and counted.
_OTHER_SHAPES = ('polyline', 'points', 'cuboid', 'skeleton')


class Cvat(LabelledImages):
  """Images with an XML file of `CVAT for images 1.1`.

  hotcoco reads this format too, but takes rotated boxes as if they were not, leaves out masks and
  ellipses, and stops at a number that is wrong. Here all of these count as the upright box around
  them, and wrong boxes are the concern of `on_bad_box`. Image ids are those of
  `annotations.number_images`.

  Args:
    annotations: The XML file.
    images: The folder of the images; '' is the folder `images` beside the file, or else the
      file's own.
    classes: Names in order of label; ids count from 1. By default the labels of the task in their
      order, and then names that only objects have.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    check_size: Whether the size of an image in the file must be that of the image.
    on_bad_example: For images that are missing, or whose header cannot be read while no size is
      stated: 'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the file and images that are missing; by indexing,
      for an image that cannot be decoded.
  """

  def __init__(self, annotations: str, images: str = '', classes: Sequence[str] = (),
               on_bad_box: str = 'clip', duplicates: str = 'merge', check_size: bool = True,
               on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_bool('cvat_xml.check_size', check_size)
    check_paths('cvat_xml', annotations=annotations, images=images or annotations)
    file = os.fspath(annotations)
    root = parse_xml(file, _MAX_BYTES)
    if root.tag != 'annotations':
      raise InputError(f'{file}: its outermost element is <{root.tag[:100]}>, legal: '
                       '<annotations>, as in `CVAT for images 1.1`')
    if root.find('track') is not None:
      raise InputError(f'{file}: it is `CVAT for video`, whose boxes belong to tracks; export '
                       'the task as `CVAT for images 1.1`')
    read, left_out = [], 0
    for number, element in enumerate(root.iterfind('image')):
      image, others = _read_image(file, number, element)
      read.append(image)
      left_out += others
    if not read:
      raise InputError(f'{file}: no images')
    listed = [name.text.strip() for kind in ('task', 'project', 'job')
              for name in root.iterfind(f'meta/{kind}/labels/label/name') if name.text]
    finder = ImageFinder(os.fspath(images) or _images_beside(file))
    notes = ([f'{counted(left_out, "shape")} left out: points, lines, cuboids'] if left_out
             else [])
    self._take(read, find_all(finder, read), finder.folder, shares=False, notes=notes,
               categories=name_categories('cvat_xml', classes, list(dict.fromkeys(listed)), read),
               on_bad_box=on_bad_box, duplicates=duplicates, on_bad_example=on_bad_example,
               check_size=check_size)


def _images_beside(file: str) -> str:
  """Returns the folder where CVAT's own exports have their images."""
  folder = os.path.dirname(file) or '.'
  inside = os.path.join(folder, 'images')
  return inside if os.path.isdir(inside) else folder


def _read_image(file: str, number: int, element: ElementTree.Element) -> tuple[LabelledImage, int]:
  """Reads an <image>: its boxes, and the number of shapes without one."""
  name = element.get('name') or ''
  where = f'{file}: image {quote(name or number)}'
  if not name:
    raise InputError(f'{where} has no name')
  image = LabelledImage(where, name, stated_size(element.get('height'), element.get('width')),
                        [], [], [])
  left_out = 0
  for shape in element:
    left_out += shape.tag in _OTHER_SHAPES
    if shape.tag in _SHAPES:
      label = (shape.get('label') or '').strip()
      if not label:
        raise InputError(f'{where}: a <{shape.tag}> has no label')
      image.classes.append(label)
      image.boxes.append(_box(shape))
      image.crowd.append(False)
  return image, left_out


def _box(shape: ElementTree.Element) -> list[Any]:
  """Returns x, y, width, height of a shape in pixels; what is written if numbers are wrong."""
  if shape.tag == 'polygon':
    points = [point.split(',') for point in (shape.get('points') or '').split(';')]
    return box_around_points(points) or [shape.get('points')]
  keys = {'box': _CORNERS, 'mask': ('left', 'top', 'width', 'height'),
          'ellipse': ('cx', 'cy', 'rx', 'ry')}[shape.tag]
  written = [shape.get(key) for key in keys]
  try:
    a, b, c, d = map(float, written)
    degrees = float(shape.get('rotation') or 0)
  except (TypeError, ValueError):
    return written
  box = {'box': [a, b, c - a, d - b], 'mask': [a, b, c, d],
         'ellipse': [a - c, b - d, 2 * c, 2 * d]}[shape.tag]
  if not degrees:
    return box
  return turned_box(box, degrees, (box[0] + box[2] / 2, box[1] + box[3] / 2))
