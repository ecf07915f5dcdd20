"""Loads batches of NumPy arrays from a source; the batch of step k is a function of (seed, k).

Order and augmentation are computed from the position of an image in an endless stream, so nothing
has to be saved: a run that restarts at step k asks for step k. Threads or processes work ahead;
their kind and number do not change the result.
"""

import collections
import concurrent.futures
import functools
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data import worker_processes
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.batch_memory import BatchShape, empty_batch, fill_row
from ppn_jax.data.cache import MEMORY
from ppn_jax.data.checks import check_integer
from ppn_jax.data.reading import read_example
from ppn_jax.data.repeats import Repeats
from ppn_jax.data.source import Source
from ppn_jax.data.transforms.basic import Resize, ResizeWhole, Transform
from ppn_jax.data.worker_server import Load, Record
from ppn_jax.detection.frame import ImageSize
from ppn_jax.detection.structures import Batch, Example
from ppn_jax.errors import InputError, did_you_mean

# Separate the random streams of one seed.
_ORDER_TAG, _AUGMENT_TAG, _REPEAT_TAG = 0x0de4, 0xa063, 0x4e9e

# Enough to hide a slow image; more would only cost memory and delay the exit.
BATCHES_AHEAD = 3

WORKERS = ('auto', 'threads', 'processes')
# From this number of cores on, threads of one process wait for one another more than they work.
_MANY_CORES = 16

Rows = Sequence[int] | slice | None


def train_batches(source: Source, *, transforms: Sequence[Transform], image_size: ImageSize,
                  max_boxes: int, batch_size: int, seed: int, start_step: int = 0,
                  rows: Rows = None, workers: str = 'threads', threads: int = 0,
                  resize: str = 'area', resize_mode: str = 'stretch',
                  reduced_decoding: bool = True, bad: BadExamples | None = None,
                  repeats: Repeats | None = None) -> Iterator[Batch]:
  """Yields endless training batches, from step `start_step` on.

  Row r of step k shows position p = k * batch_size + r: image order(epoch)[p % N] of epoch
  p // N, where the order is a permutation given by (seed, epoch) and the transforms' random
  numbers by (seed, epoch, image). With `repeats`, an epoch has M places for images, of which the
  order is a permutation, and which images they show is given by (seed, epoch) as well.

  Args:
    source: Data set of N images.
    transforms: Applied in order, before the image is resized to the network's input.
    image_size: S, side of the network's input in pixels, or (height, width).
    max_boxes: G; see `required_boxes`.
    batch_size: B, over all processes.
    seed: At least 0.
    start_step: The first step to yield; no images of earlier steps are read.
    rows: The rows of the global batch that this process needs, in this order, contiguous or not;
      None is all rows.
    workers: 'threads' or 'processes', see `worker_processes`.
    threads: Number of workers; 0 is one for each processor core that this process may use.
    resize, resize_mode, reduced_decoding: As `method` and the others of `transforms.basic.Resize`.
    bad: Decides about examples that cannot be read; if it accepts one, the next of the epoch's
      order takes its place. None raises.
    repeats: How often an epoch shows each image; None is once.

  Yields:
    Batch of len(rows) rows, in new NumPy arrays.

  Raises:
    InputError: If an image cannot be read or has more than `max_boxes` boxes.
  """
  check_integer('seed', seed, 0)
  check_integer('batch_size', batch_size, 1)
  resizing = Resize(image_size, resize, reduced_decoding, resize_mode)
  load = _TrainingRows(source, (*transforms, resizing), seed, start_step, batch_size,
                       tuple(_row_numbers(rows, batch_size)), repeats)
  return _batches(load, sys.maxsize // len(load.rows), BatchShape(
      len(load.rows), image_size, max_boxes), bad, workers, threads)


def eval_batches(source: Source, *, image_size: ImageSize, max_boxes: int, batch_size: int,
                 rows: Rows = None, workers: str = 'threads', threads: int = 0,
                 resize: str = 'area', resize_mode: str = 'stretch',
                 reduced_decoding: bool = True, bad: BadExamples | None = None) -> Iterator[Batch]:
  """Yields each image once, in order, in `num_eval_batches` batches.

  The last batch is padded with rows of zeros whose `valid` is False. Rows of examples that cannot
  be read, if `bad` accepts that, are the same. All processes get the same number of batches.

  Takes the arguments of `train_batches`.
  """
  check_integer('batch_size', batch_size, 1)
  resizing = ResizeWhole(image_size, resize, reduced_decoding, resize_mode)
  load = _EvaluationRows(source, (resizing,), batch_size, tuple(_row_numbers(rows, batch_size)))
  return _batches(load, num_eval_batches(len(source), batch_size), BatchShape(
      len(load.rows), image_size, max_boxes), bad, workers, threads)


class _TrainingRows(NamedTuple):
  """Function from the number of a row to its example; see `train_batches`."""
  source: Source
  ops: tuple[Transform, ...]
  seed: int
  start_step: int
  batch_size: int
  rows: tuple[int, ...]
  repeats: Repeats | None

  def __call__(self, number: int, record: Record) -> Example:
    step, row = divmod(number, len(self.rows))
    seed, repeats = self.seed, self.repeats
    length = repeats.num_shown if repeats else len(self.source)
    epoch, at = divmod((self.start_step + step) * self.batch_size + self.rows[row], length)
    for _ in range(length):
      place = _order(seed, epoch, length)[at]
      index = int(repeats.image_at(place, _first_point(seed, epoch, repeats.unit)) if repeats
                  else place)
      try:
        # By place, since each showing of an image is augmented in another way.
        return read_example(self.source, index, self.ops,
                            np.random.default_rng((_AUGMENT_TAG, seed, epoch, int(place))))
      except InputError as e:
        record(e)
      at = (at + 1) % length
    raise InputError(f'none of the {len(self.source):,} images can be read')


class _EvaluationRows(NamedTuple):
  """Function from the number of a row to its example, None for none; see `eval_batches`."""
  source: Source
  ops: tuple[Transform, ...]
  batch_size: int
  rows: tuple[int, ...]

  def __call__(self, number: int, record: Record) -> Example | None:
    step, row = divmod(number, len(self.rows))
    index = step * self.batch_size + self.rows[row]
    if index >= len(self.source):
      return None
    try:
      # Resizing draws no random numbers.
      return read_example(self.source, index, self.ops, np.random.default_rng(0))
    except InputError as e:
      record(e)
      return None


def choose_workers(workers: str, threads: int, *, cache: str = '') -> str:
  """Returns 'threads' or 'processes' for the config's `data.workers`.

  Args:
    workers: One of `WORKERS`; 'auto' is processes for 16 workers and more.
    threads: The config's `data.threads`, the number of workers; 0 is one for each core.
    cache: The config's `data.cache.where`.

  Raises:
    InputError: If there is no such choice, or processes cannot be used.
  """
  if workers not in WORKERS:
    raise InputError(f'data.workers={workers!r}; {did_you_mean(str(workers), WORKERS)}')
  if workers == 'processes' and cache == MEMORY:
    raise InputError("data.workers='processes' cannot share images that data.cache.where='memory' "
                     'keeps in one process; give a folder, or data.workers=threads')
  if workers == 'auto':
    many = (threads or available_cores()) >= _MANY_CORES
    return 'processes' if many and cache != MEMORY and worker_processes.available() else 'threads'
  return workers


def num_eval_batches(num_images: int, batch_size: int) -> int:
  """Returns the number of batches that `eval_batches` yields."""
  return -(-num_images // batch_size)


def required_boxes(source: Source, max_boxes: int = 0,
                   transforms: Sequence[Transform] = ()) -> int:
  """Returns G, the number of boxes that the ground truth of each image is padded to.

  Args:
    source: The data set.
    max_boxes: The config's `data.max_boxes`; 0 is the largest number of an image, rounded up to a
      multiple of 8.
    transforms: Training transforms, some of which may combine several images.

  Raises:
    InputError: If an image, or a combination of images, can have more than `max_boxes`.
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
  """Returns rows of a batch as numbers, after checking that they are in it."""
  every = range(batch_size)
  if rows is None or isinstance(rows, slice):
    rows = every[rows or slice(None)]
  numbers = [int(r) for r in rows]
  if not numbers or not all(r in every for r in numbers):
    raise ValueError(f'rows {numbers} of a batch of {batch_size}; legal: one or more of '
                     f'0 to {batch_size - 1}')
  return numbers


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the images 0 .. count-1 in the order of an epoch."""
  # With seed + epoch, the second epoch of a run would be the first one of the next seed.
  return np.random.default_rng((_ORDER_TAG, seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=4)
def _first_point(seed: int, epoch: int, unit: int) -> int:
  """Returns the random number of an epoch that decides what it repeats; see `Repeats`."""
  return int(np.random.default_rng((_REPEAT_TAG, seed, epoch)).integers(unit))


def _batches(load: Load, steps: int, shape: BatchShape, bad: BadExamples | None, workers: str,
             threads: int) -> Iterator[Batch]:
  """Groups load(0), load(1), ... into batches; None becomes a row that is not valid."""
  check_integer('threads', threads, 0)
  threads = threads or available_cores()
  if workers == 'processes':
    return worker_processes.generate_batches(load, steps, shape, workers=threads,
                                             ahead=BATCHES_AHEAD, bad=bad)
  return _in_threads(load, steps, shape, bad, threads)


def _in_threads(load: Load, steps: int, shape: BatchShape, bad: BadExamples | None, threads: int
                ) -> Iterator[Batch]:
  """Yields batches whose rows are filled in place by threads that work ahead."""
  workers = concurrent.futures.ThreadPoolExecutor(threads, 'loader')
  ahead: collections.deque[tuple[Batch, list[concurrent.futures.Future]]] = collections.deque()
  # Rows from this number on are not needed any more. Earlier rows are: they complete earlier
  # batches, and the first error of a batch is raised rather than the one that occurs first.
  end, lock, rows = [sys.maxsize], threading.Lock(), shape.rows

  def stop_at(number: int) -> None:
    with lock:
      end[0] = min(end[0], number)

  def record(error: InputError) -> None:
    if bad is None:
      raise error
    bad.record(error)

  def fill(batch: Batch, step: int, chunk: range) -> None:
    for row in chunk:
      number = step * rows + row
      if number >= end[0]:
        return
      try:
        example = load(number, record)
        if example is not None:
          fill_row(batch, row, example)
      except BaseException:
        stop_at(number)
        raise

  def begin(step: int) -> None:
    batch = empty_batch(shape)  # In new arrays, since JAX on a CPU may keep those it is given.
    # Small chunks, so that no thread works long on the last few images of a batch.
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


def available_cores() -> int:
  """Returns the number of processor cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # On Linux, a container may have only some of the cores.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
