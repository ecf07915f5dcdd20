"""Pictures of any size in, detections in their own pixels out."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ppn_jax.data.transforms import Resize
from ppn_jax.detection.structures import Array, Category, Detections, Example
from ppn_jax.detector import Variables
from ppn_jax.errors import InputError
from ppn_jax.evaluation.job import load_variables
from ppn_jax.run import Run
from ppn_jax.training import partition


@dataclasses.dataclass(frozen=True)
class Predictor:
  """A trained detector as a function of images.

  Compiled for one batch size on the first call; fewer images are padded to it.

  Attributes:
    categories: the classes, in order of label.
    step: of the run that it was loaded from.
    batch_size: how many images go through at a time.
  """
  categories: tuple[Category, ...]
  step: int
  batch_size: int
  _detect: Callable[[Variables, Array], Detections]
  _variables: Variables
  _resize: Resize

  def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
    """RGB images u8 [H, W, 3] of any sizes -> for each its N detections, best score first.

    The fields of a result have leading axis N, without padding; boxes are 0 to 1 of the image.
    """
    results = []
    for start in range(0, len(images), self.batch_size):
      results += self._batch(images[start:start + self.batch_size])
    return results

  def _batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
    side = self._resize.size
    pixels = np.zeros((self.batch_size, side, side, 3), np.uint8)
    for row, image in enumerate(images):
      pixels[row] = self._resize(_without_truth(image)).image
    found = jax.device_get(self._detect(self._variables, pixels))
    return [Detections(*(field[row][found.valid[row]] for field in found))
            for row in range(len(images))]


def load_predictor(run: Run, *, step: int | None = None, batch_size: int = 1) -> Predictor:
  """The detector of a run's saved step, the newest by default.

  Raises:
    InputError: no such checkpoint, or a batch size below 1.
  """
  if batch_size < 1:
    raise InputError(f'batch_size={batch_size} must be at least 1')
  detector = run.detector()
  # One device: a handful of pictures does not repay splitting.
  mesh = partition.data_mesh(jax.local_devices()[:1])
  step, variables = load_variables(run, detector, mesh, step=step)
  return Predictor(run.categories, step, batch_size, jax.jit(detector.detect), variables,
                   Resize(detector.image_size, run.config.data.resize))


def _without_truth(image: np.ndarray) -> Example:
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise InputError(f'an image must be uint8 [height, width, 3], got {image.dtype} '
                     f'{list(image.shape)}')
  return Example(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool), 0,
                 image.shape[:2])
