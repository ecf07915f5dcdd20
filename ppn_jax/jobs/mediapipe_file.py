"""Writes TensorFlow Lite files for MediaPipe's ObjectDetector, and checks them in its runtime."""

import io
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ppn_jax.detection.frame import sides_of
from ppn_jax.detection.structures import Anchors, Detections
from ppn_jax.detector import Detector, Variables
from ppn_jax.errors import InputError
from ppn_jax.export import mediapipe_metadata, tensorflow
from ppn_jax.export.comparison import Tolerance, compare, is_wrong
from ppn_jax.export.formats import ANCHORS, ExportOptions, load_library
from ppn_jax.export.runtimes import open_export

# MediaPipe suppresses over all classes, at this IoU, and rounds boxes to pixels.
IOU_THRESHOLD = 0.3
_ROUNDING = 3.0  # Pixels: of the origin, and of the size after it.
_MAX_RESULTS = 100
# Further differences of boxes, and the share that may have no counterpart. Of the 256 scores of an
# integer model many are equal, and which of two such boxes suppresses the other is not defined.
_APART = {'float32': (0.0, 0.05), 'float16': (0.0, 0.05), 'int8': (0.03, 0.1)}
_SCORES = 0.01  # Largest difference of scores.
_FLOOR = 0.3  # Scores below this share of an image's best are not compared.


def check_supported(config: ConfigDict, options: ExportOptions) -> None:
  """Raises InputError if MediaPipe cannot compute what a config asks for in that precision."""
  if config.data.resize_mode != 'stretch':
    raise InputError(f'data.resize_mode={config.data.resize_mode!r}: MediaPipe stretches pictures, '
                     'and no metadata changes that; use --layout=detections or '
                     'detection_postprocess, or train with data.resize_mode=stretch')
  if config.model.score_activation != 'sigmoid' and options.precision == 'int8':
    raise InputError(f'model.score_activation={config.model.score_activation!r}: layout mediapipe '
                     'computes it in floats; use --precision=float16 or float32')


def write(path: pathlib.Path, detector: Detector, variables: Variables, options: ExportOptions,
          load_images: Callable[[], np.ndarray]) -> None:
  """Writes a file of box codes and class logits with MediaPipe's metadata.

  Args:
    path: path of the new file.
    detector: with convolutions in their native form.
    variables: NumPy arrays.
    options: options of the export.
    load_images: returns images u8 [N, S, S, 3] to calibrate 'int8' on.
  """
  sides, spec = sides_of(detector.image_size), detector.class_spec
  sigmoid = spec.activation == 'sigmoid'

  def predict(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    outputs = detector.forward_scaled(variables, x)
    if sigmoid:
      return outputs.box_codes, outputs.class_logits[..., int(spec.background):]
    scores = jnp.clip(spec.scores(outputs.class_logits), 1e-6, 1 - 1e-6)
    return outputs.box_codes, -jnp.log(1 / scores - 1)

  tensorflow.write_heads(path, predict, jax.ShapeDtypeStruct((1, *sides, 3), np.float32),
                         options, scaled_images(detector, options, load_images))
  path.write_bytes(mediapipe_metadata.add(
      path.read_bytes(), anchors=detector.anchors.boxes, num_classes=spec.num_classes,
      sigmoid=True))


def scaled_images(detector: Detector, options: ExportOptions,
                  load_images: Callable[[], np.ndarray]) -> list[np.ndarray]:
  """Returns images to calibrate 'int8' on, float32 [1, S, S, 3]; none for other precisions."""
  if options.precision != 'int8':
    return []
  scale = jax.jit(detector.network.scaled)
  return [np.asarray(scale(image[None])) for image in load_images()]


def attach_anchors(path: pathlib.Path, anchors: Anchors) -> None:
  """Adds the anchors to the archive at the end of a file."""
  stored = io.BytesIO()
  np.savez(stored, boxes=np.asarray(anchors.boxes, np.float32),
           level=np.asarray(anchors.level, np.int32))
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr(ANCHORS, stored.getvalue())


def check(path: pathlib.Path, images: np.ndarray, precision: str) -> None:
  """Runs a file in MediaPipe and compares it with the same suppression of LiteRT's predictions.

  Args:
    path: the file.
    images: u8 [N, S, S, 3].
    precision: of the file.

  Raises:
    InputError: If they differ by more than MediaPipe's rounding.
  """
  expected = open_export(path, decoder=dict(
      iou_threshold=IOU_THRESHOLD, cross_class_iou=IOU_THRESHOLD,
      max_detections=_MAX_RESULTS))(images)
  found = detect(path, images)
  boxes, missing = _APART[precision]
  tolerance = Tolerance(_ROUNDING / min(images.shape[1:3]) + boxes, _SCORES, missing, _FLOOR)
  difference = compare(expected, found, tolerance)
  if is_wrong(difference, tolerance):
    raise InputError(
        f'the written file is wrong in MediaPipe and was not kept: {difference.missing} of '
        f'{difference.detections} detections on {len(images)} images differ from those of LiteRT')


def detect(path: pathlib.Path, images: np.ndarray) -> Detections:
  """Returns the detections of a file by MediaPipe's ObjectDetector, at most 100 of an image.

  Labels are found again by name, so of classes with the same name the first is returned.
  """
  mediapipe = load_library('mediapipe', 'mediapipe')
  python = load_library('mediapipe.tasks.python', 'mediapipe')
  vision = load_library('mediapipe.tasks.python.vision', 'mediapipe')
  with zipfile.ZipFile(path) as archive:
    names = archive.read(mediapipe_metadata.LABELS).decode().split('\n')
  options = vision.ObjectDetectorOptions(
      base_options=python.BaseOptions(model_asset_path=str(path)), max_results=_MAX_RESULTS)
  count, sides = len(images), np.tile(images.shape[1:3], 2)
  found = Detections(
      *(np.zeros((count, _MAX_RESULTS, *tail), dtype) for tail, dtype in (
          ((4,), np.float32), ((), np.float32), ((), np.int32), ((), np.int32), ((), bool))))
  with tensorflow.quiet(), vision.ObjectDetector.create_from_options(options) as detector:
    for row, image in enumerate(images):
      result: Any = detector.detect(mediapipe.Image(
          image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image)))
      for k, one in enumerate(result.detections):
        box, category = one.bounding_box, one.categories[0]
        corners = np.array([box.origin_y, box.origin_x, box.origin_y + box.height,
                            box.origin_x + box.width]) / sides
        found.boxes[row, k] = np.clip(corners, 0, 1)
        found.scores[row, k] = category.score
        found.labels[row, k] = names.index(category.category_name)
        found.valid[row, k] = True
  return found
