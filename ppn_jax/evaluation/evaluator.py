"""Scoring: a detector over a whole data set."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.sources import Source, build_source
from ppn_jax.detection.structures import Array, Category, Detections
from ppn_jax.detector import Detector, Variables
from ppn_jax.evaluation import coco
from ppn_jax.run import Run
from ppn_jax.training import partition
from ppn_jax.training.step import jit_detect


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
    """Detections of every image as rows in COCO's results format.

    Args:
      variables: of the detector.
      on_images: told, batch by batch, how many images are done.
    """
    rows = []
    batches = eval_batches(self.source, batch_size=self.batch_size, bad=self.bad, **self.loader,
                           rows=partition.local_rows(self.batch_size, self.mesh))
    for index, batch in enumerate(batches, start=1):
      images = partition.to_global(batch.images, self.mesh, self.batch_size)
      detections = partition.to_host(self.detect(variables, images))
      about = partition.gather_rows((batch.image_id, batch.size, batch.valid), self.mesh,
                                    self.batch_size)
      rows += coco.to_rows(detections, *about, self.categories)
      on_images(min(index * self.batch_size, len(self.source)))
    return rows

  def score(self, rows: list[dict[str, Any]]) -> coco.Scores:
    """COCO's figures of the rows over all images of the data set."""
    return coco.score(self.source.ground_truth(), rows, scorer=self.scorer)


def build_evaluator(run: Run, detector: Detector, mesh: Mesh, *, scorer: str = 'hotcoco',
                    source: Source | None = None) -> Evaluator:
  """The evaluator of a run's `data.eval`.

  Raises:
    InputError: bad data, classes other than the run's, or a batch size the devices cannot share.
  """
  data, batch_size = run.config.data, run.config.eval.batch_size
  partition.check_batch_size('eval.batch_size', batch_size, mesh)
  if source is None:
    source = build_source(data.eval.to_dict(), categories=run.categories)
  return Evaluator(
      source=source, categories=run.categories, detect=jit_detect(detector, mesh), mesh=mesh,
      batch_size=batch_size, scorer=scorer,
      bad=BadExamples('data.eval', len(source), data.on_bad_example, data.max_bad_share),
      loader={'image_size': detector.image_size, 'resize': data.resize,
              'reduced_decoding': data.reduced_decoding, 'threads': data.threads,
              'max_boxes': required_boxes(source)})
