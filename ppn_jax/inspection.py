"""Inspection of a trained run in a notebook: `inspect_run(workdir)` and a call for each picture.

  run = inspect_run('runs/quickstart')
  run.worst()

Pictures are PIL images, which notebooks show and `save(path)` writes.
"""

import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ppn_jax import storage
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.source import file_ids
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Array, Category, Detections, Example, unlabelled_example
from ppn_jax.detector import Variables
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.jobs.evaluate import EvaluationJob, EvaluationOptions, prepare_evaluation
from ppn_jax.metrics import calibration, coco, error_analysis, matching
from ppn_jax.metrics.error_analysis import KINDS
from ppn_jax.run import open_model
from ppn_jax.visualization import anchors, calibration_plot, curves, pyramid
from ppn_jax.visualization.drawing import contact_sheet, draw_boxes
from ppn_jax.visualization.gallery import CaptionedImage, Gallery, check_index, draw_caption
from ppn_jax.visualization.plotting import draw_message

logger = logging.getLogger(__name__)

# A path, a PIL image, RGB u8 [H, W, 3], or the index of an image of the evaluation data.
Picture = str | os.PathLike[str] | Array | Image.Image | int
_SIDE = 600  # Smaller pictures are enlarged to this, in pixels.


@dataclasses.dataclass(frozen=True)
class Inspection:
  """Step of a run with its detections on the run's evaluation data; see `inspect_run`.

  Attributes:
    job: the run, its detector and data.
    step: of the checkpoint.
    variables: of that step.
    rows: detections on all evaluation images, see `coco.to_rows`.
    threshold: least score of a detection that is drawn.
  """
  job: EvaluationJob
  step: int
  variables: Variables
  rows: Sequence[Mapping[str, Any]]
  threshold: float = 0.3

  @property
  def categories(self) -> tuple[Category, ...]:
    """Categories of the run, in order of label."""
    return self.job.run.categories

  @functools.cached_property
  def gallery(self) -> Gallery:
    """Evaluation images with their ground truth and detections."""
    source = self.job.evaluator.source
    return Gallery(source, source.ground_truth(), self.rows, self.categories, self.threshold)

  def table(self) -> None:
    """Prints COCO's twelve metrics and those of each class."""
    print(coco.format_table(coco.score(self.gallery.ground_truth, self.rows)))

  def training(self) -> Image.Image:
    """Plots losses, COCO's metrics, learning rate and gradient norm by step."""
    return _image(curves.training(self.job.run.metrics()))

  def precision_recall(self) -> Image.Image:
    """Plots precision against recall, over all classes by IoU, and by class."""
    return _image(curves.precision_recall(self._precision, self._names))

  def average_precision(self) -> Image.Image:
    """Plots AP by class and object size."""
    return _image(curves.average_precision(self._precision, self._names))

  def reliability(self, floor: float = 0.05) -> Image.Image:
    """Plots precision against score, for scores from `floor` on, by level, size and class."""
    ground_truth = self.gallery.ground_truth
    return _image(calibration_plot.draw_reliability(calibration.measure(
        matching.match_detections(ground_truth, self.rows), num_images=len(ground_truth['images']),
        num_levels=self.job.detector.num_levels, class_names=self._names, floor=floor)))

  def errors(self) -> Image.Image:
    """Plots the cost and number of mistakes of each kind."""
    costs = error_analysis.costs(self.gallery.ground_truth, self.rows)
    return _image(curves.errors(self.gallery.errors.counts(), costs))

  def mistakes(self, kind: str, count: int = 6) -> Image.Image:
    """Shows the worst mistakes of a kind of `error_analysis.KINDS`, such as 'wrong class'.

    Raises:
      InputError: If there is no such kind.
    """
    if kind not in KINDS:
      raise InputError(f'unknown kind of mistakes {kind!r}; {did_you_mean(str(kind), KINDS)}')
    return _sheet(self.gallery.mistakes(kind, count), 6, f'no mistakes of the kind {kind!r}')

  def best(self, count: int = 4) -> Image.Image:
    """Shows the images with the best detections next to their ground truth."""
    return _sheet(self.gallery.best(count), 2)

  def worst(self, count: int = 4) -> Image.Image:
    """Shows the images with the worst detections next to their ground truth."""
    return _sheet(self.gallery.worst(count), 2)

  def compare(self, index: int = 0) -> Image.Image:
    """Shows ground truth, left, and detections, right, of evaluation image `index`."""
    return _sheet([self.gallery.compare(index)], 1)

  def levels(self, picture: Picture = 0) -> Image.Image:
    """Shows features, best scores of cells, and detections of each pyramid level."""
    image = self._resized(self._open(picture)).image
    return _image(pyramid.draw_levels(image, self._activations(self.variables, image), self._names,
                                      threshold=self.threshold))

  def anchors(self, index: int = 0) -> Image.Image:
    """Shows anchors over evaluation image `index`, and those that ground truth is assigned to."""
    example = self._resized(self._open(index))
    return _image(anchors.draw_assigned_anchors(
        self.job.detector, example.image, example.boxes, example.labels, example.crowd,
        matched_iou=self.job.run.config.matching.matched_iou))

  def detect(self, picture: Picture = 0) -> Image.Image:
    """Shows the detections in a picture of any size."""
    image = self._open(picture).image
    found = self._activations(self.variables, self._resized(self._open(image)).image).detections
    found = self.job.evaluator.frame.in_pictures(found, np.array(image.shape[:2]))
    kept = found.valid & (found.scores >= self.threshold)
    found = Detections(*(field[kept] for field in found))
    return _image(draw_boxes(image, found.boxes, found.labels, self._names, found.scores,
                             min_side=_SIDE))

  def own_picture(self, path: str = '') -> np.ndarray:
    """Reads a picture of your own, RGB u8 [H, W, 3]; in Colab it asks for an upload.

    Args:
      path: of an image file; without it, and outside Colab, the first evaluation image is used.

    Raises:
      InputError: If the file cannot be read.
    """
    if path:
      return self._open(path).image
    if 'google.colab' in sys.modules:
      from google.colab import files as colab  # pyright: ignore
      for name, data in colab.upload().items():
        return image_files.decode(data, name=name)
    return self._open(0).image

  @functools.cached_property
  def _precision(self) -> np.ndarray:
    return coco.precision_table(self.gallery.ground_truth, self.rows)

  @functools.cached_property
  def _activations(self):
    return pyramid.build_activations(self.job.detector)

  @property
  def _names(self) -> list[str]:
    return [c.name for c in self.categories]

  def _open(self, picture: Picture) -> Example:
    """Reads any picture, with its ground truth if it is one of the evaluation data."""
    source = self.job.evaluator.source
    if isinstance(picture, (int, np.integer)):
      check_index(picture, len(source))
      return source[picture]
    return unlabelled_example(image_files.to_pixels(picture, 'the picture'))

  def _resized(self, example: Example) -> Example:
    data = self.job.run.config.data
    return Resize(self.job.detector.image_size, data.resize, resize_mode=data.resize_mode)(example)


def inspect_run(workdir: str | os.PathLike[str], *, step: int | None = None,
                data: Mapping[str, Any] | None = None, threshold: float = 0.3,
                allow: Sequence[str] = ()) -> Inspection:
  """Opens a run with its detections on the evaluation data.

  Detections that `ppn evaluate` has written are reused, otherwise they are computed, which takes as
  long as `ppn evaluate`.

  Args:
    workdir: of a `ppn train` or `ppn import-tf`, local or gs://BUCKET/FOLDER; or a weights file.
    step: a saved step; the newest by default.
    data: entries of `data.eval` to change, such as folders that are elsewhere on this machine. A
      weights file names no data, so it needs them all.
    threshold: least score of a detection that is drawn, 0 to 1.
    allow: packages or modules of your own that the run may import, see `run.open_run`.

  Raises:
    InputError: If there is no such run or checkpoint, or the data are bad.
  """
  if not 0 <= threshold <= 1:
    raise InputError(f'threshold={threshold} must lie between 0 and 1')
  data = data or {}
  allow = [allow] if isinstance(allow, str) else list(allow)
  run = open_model(workdir, allow=allow + ([data['name']] if 'name' in data else []))
  if data:
    run = run.with_eval_data(data)
  job = prepare_evaluation(run, EvaluationOptions())
  step, variables = job.load(step)
  rows = None if data else _written(job.root / str(step) / 'results.json')
  if rows is not None:
    ids = file_ids(job.evaluator.source)
    rows = coco.renumber(rows, {in_file: own for own, in_file in ids.items()})
  else:
    logger.info(f'detecting on {len(job.evaluator.source):,} images')
    rows = job.evaluator.rows(variables)
  return Inspection(job, step, variables, rows, threshold)


def _written(path: storage.Path) -> list[dict[str, Any]] | None:
  """Reads the rows of an evaluation; None if there are none or they lack pyramid levels."""
  if not path.is_file():
    return None
  rows = json.loads(path.read_text())
  return rows if all('level' in row for row in rows) else None


def _image(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(pixels)


def _sheet(pictures: Sequence[CaptionedImage], columns: int, otherwise: str = 'no images'
           ) -> Image.Image:
  """Arranges captioned pictures in rows; without any, shows the sentence `otherwise`."""
  if not pictures:
    return _image(draw_message(otherwise))
  return _image(contact_sheet([draw_caption(p) for p in pictures], min(columns, len(pictures)),
                              background=(255, 255, 255)))
