"""Summaries of data sets for reports: their boxes in arrays, and what was changed or left out."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

SHOWN = 5  # Number of examples in a message or report.

# Reasons for an image to have no boxes; `Contents.no_boxes` has positions in this tuple.
NO_BOXES = ('without boxes', 'without a label file', 'with an empty label file',
            'without annotations', 'without objects', 'with all their boxes left out')
ALL_LEFT_OUT = NO_BOXES.index('with all their boxes left out')


class BadBoxes(NamedTuple):
  """Boxes that `on_bad_box='drop'` left out; true if there are any."""
  count: int
  reasons: Mapping[str, int]  # Reason -> number of boxes.
  first: tuple[str, ...]  # The first few, one line each.

  def __bool__(self) -> bool:
    return self.count > 0

  def __str__(self) -> str:
    reasons = ', '.join(f'{n} {reason}' for reason, n in self.reasons.items())
    return (f'{self.count:,} bad box{"" if self.count == 1 else "es"} dropped ({reasons}), '
            f'such as: ' + '; '.join(self.first))


class Tally(NamedTuple):
  """Number of times that something occurred, and the first few; true if it did."""
  count: int = 0
  first: tuple[str, ...] = ()

  def __bool__(self) -> bool:
    return self.count > 0

  def __add__(self, other: 'Tally') -> 'Tally':
    return Tally(self.count + other.count, (*self.first, *other.first)[:SHOWN])


class Contents(NamedTuple):
  """Summary of a data set of N images and K boxes.

  Attributes:
    no_boxes: i8 [N], positions in NO_BOXES: the reason why an image has no boxes, if it has none.
    owners: i64 [K], the image of each box.
    labels: i32 [K], 0 to C-1.
    crowd: bool [K].
    shares: f64 [K, 2], height and width of each box as fractions of its image's.
    sides: f64 [K, 2], height and width of each box in pixels of the original image.
    left_out: Boxes that were dropped.
    clipped: Boxes that were cut at the edge of their image.
    merged: Repeated boxes that were removed.
    unreadable: (image, reason) of images that are known to be unreadable and were accepted.
    notes: Other problems and assumptions, one line each.
  """
  no_boxes: np.ndarray
  owners: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  shares: np.ndarray
  sides: np.ndarray
  left_out: BadBoxes = BadBoxes(0, {}, ())
  clipped: Tally = Tally()
  merged: Tally = Tally()
  unreadable: tuple[tuple[int, str], ...] = ()
  notes: tuple[str, ...] = ()

  def select(self, indices: Sequence[int]) -> 'Contents':
    """Returns the summary of some images, in this order; `left_out` to `merged` do not change."""
    place = np.full(len(self.no_boxes), -1)
    place[indices] = np.arange(len(indices))
    kept = np.flatnonzero(place[self.owners] >= 0)
    kept = kept[np.argsort(place[self.owners[kept]], kind='stable')]
    return self._replace(
        no_boxes=self.no_boxes[indices], owners=place[self.owners[kept]], labels=self.labels[kept],
        crowd=self.crowd[kept], shares=self.shares[kept], sides=self.sides[kept],
        unreadable=tuple((int(place[i]), why) for i, why in self.unreadable if place[i] >= 0))


def contents_from_ground_truth(ground_truth: Mapping[str, Any], categories: Sequence[Category],
                               num_images: int, *, name: str) -> Contents:
  """Summarises a COCO instances dict.

  Args:
    ground_truth: Images, annotations and categories, as of `Source.ground_truth`.
    categories: Classes in the order of their labels.
    num_images: Number of images that it must list.
    name: Name of the source, for error messages.

  Raises:
    InputError: If `ground_truth` is no such dict or lists another number of images.
  """
  try:
    place = {image['id']: i for i, image in enumerate(ground_truth['images'])}
    label = {c.id: k for k, c in enumerate(categories)}
    sizes = np.array([(i['height'], i['width']) for i in ground_truth['images']], np.float64)
    rows = ground_truth['annotations']
    owners = np.array([place[a['image_id']] for a in rows], np.int64)
    labels = np.array([label[a['category_id']] for a in rows], np.int32)
    sides = np.array([a['bbox'][3:1:-1] for a in rows], np.float64).reshape(-1, 2)
    crowd = np.array([bool(a.get('iscrowd')) for a in rows], bool)
  except (KeyError, TypeError, ValueError, IndexError) as e:
    raise InputError(f'{name}.ground_truth() is no COCO instances dict: {type(e).__name__} {e}'
                     ) from e
  if len(place) != num_images:
    raise InputError(f'{name}.ground_truth() lists {len(place)} images, but the source has '
                     f'{num_images}')
  seen = collections.Counter((a['image_id'], a['category_id'], bool(a.get('iscrowd')),
                              *a['bbox']) for a in rows)
  again = [box for box, n in seen.items() if n > 1]
  notes = () if not again else (
      f'{counted(len(rows) - len(seen), "box")} repeated, such as {list(again[0][3:])} (x, y, '
      f'width, height) in image {again[0][0]}',)
  return Contents(np.zeros(len(place), np.int8), owners, labels, crowd,
                  sides / sizes.reshape(-1, 2)[owners], sides, notes=notes)


def counted(n: int, noun: str) -> str:
  """Returns a number with its noun: '1 box', '2,000 boxes'."""
  plural = {'box': 'boxes', 'class': 'classes'}.get(noun, f'{noun}s')
  return f'{n:,} {noun if n == 1 else plural}'
