"""Repeat factor sampling: images of rare classes are shown several times in an epoch.

Each image is shown r times an epoch on average, with r of `repeat_factors`. Where r is not whole,
some epochs show it once more than others, which a random number of the epoch decides. All epochs
have the same length, so that the epoch of a position in the stream is a division.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.data.checks import check_number
from ppn_jax.data.contents import Contents, contents_from_ground_truth
from ppn_jax.data.source import Source, contents_of
from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError

_LARGEST = 2**31  # Places are 32-bit numbers on a device.
_SHOWN = 3  # Classes that a report names.


class Repeats(NamedTuple):
  """How often each of N images is shown in an epoch.

  The images lie one after another on a line, each as long as its repeat factor. An epoch shows what
  lies at M evenly spaced points, the first of which is random: systematic sampling. An image of
  factor 2.3 contains two or three of them, 2.3 on average.

  Fields:
    ends: i64 [N], where each image ends on the line; the last is M times `unit`.
    unit: distance of two points, a power of two.
  """
  ends: np.ndarray
  unit: int

  @property
  def num_shown(self) -> int:
    """M, images that an epoch shows."""
    return int(self.ends[-1]) // self.unit

  def image_at(self, slots: Any, first: Any, xp: Any = np) -> Array:
    """Returns which image lies at points of an epoch.

    Args:
      slots: numbers of points, 0 to M - 1.
      first: place of the first point of the epoch, 0 to `unit` - 1.
      xp: NumPy, or JAX's NumPy, which needs u32 arguments.
    """
    return xp.searchsorted(xp.asarray(self.ends, slots.dtype), slots * self.unit + first,
                           side='right')


def place(factors: np.ndarray) -> Repeats:
  """Places N images on the line of `Repeats`.

  Args:
    factors: f64 [N], repeat factors, at least 1. They are rounded down to multiples of 1 / `unit`,
      and the line is made longer by less than one image so that its length is whole: each image is
      shown at least once in each epoch.
  """
  bits = int(math.log2(_LARGEST / (factors.sum() + 1)))
  unit = 2**max(0, min(16, bits))
  lengths = np.floor(factors * unit).astype(np.int64)
  missing = -int(lengths.sum()) % unit
  lengths += missing // len(lengths)
  lengths[:missing % len(lengths)] += 1
  return Repeats(np.cumsum(lengths), unit)


def class_factors(contents: Contents, num_classes: int, threshold: float) -> np.ndarray:
  """Computes r(c) = max(1, sqrt(t / f(c))) of each class (Gupta et al., "LVIS", 2019, appendix B).

  Args:
    contents: summary of N images.
    num_classes: C.
    threshold: t, 0 to 1. f(c) is the share of the images with a box of class c that is no crowd.

  Returns:
    f64 [C]; 1 for classes without a box.
  """
  num_images = len(contents.no_boxes)
  seen = np.unique(np.stack([contents.owners, contents.labels])[:, ~contents.crowd], axis=1)
  share = np.bincount(seen[1], minlength=num_classes) / max(num_images, 1)
  return np.where(share > 0, np.maximum(1, np.sqrt(threshold / np.where(share > 0, share, 1))), 1)


def repeat_factors(contents: Contents, by_class: np.ndarray) -> np.ndarray:
  """Returns the largest factor of the classes in each image, f64 [N]; 1 for images without boxes.

  Args:
    contents: summary of N images; crowds do not count.
    by_class: f64 [C], factors of classes.
  """
  factors = np.ones(len(contents.no_boxes))
  kept = ~contents.crowd
  np.maximum.at(factors, contents.owners[kept], by_class[contents.labels[kept]])
  return factors


def build_repeats(source: Source, threshold: float) -> Repeats | None:
  """Returns the repeats of a source by `data.repeat_threshold`, None for a threshold of 0.

  Raises:
    InputError: If the threshold is not 0 to 1, or the source does not tell which classes its
      images show.
  """
  contents = _contents(source, threshold)
  if contents is None:
    return None
  return place(repeat_factors(contents, class_factors(
      contents, len(source.categories), threshold)))


def describe_repeats(source: Source, threshold: float) -> str:
  """Returns a line about what `data.repeat_threshold` repeats, '' for a threshold of 0."""
  contents = _contents(source, threshold)
  if contents is None:
    return ''
  what, by_class = f'data.repeat_threshold={threshold:g}', class_factors(
      contents, len(source.categories), threshold)
  shown = place(repeat_factors(contents, by_class)).num_shown
  most = [label for label in np.argsort(-by_class, kind='stable') if by_class[label] > 1]
  if not most:
    return f'{what}: no class is in so few images, an epoch shows each image once'
  named = ', '.join(f'{source.categories[label].name!r} {by_class[label]:.1f} times'
                    for label in most[:_SHOWN])
  return (f'{what}: an epoch shows {shown:,} images in place of {len(source):,}; {len(most)} of '
          f'{len(by_class)} classes are repeated, most of all {named}')


def _contents(source: Source, threshold: float) -> Contents | None:
  check_number('data.repeat_threshold', threshold, 0, 1)
  if not threshold:
    return None
  contents = contents_of(source)
  if contents is not None:
    return contents
  if not hasattr(source, 'ground_truth'):  # Only scoring and this need it.
    raise InputError(f'data.repeat_threshold={threshold:g} needs to know the classes of each image,'
                     f' but {type(source).__name__} has no ground_truth(); set it to 0')
  return contents_from_ground_truth(source.ground_truth(), source.categories, len(source),
                                    name=type(source).__name__)
