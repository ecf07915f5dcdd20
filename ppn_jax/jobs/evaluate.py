"""Scoring steps of a run, and what is written down of each."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ppn_jax import storage
from ppn_jax.checkpoints import retention
from ppn_jax.data.bad_examples import evenly_spaced_examples
from ppn_jax.data.report import report
from ppn_jax.data.source import Source, file_ids
from ppn_jax.detection.structures import Array, Category
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import coordination, sharding
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError
from ppn_jax.jobs import calibration_report
from ppn_jax.jobs.calibration_report import CalibrationOptions
from ppn_jax.jobs.evaluator import Evaluator, build_evaluator
from ppn_jax.metrics import coco
from ppn_jax.metrics.coco import write_scores
from ppn_jax.run import Run, load_variables
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.visualization.drawing import draw_boxes, mosaic, save_png
from ppn_jax.visualization.gallery import Gallery
from ppn_jax.visualization.report import evaluation_page

# Smaller images are enlarged to this for a contact sheet, so that names can be read.
PICTURE_SIDE = 400

# How long another evaluation that is writing to the same folder is waited for.
WAIT_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Options:
  """How to evaluate a step.

  Attributes:
    scorer: see `coco.score`.
    ema: True for the moving average of the weights, False for the weights themselves; None for
      the average where the run keeps one.
    pictures: how many images to draw on a contact sheet, `pictures.png`.
    calibration: reports on it too, in `calibration.json` and `calibration.png`.
    report: writes all that is known of the step to `report.html`.
  """
  scorer: str = 'hotcoco'
  ema: bool | None = None
  pictures: int = 0
  calibration: CalibrationOptions | None = None
  report: bool = False


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
  folder: storage.Path
  calibration: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Job:
  """A run's detector and evaluation data, ready for any of its steps; compiled once.

  Attributes:
    run: see `prepare`.
    detector: of the run.
    evaluator: of its evaluation data.
    options: what to do with a step.
    say: told what goes on, a line at a time.
  """
  run: Run
  detector: Detector
  evaluator: Evaluator
  options: Options
  say: Callable[[str], None]

  @property
  def root(self) -> storage.Path:
    """The folder for the folders of steps.

    Raw weights beside an average have another: the trainer keeps checkpoints by what is in
    `evaluation`.
    """
    raw = self.options.ema is False and self.run.config.optim.ema_decay
    return self.run.workdir / ('evaluation_raw' if raw else 'evaluation')

  def load(self, step: int | None = None) -> tuple[int, Variables]:
    """See `load_variables`."""
    return load_variables(self.run, self.detector, self.evaluator.mesh, step=step,
                          ema=self.options.ema, say=self.say)

  def score(self, step: int | None, output: storage.Path | None = None) -> Evaluation:
    """Loads a step, by default the newest, and evaluates it; see `evaluate`.

    Args:
      step: which.
      output: folder to write to; by default that of the step in `root`.
    """
    reader = retention.Reader(self.run.readers, self.say) if jax.process_index() == 0 else None
    try:
      if reader and step is not None:
        reader.hold(step)
      step, variables = self.load(step)
      if reader:
        reader.hold(step)
      return self.evaluate(step, variables, output or self.root / str(step))
    finally:
      if reader:
        reader.close()

  def about(self) -> dict[str, Any]:
    """Returns what scores depend on besides the checkpoint."""
    average = self.options.ema is not False and bool(self.run.config.optim.ema_decay)
    return {'average': average, 'images': len(self.evaluator.source)}

  def evaluate(self, step: int, variables: Variables, folder: storage.Path) -> Evaluation:
    """Scores the variables and writes down what it found.

    `results.json` and `scores.json` come before all that is drawn, so that a picture that cannot
    be made costs no figure.
    """
    evaluator, options, report = self.evaluator, self.options, None
    stamp = self.run.stamp(step) if jax.process_index() == 0 else None
    total = len(evaluator.source)
    self.say(f'evaluating step {step:,} on {total:,} images')
    rows = evaluator.rows(variables, on_images=_every_tenth(total, self.say))
    for reason in dict.fromkeys(coordination.gather_lines(evaluator.bad.new_reasons())):
      self.say(f'skipped: {reason}')
    scores = evaluator.score(rows)
    if jax.process_index() == 0:
      with Ownership(folder, 'evaluation', self.say, wait=WAIT_SECONDS):
        storage.remove_partial(folder)
        coco.write_results(folder / 'results.json',
                           coco.renumber(rows, file_ids(evaluator.source)))
        write_scores(folder / 'scores.json', scores,
                     {'checkpoint': stamp and stamp.checkpoint, **self.about()})
        if options.pictures:
          save_png(folder / 'pictures.png',
                   picture(evaluator.source, rows, self.run.categories, count=options.pictures))
        if options.calibration:
          report = self._calibration(step, rows, folder)
        if options.report:
          self._report(step, rows, scores, folder)
    return Evaluation(step, scores, folder, report)

  def _calibration(self, step: int, rows: list[dict[str, Any]], folder: storage.Path
                   ) -> dict[str, Any]:
    self.say('reporting on calibration')
    report = calibration_report.report(
        self.run.config, self.detector, self.run.categories, self.evaluator.source.ground_truth(),
        rows, self.options.calibration, scorer=self.options.scorer)
    calibration_report.write(folder, report, f'{self.run.workdir.resolve().name}, step {step:,}')
    return report

  def _report(self, step: int, rows: list[dict[str, Any]], scores: coco.Scores,
              folder: storage.Path) -> None:
    self.say('drawing the report')
    source = self.evaluator.source
    gallery = Gallery(source, source.ground_truth(), rows, self.run.categories)
    page = evaluation_page(
        f'{storage.absolute(self.run.workdir).name}, step {step:,}', gallery, scores,
        [line for line in self.run.metrics() if line['step'] <= step],
        num_levels=self.detector.num_levels, scorer=self.options.scorer)
    storage.write_text(folder / 'report.html', page)


def prepare(run: Run, options: Options, say: Callable[[str], None] = print) -> Job:
  """The job of evaluating a run's steps.

  Args:
    run: to evaluate; its `config.data.eval` may have been changed to other data.
    options: see there.
    say: told what goes on, a line at a time.

  Raises:
    InputError: bad data, or an average that the run does not keep.
  """
  run.check_average(options.ema, '--ema')
  keep_freed_memory()
  mesh, detector = sharding.data_mesh(), run.detector()
  evaluator = build_evaluator(run, detector, mesh, scorer=options.scorer)
  for line in report(evaluator.source, 'data.eval').warnings:
    say(line)
  return Job(run, detector, evaluator, options, say)


def evaluate(run: Run, *, step: int | None = None, options: Options = Options(),
             output: storage.Path | None = None, say: Callable[[str], None] = print) -> Evaluation:
  """Scores a saved step on the run's evaluation data and writes down what it found.

  Args:
    run: see `prepare`.
    step: a saved step; the newest by default.
    options: see there.
    output: folder to write to; by default `evaluation/STEP` in the workdir.
    say: told what goes on, a line at a time.

  Raises:
    InputError: no such checkpoint, or bad data.
  """
  job = prepare(run, options, say)
  return job.score(step, output)


def _to_stderr(text: str) -> None:
  print(text, file=sys.stderr)


def picture(source: Source, rows: list[dict[str, Any]], categories: tuple[Category, ...], *,
            count: int, threshold: float = 0.5) -> Array:
  """A contact sheet of `count` images spread over the data set, truth and detections drawn.

  Others take the places of images that cannot be read.

  Args:
    source: the data set.
    rows: its detections, as of `Evaluator.rows`.
    categories: in order of label.
    count: how many images, at most.
    threshold: least score that is drawn.

  Returns:
    u8 [H, W, 3].

  Raises:
    InputError: If no image can be read.
  """
  names = [c.name for c in categories]
  label_of = {c.id: label for label, c in enumerate(categories)}
  drawn, reasons = [], []
  for _, example in evenly_spaced_examples(source, count, reasons.append):
    found = [r for r in rows if r['image_id'] == example.image_id and r['score'] >= threshold]
    height, width = example.size
    xywh = np.array([r['bbox'] for r in found], np.float32).reshape(-1, 4)
    x, y, w, h = (xywh / np.float32([width, height, width, height])).T
    image = draw_boxes(example.image, example.boxes, example.labels, [''] * len(names), truth=True,
                       min_side=PICTURE_SIDE)
    drawn.append(draw_boxes(image, np.stack([y, x, y + h, x + w], axis=-1),
                            np.array([label_of[r['category_id']] for r in found], np.int32), names,
                            np.array([r['score'] for r in found], np.float32)))
  if not drawn:
    raise InputError(f'no image can be read to draw on, such as: {reasons[0]}')
  return mosaic(drawn)


def _every_tenth(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
  """Says how far it is at each tenth of the images."""
  said = 0

  def on_images(count: int) -> None:
    nonlocal said
    if count * 10 // total > said:
      said = count * 10 // total
      say(f'  {count:,}/{total:,} images')

  return on_images
