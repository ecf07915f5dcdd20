"""Evaluates a step of a run, or a weights file, and writes its results."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppn_jax import storage
from ppn_jax.checkpoints import retention
from ppn_jax.data.bad_examples import evenly_spaced_examples
from ppn_jax.data.report import report
from ppn_jax.data.source import Source, file_ids
from ppn_jax.data.sources import scans
from ppn_jax.data.splits import names_data
from ppn_jax.detection.structures import Array, Category
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import coordination, sharding
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError
from ppn_jax.jobs import calibration_report, class_report
from ppn_jax.jobs.calibration_report import CalibrationOptions
from ppn_jax.jobs.class_report import ClassReport
from ppn_jax.jobs.evaluator import Evaluator, build_evaluator
from ppn_jax.jobs.shared_scans import SharedScans
from ppn_jax.metrics import coco
from ppn_jax.metrics.coco import write_scores
from ppn_jax.run import Run, open_model
from ppn_jax.telemetry.host_memory import keep_freed_memory_on_cpu
from ppn_jax.trained_model import SharedModel, TrainedModel
from ppn_jax.visualization import class_page
from ppn_jax.visualization.drawing import contact_sheet, draw_boxes, save_picture
from ppn_jax.visualization.gallery import Gallery
from ppn_jax.visualization.report import evaluation_page

logger = logging.getLogger(__name__)

# Smaller images are enlarged to this on a contact sheet, so that names can be read.
PICTURE_SIDE = 400

# How long to wait for another evaluation that is writing to the same folder.
WAIT_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
  """Options of the evaluation of a step.

  Attributes:
    scorer: 'hotcoco', or 'pycocotools' for the reference implementation; their metrics are equal.
    ema: True for the moving average of the weights, False for the weights themselves, None for
      the average if the run keeps one.
    pictures: number of images to draw on a contact sheet, `pictures.png`; 0 for none.
    calibration: writes a calibration report, `calibration.json` and `calibration.png`, if given.
    report: writes an HTML report, `report.html`.
    calibrate: fits a calibration of the scores, 'temperature' or 'platt', and keeps it with the
      step; '' for none.
    matmul_dtype: see `models.layers.LayerPolicy`; None for that of the run.
  """
  scorer: str = 'hotcoco'
  ema: bool | None = None
  pictures: int = 0
  calibration: CalibrationOptions | None = None
  report: bool = False
  calibrate: str = ''
  matmul_dtype: str | None = None

  def __post_init__(self):
    class_report.check_method(self.calibrate)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results of the evaluation of one step.

  Attributes:
    step: that was evaluated.
    scores: COCO's metrics, also by class.
    folder: has `results.json` (COCO's results format), `scores.json`, `thresholds.json`,
      `confusion_matrix.csv` and `images.csv`.
    classes: thresholds, confusion and VOC's AP; None in all processes but the first.
    calibration: see `calibration_report.build_report`; None if it was not requested, and in all
      processes but the first.
  """
  step: int
  scores: coco.Scores
  folder: storage.Path
  calibration: dict[str, Any] | None = None
  classes: ClassReport | None = None

  @property
  def metrics(self) -> dict[str, float | None]:
    """COCO's twelve metrics by name, 'AP' to 'AR_large', 0 to 1; None without such ground truth."""
    return self.scores.metrics


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
  """Detector and evaluation data of a run, for evaluating any of its steps; compiled once.

  Attributes:
    run: see `prepare_evaluation`; a weights file has one step.
    detector: of the run.
    evaluator: of its evaluation data.
    options: of the evaluation of a step.
  """
  run: TrainedModel
  detector: Detector
  evaluator: Evaluator
  options: EvaluationOptions

  @property
  def root(self) -> storage.Path:
    """Folder that holds a folder for each step, see `Run.evaluations`.

    Raises:
      InputError: If a weights file is evaluated, which has no such folder.
    """
    if not isinstance(self.run, Run):
      raise InputError(f'{self.run.name} is a weights file, so there is no workdir to write to; '
                       'give a folder by --output=DIR, in Python output=DIR')
    return self.run.evaluations(
        self.options.ema is False and bool(self.run.config.optim.ema_decay))

  def load(self, step: int | None = None) -> tuple[int, Variables]:
    """Restores the variables of a step, by default the newest; see `run.load_variables`."""
    return self.run.load_variables(self.detector, self.evaluator.mesh, step=step,
                                   ema=self.options.ema)

  def score(self, step: int | None, output: storage.Path | None = None) -> Evaluation:
    """Loads and evaluates a step.

    Args:
      step: a saved step; the newest by default.
      output: folder to write to; by default that of the step in `root`.

    Raises:
      InputError: If there is no such checkpoint, or it cannot be used.
    """
    if output is None:
      root = self.root
    run = self.run if isinstance(self.run, Run) else None
    reader = retention.Reader(run.readers) if run and jax.process_index() == 0 else None
    try:
      if reader and step is not None:
        reader.hold(step)
      step, variables = self.load(step)
      if reader:
        reader.hold(step)
      return self.evaluate(step, variables, root / str(step) if output is None else output)
    finally:
      if reader:
        reader.close()

  def conditions(self) -> dict[str, Any]:
    """Returns what scores depend on in addition to the checkpoint; see `retention.Record.about`."""
    average = self.options.ema is not False and bool(self.run.config.optim.ema_decay)
    return {'average': average, 'images': len(self.evaluator.source),
            'matmul_dtype': self.options.matmul_dtype}

  def evaluate(self, step: int, variables: Variables, folder: storage.Path) -> Evaluation:
    """Scores variables of a step and writes the results to a folder.

    `results.json` and `scores.json` are written before anything is drawn, so that a failure to draw
    loses no metrics.
    """
    evaluator, options, calibration, classes = self.evaluator, self.options, None, None
    stamp = (self.run.stamp(step) if isinstance(self.run, Run) and jax.process_index() == 0
             else None)
    total = len(evaluator.source)
    logger.info(f'evaluating step {step:,} on {total:,} images')
    rows = evaluator.rows(variables, on_images=_report_tenths(total))
    for reason in dict.fromkeys(coordination.gather_lines(evaluator.bad.new_reasons())):
      logger.warning(f'skipped: {reason}')
    scores = evaluator.score(rows)
    if jax.process_index() == 0:
      with Ownership(folder, 'evaluation', wait=WAIT_SECONDS):
        storage.remove_partial(folder)
        coco.write_results(folder / 'results.json',
                           coco.renumber(rows, file_ids(evaluator.source)))
        scored = {'checkpoint': stamp and stamp.checkpoint, **self.conditions()}
        write_scores(folder / 'scores.json', scores, scored)
        classes = class_report.build_report(
            evaluator.source.ground_truth(), rows, self.run.categories,
            num_levels=self.detector.num_levels, method=options.calibrate, scorer=options.scorer)
        class_report.write_report(folder, classes, scored)
        if options.pictures:
          save_picture(folder / 'pictures.png', draw_contact_sheet(
              evaluator.source, rows, self.run.categories, count=options.pictures))
        if options.calibration:
          calibration = self._write_calibration(step, rows, folder)
        if options.report:
          self._write_report(step, rows, scores, classes, folder)
    return Evaluation(step, scores, folder, calibration, classes)

  def _write_calibration(self, step: int, rows: list[dict[str, Any]], folder: storage.Path
                         ) -> dict[str, Any]:
    logger.info('reporting on calibration')
    report = calibration_report.build_report(
        self.run.config, self.detector, self.run.categories, self.evaluator.source.ground_truth(),
        rows, self.options.calibration, scorer=self.options.scorer)
    calibration_report.write_report(folder, report,
                                    f'{self.run.name}, step {step:,}')
    return report

  def _write_report(self, step: int, rows: list[dict[str, Any]], scores: coco.Scores,
                    classes: ClassReport, folder: storage.Path) -> None:
    logger.info('drawing the report')
    source = self.evaluator.source
    gallery = Gallery(source, source.ground_truth(), rows, self.run.categories)
    page = evaluation_page(
        f'{self.run.name}, step {step:,}', gallery, scores,
        [line for line in self.run.metrics() if line['step'] <= step],
        num_levels=self.detector.num_levels, scorer=self.options.scorer, more=[
            class_page.thresholds(classes.names, classes.analysis,
                                  (*classes.voc_by_class, classes.voc_ap50)),
            class_page.confusion(classes.names, classes.matrix),
            class_page.images(classes.images)])
    storage.write_text(folder / 'report.html', page)


def prepare_evaluation(run: TrainedModel, options: EvaluationOptions) -> EvaluationJob:
  """Opens the evaluation data of a run and builds its detector.

  Args:
    run: to evaluate, see `run.open_model`; its `config.data.eval` may have been changed to other
      data.
    options: see there.

  Raises:
    InputError: If the data are bad, or `options.ema` asks for an average that the run does not
      keep.
  """
  run.check_average(options.ema, '--ema')
  data = run.config.data
  if isinstance(run, SharedModel) and not (
      names_data(data.eval) or (data.eval_fraction and names_data(data.train))):
    raise InputError(
        f'{run.name} is a weights file, which names no data to evaluate on; give some, such as '
        '--config=own_data:coco_json --config.data.eval.images=... '
        '--config.data.eval.annotations=..., in Python data=dict(name=...)')
  keep_freed_memory_on_cpu()
  mesh, detector = sharding.data_mesh(), run.detector(matmul_dtype=options.matmul_dtype)
  evaluator = _open_evaluator(run, detector, mesh, options.scorer)
  for line in report(evaluator.source, 'data.eval').warnings:
    logger.warning(line)
  return EvaluationJob(run, detector, evaluator, options)


def _open_evaluator(run: TrainedModel, detector: Detector, mesh: Mesh, scorer: str) -> Evaluator:
  """Builds the evaluator; of a run with the scans of its data that its workdir keeps."""
  if not isinstance(run, Run):
    return build_evaluator(run, detector, mesh, scorer=scorer)
  kept_scans = SharedScans(run.workdir)
  with scans.kept_by(kept_scans):
    evaluator = build_evaluator(run, detector, mesh, scorer=scorer)
  if jax.process_index() == 0:
    kept_scans.save(replace=False)
  return evaluator


def evaluate(run: TrainedModel | str | os.PathLike[str], *, step: int | None = None,
             options: EvaluationOptions = EvaluationOptions(),
             output: str | os.PathLike[str] | None = None, allow: Sequence[str] = (),
             data: Mapping[str, Any] | None = None) -> Evaluation:
  """Evaluates a saved step on the evaluation data of its run, and writes the results.

    ppn_jax.evaluate('runs/quickstart').metrics['AP']
    ppn_jax.evaluate('mine.safetensors', output='scores', data=dict(
        name='coco_json', images='photos', annotations='boxes.json'))

  All processes of a run over several machines call it together.

  Args:
    run: workdir of a `ppn train` or `ppn import-tf`, local or gs://BUCKET/FOLDER; or a weights
      file; or what `run.open_model` returns.
    step: a saved step; the newest by default.
    options: what to compute and draw.
    output: folder to write to; by default `evaluation/STEP` in the workdir, or
      `evaluation_raw/STEP` for the weights themselves of a run that keeps an average. Needed for
      weights files, other data and another `matmul_dtype`.
    allow: packages or modules of your own that the config of a workdir may import, see
      `run.open_run`.
    data: entries of `data.eval` to change; a weights file names no data.

  Returns:
    The metrics of the step and the folder of its results.

  Raises:
    InputError: If there is no such run or checkpoint, or its data cannot be used.
  """
  if not isinstance(run, TrainedModel):
    run = open_model(run, allow=allow)
  if output is None and (data or options.matmul_dtype is not None):
    raise InputError(f'{"data" if data else "matmul_dtype"} is given, so give output=DIR too: the '
                     "results of the run's own evaluation are not overwritten")
  if data:
    run = run.with_eval_data(data)
  folder = None if output is None else storage.folder_path(output, 'output')
  return prepare_evaluation(run, options).score(step, folder)


def draw_contact_sheet(source: Source, rows: list[dict[str, Any]],
                       categories: tuple[Category, ...], *, count: int, threshold: float = 0.5
                       ) -> Array:
  """Draws ground truth and detections on images evenly spaced over the data set, on one sheet.

  Images that cannot be read are replaced by others.

  Args:
    source: the data set.
    rows: its detections, see `Evaluator.rows`.
    categories: in order of label.
    count: number of images, at most.
    threshold: least score of a detection that is drawn.

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
    image = draw_boxes(example.image, example.boxes, example.labels, [''] * len(names),
                       ground_truth=True, min_side=PICTURE_SIDE)
    drawn.append(draw_boxes(image, np.stack([y, x, y + h, x + w], axis=-1),
                            np.array([label_of[r['category_id']] for r in found], np.int32), names,
                            np.array([r['score'] for r in found], np.float32)))
  if not drawn:
    raise InputError(f'none of the images can be read, so there is nothing to draw on; the first: '
                     f'{reasons[0]}')
  return contact_sheet(drawn)


def _report_tenths(total: int) -> Callable[[int], None]:
  """Returns a callback that logs progress at each tenth of the images."""
  reported = 0

  def on_images(count: int) -> None:
    nonlocal reported
    if count * 10 // total > reported:
      reported = count * 10 // total
      logger.info(f'  {count:,}/{total:,} images')

  return on_images
