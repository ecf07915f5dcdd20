"""Runs a detector over a whole data set and scores its detections."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import choose_workers, eval_batches, required_boxes
from ppn_jax.data.source import Source
from ppn_jax.data.splits import open_split
from ppn_jax.detection.frame import InputFrame
from ppn_jax.detection.structures import Array, Batch, Category, Detections
from ppn_jax.detector import Detector, Variables, jit_detect
from ppn_jax.distributed import coordination, sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs.class_report import find_operating_point
from ppn_jax.metrics import coco
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.trained_model import TrainedModel

# The fields of a detection that processes send to the first one.
_PACKED = np.dtype([('position', 'i8'), ('image_id', 'i8'), ('size', 'i8', 2), ('boxes', 'f4', 4),
                   ('scores', 'f4'), ('labels', 'i4'), ('level', 'i4')])


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Data set on which any variables of one detector can be scored.

  The program is compiled on the first call and reused afterwards.

  Attributes:
    source: the data set.
    categories: of the run, in order of label.
    detect: (variables, images) -> Detections, over the mesh.
    mesh: devices that share the work.
    batch_size: images per batch, over all devices.
    loader: other arguments of `eval_batches`.
    bad: collects images that cannot be read; they are scored as if nothing were found in them.
    scorer: see `coco.score`.
  """
  source: Source
  categories: tuple[Category, ...]
  detect: Callable[[Variables, Array], Detections]
  mesh: Mesh
  batch_size: int
  loader: Mapping[str, Any]
  bad: BadExamples
  scorer: str = 'hotcoco'

  @property
  def frame(self) -> InputFrame:
    """Geometry of the detector's input."""
    return InputFrame.of(self.loader['image_size'], self.loader['resize_mode'])

  def compile(self, variables: Variables) -> None:
    """Compiles the program by detecting on a blank batch. All processes call it together."""
    own = sharding.local_rows(self.batch_size, self.mesh)
    blank = np.zeros((len(own), self.frame.height, self.frame.width, 3), np.uint8)
    jax.block_until_ready(
        self.detect(variables, sharding.to_global(blank, self.mesh, self.batch_size)))

  def rows(self, variables: Variables,
           on_images: Callable[[int], None] = lambda count: None) -> list[dict[str, Any]]:
    """Detects on every image, and returns rows of COCO's results format in the data set's order.

    All processes call it together. Each detects on its share of every batch; the first gets all
    the rows, the others none.

    Args:
      variables: of the detector.
      on_images: called after each batch with the number of images that are done.
    """
    packed = [np.zeros(0, _PACKED)]
    own = sharding.local_rows(self.batch_size, self.mesh)
    batches = eval_batches(self.source, batch_size=self.batch_size, bad=self.bad, **self.loader,
                           rows=own)
    for index, batch in enumerate(batches, start=1):
      images = sharding.to_global(batch.images, self.mesh, self.batch_size)
      detections = self.frame.in_pictures(
          sharding.own_rows(self.detect(variables, images)), np.maximum(batch.size, 1))
      packed.append(_pack(detections, batch, own + (index - 1) * self.batch_size))
      on_images(min(index * self.batch_size, len(self.source)))
    gathered = coordination.gather(np.concatenate(packed).tobytes())
    return _unpack(b''.join(gathered), self.categories)

  def check_metric(self, name: str, key: str) -> None:
    """Raises InputError, naming the config's `key`, if the data have no such metric."""
    metrics = coco.score(self.source.ground_truth(), [], scorer=self.scorer).metrics
    if metrics[name] is None:
      known = ', '.join(metric for metric, value in metrics.items() if value is not None)
      raise InputError(f'{key}={name!r} does not exist on data.eval, which have no such objects '
                       f'({coco.DESCRIPTIONS[name]}); use one of {known or "none"}')

  def score(self, rows: list[dict[str, Any]]) -> coco.Scores:
    """Computes COCO's metrics of the rows over all images of the data set.

    All processes call it together. The first, which has the rows, scores them and sends the scores
    to the others.
    """
    scores = None
    if jax.process_index() == 0:
      scores = coco.score(self.source.ground_truth(), rows, scorer=self.scorer)
    metrics, per_class, *counts = json.loads(
        coordination.broadcast(json.dumps(scores).encode()))
    return scores or coco.Scores(
        metrics, tuple(coco.ClassScore(*c) for c in per_class), *counts)

  def operating_point(self, rows: list[dict[str, Any]]) -> OperatingPoint | None:
    """Returns the best threshold of each class; None in other processes than the first."""
    if jax.process_index():
      return None
    return find_operating_point(self.source.ground_truth(), rows, self.categories)


def _pack(detections: Detections, batch: Batch, positions: Array) -> Array:
  """Returns the valid detections of this process's rows of a batch, as `_PACKED`."""
  b, k = np.nonzero(detections.valid & batch.valid[:, None])
  packed = np.zeros(len(b), _PACKED)
  packed['position'], packed['image_id'] = positions[b], batch.image_id[b]
  packed['size'] = batch.size[b]
  for name in ('boxes', 'scores', 'labels', 'level'):
    packed[name] = getattr(detections, name)[b, k]
  return packed


def _unpack(packed: bytes, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
  """Converts `_PACKED` of all processes to rows in the data set's order."""
  found = np.frombuffer(packed, _PACKED)
  found = found[np.argsort(found['position'], kind='stable')]
  one = found[:, None]  # Each as the only detection of an image.
  detections = Detections(one['boxes'], one['scores'], one['labels'], one['level'],
                          np.ones(one.shape, bool))
  return coco.to_rows(detections, found['image_id'], found['size'], np.ones(len(found), bool),
                      categories)


def build_evaluator(run: TrainedModel, detector: Detector, mesh: Mesh, *, scorer: str = 'hotcoco',
                    source: Source | None = None) -> Evaluator:
  """Builds the evaluator of a run's `data.eval`.

  Args:
    run: provides the config and categories.
    detector: of the run.
    mesh: devices that share the work.
    scorer: see `coco.score`.
    source: evaluation data that are open already; opened here by default.

  Raises:
    InputError: If the data are bad or have other classes than the run.
  """
  data, batch_size = run.config.data, run.config.eval.batch_size
  if batch_size < 1:
    raise InputError(f'eval.batch_size={batch_size} must be at least 1')
  batch_size = sharding.fitting_batch_size(batch_size, mesh)
  if source is None:
    source = open_split(run.config, 'eval', categories=run.categories)
  bad = BadExamples('data.eval', len(source), data.on_bad_example, data.max_bad_share)
  bad.record_known(source)
  return Evaluator(
      source=source, categories=run.categories, detect=jit_detect(detector, mesh), mesh=mesh,
      batch_size=batch_size, scorer=scorer, bad=bad,
      loader={'image_size': detector.image_size, 'resize': data.resize,
              'resize_mode': data.resize_mode, 'reduced_decoding': data.reduced_decoding,
              'threads': data.threads, 'workers': choose_workers(data.workers, data.threads),
              'max_boxes': required_boxes(source)})
