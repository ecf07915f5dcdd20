"""Runs exported files in their own runtimes, without this package's models."""

import dataclasses
import functools
import io
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from ppn_jax.detection.frame import ImageSize, check_image_size, sides_of
from ppn_jax.detection.structures import Array, Detections
from ppn_jax.errors import InputError
from ppn_jax.export.detection_operation import detections
from ppn_jax.export.formats import ANCHORS, load_library, read_metadata
from ppn_jax.storage import local_path


@dataclasses.dataclass(frozen=True)
class ExportedDetector:
  """Exported file that is ready to run.

  Attributes:
    metadata: see `formats.make_metadata`.
  """
  metadata: dict[str, Any]
  _run: Callable[[np.ndarray], dict[str, Array]]

  @property
  def batch_size(self) -> int | None:
    """Returns the number of images per call, None for any number."""
    size = self.metadata['input']['shape'][0]
    return None if size == 'any' else size

  @property
  def image_size(self) -> ImageSize:
    """Returns the side of the images in pixels; (height, width) if they are not square."""
    return check_image_size('the input of the export', self.metadata['input']['shape'][1:3])

  def __call__(self, images: np.ndarray) -> Detections:
    """Detects objects, in batches of the size that the file takes.

    Args:
      images: u8 [B, S, S, 3], any B of at least 1.

    Returns:
      Detections, as NumPy arrays with leading axis B.

    Raises:
      InputError: If the images have another type or size, or there are none.
    """
    height, width = sides_of(self.image_size)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
      raise InputError(f'images are {images.dtype} {list(images.shape)}; this export takes uint8 '
                       f'[B, {height}, {width}, 3]')
    size = self.batch_size or len(images)
    parts = []
    for start in range(0, len(images), size):
      part = images[start:start + size]
      padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)])
      found = self._run(padded)
      parts.append([np.asarray(found[name])[:len(part)] for name in Detections._fields])
    if not parts:
      raise InputError('no images given')
    return Detections(*map(np.concatenate, zip(*parts, strict=True)))


def is_export(path: str | os.PathLike[str]) -> bool:
  """Returns whether `path` is a file or the folder of a SavedModel, rather than a run's workdir.

  The format of a file is known only once it is opened.
  """
  path = local_path(path)
  return path.is_file() or ((path / 'saved_model.pb').is_file()
                            and not (path / 'config.json').exists())


def open_export(path: str | os.PathLike[str], *, threads: int | None = None,
                decoder: dict[str, Any] | None = None) -> ExportedDetector:
  """Opens a file or folder that `ppn export` wrote.

  Args:
    path: path of the file, or of the folder of a SavedModel.
    threads: number of threads for tflite and onnx; by default the runtime chooses.
    decoder: options of `nms.postprocess` for a file of predictions, in place of its own.

  Returns:
    A detector that several threads may call at the same time.

  Raises:
    InputError: If there is no such file, it is damaged, or its runtime is not installed.
  """
  path = local_path(path)
  metadata = read_metadata(path)
  openers = {'stablehlo': _stablehlo, 'saved_model': _saved_model, 'tflite': _tflite,
             'onnx': _onnx}
  try:
    opener = openers[metadata['format']]
    if metadata.get('layout') == 'detection_postprocess':
      opener = _detection_operation
    if metadata.get('layout') == 'mediapipe':
      decoder = metadata['decoder'] if decoder is None else decoder
      opener = functools.partial(_predictions, options=decoder)
    return ExportedDetector(metadata, opener(path, threads))
  except InputError:
    raise
  except Exception as e:  # A runtime can raise anything for a damaged file.
    raise InputError(f'{path}: cannot be opened as {metadata["format"]}: '
                     f'{str(e).splitlines()[0] if str(e) else type(e).__name__}') from e


def _stablehlo(path: pathlib.Path, threads: int | None) -> Callable:
  load_library('flatbuffers', 'stablehlo')
  import jax
  exported = load_library('jax.export', 'stablehlo').deserialize(bytearray(path.read_bytes()))
  call = jax.jit(exported.call)
  return lambda images: jax.device_get(call(images))


def _saved_model(path: pathlib.Path, threads: int | None) -> Callable:
  tf = load_library('tensorflow', 'saved_model')
  loaded = tf.saved_model.load(str(path))
  detect = loaded.signatures['serving_default']
  return lambda images, keep=loaded: detect(images=tf.constant(images))


def _open_litert(path: pathlib.Path, threads: int | None) -> tuple[Any, Callable]:
  """Opens a tflite file; returns its signature, and a call of it that several threads may make."""
  library = load_library('ai_edge_litert.interpreter', 'tflite')
  interpreter = library.Interpreter(model_path=str(path), num_threads=threads)
  runner, lock = interpreter.get_signature_runner(), threading.Lock()

  def run(images: np.ndarray, keep: Any = interpreter) -> dict[str, np.ndarray]:
    with lock:  # An interpreter has only one input buffer.
      return {name: np.array(value) for name, value in runner(images=images).items()}

  return runner, run


def _tflite(path: pathlib.Path, threads: int | None) -> Callable:
  return _open_litert(path, threads)[1]


def _scaled_tflite(path: pathlib.Path, threads: int | None
                   ) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """Opens a tflite file that takes scaled images, unless it takes uint8."""
  runner, run = _open_litert(path, threads)
  if runner.get_input_details()['images']['dtype'] != np.float32:
    return run
  return lambda images: run(images * np.float32(2 / 255) - 1)


def _detection_operation(path: pathlib.Path, threads: int | None) -> Callable:
  """Opens a tflite file that ends with TensorFlow Lite's own operation."""
  predict = _scaled_tflite(path, threads)
  return lambda images: detections(predict(images))._asdict()


def _predictions(path: pathlib.Path, threads: int | None, options: dict[str, Any]) -> Callable:
  """Opens a tflite file of box codes and class logits, which are decoded here, by JAX."""
  import jax

  from ppn_jax.detection.class_logits import ClassLogitsSpec
  from ppn_jax.detection.nms import postprocess
  from ppn_jax.detection.structures import Anchors, Outputs
  with zipfile.ZipFile(path) as archive, np.load(io.BytesIO(archive.read(ANCHORS))) as stored:
    anchors = Anchors(stored['boxes'], stored['level'])
  predict = _scaled_tflite(path, threads)

  @jax.jit
  def decode(boxes: Array, logits: Array) -> Detections:
    return postprocess(Outputs(boxes, logits), anchors, **options,
                       class_spec=ClassLogitsSpec(logits.shape[-1], False, 'sigmoid'))

  def run(images: np.ndarray) -> dict[str, np.ndarray]:
    return jax.device_get(decode(**predict(images)))._asdict()

  return run


def _onnx(path: pathlib.Path, threads: int | None) -> Callable:
  library = load_library('onnxruntime', 'onnx')
  options = library.SessionOptions()
  options.log_severity_level = 3
  if threads:
    options.intra_op_num_threads = threads
  session = library.InferenceSession(path, options, providers=['CPUExecutionProvider'])
  names = [output.name for output in session.get_outputs()]
  return lambda images: dict(zip(names, session.run(None, {'images': images}), strict=True))
