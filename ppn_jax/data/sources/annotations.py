"""Base of all sources that read annotations: checks all boxes once and looks them up later."""

import collections
import concurrent.futures
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.data.contents import (
  ALL_LEFT_OUT,
  NO_BOXES,
  SHOWN,
  BadBoxes,
  Contents,
  Tally,
)
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

# Pixels by which a box may extend beyond its image. Exporters that count pixels from 1, or round
# corners and sides separately, overshoot by up to one.
BORDER_TOLERANCE = 1.0
KEPT_SHARE = 0.5  # Share of its area that a box must keep to be cut at the edge of its image.
ON_BAD_BOX = ('clip', 'drop', 'raise')
DUPLICATES = ('merge', 'keep')
_REASONS = ('', 'not four numbers', 'not finite', 'no area', 'outside the image')
_NUMBERS = frozenset((int, float))  # Not bool, which is an int to isinstance.
_SHARES = -0.05, 1.05  # Range of shares of an image, including the overshoot of exporters.


class Images(NamedTuple):
  """Images of a data set."""
  ids: np.ndarray  # i64 [N], unique.
  names: Sequence[str]  # Their names in `ground_truth`.
  files: Sequence[str]  # Their paths, and names in errors.
  sizes: np.ndarray  # i64 [N, 2], (height, width) of the originals in pixels.


class Boxes(NamedTuple):
  """Boxes that passed the checks, in the order of their images."""
  rows: np.ndarray  # i64 [K], positions among the boxes that were checked.
  counts: np.ndarray  # i64 [N], number of boxes of each image.
  boxes: np.ndarray  # f32 [K, 4], [ymin, xmin, ymax, xmax] in 0 to 1, cut at the border.
  bboxes: np.ndarray  # f64 [K, 4], x, y, width, height in pixels, as in the data.


class AnnotationTable(NamedTuple):
  """Annotations of a data set of N images and K boxes."""
  images: Images
  boxes: Boxes
  labels: np.ndarray  # i32 [K].
  crowd: np.ndarray  # bool [K].
  areas: np.ndarray  # f64 [K], in pixels.


class Findings(NamedTuple):
  """Results of checking the boxes of N images."""
  bad: BadBoxes
  clipped: Tally
  tiny: Tally  # Boxes smaller than a pixel.
  emptied: np.ndarray  # bool [N], whether all boxes of an image were left out.
  notes: tuple[str, ...] = ()  # Further lines for a report.


class AnnotatedImages:
  """Base of sources with annotations in memory; sub-classes read them from a file format.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.
  """
  categories: tuple[Category, ...]
  contents: Contents

  def _set_data(self, columns: AnnotationTable, findings: Findings, *, duplicates: str,
                no_boxes: str | np.ndarray = NO_BOXES[0],
                unreadable: Mapping[int, str] | None = None, notes: Sequence[str] = ()) -> None:
    """Takes the annotations of a data set, after sub-classes have set `categories`.

    Args:
      columns: Annotations of N images.
      findings: Results of `check_boxes`.
      duplicates: 'merge' removes repetitions of a box, 'keep' leaves them.
      no_boxes: The reason for images to have no boxes, one of NO_BOXES, or i8 [N] positions in it.
      unreadable: Image -> reason, for images that are known to be unreadable and accepted.
      notes: Further lines for a report.
    """
    merged = Tally()
    if duplicates == 'merge':
      columns, merged = merge_duplicates(columns, self.categories)
    self._images, self._table = columns.images, columns
    self._unreadable = dict(unreadable or {})
    counts = columns.boxes.counts
    self._starts = np.concatenate([[0], np.cumsum(counts)])
    self.max_boxes = int(counts.max(initial=0))
    if isinstance(no_boxes, str):
      no_boxes = np.full(len(counts), NO_BOXES.index(no_boxes), np.int8)
    owners = np.repeat(np.arange(len(counts)), counts)
    corners = columns.boxes.boxes.astype(np.float64)
    shares = corners[:, 2:] - corners[:, :2]
    self.contents = Contents(
        np.where(findings.emptied, ALL_LEFT_OUT, no_boxes).astype(np.int8), owners, columns.labels,
        columns.crowd, shares, shares * columns.images.sizes[owners], findings.bad,
        findings.clipped, merged, tuple(self._unreadable.items()),
        (*_note_tiny(findings.tiny, len(owners)), *findings.notes, *notes))

  def __len__(self) -> int:
    return len(self._images.ids)

  def __getitem__(self, index: int) -> Example:
    example = self.open_example(index)
    return example._replace(image=np.asarray(example.image))

  def open_example(self, index: int) -> Example:
    """See `OptionalMembers`."""
    height, width = self._images.sizes[index].tolist()
    if self._unreadable and (why := self._unreadable.get(range(len(self))[index])):
      raise InputError(why)
    image = self._pixels(index, (height, width))
    rows = slice(self._starts[index], self._starts[index + 1])
    return Example(image, self._table.boxes.boxes[rows].copy(), self._table.labels[rows].copy(),
                   self._table.crowd[rows].copy(), int(self._images.ids[index]), (height, width))

  def _pixels(self, index: int, size: tuple[int, int]) -> LazyImage:
    """Opens image `index`, whose original has `size`."""
    return image_files.open_image(self.encoded(index), name=self._images.files[index], size=size)

  def encoded(self, index: int) -> bytes:
    """Returns the bytes of an image file.

    Raises:
      InputError: If they cannot be read.
    """
    return image_files.read(self._images.files[index])

  def stamp(self, index: int) -> bytes:
    """See `OptionalMembers`."""
    return image_files.stamp(self._images.files[index])

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth for scoring; see `Source`.

    Boxes are as in the data, even if they overshoot the image by up to BORDER_TOLERANCE. It lacks
    boxes that were dropped and repetitions that were merged. Boxes that were clipped are given as
    they were cut: since no detection can leave its image, one that finds all of the visible part
    then has an IoU of 1.
    """
    images = [{'id': i, 'file_name': name, 'height': h, 'width': w} for i, name, (h, w)
              in zip(self._images.ids.tolist(), self._images.names, self._images.sizes.tolist(),
                     strict=True)]
    category_ids = np.array([c.id for c in self.categories])
    columns = (np.repeat(self._images.ids, self._table.boxes.counts),
               category_ids[self._table.labels], self._table.boxes.bboxes, self._table.areas,
               self._table.crowd.astype(int))
    # Numbered from 1, since pycocotools takes an annotation id of 0 for "not matched".
    annotations = [
        {'id': n, 'image_id': image, 'category_id': category, 'bbox': bbox, 'area': area,
         'iscrowd': crowd}
        for n, (image, category, bbox, area, crowd)
        in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)]
    return {'images': images, 'annotations': annotations,
            'categories': [c._asdict() for c in self.categories]}


def reader_pool() -> concurrent.futures.ThreadPoolExecutor:
  """Returns threads that read the files of a data set.

  There are many, because they mostly wait for files, above all on a network file system.
  """
  return concurrent.futures.ThreadPoolExecutor(16)


# Legal (height, width) of an image, as stored and upright; the error if its header cannot be read;
# None if there is no file.
HeaderSizes = tuple[tuple[int, int], ...] | InputError | None


def read_header_sizes(file: str | None) -> HeaderSizes:
  """Returns what the header of an image file says about its size."""
  try:
    return image_files.read_sizes(file) if file else None
  except InputError as e:
    return e


def sizes_of_boxes(stated: Sequence[tuple[int, int]], where: Sequence[str],
                   files: Sequence[str | None], stored: Sequence[HeaderSizes]
                   ) -> tuple[list[tuple[int, int] | None], list[str]]:
  """Chooses the size that each image's boxes refer to: the stated one, if the image can have it.

  Args:
    stated: (height, width) that the annotations state; with a zero if they do not.
    where: The place of each in the annotations, for messages.
    files: The image files.
    stored: What `read_header_sizes` returned.

  Returns:
    The sizes, None where neither is known; and a line for each image whose stated size is wrong.
  """
  sizes: list[tuple[int, int] | None] = []
  wrong = []
  for size, place, file, legal in zip(stated, where, files, stored, strict=True):
    size = size if all(size) else None
    if legal is None or isinstance(legal, InputError) or size in legal:
      sizes.append(size)
      continue
    sizes.append(legal[1])
    if size:
      wrong.append(f'{place} says {size[0]} x {size[1]}, {file} has {legal[1][0]} x {legal[1][1]}')
  return sizes, wrong


def parse_boxes(written: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
  """Converts lists of four numbers to f64 [M, 4], and i64 [M] reasons for `check_boxes`."""
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
                on_bad_box: str, show: Callable[[int], str], written: np.ndarray | None = None,
                advice: str = '') -> tuple[Boxes, Findings]:
  """Sorts boxes by image, cuts those at the edge, and removes or rejects bad ones.

  Args:
    bboxes: f64 [M, 4], x, y, width, height in pixels.
    reasons: i64 [M] of `parse_boxes`; changed in place.
    owners: int [M], positions in `images`.
    images: The N images.
    on_bad_box: 'clip' cuts a box that extends beyond its image by more than `BORDER_TOLERANCE`
      pixels and keeps at least `KEPT_SHARE` of its area, and raises for other boxes that are not
      four finite numbers, have no area or are outside. 'drop' cuts the same boxes and leaves the
      others out. 'raise' raises for all of them.
    show: Returns the file and the written box of row i, for messages.
    written: f64 [M, 4], the four numbers of each box in the file, for formats in pixels. Those
      between 0 and 1 are then probably shares of the image.
    advice: Further advice about bad boxes, for the message.

  Returns:
    The good boxes, and what was found.

  Raises:
    InputError: If there are bad boxes that `on_bad_box` does not accept, or all boxes are shares of
      the image instead of pixels.
  """
  shares = np.zeros(len(bboxes), bool)
  if written is not None:
    shares = _find_shares(written, reasons, owners, images, show)
  corners, cut = _normalise(bboxes, images.sizes[owners], reasons, clip=on_bad_box != 'raise')
  bad = _report(owners, images, reasons, show, clip=on_bad_box != 'raise')
  if bad and on_bad_box != 'drop':
    clip = ("cut those that keep half of their area with on_bad_box='clip', "
            if on_bad_box == 'raise' and 'outside the image' in bad.reasons else '')
    raise InputError(f'{bad.first[0]} ({bad.count} bad boxes in all); correct the file, {clip}or '
                     f"leave such boxes out with on_bad_box='drop' "
                     f'({command_line_flag("on_bad_box", "drop")}){advice}')
  rows = np.argsort(owners, kind='stable')
  rows = rows[reasons[rows] == 0]
  counts = np.bincount(owners[rows], minlength=len(images.ids))
  kept = bboxes.copy()
  kept[cut] = _to_pixels(corners[cut], images.sizes[owners[cut]])
  emptied = (np.bincount(owners[reasons != 0], minlength=len(images.ids)) > 0) & (counts == 0)
  tiny = rows[(kept[rows, 2:] < 1).all(axis=-1) | shares[rows]]
  findings = Findings(bad, _tally(np.flatnonzero(cut), owners, images, show),
                      _tally(tiny, owners, images, show), emptied)
  return Boxes(rows, counts, corners[rows], kept[rows]), findings


def merge_duplicates(columns: AnnotationTable, categories: Sequence[Category]
                     ) -> tuple[AnnotationTable, Tally]:
  """Removes repeated boxes, which have the same image, class, coordinates and crowd flag."""
  boxes = columns.boxes
  owners = np.repeat(np.arange(len(boxes.counts)), boxes.counts)
  order = np.lexsort((*boxes.bboxes.T, columns.crowd, columns.labels, owners))  # It is stable.
  keys = np.column_stack([owners, columns.labels, columns.crowd, boxes.bboxes])[order]
  again = order[1:][(keys[1:] == keys[:-1]).all(axis=-1)] if len(order) else order
  if not len(again):
    return columns, Tally()
  again = np.sort(again)
  kept = np.ones(len(owners), bool)
  kept[again] = False
  first = tuple(
      f'{categories[columns.labels[k]].name!r} at {_show_numbers(boxes.bboxes[k])} '
      f'(x, y, width, height) in {columns.images.files[owners[k]]}' for k in again[:SHOWN])
  counts = np.bincount(owners[kept], minlength=len(boxes.counts))
  merged = Boxes(boxes.rows[kept], counts, boxes.boxes[kept], boxes.bboxes[kept])
  return AnnotationTable(columns.images, merged, columns.labels[kept], columns.crowd[kept],
                 columns.areas[kept]), Tally(len(again), first)


def join(parts: Sequence[AnnotationTable]) -> AnnotationTable:
  """Concatenates data sets; `Boxes.rows` has no meaning in the result."""
  images = Images(np.concatenate([p.images.ids for p in parts]),
                  [name for p in parts for name in p.images.names],
                  [file for p in parts for file in p.images.files],
                  np.concatenate([p.images.sizes for p in parts]))
  boxes = Boxes(*(np.concatenate([getattr(p.boxes, field) for p in parts])
                  for field in Boxes._fields))
  return AnnotationTable(images, boxes, *(np.concatenate([getattr(p, field) for p in parts])
                                  for field in ('labels', 'crowd', 'areas')))


def join_findings(parts: Sequence[Findings]) -> Findings:
  """Joins the findings of several files, in the order of their images."""
  reasons = sum((collections.Counter(p.bad.reasons) for p in parts), collections.Counter())
  first = tuple(line for p in parts for line in p.bad.first)
  return Findings(
      BadBoxes(sum(p.bad.count for p in parts), dict(reasons), first[:SHOWN]),
      sum((p.clipped for p in parts), Tally()), sum((p.tiny for p in parts), Tally()),
      np.concatenate([p.emptied for p in parts]), tuple(n for p in parts for n in p.notes))


def fill_in_sizes(sizes: Sequence[tuple[int, int] | None], why: Mapping[int, str]) -> np.ndarray:
  """Fills in the sizes of images that cannot be read with the median of the others.

  Their boxes need a size since they are in the ground truth, where they count as not detected.

  Args:
    sizes: (height, width) of N images, None for those that cannot be read.
    why: Image -> reason why it cannot be read.

  Returns:
    i64 [N, 2], (height, width).

  Raises:
    InputError: If no image can be read.
  """
  known = [size for size in sizes if size]
  if not known:
    raise InputError(f'none of the {len(sizes)} images can be read: {next(iter(why.values()))}')
  usual = tuple(np.median(known, axis=0).astype(np.int64).tolist())
  return np.array([size or usual for size in sizes], np.int64)


def command_line_flag(option: str, value: Any) -> str:
  """Returns the flag that sets an option; `build_source` changes the block to the right one."""
  return f'--config.data.train.{option}={value}'


def check_choices(on_bad_box: Any, duplicates: Any) -> None:
  """Raises InputError unless these options have legal values."""
  for option, value, legal in (('on_bad_box', on_bad_box, ON_BAD_BOX),
                               ('duplicates', duplicates, DUPLICATES)):
    if value not in legal:
      raise InputError(f'{option} is {value!r}, legal: {", ".join(map(repr, legal))}')


def check_paths(source: str, **options: Any) -> None:
  """Raises InputError unless all options are paths."""
  for option, value in options.items():
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
      raise InputError(f'{source}.{option} is {value!r}, legal: a path')


def stays_inside(path: Any) -> bool:
  """Returns whether a file name stays below the folder that it is joined to."""
  if not isinstance(path, str) or not path or '\0' in path or os.path.isabs(path):
    return False
  return '..' not in path.replace('\\', '/').split('/') and not path.endswith('/')


def join_names(names: Sequence[str]) -> str:
  """Joins the first few names for a message, and shortens long ones."""
  shown = [name if len(name) <= 300 else f'{name[:297]}...' for name in names[:SHOWN]]
  return ', '.join(shown) + (', ...' if len(names) > SHOWN else '')


def quote(value: Any) -> str:
  """Returns what a file says as one line of limited length, for a message."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 100 else text[:97] + '...'


def number_images(names: Sequence[str]) -> np.ndarray:
  """Returns ids for images that have only file names, i64 [N].

  These are the digits of the names if all names have digits and no two the same, else 1, 2, ...
  """
  digits = [''.join(re.findall('[0-9]', os.path.splitext(os.path.basename(n))[0])) for n in names]
  if all(0 < len(d) <= 18 for d in digits) and len({int(d) for d in digits}) == len(digits):
    return np.array([int(d) for d in digits], np.int64)
  return np.arange(1, len(names) + 1)


def _normalise(bboxes: np.ndarray, sizes: np.ndarray, reasons: np.ndarray, *, clip: bool
               ) -> tuple[np.ndarray, np.ndarray]:
  """Converts boxes in pixels to shares of the image, and marks the bad ones in `reasons`.

  Args:
    bboxes: f64 [M, 4], x, y, width, height in pixels.
    sizes: i64 [M, 2], (height, width) of each box's image.
    reasons: i64 [M], positions in _REASONS; changed in place where it is still 0.
    clip: Whether boxes that keep `KEPT_SHARE` of their area inside the image are good.

  Returns:
    [ymin, xmin, ymax, xmax], f32 [M, 4], cut at the border, and bool [M], whether a box extends
    beyond it by more than the tolerance.
  """
  def mark(reason: str, where: np.ndarray) -> None:
    reasons[(reasons == 0) & where] = _REASONS.index(reason)

  x, y, w, h = bboxes.T
  height, width = sizes.T
  with np.errstate(invalid='ignore', over='ignore', divide='ignore'):
    mark('not finite', ~np.isfinite(bboxes).all(axis=-1))
    mark('no area', (w <= 0) | (h <= 0))
    over = ((np.minimum(x, y) < -BORDER_TOLERANCE)
            | (x + w > width + BORDER_TOLERANCE) | (y + h > height + BORDER_TOLERANCE))
    # From shares of the sides, since areas may be too large for a float.
    inside = (np.clip(np.minimum(x + w, width) - np.maximum(x, 0), 0, None) / w
              * (np.clip(np.minimum(y + h, height) - np.maximum(y, 0), 0, None) / h))
    mark('outside the image', over & ~(inside >= KEPT_SHARE) if clip else over)
    corners = np.stack([y / height, x / width, (y + h) / height, (x + w) / width], axis=-1)
    boxes = np.clip(corners, 0, 1).astype(np.float32)
  # Thinner than float32 resolves, or completely in the strip beyond the border.
  mark('no area', ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])))
  return boxes, over & (reasons == 0)


def _to_pixels(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Converts [ymin, xmin, ymax, xmax] in 0 to 1 to f64 x, y, width, height in pixels."""
  ymin, xmin, ymax, xmax = (corners.astype(np.float64) * sizes[:, [0, 1, 0, 1]]).T
  return np.stack([xmin, ymin, xmax - xmin, ymax - ymin], axis=-1)


def _find_shares(written: np.ndarray, reasons: np.ndarray, owners: np.ndarray, images: Images,
                 show: Callable[[int], str]) -> np.ndarray:
  """Finds boxes in a file of pixels that look like shares of their image, bool [M].

  Raises:
    InputError: If all of them do.
  """
  rows = np.flatnonzero(reasons == 0)
  low, high = _SHARES
  with np.errstate(invalid='ignore'):
    shares = ((written >= low) & (written <= high)).all(axis=-1) & (reasons == 0)
  if len(rows) and shares[rows].all():
    i = rows[0]
    height, width = images.sizes[owners[i]].tolist()
    raise InputError(
        f'all {len(rows)} boxes have numbers between 0 and 1, such as {show(i)} of '
        f'{images.files[owners[i]]}: these look like shares of the image instead of pixels; '
        f'multiply them by the width and height of the image, here {width} and {height}')
  return shares


def _note_tiny(tiny: Tally, total: int) -> list[str]:
  if not tiny:
    return []
  what = ('every box is' if tiny.count >= total else
          f'{tiny.count:,} of {total:,} boxes are')
  return [f'{what} smaller than a pixel or written as shares of the image, such as '
          f'{tiny.first[0]}; multiply shares by its width and height']


def _tally(rows: np.ndarray, owners: np.ndarray, images: Images, show: Callable[[int], str]
           ) -> Tally:
  return Tally(len(rows), tuple(_show_row(i, owners, images, show) for i in rows[:SHOWN].tolist()))


def _show_row(i: int, owners: np.ndarray, images: Images, show: Callable[[int], str]) -> str:
  at = owners[i]
  return (f'{show(i)} of image {images.ids[at]} ({images.files[at]}, height x width '
          f'{images.sizes[at, 0]} x {images.sizes[at, 1]})')


def _show_numbers(values: np.ndarray) -> str:
  return '[' + ', '.join(f'{v:.6g}' for v in values) + ']'


def _report(owners: np.ndarray, images: Images, reasons: np.ndarray, show: Callable[[int], str], *,
            clip: bool) -> BadBoxes:
  bad = np.flatnonzero(reasons)
  counts = collections.Counter(_REASONS[r] for r in reasons[bad])
  outside = _REASONS.index('outside the image')
  first = tuple(
      f'{_show_row(i, owners, images, show)}: {_REASONS[reasons[i]]}'
      + (', by more than half of its area' if clip and reasons[i] == outside else '')
      for i in bad[:SHOWN].tolist())
  return BadBoxes(len(bad), dict(counts), first)
