"""What a data set holds and what was done to its boxes, in columns: the raw material of reports."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SHOWN = 5  # How many culprits a message or a report names.

# Why an image has no boxes; `Contents.without` has positions in it.
WITHOUT = ('without boxes', 'without a label file', 'with an empty label file',
           'without annotations', 'without objects', 'with all their boxes left out')
ALL_LEFT_OUT = WITHOUT.index('with all their boxes left out')


class BadBoxes(NamedTuple):
  """The boxes that `on_bad_box='drop'` left out; true if there are any."""
  count: int
  reasons: Mapping[str, int]  # Reason -> number of boxes.
  first: tuple[str, ...]  # The first few, a line each.

  def __bool__(self) -> bool:
    return self.count > 0

  def __str__(self) -> str:
    reasons = ', '.join(f'{n} {reason}' for reason, n in self.reasons.items())
    return (f'{self.count:,} bad box{"" if self.count == 1 else "es"} dropped ({reasons}), '
            f'such as: ' + '; '.join(self.first))


class Tally(NamedTuple):
  """How often something was met, and the first few, a line each; true if it was."""
  count: int = 0
  first: tuple[str, ...] = ()

  def __bool__(self) -> bool:
    return self.count > 0

  def __add__(self, other: 'Tally') -> 'Tally':
    return Tally(self.count + other.count, (*self.first, *other.first)[:SHOWN])


class Contents(NamedTuple):
  """What a data set of N images and K boxes holds.

  Attributes:
    without: i8 [N], positions in WITHOUT: why an image has no boxes, if it has none.
    owners: i64 [K], the image of each box.
    labels: i32 [K], 0 to C-1.
    crowd: bool [K].
    shares: f64 [K, 2], height and width of each box as shares of its image's.
    sides: f64 [K, 2], the same in pixels of the original image.
    left_out: boxes that were dropped.
    clipped: boxes that were cut at the edge of their image.
    merged: repetitions of a box that were removed.
    unreadable: (image, why) of those that are known to be unreadable and were let pass.
    notes: what else is wrong or was assumed, a line each.
  """
  without: np.ndarray
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

  def take(self, indices: Sequence[int]) -> 'Contents':
    """The contents of some of the images, in this order; what was done to boxes stays as it is."""
    place = np.full(len(self.without), -1)
    place[indices] = np.arange(len(indices))
    kept = np.flatnonzero(place[self.owners] >= 0)
    kept = kept[np.argsort(place[self.owners[kept]], kind='stable')]
    return self._replace(
        without=self.without[indices], owners=place[self.owners[kept]], labels=self.labels[kept],
        crowd=self.crowd[kept], shares=self.shares[kept], sides=self.sides[kept],
        unreadable=tuple((int(place[i]), why) for i, why in self.unreadable if place[i] >= 0))
