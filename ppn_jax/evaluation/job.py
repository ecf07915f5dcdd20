"""Scoring: a detector over a whole data set, and a step of a run."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax import files
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.sources import Source, build_source
from ppn_jax.detection.structures import Array, Category, Detections
from ppn_jax.detector import Detector, Variables
from ppn_jax.errors import InputError
from ppn_jax.evaluation import calibration_job, coco
from ppn_jax.evaluation.calibration_job import CalibrationOptions
from ppn_jax.evaluation.drawing import draw_boxes, mosaic, save_png
from ppn_jax.host_memory import keep_freed_memory
from ppn_jax.run import Run
from ppn_jax.training import partition
from ppn_jax.training.step import abstract_state, jit_detect

# Smaller images are enlarged to this for a contact sheet, so that names can be read.
PICTURE_SIDE = 400


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


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came of evaluating one step.

  Attributes:
    step: which.
    scores: COCO's figures.
    folder: where `results.json` (COCO's results format) and `scores.json` lie.
    calibration: see `calibration_job.report`; None if it was not asked for, and in all
      processes but the first.
  """
  step: int
  scores: coco.Scores
  folder: pathlib.Path
  calibration: dict[str, Any] | None = None


def evaluate(run: Run, *, step: int | None = None, scorer: str = 'hotcoco', pictures: int = 0,
             calibration: CalibrationOptions | None = None, output: pathlib.Path | None = None,
             say: Callable[[str], None] = print) -> Evaluation:
  """Scores a saved step on the run's evaluation data and writes down what it found.

  Args:
    run: to evaluate; its `config.data.eval` may have been changed to other data.
    step: a saved step; the newest by default.
    scorer: see `coco.score`.
    pictures: how many images to draw on a contact sheet, `pictures.png`.
    calibration: reports on it too, in `calibration.json` and `calibration.png`.
    output: folder to write to; by default `evaluation/STEP` in the workdir.
    say: told what goes on, a line at a time.

  Raises:
    InputError: no such checkpoint, or bad data.
  """
  keep_freed_memory()
  mesh = partition.data_mesh()
  detector = run.detector()
  evaluator = build_evaluator(run, detector, mesh, scorer=scorer)
  if getattr(evaluator.source, 'bad_boxes', None):
    say(str(evaluator.source.bad_boxes))
  step, variables = load_variables(run, detector, mesh, step=step)
  say(f'evaluating step {step:,} on {len(evaluator.source):,} images')
  rows = evaluator.rows(variables, on_images=_every_tenth(len(evaluator.source), say))
  for reason in evaluator.bad.news():
    say(f'skipped: {reason}')
  scores = evaluator.score(rows)
  folder, report = output or run.workdir / 'evaluation' / str(step), None
  if jax.process_index() == 0:
    coco.write_results(folder / 'results.json', rows)
    write_scores(folder / 'scores.json', scores)
    if pictures:
      save_png(folder / 'pictures.png',
               picture(evaluator.source, rows, run.categories, count=pictures))
    if calibration:
      say('reporting on calibration')
      report = calibration_job.report(run.config, detector, run.categories,
                                      evaluator.source.ground_truth(), rows, calibration,
                                      scorer=scorer)
      calibration_job.write(folder, report, f'{run.workdir.resolve().name}, step {step:,}')
  return Evaluation(step, scores, folder, report)


def load_variables(run: Run, detector: Detector, mesh: Mesh, *,
                   step: int | None = None) -> tuple[int, Variables]:
  """A saved step's variables, the moving average where the run keeps one, on the mesh.

  Raises:
    InputError: the run has no checkpoint, not this one, or one of another model.
  """
  with run.checkpoints(read_only=True) as checkpoints:
    step = checkpoints.latest() if step is None else step
    if step is None:
      raise InputError(f'workdir {run.workdir} has no checkpoint yet')
    state = checkpoints.restore(abstract_state(detector, run.optimizer(), mesh), step)
  return step, state.best_variables()


def picture(source: Source, rows: list[dict[str, Any]], categories: tuple[Category, ...], *,
            count: int, threshold: float = 0.5) -> Array:
  """A contact sheet of `count` images spread over the data set, truth and detections drawn.

  Args:
    source: the data set.
    rows: its detections, as of `Evaluator.rows`.
    categories: in order of label.
    count: how many images, at most.
    threshold: least score that is drawn.

  Returns:
    u8 [H, W, 3].
  """
  names = [c.name for c in categories]
  label_of = {c.id: label for label, c in enumerate(categories)}
  drawn = []
  for index in sorted({round(i) for i in np.linspace(0, len(source) - 1, count)}):
    example = source[index]
    found = [r for r in rows if r['image_id'] == example.image_id and r['score'] >= threshold]
    height, width = example.size
    xywh = np.array([r['bbox'] for r in found], np.float32).reshape(-1, 4)
    x, y, w, h = (xywh / np.float32([width, height, width, height])).T
    image = draw_boxes(example.image, example.boxes, example.labels, [''] * len(names), truth=True,
                       min_side=PICTURE_SIDE)
    drawn.append(draw_boxes(image, np.stack([y, x, y + h, x + w], axis=-1),
                            np.array([label_of[r['category_id']] for r in found], np.int32), names,
                            np.array([r['score'] for r in found], np.float32)))
  return mosaic(drawn)


def write_scores(path: pathlib.Path, scores: coco.Scores) -> None:
  """The figures and the per-class table as JSON."""
  files.write_text(path, json.dumps(scores._asdict(), indent=2) + '\n')


def _every_tenth(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
  """Says how far it is at each tenth of the images."""
  said = 0

  def on_images(count: int) -> None:
    nonlocal said
    if count * 10 // total > said:
      said = count * 10 // total
      say(f'  {count:,}/{total:,} images')

  return on_images
