"""A trained detector in other people's programs: `ppn_jax.load(workdir_or_export)(images)`."""

import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np

from ppn_jax.data.images import decoding as image_files
from ppn_jax.detection.structures import Array, Category, Detections
from ppn_jax.errors import InputError, InputTypeError
from ppn_jax.export.runtimes import is_export
from ppn_jax.predictor import Predictor, load_predictor, open_predictor
from ppn_jax.storage import expand_home

if TYPE_CHECKING:
  import PIL.Image

# The path of an image file, a PIL image, or an array u8 [H, W, 3]; see `data.images.to_pixels`.
Image = Union[Array, str, os.PathLike[str], 'PIL.Image.Image']


class ImageDetections(NamedTuple):
  """The N detections of one image, best score first; NumPy."""
  boxes: np.ndarray  # f32 [N, 4], [ymin, xmin, ymax, xmax] in pixels of the upright image.
  scores: np.ndarray  # f32 [N], 0 to 1.
  labels: np.ndarray  # i32 [N], indices into `ImageDetector.categories`.
  names: tuple[str, ...]  # Of those classes.
  level: np.ndarray  # i32 [N], the pyramid level whose anchor made the box, 0 the finest.


@dataclasses.dataclass(frozen=True)
class ImageDetector:
  """A trained detector as a function of images; see `load`.

  Attributes:
    predictor: what it works with.
  """
  predictor: Predictor

  @property
  def categories(self) -> tuple[Category, ...]:
    """The classes (id, name), in order of label."""
    return self.predictor.categories

  @property
  def step(self) -> int | None:
    """Of the run that was trained; None if that is not known."""
    return self.predictor.step

  def __call__(self, images: Image | Iterable[Image], *, threshold: float = 0.0
               ) -> ImageDetections | list[ImageDetections]:
    """Detects objects.

    Args:
      images: one image or several, of any sizes. One is the path of a file or a PIL image, both of
        which are turned upright as EXIF says, or an array u8 [H, W, 3] RGB, [H, W, 4] RGBA or
        [H, W] grey. Several are any list, tuple, generator or other iterable of these, mixed or
        not, or an array u8 [B, H, W, 3].
      threshold: least score of what is returned, 0 to 1.

    Returns:
      The detections of an image; of several, a list in their order, [] for none.

    Raises:
      InputTypeError: a TypeError, if an image is of another type or its pixels are not uint8.
      InputError: an image that cannot be read, which is named, or a bad threshold.
    """
    if _is_several(images):
      return list(self.stream(images, threshold=threshold))
    return next(self._in_batches([(images, 'the image')], _checked(threshold)))

  def stream(self, images: Iterable[Image], *, threshold: float = 0.0
             ) -> Iterator[ImageDetections]:
    """As a call with several images, but reads and holds no more than a batch of them at a time."""
    if not _is_several(images):
      raise InputTypeError(f'images is of type {type(images).__name__}, legal: a list or another '
                           'iterable of images')
    named = ((image, f'image {number}') for number, image in enumerate(images))
    return self._in_batches(named, _checked(threshold))

  def _in_batches(self, named: Iterable[tuple[Image, str]], threshold: float
                  ) -> Iterator[ImageDetections]:
    """As `stream`, of images with what errors call them."""
    named = iter(named)
    while group := [image_files.to_pixels(*pair)
                    for pair in itertools.islice(named, self.predictor.batch_size)]:
      for image, found in zip(group, self.predictor(group), strict=True):
        yield self._in_pixels(found, image.shape[:2], threshold)

  def _in_pixels(self, found: Detections, size: tuple[int, int], threshold: float
                 ) -> ImageDetections:
    kept = found.scores >= threshold
    labels = found.labels[kept]
    return ImageDetections(
        found.boxes[kept] * np.float32([*size, *size]), found.scores[kept], labels,
        tuple(self.categories[label].name for label in labels), found.level[kept])


def load(path: str | os.PathLike[str], *, step: int | None = None, ema: bool | None = None,
         batch_size: int | None = None, allow: Sequence[str] = ()) -> ImageDetector:
  """A trained detector, ready to be called: of a run, or of a file that `ppn export` wrote.

  A run's is compiled on the first call, once, for `batch_size` images; fewer are padded. 1 answers
  soonest, more give more images a second. A file is run by its own runtime, and loading it imports
  neither models nor training; tflite and onnx not even JAX.

  Args:
    path: the workdir of a `ppn train` or `ppn import-tf`, or an exported file; of a SavedModel its
      folder.
    step: of a run: a saved step; the newest that is whole by default.
    ema: of a run: True for the moving average of the weights, False for the weights themselves;
      None for the average where the run keeps one.
    batch_size: images at a time; by default 1, or what a file takes that takes no other number.
    allow: packages or modules of your own that a run may import, such as 'my_nets', where its
      backbone, neck, head or loss is given by a dotted path. A workdir may come from anybody, so
      none are imported by default.

  Raises:
    InputError: neither there, no such checkpoint or average, a batch size below 1 or another than
      the file's, a file that is damaged, or whose runtime is not installed.
  """
  path = expand_home(os.fspath(path))
  if not is_export(path):
    if '://' not in str(path) and not os.path.exists(path):
      raise InputError(f'{os.fspath(path)}: there is neither a workdir nor an exported file')
    from ppn_jax.run import open_run  # Heavy, and not for a file.
    return ImageDetector(load_predictor(open_run(path, allow=allow), step=step, ema=ema,
                                        batch_size=1 if batch_size is None else batch_size))
  if step is not None or ema is not None:
    raise InputError(f'step and ema choose among what a run has saved; {os.fspath(path)} is an '
                     'exported file, leave them out')
  return ImageDetector(open_predictor(path, batch_size=batch_size))


def _checked(threshold: float) -> float:
  if not 0 <= threshold <= 1:
    raise InputError(f'threshold={threshold} must lie between 0 and 1')
  return threshold


def _is_several(images: Any) -> bool:
  """Returns whether a caller's images are several, rather than one or none at all."""
  if isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping, Set, io.IOBase)):
    return False
  if image_files.is_array(images):
    # A batch, or a column of paths as of a table.
    return images.ndim == 4 or (images.ndim == 1 and np.asarray(images).dtype.kind in 'OU')
  return hasattr(images, '__iter__') and not hasattr(images, 'getexif')  # As PIL's images have.
