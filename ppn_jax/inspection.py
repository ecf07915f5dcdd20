"""A trained run, looked at in a notebook: `inspect_run(workdir)` and a call for each picture.

  run = inspect_run('runs/quickstart')
  run.worst()

Pictures are PIL images, which notebooks show and `save(path)` writes.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ppn_jax import storage
from ppn_jax.config import complete, plain
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.source import file_ids
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Array, Category, Detections, Example, unlabelled_example
from ppn_jax.detector import Variables
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.jobs.evaluate import Job, Options, prepare
from ppn_jax.metrics import calibration, coco, error_analysis, matching
from ppn_jax.metrics.error_analysis import KINDS
from ppn_jax.run import open_run
from ppn_jax.visualization import anchors, calibration_plot, curves, pyramid
from ppn_jax.visualization.drawing import draw_boxes, mosaic
from ppn_jax.visualization.gallery import Gallery, Shown, captioned
from ppn_jax.visualization.plotting import sentence

# A path, a PIL image, RGB u8 [H, W, 3], or the number of an image of the evaluation data.
Picture = str | os.PathLike[str] | Array | Image.Image | int
_SIDE = 600  # Smaller pictures are enlarged to this, in pixels.


@dataclasses.dataclass(frozen=True)
class Inspection:
  """A step of a run and what it finds in the run's evaluation data; see `inspect_run`.

  Attributes:
    job: the run, its detector and data.
    step: which.
    variables: of that step.
    rows: detections of all evaluation images, as of `coco.to_rows`.
    threshold: least score of a detection that is drawn.
  """
  job: Job
  step: int
  variables: Variables
  rows: Sequence[Mapping[str, Any]]
  threshold: float = 0.3

  @property
  def categories(self) -> tuple[Category, ...]:
    """The classes, in order of label."""
    return self.job.run.categories

  @functools.cached_property
  def gallery(self) -> Gallery:
    """The evaluation images with their truth and detections."""
    source = self.job.evaluator.source
    return Gallery(source, source.ground_truth(), self.rows, self.categories, self.threshold)

  def table(self) -> None:
    """Prints COCO's twelve figures and those of each class."""
    print(coco.format_table(coco.score(self.gallery.truth, self.rows)))

  def training(self) -> Image.Image:
    """Losses, COCO's figures, learning rate and gradient norm by step."""
    return _image(curves.training(self.job.run.metrics()))

  def precision_recall(self) -> Image.Image:
    """Precision against recall: over all classes by IoU, and by class."""
    return _image(curves.precision_recall(self._precision, self._names))

  def average_precision(self) -> Image.Image:
    """AP by class and size of the truth."""
    return _image(curves.average_precision(self._precision, self._names))

  def reliability(self, floor: float = 0.05) -> Image.Image:
    """Scores of `floor` and more against precision, by level, size and class."""
    truth = self.gallery.truth
    return _image(calibration_plot.reliability(calibration.measure(
        matching.judge(truth, self.rows), num_images=len(truth['images']),
        num_levels=self.job.detector.num_levels, class_names=self._names, floor=floor)))

  def errors(self) -> Image.Image:
    """What each kind of mistake costs, and how many there are."""
    truth = self.gallery.truth
    costs = error_analysis.costs(truth, self.rows, error_analysis.classify(truth, self.rows))
    return _image(curves.errors(self.gallery.errors.counts(), costs))

  def mistakes(self, kind: str, count: int = 6) -> Image.Image:
    """The worst mistakes of a kind of `error_kinds.KINDS`, such as 'missed' or 'wrong class'.

    Raises:
      InputError: no such kind.
    """
    if kind not in KINDS:
      raise InputError(f'mistakes: {kind!r} is no kind; {did_you_mean(str(kind), KINDS)}')
    return _sheet(self.gallery.mistakes(kind, count), 6, f'no mistakes of the kind {kind!r}')

  def best(self, count: int = 4) -> Image.Image:
    """The images that went best, truth beside detections."""
    return _sheet(self.gallery.best(count), 2)

  def worst(self, count: int = 4) -> Image.Image:
    """The images that went worst, truth beside detections."""
    return _sheet(self.gallery.worst(count), 2)

  def beside(self, index: int = 0) -> Image.Image:
    """Evaluation image `index`: truth on the left, detections on the right, mistakes named."""
    return _sheet([self.gallery.beside(index)], 1)

  def levels(self, picture: Picture = 0) -> Image.Image:
    """The pyramid's features, the best scores of its cells, and which level found what."""
    image = self._resized(self._open(picture)).image
    return _image(pyramid.levels(image, self._look(self.variables, image), self._names,
                                 threshold=self.threshold))

  def anchors(self, index: int = 0) -> Image.Image:
    """Anchors over evaluation image `index`, and which of them its truth is assigned to."""
    example = self._resized(self._open(index))
    return _image(anchors.matched(
        self.job.detector, example.image, example.boxes, example.labels, example.crowd,
        matched_iou=self.job.run.config.matching.matched_iou))

  def detect(self, picture: Picture = 0) -> Image.Image:
    """What is found in a picture of any size."""
    image = self._open(picture).image
    found = self._look(self.variables, self._resized(self._open(image)).image).detections
    found = Detections(*(field[found.scores >= self.threshold] for field in found))
    return _image(draw_boxes(image, found.boxes, found.labels, self._names, found.scores,
                             min_side=_SIDE))

  def own_picture(self, path: str = '') -> np.ndarray:
    """A picture of yours, RGB u8 [H, W, 3]: in Colab one that it asks you to upload.

    Args:
      path: of an image file, instead. Without either it is the first evaluation image.

    Raises:
      InputError: a file that cannot be read.
    """
    if path:
      return self._open(path).image
    if 'google.colab' in sys.modules:
      from google.colab import files as colab
      for name, data in colab.upload().items():
        return image_files.decode(data, name=name)
    return self._open(0).image

  @functools.cached_property
  def _precision(self) -> np.ndarray:
    return coco.precision_table(self.gallery.truth, self.rows)

  @functools.cached_property
  def _look(self):
    return pyramid.looker(self.job.detector)

  @property
  def _names(self) -> list[str]:
    return [c.name for c in self.categories]

  def _open(self, picture: Picture) -> Example:
    """Any picture, with its truth if it is one of the evaluation data."""
    source = self.job.evaluator.source
    if isinstance(picture, (int, np.integer)):
      if not 0 <= picture < len(source):
        raise InputError(f'image {picture} of {len(source)}: legal are 0 to {len(source) - 1}')
      return source[picture]
    return unlabelled_example(image_files.to_pixels(picture, 'the picture'))

  def _resized(self, example: Example) -> Example:
    return Resize(self.job.detector.image_size, self.job.run.config.data.resize)(example)


def inspect_run(workdir: str | os.PathLike[str], *, step: int | None = None,
                data: Mapping[str, Any] | None = None, threshold: float = 0.3,
                allow: Sequence[str] = ()) -> Inspection:
  """Opens a run, with its detections on the evaluation data.

  Those that `ppn evaluate` has written are taken; else they are made, which takes as long as it.

  Args:
    workdir: of a `ppn train` or `ppn import-tf`, local or gs://BUCKET/FOLDER.
    step: a saved step; the newest by default.
    data: entries of `data.eval` to change, such as folders that are elsewhere on this machine.
    threshold: least score of a detection that is drawn, 0 to 1.
    allow: packages or modules of your own that the run may import, see `run.open_run`.

  Raises:
    InputError: no run or checkpoint there, or bad data.
  """
  if not 0 <= threshold <= 1:
    raise InputError(f'threshold={threshold} must lie between 0 and 1')
  data = data or {}
  allow = [allow] if isinstance(allow, str) else list(allow)
  run = open_run(workdir, allow=allow + ([data['name']] if 'name' in data else []))
  if data:
    config = plain(run.config)
    config['data']['eval'] |= data
    run = dataclasses.replace(run, config=complete(config))
  job = prepare(run, Options(), lambda line: print(line, file=sys.stderr))
  step, variables = job.load(step)
  rows = None if data else _written(job.root / str(step) / 'results.json')
  if rows is not None:
    ids = file_ids(job.evaluator.source)
    rows = coco.renumber(rows, {theirs: ours for ours, theirs in ids.items()})
  else:
    job.say(f'detecting on {len(job.evaluator.source):,} images')
    rows = job.evaluator.rows(variables)
  return Inspection(job, step, variables, rows, threshold)


def _written(path: storage.Path) -> list[dict[str, Any]] | None:
  """The rows of an evaluation, if it is there and has their levels."""
  if not path.is_file():
    return None
  rows = json.loads(path.read_text())
  return rows if all('level' in row for row in rows) else None


def _image(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(pixels)


def _sheet(shown: Sequence[Shown], columns: int, otherwise: str = 'no images') -> Image.Image:
  """Pictures and their captions, so many to a row; a sentence where there are none."""
  if not shown:
    return _image(sentence(otherwise))
  return _image(mosaic([captioned(s) for s in shown], min(columns, len(shown)),
                       background=(255, 255, 255)))
