"""Images in a folder with a COCO instances file: read once, checked whole, then only looked up."""

import collections
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.data import images as image_files
from ppn_jax.data import instances
from ppn_jax.data.sources import check_categories
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

# Pixels that a box may reach beyond its image before it counts as wrong. Exporters that count
# pixels from 1, or round corners and sides apart, overshoot by up to one.
BORDER_TOLERANCE = 1.0
_REASONS = ('', 'not four numbers', 'not finite', 'no area', 'outside the image')
_NUMBERS = frozenset((int, float))  # Not bool, which is an int to isinstance.
_SHOWN = 5  # How many culprits a message or a report names.


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


class CocoJson:
  """A folder of images and their boxes in COCO's instances format; a `sources.Source`.

  Category ids may have gaps and start anywhere; label k is the k-th in order of id. Crowds keep
  their flag and images without boxes stay. Boxes that overshoot the image by up to
  `BORDER_TOLERANCE` pixels are cut at its border for training, and stand as they are in
  `ground_truth`. Ids of annotations are not used: files exist in which they repeat or are absent.

  Args:
    images: folder that the file names are relative to.
    annotations: the json file.
    on_bad_box: what to do with a box that is not four finite numbers, has no area or lies
      outside its image: 'raise', or 'drop' it and list it in `bad_boxes`.
    categories: the classes of the run, if they are settled; the file must have the same.

  Attributes:
    categories, max_boxes: see `sources.Source`.
    bad_boxes: what was dropped.

  Raises:
    InputError: at construction, for anything wrong with the file and for images that are not
      in the folder; by indexing, for an image that cannot be decoded whole.
  """

  def __init__(self, images: str, annotations: str, on_bad_box: str = 'raise',
               categories: Sequence[Category] | None = None):
    if on_bad_box not in ('raise', 'drop'):
      raise InputError(f"on_bad_box is {on_bad_box!r}, legal: 'raise', 'drop'")
    for option, value in (('images', images), ('annotations', annotations)):
      if not isinstance(value, (str, os.PathLike)):
        raise InputError(f'coco_json.{option} is {value!r}, legal: a path')
    if not os.path.isdir(images):
      raise InputError(f'no folder of images at {os.fspath(images)!r}')
    self._folder, self._file = os.fspath(images), os.fspath(annotations)
    tables = instances.read(self._file)
    self._read_categories(tables['categories'])
    if categories is not None:
      check_categories(self._file, self.categories, categories)
    self._read_images(tables['images'])
    self._read_boxes(tables['annotations'], drop=on_bad_box == 'drop')
    self._check_files()

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Example:
    name = os.path.join(self._folder, self._names[index])
    height, width = self._sizes[index].tolist()
    try:
      with open(name, 'rb') as f:
        data = f.read()
    except OSError as e:
      raise InputError(f'{name}: cannot be read: {e.strerror}') from e
    image = image_files.decode(data, name=name, size=(height, width))
    rows = slice(self._starts[index], self._starts[index + 1])
    return Example(image, self._boxes[rows].copy(), self._labels[rows].copy(),
                   self._crowd[rows].copy(), int(self._ids[index]), (height, width))

  def ground_truth(self) -> dict[str, Any]:
    """The file's own boxes and areas, less those dropped; see `sources.Source`."""
    images = [{'id': i, 'file_name': name, 'height': h, 'width': w} for i, name, (h, w)
              in zip(self._ids.tolist(), self._names, self._sizes.tolist(), strict=True)]
    category_ids = np.array([c.id for c in self.categories])
    columns = (np.repeat(self._ids, np.diff(self._starts)), category_ids[self._labels],
               self._bboxes, self._areas, self._crowd.astype(int))
    # Numbered from 1: pycocotools takes an annotation id of 0 for "not matched".
    annotations = [
        {'id': n, 'image_id': image, 'category_id': category, 'bbox': bbox, 'area': area,
         'iscrowd': crowd}
        for n, (image, category, bbox, area, crowd)
        in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)]
    return {'images': images, 'annotations': annotations,
            'categories': [c._asdict() for c in self.categories]}

  def _read_categories(self, table: instances.Table) -> None:
    if not len(table):
      raise InputError(f'{self._file}: no categories')
    names = table.column('name', lambda v: isinstance(v, str) and v, 'a name')
    self.categories = tuple(sorted(map(Category, table.ids().tolist(), names)))

  def _read_images(self, table: instances.Table) -> None:
    if not len(table):
      raise InputError(f'{self._file}: no images')
    self._ids = table.ids()
    self._names = table.column('file_name', _stays_inside, 'a path inside the folder of images')
    self._sizes = np.stack([table.integers('height'), table.integers('width')], axis=-1)
    for i in np.flatnonzero((self._sizes < 1).any(axis=-1))[:1]:
      raise table.error(i, f'height and width are {self._sizes[i].tolist()}, legal: 1 and more')

  def _read_boxes(self, table: instances.Table, drop: bool) -> None:
    """Fills the columns that `__getitem__` slices: boxes in the order of their images."""
    owners = table.references('image_id', self._ids)
    labels = table.references('category_id', [c.id for c in self.categories])
    written = table.column('bbox')
    bboxes, reasons = _parse(written)
    boxes = _normalise(bboxes, self._sizes[owners], reasons)
    self.bad_boxes = self._report(written, owners, reasons)
    if self.bad_boxes.count and not drop:
      raise InputError(f'{self.bad_boxes.first[0]} ({self.bad_boxes.count} bad boxes in all); '
                       "mend the file, or leave such boxes out with on_bad_box='drop'")
    order = np.argsort(owners, kind='stable')
    order = order[reasons[order] == 0]
    counts = np.bincount(owners[order], minlength=len(self._ids))
    self.max_boxes = int(counts.max())
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self._boxes, self._bboxes = boxes[order], bboxes[order]
    self._labels = labels[order].astype(np.int32)
    self._areas = _areas(table, self._bboxes, order)
    self._crowd = _crowd(table, order)

  def _report(self, written: list, owners: np.ndarray, reasons: np.ndarray) -> BadBoxes:
    bad = np.flatnonzero(reasons)
    counts = collections.Counter(_REASONS[r] for r in reasons[bad])
    first = tuple(
        f'{self._file}: bbox {written[i]!r} (x, y, width, height) of image {self._ids[owners[i]]} '
        f'({self._names[owners[i]]}, height x width {self._sizes[owners[i], 0]} x '
        f'{self._sizes[owners[i], 1]}): {_REASONS[reasons[i]]}' for i in bad[:_SHOWN])
    return BadBoxes(len(bad), dict(counts), first)

  def _check_files(self) -> None:
    """Finds absent images by listing folders, which is cheaper than asking for every file."""
    wanted = collections.defaultdict(set)
    for path in self._names:
      wanted[os.path.dirname(path)].add(os.path.basename(path))
    missing = []
    for folder, names in wanted.items():
      try:
        present = os.listdir(os.path.join(self._folder, folder))
      except OSError:
        present = []
      missing += [os.path.join(folder, name) for name in sorted(names.difference(present))]
    if missing:
      more = ', ...' if len(missing) > _SHOWN else ''
      raise InputError(f'{len(missing)} of the {len(self)} images that {self._file} lists are not '
                       f"in {self._folder!r}: {', '.join(missing[:_SHOWN])}{more}")


def _stays_inside(path: Any) -> bool:
  """Whether a file name leads to a file below the folder that it is joined to."""
  if not isinstance(path, str) or not path or '\0' in path or os.path.isabs(path):
    return False
  return '..' not in path.replace('\\', '/').split('/') and not path.endswith('/')


def _parse(written: list) -> tuple[np.ndarray, np.ndarray]:
  """The json's bbox values -> f64 [N, 4], and i64 [N] positions in _REASONS."""
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


def _normalise(bboxes: np.ndarray, sizes: np.ndarray, reasons: np.ndarray) -> np.ndarray:
  """x, y, width, height in pixels -> f32 [N, 4] of the image; marks the bad ones in `reasons`.

  Args:
    bboxes: f64 [N, 4].
    sizes: i64 [N, 2], (height, width) of each box's image.
    reasons: i64 [N], positions in _REASONS; changed in place where it is still 0.
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


def _areas(table: instances.Table, bboxes: np.ndarray, order: np.ndarray) -> np.ndarray:
  """f64 of the entries `order`, whose boxes are `bboxes`: the file's, else width x height."""
  areas = bboxes[:, 2] * bboxes[:, 3]
  written = table.optional('area')
  for k, i in enumerate(order.tolist()):
    if written[i] is not None:
      if type(written[i]) not in _NUMBERS or not 0 <= written[i] < 1e300:
        raise table.error(i, f'area is {written[i]!r}, legal: a number of pixels, or none')
      areas[k] = written[i]
  return areas


def _crowd(table: instances.Table, order: np.ndarray) -> np.ndarray:
  """bool of the entries `order`; absent means not a crowd."""
  written = table.optional('iscrowd')
  for i in order.tolist():
    if written[i] not in (None, 0, 1):
      raise table.error(i, f'iscrowd is {written[i]!r}, legal: 0, 1')
  return np.array([bool(written[i]) for i in order.tolist()], bool)
