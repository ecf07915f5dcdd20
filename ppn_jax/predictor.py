"""Detection on images of any size, by a run's checkpoint, a weights file or an exported file."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Array, Category, Detections, unlabelled_example
from ppn_jax.errors import InputError
from ppn_jax.export.runtimes import open_export
from ppn_jax.metrics import operating_point
from ppn_jax.metrics.operating_point import OperatingPoint

if TYPE_CHECKING:
  from ppn_jax.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True)
class Predictor:
  """Trained detector as a function of images.

  It is compiled for one batch size on the first call, and fewer images are padded. Several threads
  may call it at the same time.

  Attributes:
    categories: the classes, in order of label.
    step: step of the run that it comes from; None if unknown.
    batch_size: B, number of images that are processed at a time.
    resize: resizes an image to the side S that the detector takes.
    detect: maps u8 [B, S, S, 3] to Detections, with boxes 0 to 1 of this input.
    point: thresholds, and the calibration that scores are returned with; None if none are kept.
  """
  categories: tuple[Category, ...]
  step: int | None
  batch_size: int
  resize: Resize
  detect: Callable[[np.ndarray], Detections]
  point: OperatingPoint | None = None

  def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
    """Detects objects in images.

    Args:
      images: RGB images u8 [H, W, 3] of any sizes.

    Returns:
      For each image its N detections, highest score first. The fields have leading axis N, without
      padding; boxes are 0 to 1 of the image.

    Raises:
      InputError: If an image has another type or shape, or no pixels.
    """
    for image in images:
      _check(image)
    results = []
    for start in range(0, len(images), self.batch_size):
      results += self._batch(images[start:start + self.batch_size])
    return results

  def _batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
    frame = self.resize.frame
    pixels = np.zeros((self.batch_size, frame.height, frame.width, 3), np.uint8)
    for row, image in enumerate(images):
      pixels[row] = self.resize(unlabelled_example(image)).image
    found = Detections(*map(np.asarray, self.detect(pixels)))
    in_pictures = (
        frame.in_pictures(Detections(*(field[row] for field in found)), np.array(image.shape[:2]))
        for row, image in enumerate(images))
    each = [Detections(*(field[one.valid] for field in one)) for one in in_pictures]
    return each if self.point is None else [self.point.calibrated(one) for one in each]


def load_predictor(model: 'TrainedModel', *, step: int | None = None, ema: bool | None = None,
                   batch_size: int = 1, matmul_dtype: str | None = None) -> Predictor:
  """Loads the detector of a run's saved step or of a weights file, on one device.

  Args:
    model: the run or file, see `run.open_model`.
    step: for a run: a saved step; the newest intact one by default.
    ema: for a run: True for the moving average of the weights, False for the weights themselves;
      None for the average if the run keeps one.
    batch_size: number of images that are processed at a time.
    matmul_dtype: see `models.layers.LayerPolicy`; None for that of the model's config.

  Raises:
    InputError: If there is no such checkpoint or average, the batch size is below 1, or a file does
      not fit its own config.
  """
  # Imported here because serving an exported file needs neither models nor training.
  import jax

  from ppn_jax.distributed import sharding
  _check_batch_size(batch_size)
  model.check_average(ema, 'ema')
  detector = model.detector(matmul_dtype=matmul_dtype)
  # One device, because splitting a few images over several does not pay off.
  mesh = sharding.data_mesh(jax.local_devices()[:1])
  step, variables = model.load_variables(detector, mesh, step=step, ema=ema)
  data = model.config.data
  return Predictor(model.categories, step, batch_size,
                   Resize(detector.image_size, data.resize, resize_mode=data.resize_mode),
                   functools.partial(jax.jit(detector.detect), variables),
                   model.operating_point(step, ema=ema))


def open_predictor(path: str | os.PathLike[str], *, batch_size: int | None = None) -> Predictor:
  """Opens the detector in a file of `ppn export`, which its own runtime executes.

  Args:
    path: path of the file, or of the folder of a SavedModel.
    batch_size: number of images that are processed at a time; by default the file's, or 1 if the
      file takes any number.

  Raises:
    InputError: If there is no such file, it is damaged, its runtime is not installed, or it has
      another batch size.
  """
  if batch_size is not None:
    _check_batch_size(batch_size)
  exported = open_export(path)
  fixed, metadata = exported.batch_size, exported.metadata
  described = metadata['input']
  if fixed and batch_size not in (None, fixed):
    raise InputError(f'batch_size={batch_size}: {path} takes {fixed} images at a time; leave '
                     f'batch_size out, or export with --batch_size={batch_size}')
  categories = map(Category, metadata['category_ids'], metadata['labels'])
  try:
    point = operating_point.parse(metadata.get('operating_point'), metadata['labels'])
  except ValueError as e:
    raise InputError(f'{path}: its thresholds are damaged: {e}; export it again') from e
  resize = Resize(exported.image_size, described['resize'],
                  resize_mode=described.get('resize_mode', 'stretch'))
  return Predictor(tuple(categories), metadata['step'], fixed or batch_size or 1, resize, exported,
                   point)


def _check_batch_size(batch_size: int) -> None:
  if not isinstance(batch_size, int) or batch_size < 1:
    raise InputError(f'batch_size={batch_size!r} must be an integer of at least 1')


def _check(image: Array) -> None:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
    raise InputError(f'an image must be uint8 [height, width, 3], got {image.dtype} '
                     f'{list(image.shape)}')
