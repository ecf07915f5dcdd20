"""LabelMe's files: one JSON file for each image."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppn_jax.data.checks import check_bool, check_on_bad_example
from ppn_jax.data.contents import counted
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.images import folders
from ppn_jax.data.sources.annotations import check_choices, check_paths, quote, reader_pool
from ppn_jax.data.sources.labelled_images import (
  ImageFinder,
  LabelledImage,
  LabelledImages,
  box_around_points,
  find_all,
  name_categories,
  stated_size,
)
from ppn_jax.errors import InputError

_MAX_BYTES = 1 << 30  # A file may contain its image.
_BOX_SHAPES = ('rectangle', 'oriented_rectangle', 'polygon', 'mask')
_OTHER_SHAPES = ('point', 'points', 'line', 'linestrip')


class LabelMe(LabelledImages):
  """Folder of LabelMe's JSON files.

  Rectangles are boxes; polygons, masks, circles and turned rectangles count as the box around them.
  Points and lines are left out and counted. Image ids are those of `annotations.number_images`.

  Args:
    folder: The JSON files, also in folders below it.
    images: The folder of the images; '' is `folder`. An image is found by its path in the file,
      from wherever it once was, or by the name of the JSON file.
    classes: Names in order of label; ids count from 1. By default all names that occur, in
      alphabetical order.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    check_size: Whether the size in a JSON file must be that of its image.
    on_bad_example: For images that are missing, or whose header cannot be read while no size is
      stated: 'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the files and images that are missing; by indexing,
      for an image that cannot be decoded.
  """

  def __init__(self, folder: str, images: str = '', classes: Sequence[str] = (),
               on_bad_box: str = 'clip', duplicates: str = 'merge', check_size: bool = True,
               on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_bool('labelme.check_size', check_size)
    check_paths('labelme', folder=folder, images=images or folder)
    if not os.path.isdir(folder):
      raise InputError(f'no folder of LabelMe files at {os.fspath(folder)!r}')
    finder = ImageFinder(os.fspath(images or folder))
    paths = [p for p in folders.list_tree(os.fspath(folder))[1] if p.lower().endswith('.json')]
    with reader_pool() as pool:
      parsed = list(pool.map(_read, paths))
    found = [(path, p) for path, p in zip(paths, parsed, strict=True) if p is not None]
    if not found:
      raise InputError(f'{folder}: none of its {len(paths)} JSON files is of LabelMe, which have '
                       "'shapes' and 'imagePath'")
    read = [image for _, (image, _) in found]
    # An image that was renamed or moved keeps its place beside the file of the same name.
    names = {i: [_beside(path, image.name, finder.folder), image.name,
                 os.path.splitext(os.path.basename(path))[0]]
             for i, (path, (image, _)) in enumerate(found)}
    left_out = sum(n for _, (_, n) in found)
    notes = [f'{counted(left_out, "shape")} left out: points, lines'] if left_out else []
    if len(found) < len(paths):
      other = next(path for path, p in zip(paths, parsed, strict=True) if p is None)
      notes.append(f'{counted(len(paths) - len(found), "JSON file")} not of LabelMe, such as '
                   f'{other}')
    self._take(read, find_all(finder, read, names), finder.folder, shares=False, notes=notes,
               categories=name_categories('labelme', classes, (), read), on_bad_box=on_bad_box,
               duplicates=duplicates, on_bad_example=on_bad_example, check_size=check_size)


def _beside(path: str, name: str, folder: str) -> str:
  """Returns the path of an image relative to `folder`, from one relative to its JSON file."""
  place = os.path.normpath(os.path.join(os.path.dirname(path), name.replace('\\', '/')))
  return os.path.relpath(place, folder)


def _read(path: str) -> tuple[LabelledImage, int] | None:
  """Reads a file: its boxes, and the number of shapes without one. None if it is not LabelMe's."""
  data = image_files.read(path)
  if len(data) > _MAX_BYTES:
    raise InputError(f'{path}: {len(data):,} bytes, legal: up to {_MAX_BYTES:,}')
  try:
    content = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise InputError(f'{path}: not valid JSON: {e}') from e
  if not isinstance(content, dict) or not isinstance(content.get('shapes'), list) or (
      'imagePath' not in content):
    return None
  name = content['imagePath']
  if not isinstance(name, str) or not name:
    raise InputError(f'{path}: imagePath is {quote(name)}, legal: a path')
  image = LabelledImage(path, name, stated_size(content.get('imageHeight'),
                                                content.get('imageWidth')), [], [], [])
  left_out = 0
  for number, shape in enumerate(content['shapes']):
    label = shape.get('label') if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
      raise InputError(f'{path}: shapes[{number}] has the label {quote(label)}, legal: a name')
    kind = shape.get('shape_type') or 'polygon'  # The first versions had only these.
    if kind in _OTHER_SHAPES:
      left_out += 1
      continue
    if kind not in (*_BOX_SHAPES, 'circle'):
      raise InputError(f'{path}: shapes[{number}] has the shape_type {quote(kind)}, legal: '
                       f'{", ".join((*_BOX_SHAPES, "circle", *_OTHER_SHAPES))}')
    image.classes.append(label.strip())
    image.boxes.append(_box(kind, shape.get('points')))
    image.crowd.append(False)
  return image, left_out


def _box(kind: str, points: Any) -> list[float]:
  """Returns x, y, width, height of a shape; [] if its points are wrong."""
  if not isinstance(points, list):
    return []
  box = box_around_points(points)
  if kind != 'circle' or not box:
    return box
  if len(points) != 2:
    return []
  centre, rim = np.array(points, np.float64)
  radius = float(np.hypot(*(rim - centre)))
  return [float(centre[0]) - radius, float(centre[1]) - radius, 2 * radius, 2 * radius]
