"""The input of training: batches from the host, or drawn from the devices' own memory."""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax.data.bad_examples import BadExamples, WithSubstitutes
from ppn_jax.data.cache import cache_source
from ppn_jax.data.checks import check_integer
from ppn_jax.data.loader import choose_workers, required_boxes, train_batches
from ppn_jax.data.repeats import Repeats, build_repeats
from ppn_jax.data.source import Source
from ppn_jax.data.transforms.basic import Resize, build_transforms
from ppn_jax.detection.frame import show_size
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.detector import Detector
from ppn_jax.device_data import dataset
from ppn_jax.device_data.transforms import build_augmentation
from ppn_jax.distributed import sharding
from ppn_jax.telemetry.progress import Progress, duration
from ppn_jax.training.optimizer import Optimizer
from ppn_jax.training.train_step import abstract_batch, jit_resident_step, jit_train_step

logger = logging.getLogger(__name__)

T = TypeVar('T')

# How often a thread that waits for space in its queue checks whether it is still needed, in
# seconds.
_POLL_SECONDS = 0.1

_SAMPLE_BATCH = 16  # Images of `sample_images` at a time.


class Prefetcher(Generic[T]):
  """Runs an iterator ahead in a thread. Close it, or use it as a context manager.

  Args:
    items: The iterator; nothing else may use it any more.
    depth: Number of items to hold.
  """

  def __init__(self, items: Iterator[T], depth: int = 2):
    self._queue = queue.Queue(maxsize=depth)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._fetch, args=(items,), daemon=True)
    self._thread.start()

  def __enter__(self) -> 'Prefetcher[T]':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> 'Prefetcher[T]':
    return self

  def __next__(self) -> T:
    """Returns the next item, or raises what the iterator raised."""
    item, error = self._queue.get()
    if error is not None:
      self._queue.put((None, error))  # For the next call.
      raise error
    return item

  def ready(self) -> bool:
    """Returns whether the next item can be had without waiting."""
    return not self._queue.empty()

  def close(self) -> None:
    """Stops fetching and waits for the thread to end."""
    self._closed.set()
    self._thread.join()

  def _fetch(self, items: Iterator[T]) -> None:
    try:
      for item in items:
        self._put((item, None))
        if self._closed.is_set():
          break
      else:
        self._put((None, StopIteration()))
    except BaseException as e:
      self._put((None, e))
    finally:
      if hasattr(items, 'close'):
        items.close()

  def _put(self, entry) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(entry, timeout=_POLL_SECONDS)
      except queue.Full:
        continue


class Constant(Generic[T]):
  """Takes the place of a `Prefetcher` where every step takes the same item.

  Args:
    make: Makes the item when the context is entered. The item is released on exit.
  """

  def __init__(self, make: Callable[[], T]):
    self._make = make

  def __enter__(self) -> 'Constant[T]':
    self._item = self._make()
    return self

  def __exit__(self, *_) -> None:
    del self._item

  def __iter__(self) -> 'Constant[T]':
    return self

  def __next__(self) -> T:
    return self._item

  def ready(self) -> bool:
    """Returns True: the item is always there."""
    return True


class InputPipeline(Protocol):
  """Input of the training step: its arguments after the state, and the step that takes them.

  Attributes:
    bad: Examples that could not be read.
  """
  bad: BadExamples

  def jit_step(self, detector: Detector, optimizer: Optimizer) -> Callable:
    """Returns the jitted step: (state, *what `open` yields) -> (state, StepMetrics)."""

  def arguments(self) -> tuple[Any, ...]:
    """Returns shapes, types and shardings of what `open` yields."""

  def open(self, start: int, progress: Progress) -> Prefetcher | Constant:
    """Returns the arguments of the steps after `start`: an iterator and context manager."""


@dataclasses.dataclass(frozen=True)
class HostPipeline:
  """Batches that the host decodes and augments while the previous step runs.

  Attributes:
    source: Where the images come from.
    mesh: Devices that the batches are placed on.
    bad: Examples that could not be read.
    options: The other arguments of `train_batches`.
  """
  source: Source
  mesh: Mesh
  bad: BadExamples
  options: dict[str, Any]

  def jit_step(self, detector: Detector, optimizer: Optimizer) -> Callable:
    return jit_train_step(detector, optimizer, self.mesh)

  def arguments(self) -> tuple[Array, GroundTruth]:
    sizes = (self.options[name] for name in ('batch_size', 'image_size', 'max_boxes'))
    return abstract_batch(*sizes, self.mesh)

  def open(self, start: int, progress: Progress) -> Prefetcher:
    return Prefetcher(self._batches(start))

  def _batches(self, start: int) -> Iterator[tuple[Array, GroundTruth]]:
    batch_size = self.options['batch_size']
    rows = sharding.local_rows(batch_size, self.mesh)
    for batch in train_batches(self.source, start_step=start, rows=rows, bad=self.bad,
                               **self.options):
      yield sharding.to_global((batch.images, batch.ground_truth), self.mesh, batch_size)


@dataclasses.dataclass(frozen=True)
class ResidentPipeline:
  """The whole training set in device memory, loaded once per start; steps draw from it.

  Attributes:
    source: Where the images come from.
    mesh: Devices that hold them.
    bad: Examples that could not be read.
    spec: What steps draw.
    threads: Number of threads that load the images.
  """
  source: Source
  mesh: Mesh
  bad: BadExamples
  spec: dataset.ResidentSpec
  threads: int

  def jit_step(self, detector: Detector, optimizer: Optimizer) -> Callable:
    return jit_resident_step(detector, optimizer, self.mesh, self.spec)

  def arguments(self) -> tuple[dataset.ResidentData]:
    return (dataset.abstract_data(self.spec, self.mesh),)

  def open(self, start: int, progress: Progress) -> Constant:
    return Constant(lambda: (self._load(start, progress),))

  def _load(self, start: int, progress: Progress) -> dataset.ResidentData:
    count, started = self.spec.num_images, time.perf_counter()
    size = f'{dataset.data_bytes(self.spec, self.mesh) / 1e9:,.3g} GB'
    logger.info(f'loading {count:,} images of {show_size(self.spec.stored_size)} px onto the '
                f'devices, {size} on each')
    data = dataset.load(
        WithSubstitutes(self.source, self.bad), self.spec, self.mesh, threads=self.threads,
        on_images=lambda done: progress.advance(start, f'loading: {done:,}/{count:,} images'))
    logger.info(f'loaded in {duration(time.perf_counter() - started)}')
    return data


def sample_images(config: ConfigDict, source: Source, count: int) -> Iterator[np.ndarray]:
  """Yields the first images of training, with their augmentation, the same in every process.

  Args:
    config: config of the run.
    source: training data.
    count: number of images.

  Yields:
    u8 [B, S, S, 3]; the B add up to `count`.

  Raises:
    InputError: If images cannot be read.
  """
  data = config.data
  transforms = build_transforms(data.transforms, data.resize_mode)
  bad = BadExamples('data.train', len(source), data.on_bad_example, data.max_bad_share)
  with contextlib.closing(train_batches(
      source, transforms=transforms, image_size=config.model.image_size,
      max_boxes=required_boxes(source, data.max_boxes, transforms),
      batch_size=min(count, _SAMPLE_BATCH), seed=config.seed, threads=data.threads,
      resize=data.resize, resize_mode=data.resize_mode, reduced_decoding=data.reduced_decoding,
      bad=bad)) as batches:
    left = count
    while left > 0:
      images = next(batches).images[:left]
      left -= len(images)
      yield images


def build_input_pipeline(config: ConfigDict, source: Source, mesh: Mesh
                         ) -> HostPipeline | ResidentPipeline:
  """Builds the input pipeline that `data.resident` selects.

  Raises:
    InputError: If an option is out of range, or the data do not fit into device memory.
  """
  data, size = config.data, config.model.image_size
  Resize(size, data.resize, data.reduced_decoding, data.resize_mode)
  check_integer('data.threads', data.threads, 0)
  workers = choose_workers(data.workers, data.threads, cache=data.cache.where)
  check_integer('data.resident.size', data.resident.size, 0)
  repeats = build_repeats(source, data.repeat_threshold)
  source = cache_source(source, **data.cache, image_size=size)
  transforms = build_transforms(data.transforms, data.resize_mode)
  max_boxes = required_boxes(source, data.max_boxes, transforms)
  batch_size, seed = config.train.batch_size, config.seed
  bad = BadExamples('data.train', len(source), data.on_bad_example, data.max_bad_share)
  bad.record_known(source)
  if not data.resident.enabled:
    return HostPipeline(source, mesh, bad, {
        'transforms': transforms, 'resize': data.resize, 'resize_mode': data.resize_mode,
        'reduced_decoding': data.reduced_decoding,
        'image_size': size, 'batch_size': batch_size, 'seed': seed, 'workers': workers,
        'threads': data.threads,
        'max_boxes': max_boxes, 'repeats': repeats})
  spec = resident_spec(config, len(source), batch_size=batch_size, max_boxes=max_boxes,
                       repeats=repeats)
  dataset.check_memory(spec, mesh, config.train.steps)
  return ResidentPipeline(source, mesh, bad, spec, data.threads)


def resident_spec(config: ConfigDict, num_images: int, *, batch_size: int, max_boxes: int,
                  repeats: Repeats | None = None) -> dataset.ResidentSpec:
  """Returns the sizes of a config's resident data set; see `dataset.ResidentSpec`.

  Raises:
    InputError: If a transform is not available on the device.
  """
  data, size = config.data, config.model.image_size
  augmentation = build_augmentation(data.transforms, image_size=size, resize=data.resize,
                                    resize_mode=data.resize_mode)
  return dataset.ResidentSpec(
      num_images=num_images, batch_size=batch_size, max_boxes=max_boxes,
      stored_size=data.resident.size or size, augmentation=augmentation, seed=config.seed,
      repeats=repeats)
