"""YOLO's layout: a text file of normalised boxes beside each image, named by a data.yaml."""

import concurrent.futures
import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, check_on_bad_example
from ppn_jax.data.contents import WITHOUT
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  Columns,
  Images,
  check_boxes,
  check_choices,
  check_paths,
  fill_in_sizes,
  number_images,
  option_on_the_command_line,
  parse_boxes,
)
from ppn_jax.data.sources.coco_json import quote
from ppn_jax.data.sources.yolo_yaml import Found, find_images, name_categories, read_text, read_yaml
from ppn_jax.errors import InputError

_THREADS = 16  # They wait for files, on a network file system above all.


class _Row(NamedTuple):
  """One line of a label file."""
  file: str
  line: int
  text: str
  category: int
  box: list  # [cx, cy, w, h] of the image; shorter if the line has not got them.


class YoloTxt(AnnotatedImages):
  """Images with text files of boxes, as YOLO's programs take them; a `sources.Source`.

  The labels of .../images/NAME.jpg are in .../labels/NAME.txt, or beside the image where no
  folder is called images. A line is `class cx cy w h`, class counted from 0 and the others in 0
  to 1 of the upright image. An image without a text file has no boxes. Category ids are the
  classes' own numbers; image ids as in `annotations.number_images`. Links to folders are followed;
  files and folders whose names begin with a dot are passed over.

  Args:
    data: the data.yaml. Its entry `split` is a folder of images (with those below it), a list of
      images in a text file, or several of these; relative ones start at its `path`, which
      starts at the yaml's own folder.
    split: the key in data.yaml, such as 'train' or 'val'.
    images: instead of `data`, a folder of images.
    labels: beside `images`, the folder of the text files; '' looks as said above.
    names: beside `images`, the classes in order.
    on_bad_box: what to do with boxes that are not four finite numbers, have no area or lie
      outside their image. 'clip' cuts those that reach over the edge and keep half of their area,
      and raises for the others; 'drop' leaves the others out; 'raise' raises for all.
    polygons: what to do with a line of an outline, `class x1 y1 x2 y2 x3 y3 ...`: 'raise', or
      take its bounding 'box'. Lines of key points can look the same, so this is not a default.
    duplicates: 'merge' counts a box once that is there twice: same image, class and coordinates;
      'keep' leaves both.
    on_bad_example: what to do about images that are missing or whose header cannot be read:
      'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: see `sources.Source`.
    bad_boxes: what was dropped.
    contents: what the data set holds and what was done to its boxes.

  Raises:
    InputError: at construction, for anything wrong with the text files, named by line, and for
      images whose header cannot be read; by indexing, for an image that cannot be decoded.
  """

  def __init__(self, data: str = '', split: str = 'train', images: str = '', labels: str = '',
               names: Sequence[str] | Mapping[int, str] = (), on_bad_box: str = 'clip',
               polygons: str = 'raise', duplicates: str = 'merge', on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    if polygons not in ('raise', 'box'):
      raise InputError(f"yolo_txt.polygons is {polygons!r}, legal: 'raise', 'box'")
    if bool(data) == bool(images):
      raise InputError('yolo_txt needs either data, a data.yaml, or images, a folder')
    if data:
      check_paths('yolo_txt', data=data)
      if labels or names:
        raise InputError('yolo_txt.labels and names go with images; a data.yaml has its own')
      names, found = read_yaml(os.fspath(data), split)
    else:
      check_paths('yolo_txt', images=images, labels=labels or images)
      found = find_images(os.fspath(images))
    self.categories = name_categories(names, data or 'yolo_txt')
    if found.missing and on_bad_example == 'raise':
      raise InputError(f'{found.missing}; {SKIP_IMAGES}')
    self._read(found, _label_files(found.files, images, labels), on_bad_box, polygons, duplicates,
               on_bad_example)

  def _read(self, found: Found, label_files: Sequence[str], on_bad_box: str, polygons: str,
            duplicates: str, on_bad_example: str) -> None:
    classes, files, unreadable = {c.id for c in self.categories}, found.files, {}

    def read_size(index: int) -> tuple[int, int] | None:
      try:
        return image_files.read_sizes(files[index])[1]
      except InputError as e:
        if on_bad_example == 'raise':
          raise InputError(f'{e}; {SKIP_IMAGES}') from e
        unreadable[index] = str(e)
        return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      read = list(pool.map(lambda file: _read_labels(file, classes, polygons), label_files))
      sizes = list(pool.map(read_size, range(len(files))))
    if all(rows is None for rows in read):
      raise InputError(f'none of the {len(files)} images has a text file, such as '
                       f'{quote(label_files[0])} for {quote(files[0])}')
    sizes = fill_in_sizes(sizes, unreadable)
    owners = np.repeat(np.arange(len(read)), [len(rows or ()) for rows in read])
    rows = [row for rows in read for row in rows or ()]
    centred, reasons = parse_boxes([row.box for row in rows])
    images = Images(number_images(files), [os.path.basename(f) for f in files], files, sizes)
    boxes, findings = check_boxes(
        _to_xywh(centred, sizes[owners]), reasons, owners, images, on_bad_box=on_bad_box,
        show=lambda i: f'{rows[i].file}:{rows[i].line}: {quote(rows[i].text)}',
        advice=_advise(centred))
    label = {c.id: k for k, c in enumerate(self.categories)}
    labels = np.array([label[row.category] for row in rows], np.int32)[boxes.rows]
    no_file, empty = (WITHOUT.index(f'with{how} label file') for how in ('out a', ' an empty'))
    self._fill(Columns(images, boxes, labels, np.zeros(len(labels), bool),
                       boxes.bboxes[:, 2:].prod(axis=-1)), findings, duplicates=duplicates,
               without=np.array([no_file if rows is None else empty for rows in read], np.int8),
               unreadable=dict(sorted(unreadable.items())),
               notes=found.describe_others(label_files))


def _advise(centred: np.ndarray) -> str:
  """A hint for boxes that are in pixels."""
  with np.errstate(invalid='ignore'):
    if len(centred) and (np.nan_to_num(centred).max(axis=-1) > 2).mean() > 0.5:
      return ('; most boxes have numbers above 1, but shares of the image are wanted: divide by '
              'its width and height')
  return ''


def _to_xywh(centred: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """cx, cy, w, h of the image, f64 [M, 4] -> x, y, width, height in pixels."""
  with np.errstate(invalid='ignore', over='ignore'):
    corners = np.concatenate([centred[:, :2] - centred[:, 2:] / 2, centred[:, 2:]], axis=-1)
    return corners * sizes[:, [1, 0, 1, 0]]


def _label_files(files: Sequence[str], images: str, labels: str) -> list[str]:
  """The text file of every image file, whether it is there or not."""
  stems = [os.path.splitext(f)[0] for f in files]
  if labels:
    if not os.path.isdir(labels):
      raise InputError(f'no folder of labels at {os.fspath(labels)!r}')
    return [f'{os.path.join(labels, os.path.relpath(s, images))}.txt' for s in stems]
  return [re.sub(r'^(.*/)?images/', r'\1labels/', s) + '.txt' for s in stems]


def _read_labels(file: str, classes: Set[int], polygons: str) -> list[_Row] | None:
  """The rows of a label file; None if there is none."""
  if not os.path.exists(file):
    return None
  rows = []
  for number, line in enumerate(read_text(file).splitlines(), start=1):
    words = line.split()
    if words:
      category, *numbers = map(_number, words)
      if category not in classes:
        raise InputError(f'{file}:{number}: class {quote(words[0])}, legal: {min(classes)} to '
                         f'{max(classes)}, as the names are numbered')
      if len(numbers) >= 6 and len(numbers) % 2 == 0:
        numbers = _bounding_box(numbers, f'{file}:{number}', polygons)
      rows.append(_Row(file, number, line, int(category), [n for n in numbers if n is not None]))
  return rows


def _bounding_box(outline: Sequence[float | None], where: str, polygons: str) -> Sequence[float]:
  """x1 y1 x2 y2 ... -> cx, cy, w, h."""
  if polygons == 'raise':
    raise InputError(f'{where}: {len(outline)} numbers after the class, legal: 4; if they are '
                     "outlines (not key points), polygons='box' takes their bounding boxes "
                     f'({option_on_the_command_line("polygons", "box")})')
  if None in outline:
    return ()
  points = np.reshape(outline, (-1, 2))
  low, high = points.min(axis=0), points.max(axis=0)
  with np.errstate(invalid='ignore', over='ignore'):
    return [*((low + high) / 2).tolist(), *(high - low).tolist()]


def _number(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None
