"""Sources -> batches of NumPy arrays. Step k is a function of (seed, k), whoever asks for it.

Order and augmentation are computed from the position of an image in the endless stream, so
nothing has to be saved: a run that restarts at step k asks for step k. Threads do the work ahead
of time; their number changes no bit.
"""

import collections
import concurrent.futures
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.checks import check_integer
from ppn_jax.data.reading import read_example
from ppn_jax.data.source import Source
from ppn_jax.data.transforms.basic import Resize, Transform
from ppn_jax.detection.structures import Batch, Example, GroundTruth
from ppn_jax.errors import InputError

_ORDER_TAG, _AUGMENT_TAG = 0x0de4, 0xa063  # Keep the two uses of one seed apart.

# Two hide a slow image; more would only cost memory and delay the exit.
BATCHES_AHEAD = 3

Rows = Sequence[int] | slice | None


def train_batches(source: Source, *, transforms: Sequence[Transform], image_size: int,
                  max_boxes: int, batch_size: int, seed: int, start_step: int = 0,
                  rows: Rows = None, threads: int = 0, resize: str = 'area',
                  reduced_decoding: bool = True, bad: BadExamples | None = None
                  ) -> Iterator[Batch]:
  """Batches without end, from step `start_step` on.

  Row r of step k shows position p = k * batch_size + r: image order(epoch)[p % N] of epoch
  p // N, where the order is a permutation given by (seed, epoch) and the transforms' random
  numbers by (seed, epoch, image).

  Args:
    source: of N images.
    transforms: applied in order; a resize to the network's input follows by itself.
    image_size: S, side of the network's input.
    max_boxes: G; see `required_boxes`.
    batch_size: B of all processes together.
    seed: 0 and more.
    start_step: the first step to yield; nothing before it is read.
    rows: the rows of the global batch that this process needs, in this order; None is all. They
      need not be contiguous.
    threads: workers; 0 is one for each processor core that this process may use.
    resize, reduced_decoding: as of `transforms.Resize`.
    bad: decides about examples that cannot be read; where it lets one pass, the next of the
      epoch's order takes its place. None raises.

  Yields:
    Batch of NumPy arrays that nobody else holds, len(rows) rows.

  Raises:
    InputError: an image cannot be read, or has more than `max_boxes` boxes.
  """
  check_integer('seed', seed, 0)
  check_integer('batch_size', batch_size, 1)
  rows = _row_numbers(rows, batch_size)
  ops = (*transforms, Resize(image_size, resize, reduced_decoding))

  def load(number: int) -> Example:
    step, row = divmod(number, len(rows))
    epoch, at = divmod((start_step + step) * batch_size + rows[row], len(source))
    for _ in range(len(source)):
      index = int(_order(seed, epoch, len(source))[at])
      try:
        return read_example(source, index, ops,
                            np.random.default_rng((_AUGMENT_TAG, seed, epoch, index)))
      except InputError as e:
        _note(bad, e)
      at = (at + 1) % len(source)
    raise InputError(f'none of the {len(source):,} images can be read')

  return _batches(load, sys.maxsize // len(rows), len(rows), image_size, max_boxes, threads)


def eval_batches(source: Source, *, image_size: int, max_boxes: int, batch_size: int,
                 rows: Rows = None, threads: int = 0, resize: str = 'area',
                 reduced_decoding: bool = True, bad: BadExamples | None = None
                 ) -> Iterator[Batch]:
  """Every image once, in order, in `num_eval_batches` batches; arguments as `train_batches`.

  The last batch is filled up with rows of zeros whose `valid` is False; so are the places of
  examples that cannot be read and that `bad` lets pass. All processes get the
  same number of batches, whichever rows they ask for.
  """
  check_integer('batch_size', batch_size, 1)
  rows = _row_numbers(rows, batch_size)
  ops, rng = [Resize(image_size, resize, reduced_decoding)], np.random.default_rng(0)  # Not used.

  def load(number: int) -> Example | None:
    step, row = divmod(number, len(rows))
    index = step * batch_size + rows[row]
    if index >= len(source):
      return None
    try:
      return read_example(source, index, ops, rng)
    except InputError as e:
      _note(bad, e)
      return None

  steps = num_eval_batches(len(source), batch_size)
  return _batches(load, steps, len(rows), image_size, max_boxes, threads)


def _note(bad: BadExamples | None, error: InputError) -> None:
  if bad is None:
    raise error
  bad.note(error)


def num_eval_batches(num_images: int, batch_size: int) -> int:
  """How many batches `eval_batches` yields."""
  return -(-num_images // batch_size)


def required_boxes(source: Source, max_boxes: int = 0,
                   transforms: Sequence[Transform] = ()) -> int:
  """G, the boxes to pad every image's truth to.

  Args:
    source: the data set.
    transforms: of which some may put several images' boxes into one.
    max_boxes: the config's figure; 0 means as many as the fullest image has, rounded up to a
      multiple of 8.

  Raises:
    InputError: some image has, or several in one can have, more than `max_boxes`.
  """
  check_integer('max_boxes', max_boxes, 0)
  factor = math.prod(getattr(transform, 'box_factor', 1) for transform in transforms)
  needed = source.max_boxes * factor
  if not max_boxes:
    return max(8, -(-needed // 8) * 8)
  if max_boxes < needed:
    what = 'one image has' if factor == 1 else f'{factor} images in one can have'
    raise InputError(f'max_boxes is {max_boxes}, but {what} {needed} boxes; '
                     f'legal: {needed} and more, or 0 for as many as needed')
  return max_boxes


def _row_numbers(rows: Rows, batch_size: int) -> list[int]:
  every = range(batch_size)
  if rows is None or isinstance(rows, slice):
    rows = every[rows or slice(None)]
  numbers = [int(r) for r in rows]
  if not numbers or not all(r in every for r in numbers):
    raise ValueError(f'rows {numbers} of a batch of {batch_size}; wanted: one or more of '
                     f'0 to {batch_size - 1}')
  return numbers


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  """The images 0 .. count-1 in the order of an epoch."""
  # Hashed, because with seed + epoch the second epoch of one run is the first of the next seed.
  return np.random.default_rng((_ORDER_TAG, seed, epoch)).permutation(count)


def _batches(load: Callable[[int], Example | None], steps: int, rows: int, image_size: int,
             max_boxes: int, threads: int) -> Iterator[Batch]:
  """Groups load(0), load(1), ... by `rows`; None makes a row that is not valid."""
  check_integer('threads', threads, 0)
  # The workers already fill the cores; OpenCV's own threads would only fight them for these.
  cv2.setNumThreads(1)
  return _generate(load, steps, rows, image_size, max_boxes, threads or _available_cores())


def _generate(load: Callable[[int], Example | None], steps: int, rows: int, image_size: int,
              max_boxes: int, threads: int) -> Iterator[Batch]:
  """Threads fill the rows of the batches ahead in place; a batch is yielded when all are full."""
  workers = concurrent.futures.ThreadPoolExecutor(threads, 'loader')
  ahead: collections.deque[tuple[Batch, list[concurrent.futures.Future]]] = collections.deque()
  # What lies behind it is no longer wanted. What lies before it still is: the batches before, and
  # the first error of a batch rather than the one that happens to come first.
  end, lock = [sys.maxsize], threading.Lock()

  def stop_at(number: int) -> None:
    with lock:
      end[0] = min(end[0], number)

  def fill(batch: Batch, step: int, chunk: range) -> None:
    for row in chunk:
      number = step * rows + row
      if number >= end[0]:
        return
      try:
        example = load(number)
        if example is not None:
          _fill(batch, row, example, max_boxes)
      except BaseException:
        stop_at(number)
        raise

  def begin(step: int) -> None:
    batch = _empty(rows, image_size, max_boxes)
    # Fine enough that no thread is left with the last few images of a batch for long.
    size = max(1, rows // (4 * threads))
    chunks = [range(first, min(first + size, rows)) for first in range(0, rows, size)]
    ahead.append((batch, [workers.submit(fill, batch, step, chunk) for chunk in chunks]))

  try:
    for step in range(min(steps, BATCHES_AHEAD)):
      begin(step)
    for step in range(steps):
      batch, parts = ahead.popleft()
      for part in parts:
        part.result()
      if step + BATCHES_AHEAD < steps:
        begin(step + BATCHES_AHEAD)
      yield batch
  finally:
    stop_at(0)
    for _, parts in ahead:
      for part in parts:
        part.cancel()
    workers.shutdown(wait=False)


def _available_cores() -> int:
  if hasattr(os, 'sched_getaffinity'):  # Linux: a container may own fewer cores than there are.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _empty(rows: int, image_size: int, max_boxes: int) -> Batch:
  """New arrays for every batch: JAX on a CPU may go on using the memory it is handed."""
  return Batch(
      images=np.zeros((rows, image_size, image_size, 3), np.uint8),
      ground_truth=GroundTruth(boxes=np.zeros((rows, max_boxes, 4), np.float32),
                               labels=np.zeros((rows, max_boxes), np.int32),
                               crowd=np.zeros((rows, max_boxes), bool),
                               valid=np.zeros((rows, max_boxes), bool)),
      image_id=np.zeros(rows, np.int64), size=np.zeros((rows, 2), np.int32),
      valid=np.zeros(rows, bool))


def _fill(batch: Batch, row: int, example: Example, max_boxes: int) -> None:
  n = len(example.boxes)
  if n > max_boxes:
    raise InputError(f'image {example.image_id} has {n} boxes, but max_boxes is {max_boxes}; '
                     'raise it, or set it to 0 for as many as the data needs')
  batch.images[row] = example.image
  for array, values in zip(
      batch.ground_truth, (example.boxes, example.labels, example.crowd, True), strict=True):
    array[row, :n] = values
  batch.image_id[row], batch.size[row], batch.valid[row] = example.image_id, example.size, True
