"""Open Images' files: a csv file of boxes, and one of the names of classes."""

import csv
import os
from collections.abc import Iterator, Sequence

from ppn_jax.data.checks import check_on_bad_example
from ppn_jax.data.contents import counted
from ppn_jax.data.sources.annotations import check_choices, check_paths, quote
from ppn_jax.data.sources.labelled_images import (
  ImageFinder,
  LabelledImage,
  LabelledImages,
  name_categories,
)
from ppn_jax.errors import InputError

COLUMNS = ('ImageID', 'LabelName', 'XMin', 'XMax', 'YMin', 'YMax')


class OpenImages(LabelledImages):
  """Images of Open Images with its csv file of boxes.

  The file lists millions of images of which few are usually at hand, so it is read row by row, and
  rows of images that are not in the folder are counted and left out. Groups (`IsGroupOf`) count as
  crowds, which are ignored in training and scoring. Image ids are those of
  `annotations.number_images`.

  Args:
    annotations: The csv file, such as train-annotations-bbox.csv.
    images: The folder of the images, called ImageID.jpg.
    class_descriptions: The csv file with a name for each LabelName, such as
      class-descriptions-boxable.csv; '' uses LabelName itself.
    classes: Names in order of label; ids count from 1, and boxes of other classes are left out. By
      default all names that occur, in alphabetical order.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    on_bad_example: For images whose header cannot be read: 'raise', or 'skip' until they are
      indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the files; by indexing, for an image that cannot be
      decoded.
  """

  def __init__(self, annotations: str, images: str, class_descriptions: str = '',
               classes: Sequence[str] = (), on_bad_box: str = 'clip', duplicates: str = 'merge',
               on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_paths('open_images', annotations=annotations, images=images,
                class_descriptions=class_descriptions or annotations)
    file = os.fspath(annotations)
    names = _read_names(os.fspath(class_descriptions)) if class_descriptions else {}
    finder = ImageFinder(os.fspath(images))
    kept = frozenset(classes) if not isinstance(classes, str) else frozenset()
    read, absent, others = _read_rows(file, names, finder, kept)
    if not read:
      raise InputError(f'{file}: none of its {absent} images is in {finder.folder!r}, where '
                       f'they are called ImageID.jpg, such as {os.path.basename(finder.files[0])}')
    unused = len(finder.files) - len(read)
    notes = [text for count, text in (
        (absent, f'{counted(absent, "image")} of {file} left out: not in {finder.folder}'),
        (others, f'{counted(others, "box")} of other classes left out'),
        (unused, f'{counted(unused, "image")} not used: not in {file}')) if count]
    found = list(read.values())
    self._take(found, list(read), finder.folder, shares=True, notes=notes,
               categories=name_categories('open_images', classes, (), found),
               on_bad_box=on_bad_box, duplicates=duplicates, on_bad_example=on_bad_example)


def _read_names(file: str) -> dict[str, str]:
  """Reads the name of each LabelName.

  Raises:
    InputError: If the file is wrong.
  """
  names = {}
  for number, row in _rows(file):
    if len(row) != 2 or not all(row):
      raise InputError(f'{file}:{number}: {quote(row)}, legal: LabelName and a name')
    names[row[0]] = row[1]
  return names


def _read_rows(file: str, names: dict[str, str], finder: ImageFinder, kept: frozenset[str]
               ) -> tuple[dict[str, LabelledImage], int, int]:
  """Reads the boxes of the images that are there.

  Args:
    file: The csv file.
    names: LabelName -> name, empty to use LabelName.
    finder: Finds the images.
    kept: Names of the classes to keep, empty for all.

  Returns:
    Path of an image -> its boxes; the number of other images, and of boxes of other classes.

  Raises:
    InputError: If the file is wrong.
  """
  rows = iter(_rows(file))
  _, header = next(rows, (0, []))
  if missing := [c for c in COLUMNS if c not in header]:
    raise InputError(f'{file}: no column {missing[0]!r} in {quote(header)}, needed: '
                     f'{", ".join(COLUMNS)}')
  at_id, at_label, *at_box = (header.index(c) for c in COLUMNS)
  at_group = header.index('IsGroupOf') if 'IsGroupOf' in header else None
  read: dict[str, LabelledImage] = {}
  absent, others = set(), 0
  for number, row in rows:
    if len(row) != len(header):
      raise InputError(f'{file}:{number}: {len(row)} fields, needed: {len(header)}, as the header '
                       'has')
    path = None if row[at_id] in absent else finder.find(row[at_id])
    if path is None:
      absent.add(row[at_id])
      continue
    image = read.setdefault(path, LabelledImage(file, row[at_id], (0, 0), [], [], []))
    label = row[at_label]
    if names and label not in names:
      raise InputError(f'{file}:{number}: LabelName {quote(label)} is not among the '
                       f'{len(names)} of the class descriptions')
    name = names.get(label, label)
    if kept and name not in kept:
      others += 1
      continue
    image.classes.append(name)
    image.boxes.append(_box([row[i] for i in at_box]))
    image.crowd.append(at_group is not None and row[at_group] == '1')
  return read, len(absent), others


def _box(written: list[str]) -> list:
  """Returns x, y, width, height from xmin, xmax, ymin, ymax; what is written if that is wrong."""
  try:
    xmin, xmax, ymin, ymax = map(float, written)
  except ValueError:
    return written
  return [xmin, ymin, xmax - xmin, ymax - ymin]


def _rows(file: str) -> Iterator[tuple[int, list[str]]]:
  """Yields the number of each line of a csv file and its fields; empty lines are left out."""
  try:
    with open(file, encoding='utf-8-sig', newline='') as f:
      reader = csv.reader(f)
      for row in reader:
        if row:
          yield reader.line_num, row
  except OSError as e:
    raise InputError(f'{file}: cannot be read: {e.strerror}') from e
  except (csv.Error, UnicodeDecodeError) as e:
    raise InputError(f'{file}: not a csv file: {e}') from e
