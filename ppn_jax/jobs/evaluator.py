"""Scoring: a detector over a whole data set."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.source import Source
from ppn_jax.data.splits import open_split
from ppn_jax.detection.structures import Array, Batch, Category, Detections
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import coordination, sharding
from ppn_jax.metrics import coco
from ppn_jax.run import Run
from ppn_jax.training.train_step import jit_detect

# What the first process needs to know of a detection that another has made.
_FOUND = np.dtype([('position', 'i8'), ('image_id', 'i8'), ('size', 'i8', 2), ('boxes', 'f4', 4),
                   ('scores', 'f4'), ('labels', 'i4'), ('level', 'i4')])


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """A data set, ready to score any variables of one detector on it.

  The program is compiled on the first call and reused afterwards.

  Attributes:
    source: the data set.
    categories: of the run, in order of label.
    detect: (variables, images) -> Detections, over the mesh.
    mesh: devices that share the work.
    batch_size: images at a time, over all devices.
    loader: arguments of `eval_batches` besides those above and below.
    bad: which images could not be read; they are scored as if nothing were found in them.
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

  def rows(self, variables: Variables,
           on_images: Callable[[int], None] = lambda count: None) -> list[dict[str, Any]]:
    """Detections of every image as rows in COCO's results format, in the data set's order.

    All processes call it together. Each detects on its share of every batch; the first gets all
    the rows, and the others none.

    Args:
      variables: of the detector.
      on_images: told, batch by batch, how many images are done.
    """
    found = [np.zeros(0, _FOUND)]
    own = sharding.local_rows(self.batch_size, self.mesh)
    batches = eval_batches(self.source, batch_size=self.batch_size, bad=self.bad, **self.loader,
                           rows=own)
    for index, batch in enumerate(batches, start=1):
      images = sharding.to_global(batch.images, self.mesh, self.batch_size)
      detections = sharding.own_rows(self.detect(variables, images))
      found.append(_pack(detections, batch, own + (index - 1) * self.batch_size))
      on_images(min(index * self.batch_size, len(self.source)))
    gathered = coordination.gather(np.concatenate(found).tobytes())
    return _rows(b''.join(gathered), self.categories)

  def score(self, rows: list[dict[str, Any]]) -> coco.Scores:
    """COCO's figures of the rows over all images of the data set.

    All processes call it together. The first, whose rows they are, scores, and tells the others.
    """
    scores = None
    if jax.process_index() == 0:
      scores = coco.score(self.source.ground_truth(), rows, scorer=self.scorer)
    told = json.loads(coordination.broadcast(json.dumps(scores).encode()))
    return scores or coco.Scores(told[0], tuple(coco.ClassScore(*c) for c in told[1]), *told[2:])


def _pack(detections: Detections, batch: Batch, positions: Array) -> Array:
  """The valid detections of this process's rows of a batch, as `_FOUND`."""
  b, k = np.nonzero(detections.valid & batch.valid[:, None])
  packed = np.zeros(len(b), _FOUND)
  packed['position'], packed['image_id'] = positions[b], batch.image_id[b]
  packed['size'] = batch.size[b]
  for name in ('boxes', 'scores', 'labels', 'level'):
    packed[name] = getattr(detections, name)[b, k]
  return packed


def _rows(packed: bytes, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
  """`_FOUND` of any processes -> rows in the data set's order."""
  found = np.frombuffer(packed, _FOUND)
  found = found[np.argsort(found['position'], kind='stable')]
  one = found[:, None]  # As if each were the only one of its image.
  detections = Detections(one['boxes'], one['scores'], one['labels'], one['level'],
                          np.ones(one.shape, bool))
  return coco.to_rows(detections, found['image_id'], found['size'], np.ones(len(found), bool),
                      categories)


def build_evaluator(run: Run, detector: Detector, mesh: Mesh, *, scorer: str = 'hotcoco',
                    source: Source | None = None) -> Evaluator:
  """The evaluator of a run's `data.eval`.

  Raises:
    InputError: bad data, classes other than the run's, or a batch size the devices cannot share.
  """
  data, batch_size = run.config.data, run.config.eval.batch_size
  sharding.check_batch_size('eval.batch_size', batch_size, mesh)
  if source is None:
    source = open_split(run.config, 'eval', categories=run.categories)
  bad = BadExamples('data.eval', len(source), data.on_bad_example, data.max_bad_share)
  bad.note_known(source)
  return Evaluator(
      source=source, categories=run.categories, detect=jit_detect(detector, mesh), mesh=mesh,
      batch_size=batch_size, scorer=scorer,
      bad=bad,
      loader={'image_size': detector.image_size, 'resize': data.resize,
              'reduced_decoding': data.reduced_decoding, 'threads': data.threads,
              'max_boxes': required_boxes(source)})
