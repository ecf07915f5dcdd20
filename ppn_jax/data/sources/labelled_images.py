"""Base of sources for the files of annotation tools, which name an image for each set of boxes."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, advise_skipping
from ppn_jax.data.images import folders
from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  AnnotationTable,
  Images,
  check_boxes,
  command_line_flag,
  fill_in_sizes,
  join_names,
  number_images,
  parse_boxes,
  quote,
  read_header_sizes,
  reader_pool,
  sizes_of_boxes,
)
from ppn_jax.data.sources.uploaded_names import name_after_upload
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean


class LabelledImage(NamedTuple):
  """One image as an annotation tool describes it.

  Attributes:
    where: The file of annotations, and the entry in it, for messages.
    name: The name or path of the image, as written there.
    size: (height, width) that is stated there; zeros if none is.
    classes: The class of each box.
    boxes: [x, y, width, height] of each, or anything else for one that is wrong.
    crowd: Whether each is a group.
  """
  where: str
  name: str
  size: tuple[int, int]
  classes: list[str]
  boxes: list
  crowd: list[bool]


class ImageFinder:
  """Finds the files of images by what annotations call them.

  Args:
    folder: The images, also in folders below it.

  Raises:
    InputError: If there is no such folder, or no image in it.
  """

  def __init__(self, folder: str):
    if not os.path.isdir(folder):
      seen_from = '' if os.path.isabs(folder) else f', seen from {os.getcwd()}'
      raise InputError(f'no folder of images at {folder!r}{seen_from}')
    self.folder = folder
    self.files, _ = folders.list_tree(folder)
    if not self.files:
      raise InputError(f'no images in {folder!r}')
    self._exact = {os.path.relpath(file, folder).replace(os.sep, '/'): file for file in self.files}
    self._named: dict[str, list[str]] = {}
    self._uploaded: dict[str, list[str]] = {}
    for file in self.files:
      base = os.path.basename(file)
      for name in {base, os.path.splitext(base)[0]}:
        self._named.setdefault(name, []).append(file)
      self._uploaded.setdefault(name_after_upload(base), []).append(file)

  def find(self, *names: str) -> str | None:
    """Returns the file of the first name that leads to one, None if none does.

    A name is a path as another machine may have written it, of which as much of the end counts as
    is there, or a file name with or without its suffix, or as an upload changes it.

    Raises:
      InputError: If only the file name fits, and several images have it, or of a further name have
        it after an upload.
    """
    split = [[p for p in name.replace('\\', '/').split('/') if p not in ('', '.', '..')]
             for name in names]
    for number, parts in enumerate(split):
      for start in range(len(parts)):
        if file := self._exact.get('/'.join(parts[start:])):
          if number and start == len(parts) - 1:  # The folder is a guess.
            return self._only(self._uploaded, [name_after_upload(parts[-1])])
          return file
      if file := self._only(self._named, parts):
        return file
    return next(filter(None, (self._only(self._uploaded, parts) for parts in split)), None)

  def _only(self, named: Mapping[str, list[str]], parts: Sequence[str]) -> str | None:
    """Returns the file with the last part of a path as its name."""
    files = named.get(parts[-1], []) if parts else []
    if len(files) > 1:
      raise InputError(f'{quote(parts[-1])} can be {len(files)} images: {join_names(files)}; give '
                       'each its own name')
    return files[0] if files else None


class LabelledImages(AnnotatedImages):
  """Base of sources that read `LabelledImage`s; see `PascalVoc` for the meaning of the options."""

  def _take(self, read: Sequence[LabelledImage], files: Sequence[str | None], folder: str, *,
            categories: Sequence[Category], shares: bool, on_bad_box: str, duplicates: str,
            on_bad_example: str, check_size: bool = True, notes: Sequence[str] = ()) -> None:
    """Takes the annotations of a data set.

    Args:
      read: N images with their boxes.
      files: The file of each image, None for one that was not found.
      folder: The folder where they were looked for, for messages.
      categories: The classes, which include all those of the boxes.
      shares: Whether boxes are shares of the image, 0 to 1, instead of pixels.
      on_bad_box, duplicates, on_bad_example, check_size: Options of the source.
      notes: Further lines for a report.
    """
    self.categories = tuple(categories)
    _check_distinct(read, files)
    missing = {i: f'{image.where}: {quote(image.name)} is not in {folder!r}'
               for i, (image, file) in enumerate(zip(read, files, strict=True)) if file is None}
    if missing and on_bad_example == 'raise':
      others = join_names([read[i].name for i in missing][1:])
      raise InputError(f'{len(missing)} of {len(read)} images are missing: '
                       f'{next(iter(missing.values()))}{f", nor {others}" if others else ""}; '
                       f'{advise_skipping(len(missing), len(read))}')
    paths = [file or os.path.join(folder, image.name)
             for image, file in zip(read, files, strict=True)]
    sizes, unreadable = _read_sizes(read, files, on_bad_example, check_size)
    images = Images(number_images(paths), [os.path.basename(p) for p in paths], paths,
                    fill_in_sizes(sizes, unreadable | missing))
    owners = np.repeat(np.arange(len(read)), [len(image.boxes) for image in read])
    written = [box for image in read for box in image.boxes]
    given, reasons = parse_boxes(written)
    with np.errstate(invalid='ignore', over='ignore'):
      bboxes = given * images.sizes[owners][:, [1, 0, 1, 0]] if shares else given
    kind = 'x, y, width, height' + (', shares of the image' if shares else '')
    boxes, findings = check_boxes(
        bboxes, reasons, owners, images, on_bad_box=on_bad_box,
        written=None if shares else given,
        show=lambda i: f'{read[owners[i]].where}: box {quote(written[i])} ({kind})')
    label = {c.name: k for k, c in enumerate(self.categories)}
    labels = np.array([label[name] for image in read for name in image.classes], np.int32)
    crowd = np.array([c for image in read for c in image.crowd], bool)
    table = AnnotationTable(images, boxes, labels[boxes.rows], crowd[boxes.rows],
                            boxes.bboxes[:, 2:].prod(axis=-1))
    self._set_data(table, findings, duplicates=duplicates, no_boxes='without objects',
                   unreadable=dict(sorted((unreadable | missing).items())), notes=notes)


def name_categories(what: str, classes: Sequence[str], listed: Sequence[str],
                    read: Sequence[LabelledImage]) -> tuple[Category, ...]:
  """Returns the classes of a data set, with ids from 1.

  Args:
    what: The source, for messages.
    classes: The user's names in order of label, empty for those that are listed and found.
    listed: Names that the file lists in order.
    read: The images. Names that are only there follow in alphabetical order.

  Raises:
    InputError: If `classes` are no names or differ from those of the boxes, or there are none.
  """
  found = {name for image in read for name in image.classes}
  if isinstance(classes, str) or not all(isinstance(c, str) and c for c in classes):
    raise InputError(f'{what}.classes is {quote(classes)}, legal: names of classes')
  names = list(classes) or [*listed, *sorted(found.difference(listed))]
  if not names:
    raise InputError(f'{what}: no object has a class; name the classes by {what}.classes')
  if len(set(names)) < len(names):
    raise InputError(f'{what}.classes names one class twice: {quote(names)}')
  for image in read if classes else ():
    for name in image.classes:
      if name not in names:
        raise InputError(f'{image.where}: unknown class {quote(name)}; '
                         f'{did_you_mean(name, names)}')
  return tuple(Category(i, name) for i, name in enumerate(names, start=1))


def box_around_points(points: Iterable) -> list[float]:
  """Computes x, y, width, height of the box around points; [] if they are no pairs of numbers."""
  try:
    array = np.array(list(points), np.float64)
  except (TypeError, ValueError, OverflowError):
    return []
  if array.ndim != 2 or array.shape[1] != 2 or not len(array):
    return []
  low = array.min(axis=0)
  with np.errstate(invalid='ignore', over='ignore'):
    return [*low.tolist(), *(array.max(axis=0) - low).tolist()]


def turned_box(box: Sequence[float], degrees: float, pivot: tuple[float, float]) -> list[float]:
  """Computes the box around a box that is turned clockwise about a point.

  Args:
    box: x, y, width, height in pixels.
    degrees: The angle.
    pivot: x, y of the point.
  """
  x, y, width, height = box
  angle = np.deg2rad(degrees)
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  corners = np.array([(x, y), (x + width, y), (x, y + height), (x + width, y + height)])
  return box_around_points((corners - pivot) @ turn.T + pivot)


def stated_size(height: object, width: object) -> tuple[int, int]:
  """Returns (height, width) as integers; zeros unless both are whole numbers above 0."""
  sides = []
  for side in (height, width):
    text = str(side) if isinstance(side, (int, float, str)) and not isinstance(side, bool) else ''
    whole = re.fullmatch(r' *([1-9][0-9]{0,8})(\.0*)? *', text)
    sides.append(int(whole[1]) if whole else 0)
  return (sides[0], sides[1]) if all(sides) else (0, 0)


def _check_distinct(read: Sequence[LabelledImage], files: Sequence[str | None]) -> None:
  """Raises InputError if two entries are about one image."""
  first: dict[str, LabelledImage] = {}
  for image, file in zip(read, files, strict=True):
    if file and first.setdefault(file, image) is not image:
      raise InputError(f'{image.where} and {first[file].where} are both about {file}; keep one')


def _read_sizes(read: Sequence[LabelledImage], files: Sequence[str | None], on_bad_example: str,
                check_size: bool) -> tuple[list[tuple[int, int] | None], dict[int, str]]:
  """Returns the size that each image's boxes refer to, and image -> reason for unreadable ones."""
  with reader_pool() as pool:
    stored = list(pool.map(read_header_sizes, files))
  unreadable = {i: str(e) for i, e in enumerate(stored) if isinstance(e, InputError)}
  # Reading deals with damaged images by its own policy, unless their size is needed here.
  for i in unreadable if on_bad_example == 'raise' else ():
    if not all(read[i].size):
      raise InputError(f'{unreadable[i]}; {SKIP_IMAGES}') from stored[i]
  sizes, wrong = sizes_of_boxes([image.size for image in read], [image.where for image in read],
                                files, stored)
  if wrong and check_size:
    raise InputError(f'{len(wrong)} images have another size (height x width) than is stated: '
                     f'{wrong[0]}; correct that, or set check_size=False if the boxes are in '
                     f'pixels of the image files ({command_line_flag("check_size", False)})')
  return sizes, unreadable if on_bad_example == 'skip' else {}


def find_all(finder: ImageFinder, read: Sequence[LabelledImage],
             names: Mapping[int, Sequence[str]] | None = None) -> list[str | None]:
  """Returns the file of every image, None for missing ones.

  Args:
    finder: Finds them.
    read: The images.
    names: Image -> the names to look for, if they are not `LabelledImage.name` alone.

  Raises:
    InputError: See `ImageFinder.find`.
  """
  files = []
  for i, image in enumerate(read):
    try:
      files.append(finder.find(*((names or {}).get(i) or [image.name])))
    except InputError as e:
      raise InputError(f'{image.where}: {e}') from e
  return files
