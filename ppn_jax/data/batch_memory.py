"""Batches in memory that several processes share, so that nothing is copied between them.

The memory has no name: it is a file descriptor, which the kernel frees with the last process that
holds it, however that ends.
"""

import collections
import mmap
import os
import tempfile
import weakref
from typing import NamedTuple

import numpy as np

from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.structures import Batch, Example, GroundTruth
from ppn_jax.errors import InputError

_ALIGNMENT = 64  # Bytes; each array starts at a multiple of it.


class BatchShape(NamedTuple):
  """Sizes of a batch.

  Fields:
    rows: B, images of the batch.
    image_size: S, side of the images in pixels, or (height, width).
    max_boxes: G, boxes that each image's ground truth is padded to.
  """
  rows: int
  image_size: ImageSize
  max_boxes: int

  def arrays(self) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and type of each array, in the order of `as_batch`."""
    b, s, g = self
    shapes = [((b, *sides_of(s), 3), 'u1'),
              ((b, g, 4), 'f4'), ((b, g), 'i4'), ((b, g), '?'), ((b, g), '?'),
              ((b,), 'i8'), ((b, 2), 'i4'), ((b,), '?')]
    return [(shape, np.dtype(dtype)) for shape, dtype in shapes]

  @property
  def bytes(self) -> int:
    """Bytes that a batch takes in shared memory, whole pages."""
    used = sum(_aligned(_size(*array)) for array in self.arrays())
    return -(-used // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def empty_batch(shape: BatchShape) -> Batch:
  """Makes a batch of zeros in new arrays."""
  return as_batch(*(np.zeros(*array) for array in shape.arrays()))


def as_batch(images: np.ndarray, boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray,
             box_valid: np.ndarray, image_id: np.ndarray, size: np.ndarray, valid: np.ndarray
             ) -> Batch:
  """Returns the arrays as a batch."""
  return Batch(images=images,
               ground_truth=GroundTruth(boxes=boxes, labels=labels, crowd=crowd, valid=box_valid),
               image_id=image_id, size=size, valid=valid)


def fill_row(batch: Batch, row: int, example: Example) -> None:
  """Writes an example into a row of zeros.

  Raises:
    InputError: If it has more boxes than there is room for.
  """
  n, room = len(example.boxes), batch.ground_truth.boxes.shape[1]
  if n > room:
    raise InputError(f'image {example.image_id} has {n} boxes, but max_boxes is {room}; raise it, '
                     'or set it to 0 for as many as the data needs')
  batch.images[row] = example.image
  for array, values in zip(
      batch.ground_truth, (example.boxes, example.labels, example.crowd, True), strict=True):
    array[row, :n] = values
  batch.image_id[row], batch.size[row], batch.valid[row] = example.image_id, example.size, True


def clear_row(batch: Batch, row: int, *, image: bool) -> None:
  """Sets a row to zeros, its image only if `image`, since `fill_row` replaces all of that."""
  if image:
    batch.images[row] = 0
  for array in (*batch.ground_truth, batch.image_id, batch.size, batch.valid):
    array[row] = 0


class SharedBatches:
  """Memory for batches of one shape, which grows as they are in use.

  A batch is in use until all of its arrays are garbage; JAX on a CPU may keep them as its own.

  Args:
    shape: sizes of the batches.
    descriptor: of the memory, as another process made it; None makes new memory.

  Attributes:
    descriptor: file descriptor of the memory.
  """

  def __init__(self, shape: BatchShape, descriptor: int | None = None):
    self._shape = shape
    self.descriptor = _new_memory() if descriptor is None else descriptor
    self._maps: dict[int, mmap.mmap] = {}
    self._free: collections.deque[int] = collections.deque()  # Appended to by finalizers.
    self._count = 0

  def take(self) -> int:
    """Returns the number of a batch that is not in use. What it holds is undefined."""
    if self._free:
      return self._free.popleft()
    self._count += 1
    os.ftruncate(self.descriptor, self._count * self._shape.bytes)
    return self._count - 1

  def view(self, number: int) -> Batch:
    """Returns the arrays of a batch; `take` may return its number again when they are garbage."""
    root = np.frombuffer(self._map(number), np.uint8)
    weakref.finalize(root, self._free.append, number).atexit = False
    return self._arrays(root)

  def permanent_view(self, number: int) -> Batch:
    """Returns the arrays of a batch, for the processes that fill it."""
    return self._arrays(np.frombuffer(self._map(number), np.uint8))

  def close(self) -> None:
    """Closes the descriptor. Batches in use stay valid."""
    os.close(self.descriptor)

  def _map(self, number: int) -> mmap.mmap:
    if number not in self._maps:
      self._maps[number] = mmap.mmap(self.descriptor, self._shape.bytes,
                                     offset=number * self._shape.bytes)
    return self._maps[number]

  def _arrays(self, root: np.ndarray) -> Batch:
    arrays, start = [], 0
    for shape, dtype in self._shape.arrays():
      size = _size(shape, dtype)
      arrays.append(root[start:start + size].view(dtype).reshape(shape))
      start += _aligned(size)
    return as_batch(*arrays)


def _new_memory() -> int:
  if hasattr(os, 'memfd_create'):
    return os.memfd_create('batches')
  with tempfile.TemporaryFile() as file:  # Has no name either.
    return os.dup(file.fileno())


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
  return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _aligned(size: int) -> int:
  return -(-size // _ALIGNMENT) * _ALIGNMENT
