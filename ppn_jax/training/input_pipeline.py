"""Where the steps of a run get their images from: the host, or the devices' own memory."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax.data.bad_examples import BadExamples, WithSubstitutes
from ppn_jax.data.cache import cache_source
from ppn_jax.data.checks import check_integer
from ppn_jax.data.loader import required_boxes, train_batches
from ppn_jax.data.source import Source
from ppn_jax.data.transforms.basic import Resize, build_transforms
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.detector import Detector
from ppn_jax.device_data import dataset
from ppn_jax.device_data.transforms import build_augmentation
from ppn_jax.distributed import sharding
from ppn_jax.telemetry.metrics import Progress, duration
from ppn_jax.training.optimizer import Optimizer
from ppn_jax.training.prefetch import Prefetcher, Unchanging
from ppn_jax.training.train_step import abstract_batch, jit_resident_step, jit_train_step


class Feed(Protocol):
  """What a step takes besides the state, and how to come by it.

  Attributes:
    bad: which examples could not be read.
  """
  bad: BadExamples

  def jit_step(self, detector: Detector, optimizer: Optimizer) -> Callable:
    """The jitted step: state, *what a feed yields -> state, StepMetrics."""

  def arguments(self) -> tuple[Any, ...]:
    """Shapes, types and shardings of what `open` yields."""

  def open(self, start: int, progress: Progress) -> Prefetcher | Unchanging:
    """The steps' arguments, from step `start` on; a context manager."""


@dataclasses.dataclass(frozen=True)
class HostFeed:
  """Batches that the host decodes and augments while the step before runs.

  Attributes:
    source: of the images.
    mesh: where batches go.
    bad: which examples could not be read.
    options: the other arguments of `train_batches`.
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
class ResidentFeed:
  """The whole training set in device memory, loaded once a start; steps draw from it.

  Attributes:
    source: of the images.
    mesh: whose devices hold them.
    plan: of what steps draw.
    threads: that load them.
    bad: which examples could not be read.
  """
  source: Source
  mesh: Mesh
  bad: BadExamples
  plan: dataset.ResidentSpec
  threads: int

  def jit_step(self, detector: Detector, optimizer: Optimizer) -> Callable:
    return jit_resident_step(detector, optimizer, self.mesh, self.plan)

  def arguments(self) -> tuple[dataset.ResidentData]:
    return (dataset.abstract_data(self.plan, self.mesh),)

  def open(self, start: int, progress: Progress) -> Unchanging:
    return Unchanging(lambda: (self._load(start, progress),))

  def _load(self, start: int, progress: Progress) -> dataset.ResidentData:
    count, begun = self.plan.num_images, time.perf_counter()
    share = f'{dataset.data_bytes(self.plan, self.mesh) / 1e9:,.3g} GB'
    progress.say(f'loading {count:,} images of {self.plan.stored_size} px onto the devices, '
                 f'{share} on each')
    data = dataset.load(
        WithSubstitutes(self.source, self.bad), self.plan, self.mesh, threads=self.threads,
        on_images=lambda done: progress.advance(start, f'loading: {done:,}/{count:,} images'))
    progress.say(f'loaded in {duration(time.perf_counter() - begun)}')
    return data


def build_feed(config: ConfigDict, source: Source, mesh: Mesh) -> HostFeed | ResidentFeed:
  """Builds the feed that `data.resident` asks for.

  Raises:
    InputError: an option of the input is bad, or the data do not fit into device memory.
  """
  data, size = config.data, config.model.image_size
  Resize(size, data.resize, data.reduced_decoding)
  check_integer('data.threads', data.threads, 0)
  check_integer('data.resident.size', data.resident.size, 0)
  source = cache_source(source, **data.cache, image_size=size)
  transforms = build_transforms(data.transforms)
  max_boxes = required_boxes(source, data.max_boxes, transforms)
  batch_size, seed = config.train.batch_size, config.seed
  bad = BadExamples('data.train', len(source), data.on_bad_example, data.max_bad_share)
  bad.record_known(source)
  if not data.resident.enabled:
    return HostFeed(source, mesh, bad, {
        'transforms': transforms, 'resize': data.resize,
        'reduced_decoding': data.reduced_decoding,
        'image_size': size, 'batch_size': batch_size, 'seed': seed, 'threads': data.threads,
        'max_boxes': max_boxes})
  augmentation = build_augmentation(data.transforms, image_size=size, resize=data.resize)
  plan = dataset.ResidentSpec(num_images=len(source), batch_size=batch_size, max_boxes=max_boxes,
                       stored_size=data.resident.size or size, augmentation=augmentation,
                       seed=seed)
  dataset.check_memory(plan, mesh, config.train.steps)
  return ResidentFeed(source, mesh, bad, plan, data.threads)
