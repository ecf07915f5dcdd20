"""YOLO's layout: a data.yaml, and a text file of normalised boxes for each image."""

import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import yaml

from ppn_jax.data.checks import SKIP_IMAGES, check_on_bad_example
from ppn_jax.data.contents import NO_BOXES
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.images import folders
from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  AnnotationTable,
  Images,
  check_boxes,
  check_choices,
  check_paths,
  command_line_flag,
  fill_in_sizes,
  join_names,
  number_images,
  parse_boxes,
  quote,
  reader_pool,
)
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean

_MAX_BYTES = 64 << 20  # Largest text file.
_MAX_YAML_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
  """Loader without aliases, by which a short file can grow without bounds."""

  def compose_node(self, parent: Any, index: Any) -> Any:
    if self.check_event(yaml.AliasEvent):
      raise yaml.YAMLError('it has aliases, which no data.yaml needs')
    return super().compose_node(parent, index)


class _Found(NamedTuple):
  """Images of a split."""
  files: list[str]
  others: tuple[str, ...] = ()  # Files beside them without the suffix of an image.
  missing: str = ''  # Error about files that are listed and missing, '' if there are none.

  def describe_others(self, label_files: Sequence[str]) -> list[str]:
    """Returns a line about files that are neither images nor label files, or none."""
    labels = set(label_files)
    line = folders.describe_others(f for f in self.others if f not in labels)
    return [line] if line else []


class _Row(NamedTuple):
  """One line of a label file."""
  file: str
  line: int
  text: str
  category: int
  box: list  # [cx, cy, w, h] in 0 to 1; shorter if the line lacks numbers.


class YoloTxt(AnnotatedImages):
  """Images with text files of boxes, in the layout of YOLO's programs.

  The labels of .../images/NAME.jpg are in .../labels/NAME.txt, or next to the image if no folder is
  called images. A line is `class cx cy w h`, where the class counts from 0 and the others are 0 to
  1 of the upright image. An image without a text file has no boxes. Category ids are the classes'
  own numbers; image ids are those of `annotations.number_images`. Links to folders are followed.
  Files and folders whose names begin with a dot are ignored.

  Args:
    data: The data.yaml. Its entry `split` is a folder of images (and the folders below it), a text
      file that lists images, or several of these. Relative paths start at its `path`, which is
      relative to the folder of the data.yaml.
    split: The key in data.yaml, such as 'train' or 'val'.
    images: A folder of images, instead of `data`.
    labels: With `images`, the folder of the text files; '' finds them as described above.
    names: With `images`, the classes in order.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    polygons: For lines with an outline, `class x1 y1 x2 y2 x3 y3 ...`: 'raise', or 'box' for its
      bounding box. That is not the default because lines of key points can look the same.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    on_bad_example: For images that are missing or whose header cannot be read: 'raise', or 'skip'
      until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the text files, with the line, and for images whose
      header cannot be read; by indexing, for an image that cannot be decoded.
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
      names, found = _read_yaml(os.fspath(data), split)
    else:
      check_paths('yolo_txt', images=images, labels=labels or images)
      found = _find_images(os.fspath(images))
    self.categories = _name_categories(names, data or 'yolo_txt')
    if found.missing and on_bad_example == 'raise':
      raise InputError(f'{found.missing}; {SKIP_IMAGES}')
    self._read(found, label_files(found.files, images, labels), on_bad_box, polygons, duplicates,
               on_bad_example)

  def _read(self, found: _Found, label_files: Sequence[str], on_bad_box: str, polygons: str,
            duplicates: str, on_bad_example: str) -> None:
    """Reads all label files and image sizes and sets the annotations."""
    classes, files, unreadable = {c.id for c in self.categories}, found.files, {}

    def read_size(index: int) -> tuple[int, int] | None:
      try:
        return image_files.read_sizes(files[index])[1]
      except InputError as e:
        if on_bad_example == 'raise':
          raise InputError(f'{e}; {SKIP_IMAGES}') from e
        unreadable[index] = str(e)
        return None

    with reader_pool() as pool:
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
    no_file, empty = (NO_BOXES.index(f'with{how} label file') for how in ('out a', ' an empty'))
    table = AnnotationTable(images, boxes, labels, np.zeros(len(labels), bool),
                            boxes.bboxes[:, 2:].prod(axis=-1))
    self._set_data(table, findings, duplicates=duplicates,
                   no_boxes=np.array([no_file if r is None else empty for r in read], np.int8),
                   unreadable=dict(sorted(unreadable.items())),
                   notes=found.describe_others(label_files))


def _advise(centred: np.ndarray) -> str:
  """Returns advice if the boxes are probably in pixels, else ''."""
  with np.errstate(invalid='ignore'):
    if len(centred) and (np.nan_to_num(centred).max(axis=-1) > 2).mean() > 0.5:
      return ('; most boxes have numbers above 1, but must be shares of the image: divide by its '
              'width and height')
  return ''


def _to_xywh(centred: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Converts cx, cy, w, h in 0 to 1, f64 [M, 4], to x, y, width, height in pixels."""
  with np.errstate(invalid='ignore', over='ignore'):
    corners = np.concatenate([centred[:, :2] - centred[:, 2:] / 2, centred[:, 2:]], axis=-1)
    return corners * sizes[:, [1, 0, 1, 0]]


def label_files(files: Sequence[str], images: str = '', labels: str = '') -> list[str]:
  """Returns the path of the text file of every image file, which may not exist.

  Args:
    files: The image files.
    images, labels: See `YoloTxt`.
  """
  stems = [os.path.splitext(f)[0] for f in files]
  if labels:
    if not os.path.isdir(labels):
      raise InputError(f'no folder of labels at {os.fspath(labels)!r}')
    return [f'{os.path.join(labels, os.path.relpath(s, images))}.txt' for s in stems]
  return [re.sub(r'^(.*/)?images/', r'\1labels/', s) + '.txt' for s in stems]


def _read_labels(file: str, classes: Set[int], polygons: str) -> list[_Row] | None:
  """Reads the rows of a label file; None if there is no file."""
  if not os.path.exists(file):
    return None
  rows = []
  for number, line in enumerate(_read_text(file).splitlines(), start=1):
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
  """Converts x1 y1 x2 y2 ... to cx, cy, w, h of the bounding box."""
  if polygons == 'raise':
    raise InputError(f'{where}: {len(outline)} numbers after the class, legal: 4; if they are '
                     "outlines (not key points), polygons='box' takes their bounding boxes "
                     f'({command_line_flag("polygons", "box")})')
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


def load_yaml(file: str) -> dict:
  """Reads a data.yaml.

  Raises:
    InputError: If it cannot be read, or has no `names`.
  """
  text = _read_text(file, _MAX_YAML_BYTES)
  try:
    content = yaml.load(text, _Loader)
  except (yaml.YAMLError, ValueError, RecursionError) as e:
    raise InputError(f'{file}: not valid yaml: {" ".join(str(e).split())}') from e
  if not isinstance(content, dict) or 'names' not in content:
    raise InputError(f"{file}: not a data.yaml: it has no 'names'")
  return content


def _read_yaml(file: str, split: str) -> tuple[Any, _Found]:
  """Reads `names` of a data.yaml and finds the images of one of its splits."""
  content = load_yaml(file)
  places = content.get(split) if isinstance(split, str) else None
  if not places:
    splits = [k for k in content if isinstance(content[k], (str, list)) and k != 'names']
    raise InputError(f'{file}: no split {split!r}; {did_you_mean(str(split), map(str, splits))}')
  places = places if isinstance(places, list) else [places]
  root = content.get('path') or ''
  if not all(isinstance(p, str) and p for p in (*places, root or '.')):
    raise InputError(f'{file}: {split} and path must be paths, not {quote(places)}')
  _check_count(file, content)
  root = os.path.normpath(os.path.join(os.path.dirname(file), os.path.expanduser(root)))
  parts = [_find_images(_locate(root, os.path.expanduser(place)), root) for place in places]
  files = [f for part in parts for f in part.files]
  seen = set()
  for path in files:
    if path in seen:
      raise InputError(f'{file}: {split} has an image twice: {path}')
    seen.add(path)
  return content['names'], _Found(files, tuple(f for part in parts for f in part.others),
                                 next((part.missing for part in parts if part.missing), ''))


def _check_count(file: str, content: Mapping[str, Any]) -> None:
  """Raises InputError if `nc` is given and differs from the number of `names`."""
  count, names = content.get('nc'), content['names']
  if count is None or not isinstance(names, (list, dict)):
    return
  legal = {len(names)}
  if isinstance(names, dict):  # Numbers without a name may count too.
    legal |= {n + 1 for n in [max((k for k in names if type(k) is int), default=-1)]}
  if count not in legal or isinstance(count, bool):
    shown = ', '.join(map(str, names.values() if isinstance(names, dict) else names))
    raise InputError(f'{file}: nc is {quote(count)}, but names has {len(names)}: {shown[:200]}; '
                     'correct one of them')


def _locate(root: str, place: str) -> str:
  """Returns the path of a split of a data.yaml."""
  path = os.path.normpath(os.path.join(root, place))
  if place.startswith('../') and not os.path.exists(path):
    # Exports for the folder layout of one program have one step too many.
    return os.path.normpath(os.path.join(root, place[3:]))
  return path


def _find_images(place: str, root: str = '') -> _Found:
  """Finds image files: those below a folder, in order of name, or those of a list, in its order."""
  if os.path.isdir(place):
    files, others = folders.list_tree(place)
    found = _Found(files, tuple(others))
  elif os.path.isfile(place) and place.endswith('.txt'):
    found = _read_list(place, root)
  else:
    raise InputError(f'no folder of images at {quote(place)}')
  if not found.files:
    raise InputError('; '.join([f'no images in {quote(place)}', *found.describe_others(())]))
  return found


def _read_list(file: str, root: str) -> _Found:
  """Reads a list of images, one path per line.

  Paths are relative to the list's folder or else to the data set's; both are common. Hidden files
  are ignored.
  """
  files, others = [], []
  for number, line in enumerate(_read_text(file).splitlines(), start=1):
    written = line.strip()
    if not written or written.replace('\\', '/').rpartition('/')[2].startswith('.'):
      continue
    if '\0' in written:
      raise InputError(f'{file}:{number}: {quote(written)}, legal: a path')
    path = _resolve(written, os.path.dirname(file), root)
    (files if folders.has_suffix(path) else others).append(path)
  missing = [f for f in files if not os.path.isfile(f)]
  return _Found(files, tuple(others), '' if not missing else
               f'{len(missing)} of the {len(files)} images that {file} lists are absent: '
               f'{join_names(missing)}')


def _resolve(written: str, folder: str, root: str) -> str:
  """Finds the file of a path in a list by the usual interpretations, the first if none exists."""
  written = os.path.expanduser(written)
  paths = [os.path.normpath(os.path.join(start, text))
           for text in dict.fromkeys((written, written.replace('\\', '/')))
           for start in (folder, root)]
  return next((path for path in paths if os.path.isfile(path)), paths[0])


def _read_text(file: str, max_bytes: int = _MAX_BYTES) -> str:
  """Reads a text file.

  Raises:
    InputError: If it cannot be read, is too large or is no text.
  """
  data = image_files.read(file)
  if len(data) > max_bytes:
    raise InputError(f'{file}: {len(data):,} bytes, legal: up to {max_bytes:,}')
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise InputError(f'{file}: not a text file: {e}') from e


def _name_categories(names: Any, where: str) -> tuple[Category, ...]:
  """Makes the classes from a list of names or a map from numbers to names."""
  try:
    numbered = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
  except TypeError:
    numbered = {}
  for number, name in numbered.items():
    if type(number) is not int or number < 0 or type(name) not in (str, int) or name == '':
      raise InputError(f'{where}: names has {quote(name)} for class {quote(number)}, '
                       'legal: a name for a number (in yaml, quote names like no and yes)')
  if not numbered or isinstance(names, str):
    raise InputError(f'{where}: names is {quote(names)}, legal: names of classes in order')
  first: dict[str, int] = {}
  for number, name in sorted(numbered.items()):
    if first.setdefault(str(name), number) != number:
      raise InputError(f'{where}: names has {quote(str(name))} for class {first[str(name)]} and '
                       f'for class {number}; legal: different names')
  return tuple(Category(number, str(name)) for number, name in sorted(numbered.items()))
