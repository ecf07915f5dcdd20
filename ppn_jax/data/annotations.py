"""What all data sets of images with boxes share: boxes checked once, in columns, and looked up."""

import collections
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.data import images as image_files
from ppn_jax.data.lazy_image import LazyImage
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

# Pixels that a box may reach beyond its image before it counts as wrong. Exporters that count
# pixels from 1, or round corners and sides apart, overshoot by up to one.
BORDER_TOLERANCE = 1.0
SHOWN = 5  # How many culprits a message or a report names.
_REASONS = ('', 'not four numbers', 'not finite', 'no area', 'outside the image')
_NUMBERS = frozenset((int, float))  # Not bool, which is an int to isinstance.


class BadBoxes(NamedTuple):
  """The boxes that `on_bad_box='drop'` left out; true if there are any."""
  count: int
  reasons: dict[str, int]  # Reason -> number of boxes.
  first: tuple[str, ...]  # The first few, a line each.

  def __bool__(self) -> bool:
    return self.count > 0

  def __str__(self) -> str:
    reasons = ', '.join(f'{n} {reason}' for reason, n in self.reasons.items())
    return f'{self.count} bad boxes dropped ({reasons}), such as: ' + '; '.join(self.first)


class Images(NamedTuple):
  """The images of a data set."""
  ids: np.ndarray  # i64 [N], all different.
  names: Sequence[str]  # What `ground_truth` calls them.
  files: Sequence[str]  # Where they are: what errors call them.
  sizes: np.ndarray  # i64 [N, 2], (height, width) in pixels of the originals.


class Boxes(NamedTuple):
  """Boxes that passed, in the order of their images."""
  rows: np.ndarray  # i64 [K], which of the rows that were checked.
  counts: np.ndarray  # i64 [N], boxes of each image.
  boxes: np.ndarray  # f32 [K, 4], [ymin, xmin, ymax, xmax] of the image, cut at its border.
  bboxes: np.ndarray  # f64 [K, 4], x, y, width, height in pixels, as they were given.


class Columns(NamedTuple):
  """A data set of N images and K boxes."""
  images: Images
  boxes: Boxes
  labels: np.ndarray  # i32 [K].
  crowd: np.ndarray  # bool [K].
  areas: np.ndarray  # f64 [K], in pixels.


class AnnotatedImages:
  """A `sources.Source` made of columns; its sub-classes read them from a format.

  Attributes:
    categories, max_boxes: see `sources.Source`.
    bad_boxes: what was dropped.
  """
  categories: tuple[Category, ...]
  bad_boxes: BadBoxes

  def _fill(self, columns: Columns) -> None:
    self._images, self._table = columns.images, columns
    counts = columns.boxes.counts
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.max_boxes = int(counts.max(initial=0))

  def __len__(self) -> int:
    return len(self._images.ids)

  def __getitem__(self, index: int) -> Example:
    example = self.open_example(index)
    return example._replace(image=np.asarray(example.image))

  def open_example(self, index: int) -> Example:
    """See `sources.open_example`."""
    height, width = self._images.sizes[index].tolist()
    image = self._pixels(index, (height, width))
    rows = slice(self._starts[index], self._starts[index + 1])
    return Example(image, self._table.boxes.boxes[rows].copy(), self._table.labels[rows].copy(),
                   self._table.crowd[rows].copy(), int(self._images.ids[index]), (height, width))

  def _pixels(self, index: int, size: tuple[int, int]) -> LazyImage:
    """Image `index`, whose original has `size`."""
    return image_files.open_image(self.encoded(index), name=self._images.files[index], size=size)

  def encoded(self, index: int) -> bytes:
    """The bytes of the image file `index`.

    Raises:
      InputError: they cannot be read.
    """
    return image_files.read(self._images.files[index])

  def stamp(self, index: int) -> bytes:
    """See `sources.Source`."""
    return image_files.stamp(self._images.files[index])

  def ground_truth(self) -> dict[str, Any]:
    """The boxes as they were given, less those dropped; see `sources.Source`."""
    images = [{'id': i, 'file_name': name, 'height': h, 'width': w} for i, name, (h, w)
              in zip(self._images.ids.tolist(), self._images.names, self._images.sizes.tolist(),
                     strict=True)]
    category_ids = np.array([c.id for c in self.categories])
    columns = (np.repeat(self._images.ids, self._table.boxes.counts),
               category_ids[self._table.labels], self._table.boxes.bboxes, self._table.areas,
               self._table.crowd.astype(int))
    # Numbered from 1: pycocotools takes an annotation id of 0 for "not matched".
    annotations = [
        {'id': n, 'image_id': image, 'category_id': category, 'bbox': bbox, 'area': area,
         'iscrowd': crowd}
        for n, (image, category, bbox, area, crowd)
        in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)]
    return {'images': images, 'annotations': annotations,
            'categories': [c._asdict() for c in self.categories]}


def parse_boxes(written: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
  """Lists of four numbers -> f64 [M, 4], and i64 [M] reasons (0: none yet) for `check_boxes`."""
  reasons = np.zeros(len(written), np.int64)
  values = list(written)
  for i, v in enumerate(written):
    if not (isinstance(v, list) and len(v) == 4 and _NUMBERS.issuperset(map(type, v))):
      values[i], reasons[i] = [0.0] * 4, _REASONS.index('not four numbers')
  try:
    return np.array(values, np.float64).reshape(-1, 4), reasons
  except OverflowError:  # An integer of hundreds of digits.
    clamped = [[float(min(max(n, -1e300), 1e300)) for n in v] for v in values]
    return np.array(clamped, np.float64), reasons


def check_boxes(bboxes: np.ndarray, reasons: np.ndarray, owners: np.ndarray, images: Images, *,
                on_bad_box: str, show: Callable[[int], str]) -> tuple[Boxes, BadBoxes]:
  """Sorts the good boxes by image and the bad ones out.

  Args:
    bboxes: f64 [M, 4], x, y, width, height in pixels.
    reasons: i64 [M] of `parse_boxes`; changed in place.
    owners: int [M], positions in `images`.
    images: N of them.
    on_bad_box: 'raise', or 'drop' boxes that are not four finite numbers, have no area or
      lie outside their image by more than `BORDER_TOLERANCE` pixels.
    show: the file and the written box of row i, for messages.

  Raises:
    InputError: there are bad boxes and `on_bad_box` is 'raise'.
  """
  corners = _normalise(bboxes, images.sizes[owners], reasons)
  bad = _report(owners, images, reasons, show)
  if bad and on_bad_box == 'raise':
    raise InputError(f'{bad.first[0]} ({bad.count} bad boxes in all); '
                     "mend the file, or leave such boxes out with on_bad_box='drop' "
                     '(--config.data.train.on_bad_box=drop, or data.eval)')
  rows = np.argsort(owners, kind='stable')
  rows = rows[reasons[rows] == 0]
  counts = np.bincount(owners[rows], minlength=len(images.ids))
  return Boxes(rows, counts, corners[rows], bboxes[rows]), bad


def join(parts: Sequence[Columns]) -> Columns:
  """One data set after the other; what `Boxes.rows` says is lost."""
  images = Images(np.concatenate([p.images.ids for p in parts]),
                  [name for p in parts for name in p.images.names],
                  [file for p in parts for file in p.images.files],
                  np.concatenate([p.images.sizes for p in parts]))
  boxes = Boxes(*(np.concatenate([getattr(p.boxes, field) for p in parts])
                  for field in Boxes._fields))
  return Columns(images, boxes, *(np.concatenate([getattr(p, field) for p in parts])
                                  for field in ('labels', 'crowd', 'areas')))


def join_bad_boxes(parts: Sequence[BadBoxes]) -> BadBoxes:
  """Of several files."""
  reasons = sum((collections.Counter(p.reasons) for p in parts), collections.Counter())
  first = tuple(line for p in parts for line in p.first)
  return BadBoxes(sum(p.count for p in parts), dict(reasons), first[:SHOWN])


def check_on_bad_box(value: Any) -> None:
  """Raises InputError unless `value` is one of the two policies."""
  if value not in ('raise', 'drop'):
    raise InputError(f"on_bad_box is {value!r}, legal: 'raise', 'drop'")


def check_paths(source: str, **options: Any) -> None:
  """Raises InputError unless every option of the source is a path."""
  for option, value in options.items():
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
      raise InputError(f'{source}.{option} is {value!r}, legal: a path')


def stays_inside(path: Any) -> bool:
  """Whether a file name leads to a file below the folder that it is joined to."""
  if not isinstance(path, str) or not path or '\0' in path or os.path.isabs(path):
    return False
  return '..' not in path.replace('\\', '/').split('/') and not path.endswith('/')


def some(names: Sequence[str]) -> str:
  """The first few of `names` in a message, no end of a long one."""
  shown = [name if len(name) <= 300 else f'{name[:297]}...' for name in names[:SHOWN]]
  return ', '.join(shown) + (', ...' if len(names) > SHOWN else '')


def number_images(names: Sequence[str]) -> np.ndarray:
  """Ids for images that have only names, i64 [N].

  The digits of the files' names, if all have some and no two the same, else 1, 2, ...
  """
  digits = [''.join(re.findall('[0-9]', os.path.splitext(os.path.basename(n))[0])) for n in names]
  if all(0 < len(d) <= 18 for d in digits) and len({int(d) for d in digits}) == len(digits):
    return np.array([int(d) for d in digits], np.int64)
  return np.arange(1, len(names) + 1)


def _normalise(bboxes: np.ndarray, sizes: np.ndarray, reasons: np.ndarray) -> np.ndarray:
  """x, y, width, height in pixels -> f32 [M, 4] of the image; marks the bad ones in `reasons`.

  Args:
    bboxes: f64 [M, 4].
    sizes: i64 [M, 2], (height, width) of each box's image.
    reasons: i64 [M], positions in _REASONS; changed in place where it is still 0.
  """
  def mark(reason: str, where: np.ndarray) -> None:
    reasons[(reasons == 0) & where] = _REASONS.index(reason)

  x, y, w, h = bboxes.T
  height, width = sizes.T
  with np.errstate(invalid='ignore', over='ignore'):
    mark('not finite', ~np.isfinite(bboxes).all(axis=-1))
    mark('no area', (w <= 0) | (h <= 0))
    mark('outside the image', (np.minimum(x, y) < -BORDER_TOLERANCE)
         | (x + w > width + BORDER_TOLERANCE) | (y + h > height + BORDER_TOLERANCE))
    corners = np.stack([y / height, x / width, (y + h) / height, (x + w) / width], axis=-1)
    boxes = np.clip(corners, 0, 1).astype(np.float32)
  # Thinner than float32 can tell, or wholly in the strip beyond the border.
  mark('no area', ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])))
  return boxes


def _report(owners: np.ndarray, images: Images, reasons: np.ndarray,
            show: Callable[[int], str]) -> BadBoxes:
  bad = np.flatnonzero(reasons)
  counts = collections.Counter(_REASONS[r] for r in reasons[bad])
  first = tuple(
      f'{show(i)} of image {images.ids[at]} ({images.files[at]}, height x width '
      f'{images.sizes[at, 0]} x {images.sizes[at, 1]}): {_REASONS[reasons[i]]}'
      for i, at in zip(bad[:SHOWN].tolist(), owners[bad[:SHOWN]].tolist(), strict=True))
  return BadBoxes(len(bad), dict(counts), first)
