"""Public Python interface of a trained detector: `ppn_jax.load(workdir_or_file)(images)`."""

import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np

from ppn_jax import zoo
from ppn_jax.data.images import decoding as image_files
from ppn_jax.detection.structures import Array, Category, Detections
from ppn_jax.detection.tiles import check_tiles, merge_tiles, tile_windows
from ppn_jax.errors import InputError, InputTypeError
from ppn_jax.export.runtimes import is_export
from ppn_jax.export.weights_file import is_weights_file
from ppn_jax.predictor import Predictor, load_predictor, open_predictor
from ppn_jax.storage import expand_home
from ppn_jax.tracking import FRAMES_PER_SECOND, Tracker

if TYPE_CHECKING:
  import PIL.Image

# The path of an image file, a PIL image, or an array u8 [H, W, 3]; see `data.images.to_pixels`.
Image = Union[Array, str, os.PathLike[str], 'PIL.Image.Image']


class ImageDetections(NamedTuple):
  """Detections of one image as NumPy arrays, N of them, highest score first.

  Fields:
    boxes: f32 [N, 4], [ymin, xmin, ymax, xmax] in pixels of the upright image.
    scores: f32 [N], 0 to 1.
    labels: i32 [N], indices into `ImageDetector.categories`.
    names: N class names.
    level: i32 [N], pyramid level of the anchor that the box comes from, 0 the finest.
    track_ids: i32 [N], ids of the objects in a video, see `ImageDetector.stream`; None for images.
  """
  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  level: np.ndarray
  track_ids: np.ndarray | None = None

  @property
  def xyxy(self) -> np.ndarray:
    """Returns the boxes as most other libraries have them, f32 [N, 4]: xmin, ymin, xmax, ymax."""
    return self.boxes[:, [1, 0, 3, 2]]

  def at_least(self, thresholds: float | np.ndarray) -> 'ImageDetections':
    """Returns the detections with a score of at least a threshold, or that of their class [C]."""
    kept = self.scores >= (thresholds if np.ndim(thresholds) == 0
                           else np.asarray(thresholds)[self.labels])
    names = tuple(name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep)
    return ImageDetections(self.boxes[kept], self.scores[kept], self.labels[kept], names,
                           self.level[kept],
                           None if self.track_ids is None else self.track_ids[kept])

  def tracked_by(self, tracker: Tracker) -> 'ImageDetections':
    """Returns the detections of the next frame of a video with the ids of their objects."""
    return self._replace(track_ids=tracker.update(self.boxes, self.scores, self.labels))


@dataclasses.dataclass(frozen=True)
class ImageDetector:
  """Trained detector as a function of images; see `load`.

  Attributes:
    predictor: the detector that is called on batches of arrays.
  """
  predictor: Predictor

  @property
  def categories(self) -> tuple[Category, ...]:
    """Returns the classes (id, name), in order of label."""
    return self.predictor.categories

  @property
  def step(self) -> int | None:
    """Returns the step of the run that it comes from, None if unknown."""
    return self.predictor.step

  @property
  def thresholds(self) -> dict[str, float] | None:
    """Returns the best threshold of each class by name, None if none are kept with the detector.

    `ppn evaluate` and the evaluation in training find them.
    """
    point = self.predictor.point
    return None if point is None else dict(zip(point.names, point.thresholds, strict=True))

  def thresholds_by_label(self, threshold: float | None, default: float = 0.0) -> np.ndarray:
    """Returns the least score of a detection of each class, f32 [C].

    Args:
      threshold: one for all classes, 0 to 1; None for the best of each class.
      default: instead of those, if none are kept with the detector.

    Raises:
      InputError: If the threshold is not in 0 to 1.
    """
    if threshold is None and self.predictor.point is not None:
      return np.float32(self.predictor.point.thresholds)
    value = default if threshold is None else threshold
    if not 0 <= value <= 1:
      raise InputError(f'threshold={value} must lie between 0 and 1')
    return np.full(len(self.categories), value, np.float32)

  def __call__(self, images: Image | Iterable[Image], *, threshold: float | None = None,
               tiles: int = 1, overlap: float = 0.2) -> ImageDetections | list[ImageDetections]:
    """Detects objects.

    Args:
      images: one image or several, of any sizes. An image is the path of a file or a PIL image,
        both of which are rotated as their EXIF data says, or an array u8 [H, W, 3] RGB, [H, W, 4]
        RGBA or [H, W] grey. Several images are a list, tuple, generator or other iterable of
        these, mixed or not, or an array u8 [B, H, W, 3].
      threshold: lowest score of a detection that is returned, 0 to 1. By default the best of its
        class, see `thresholds`; if there are none, all detections are returned.
      tiles: number of tiles along the longer side, in which small objects are found as well as in
        the whole picture; 1 is the picture alone. See `tiles.tile_windows`.
      overlap: share of a tile that it has in common with the next, 0 to 0.5. Objects that are
        larger than that are found in the whole picture.

    Returns:
      The detections of the image, or for several images a list in their order.

    Raises:
      InputTypeError: A TypeError, if an image has another type or its pixels are not uint8.
      InputError: If an image cannot be read, or an option is out of range.
    """
    if _is_several(images):
      return list(self.stream(images, threshold=threshold, tiles=tiles, overlap=overlap))
    check_tiles(tiles, overlap)
    return next(self._in_batches([(images, 'the image')], self.thresholds_by_label(threshold),
                                 tiles, overlap))

  def stream(self, images: Iterable[Image], *, threshold: float | None = None, tiles: int = 1,
             overlap: float = 0.2, track: bool = False,
             frames_per_second: float = FRAMES_PER_SECOND) -> Iterator[ImageDetections]:
    """Detects objects in several images, reading no more than one batch of them at a time.

    Args:
      images: the images, as for `__call__`.
      threshold: see `__call__`.
      tiles: see `__call__`.
      overlap: see `__call__`.
      track: whether the images are the frames of one video, in order. Detections then have
        `track_ids`, numbers from 1 on that objects keep from frame to frame. An object that is not
        detected keeps its number for a second.
      frames_per_second: rate of the frames, for `track`.

    Raises:
      InputTypeError, InputError: As `__call__`, or if the extra `track` is not installed.
    """
    check_tiles(tiles, overlap)
    if not _is_several(images):
      raise InputTypeError(f'images is of type {type(images).__name__}; give a list or another '
                           'iterable of images')
    named = ((image, f'image {number}') for number, image in enumerate(images))
    thresholds = self.thresholds_by_label(threshold)
    if not track:
      return self._in_batches(named, thresholds, tiles, overlap)
    tracker = Tracker(thresholds, frames_per_second)
    return (found.tracked_by(tracker).at_least(thresholds)
            for found in self._in_batches(named, tracker.lowest, tiles, overlap))

  def _in_batches(self, named: Iterable[tuple[Image, str]], thresholds: np.ndarray, tiles: int,
                  overlap: float) -> Iterator[ImageDetections]:
    """Detects objects in images that are given with their names for error messages."""
    named = iter(named)
    if tiles > 1:
      for pair in named:
        yield self._in_tiles(image_files.to_pixels(*pair), thresholds, tiles, overlap)
      return
    while group := [image_files.to_pixels(*pair)
                    for pair in itertools.islice(named, self.predictor.batch_size)]:
      for image, found in zip(group, self.predictor(group), strict=True):
        yield self._in_pixels(found, image.shape[:2], thresholds)

  def _in_tiles(self, image: np.ndarray, thresholds: np.ndarray, tiles: int, overlap: float
                ) -> ImageDetections:
    size = image.shape[:2]
    windows = tile_windows(size, tiles, overlap)
    found = self.predictor([image[top:bottom, left:right]
                            for top, left, bottom, right in windows.tolist()])
    return self._in_pixels(merge_tiles(found, windows, size, len(self.categories)), size,
                           thresholds)

  def _in_pixels(self, found: Detections, size: tuple[int, int], thresholds: np.ndarray
                 ) -> ImageDetections:
    kept = found.scores >= thresholds[found.labels]
    labels = found.labels[kept]
    return ImageDetections(
        found.boxes[kept] * np.float32([*size, *size]), found.scores[kept], labels,
        tuple(self.categories[label].name for label in labels), found.level[kept])


def load(path: str | os.PathLike[str], *, step: int | None = None, ema: bool | None = None,
         batch_size: int | None = None, matmul_dtype: str | None = None,
         allow: Sequence[str] = ()) -> ImageDetector:
  """Loads a trained detector from a run, or from a file that `ppn export` wrote.

  The detector of a run or of a weights file is compiled on the first call for `batch_size` images,
  and fewer are padded. A batch size of 1 has the lowest latency; larger ones process more images
  per second. Other exported files are executed by their own runtimes. Loading them imports neither
  models nor training, and for tflite and onnx not even JAX.

  Args:
    path: the workdir of `ppn train` or `ppn import-tf`, a weights file (.safetensors), another
      exported file, the folder of a SavedModel, or the name of a model that comes with the
      package, such as 'ppn_voc'.
    step: for a run: a saved step; the newest intact one by default.
    ema: for a run: True for the moving average of the weights, False for the weights themselves;
      None for the average if the run keeps one.
    batch_size: number of images that are processed at a time; by default that of the file, or 1.
    matmul_dtype: for a run or weights file: 'bfloat16' rounds the numbers that large matrix
      products multiply, which is faster on CPUs with instructions for it, 'auto' does so on those
      alone, 'same' never; None is what the config says.
    allow: packages or modules of your own that a run or weights file may import, such as
      'my_nets', if its backbone, neck, head or loss is given by a dotted path. None are imported
      by default, because it may come from anyone.

  Raises:
    InputError: If the path does not exist, there is no such checkpoint or average, the batch size
      is below 1 or differs from the file's, the file is damaged, or its runtime is not installed.
  """
  path = zoo.find(expand_home(os.fspath(path)))
  one = 1 if batch_size is None else batch_size
  if is_weights_file(path):
    # Imported here, as below, because other files do not need it.
    from ppn_jax.trained_model import open_weights_file
    return ImageDetector(load_predictor(open_weights_file(path, allow=allow), step=step, ema=ema,
                                        batch_size=one, matmul_dtype=matmul_dtype))
  if not is_export(path):
    if '://' not in path and not os.path.exists(path):
      raise InputError(f'{path} is neither a workdir nor an exported file{zoo.suggestion(path)}')
    from ppn_jax.run import open_run
    return ImageDetector(load_predictor(open_run(path, allow=allow), step=step, ema=ema,
                                        batch_size=one, matmul_dtype=matmul_dtype))
  if step is not None or ema is not None:
    raise InputError(f'step and ema choose a checkpoint of a run, but {path} is an exported file; '
                     'leave them out')
  if matmul_dtype is not None:
    raise InputError(f'matmul_dtype={matmul_dtype} is for runs and weights files, but {path} is an '
                     'exported file, whose types are fixed; leave it out')
  return ImageDetector(open_predictor(path, batch_size=batch_size))


def _is_several(images: Any) -> bool:
  """Returns whether `images` is a collection of images rather than one image or another type."""
  if isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping, Set, io.IOBase)):
    return False
  if image_files.is_array(images):
    # A batch of images, or an array of paths.
    return images.ndim == 4 or (images.ndim == 1 and np.asarray(images).dtype.kind in 'OU')
  return hasattr(images, '__iter__') and not hasattr(images, 'getexif')  # Of PIL images.
