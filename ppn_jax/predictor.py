"""Pictures of any size in, detections out."""

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

if TYPE_CHECKING:
  from ppn_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A trained detector as a function of images.

  Compiled for one batch size on the first call; fewer images are padded to it. Threads may call
  it at the same time.

  Attributes:
    categories: the classes, in order of label.
    step: of the run that it comes from; None if that is not known.
    batch_size: B, how many images go through at a time.
    resize: an image -> the side S that the detector takes.
    detect: u8 [B, S, S, 3] -> Detections.
  """
  categories: tuple[Category, ...]
  step: int | None
  batch_size: int
  resize: Resize
  detect: Callable[[np.ndarray], Detections]

  def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
    """RGB images u8 [H, W, 3] of any sizes -> for each its N detections, best score first.

    The fields of a result have leading axis N, without padding; boxes are 0 to 1 of the image.

    Raises:
      InputError: an image of another type or shape, or without pixels.
    """
    for image in images:
      _check(image)
    results = []
    for start in range(0, len(images), self.batch_size):
      results += self._batch(images[start:start + self.batch_size])
    return results

  def _batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
    side = self.resize.size
    pixels = np.zeros((self.batch_size, side, side, 3), np.uint8)
    for row, image in enumerate(images):
      pixels[row] = self.resize(unlabelled_example(image)).image
    found = Detections(*map(np.asarray, self.detect(pixels)))
    return [Detections(*(field[row][found.valid[row]] for field in found))
            for row in range(len(images))]


def load_predictor(run: 'Run', *, step: int | None = None, ema: bool | None = None,
                   batch_size: int = 1) -> Predictor:
  """The detector of a run's saved step, on one device.

  Args:
    run: to load from.
    step: a saved step; the newest that is whole by default.
    ema: True for the moving average of the weights, False for the weights themselves; None for
      the average where the run keeps one.
    batch_size: images at a time.

  Raises:
    InputError: no such checkpoint or average, or a batch size below 1.
  """
  # Not above: what serves an exported file needs neither models nor training.
  import jax

  from ppn_jax.distributed import sharding
  from ppn_jax.run import load_variables
  _check_batch_size(batch_size)
  run.check_average(ema, 'ema')
  detector = run.detector()
  # One device: a handful of pictures does not repay splitting.
  mesh = sharding.data_mesh(jax.local_devices()[:1])
  step, variables = load_variables(run, detector, mesh, step=step, ema=ema)
  return Predictor(run.categories, step, batch_size,
                   Resize(detector.image_size, run.config.data.resize),
                   functools.partial(jax.jit(detector.detect), variables))


def open_predictor(path: str | os.PathLike[str], *, batch_size: int | None = None) -> Predictor:
  """The detector in a file of `ppn export`, run by the file's own runtime.

  Args:
    path: of the file; of a SavedModel its folder.
    batch_size: images at a time; by default as many as the file takes, 1 where it takes any
      number.

  Raises:
    InputError: no such file, a damaged one, a runtime that is not installed (its extra is named),
      or another batch size than the file's.
  """
  if batch_size is not None:
    _check_batch_size(batch_size)
  exported = open_export(path)
  fixed, metadata = exported.batch_size, exported.metadata
  if fixed and batch_size not in (None, fixed):
    raise InputError(f'batch_size={batch_size}: {path} takes {fixed} images at a time; leave '
                     f'batch_size out, or export with --batch_size={batch_size}')
  categories = map(Category, metadata['category_ids'], metadata['labels'])
  return Predictor(tuple(categories), metadata['step'], fixed or batch_size or 1,
                   Resize(exported.image_size, metadata['input']['resize']), exported)


def _check_batch_size(batch_size: int) -> None:
  if not isinstance(batch_size, int) or batch_size < 1:
    raise InputError(f'batch_size={batch_size!r} must be an integer of at least 1')


def _check(image: Array) -> None:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
    raise InputError(f'an image must be uint8 [height, width, 3], got {image.dtype} '
                     f'{list(image.shape)}')

