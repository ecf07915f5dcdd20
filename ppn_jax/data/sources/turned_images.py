"""Finds files of annotations that state the sizes of images before they are turned upright.

A phone that is held upright stores pictures on their side, with an orientation in the EXIF block.
Browsers turn them, so people annotate upright images. Some tools then write the boxes of the
upright image and the size of the stored one, as Label Studio's exports in COCO's format do.
"""

from collections.abc import Sequence

import numpy as np

from ppn_jax.data.sources.annotations import (
  BORDER_TOLERANCE,
  Images,
  read_header_sizes,
  reader_pool,
)


def with_upright_sizes(images: Images, bboxes: np.ndarray, reasons: np.ndarray,
                       owners: np.ndarray, *, certain: bool, file: str
                       ) -> tuple[Images, tuple[str, ...]]:
  """Replaces the sizes of turned images if their boxes are those of the upright ones.

  Args:
    images: N images with the sizes that are stated.
    bboxes: f64 [M, 4], x, y, width, height in pixels.
    reasons: i64 [M], zero for boxes that are numbers.
    owners: int [M], positions in `images`.
    certain: Whether the tool is known to do so. Otherwise the middle of some boxes has to be
      outside the stored images, and no box outside the upright ones.
    file: The file, for the note.

  Returns:
    The images, and a note if their sizes have changed.
  """
  good = reasons == 0
  ends, owners = (bboxes[:, :2] + bboxes[:, 2:])[good], owners[good]
  if not certain:
    outside = ~_fit((bboxes[:, :2] + bboxes[:, 2:] / 2)[good], images.sizes[owners])
    suspects = np.unique(owners[outside & _fit(ends, images.sizes[owners][:, ::-1])])
    if not _turned(images, suspects).any():
      return images, ()
  turned = _turned(images, np.arange(len(images.files)))
  if not certain and not _fit(ends, images.sizes[owners][:, ::-1])[turned[owners]].all():
    return images, ()
  if not turned.any():
    return images, ()
  sizes = np.where(turned[:, None], images.sizes[:, ::-1], images.sizes)
  first = images.files[int(np.argmax(turned))]
  return images._replace(sizes=sizes), (
      f'{file}: {turned.sum():,} images are stored on their side, such as {first}; the file states '
      'their size as stored, and boxes of the upright image, as which they are used',)


def _fit(points: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Returns whether points x, y are not beyond images of (height, width), bool [M]."""
  with np.errstate(invalid='ignore'):
    return (points <= sizes[:, ::-1] + BORDER_TOLERANCE).all(axis=-1)


def _turned(images: Images, rows: Sequence[int] | np.ndarray) -> np.ndarray:
  """Returns which of some images are stored on their side, with the stated size, bool [N]."""
  found = np.zeros(len(images.files), bool)
  with reader_pool() as pool:
    sizes = pool.map(read_header_sizes, [images.files[row] for row in rows])
  for row, size in zip(rows, sizes, strict=True):
    if isinstance(size, tuple):
      stored, upright = size
      found[row] = stored != upright and stored == tuple(images.sizes[row].tolist())
  return found
