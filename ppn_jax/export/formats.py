"""Export formats: what an export can be asked for, and the metadata that each file carries."""

import dataclasses
import importlib
import json
import pathlib
import zipfile
from typing import Any

from ppn_jax.detection.frame import FILL, ImageSize, InputFrame
from ppn_jax.errors import InputError, did_you_mean, install_command

# Format of another runtime -> the extra that installs its libraries.
FORMATS = {'stablehlo': 'export', 'saved_model': 'saved_model', 'tflite': 'tflite', 'onnx': 'onnx'}
WEIGHTS = 'weights'  # A file to share, see `weights_file`; it has no program in it.
PRECISIONS = ('float32', 'float16', 'int8')
# Outputs of a tflite file: detections of this package's NMS; predictions for MediaPipe (an extra of
# this name); detections of TensorFlow Lite's own operation.
LAYOUTS = ('detections', 'mediapipe', 'detection_postprocess')
ANCHORS = 'anchors.npz'  # In a tflite file of predictions.
METADATA_KEY = 'ppn_jax'  # Name of the metadata in an ONNX file.
_ONNX_START = b'\x08'  # Tag of a protocol buffer's first field.
_METADATA_IN_FOLDER = pathlib.PurePath('assets.extra', 'metadata.json')  # Of a SavedModel.


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """Options of an export.

  Attributes:
    format: one of `FORMATS`, or `WEIGHTS`.
    batch_size: images per call; None leaves it to the caller, which tflite cannot and weights do.
    precision: one of `PRECISIONS`; only tflite and weights have others than float32. 'float16'
      stores weights in half the space, 'int8' computes the convolutions in integers.
    calibration_images: number of training images from which 'int8' takes the ranges of activations.
    layout: one of `LAYOUTS`; only tflite has others than 'detections'. 'mediapipe' writes box codes
      and class logits, which MediaPipe's ObjectDetector decodes by the file's own metadata; its
      'int8' takes uint8 images and has no operation on floats. 'detection_postprocess' ends with
      the operation TFLite_Detection_PostProcess, as detectors of the TF Object Detection API.

  Raises:
    InputError: If a name is unknown, or the format does not support an option.
  """
  format: str
  batch_size: int | None = 1
  precision: str = 'float32'
  calibration_images: int = 100
  layout: str = 'detections'

  def __post_init__(self):
    if self.format not in (*FORMATS, WEIGHTS):
      raise InputError(f'unknown format {self.format!r}; '
                       f'{did_you_mean(self.format, (*FORMATS, WEIGHTS))}')
    if self.precision not in PRECISIONS:
      raise InputError(f'unknown precision {self.precision!r}; '
                       f'{did_you_mean(self.precision, PRECISIONS)}')
    if self.layout not in LAYOUTS:
      raise InputError(f'unknown layout {self.layout!r}; {did_you_mean(self.layout, LAYOUTS)}')
    if self.layout != 'detections' and self.format != 'tflite':
      raise InputError(f'layout {self.layout} is for format tflite, not {self.format}')
    if self.layout != 'detections' and self.batch_size != 1:
      raise InputError(f'batch_size={self.batch_size}: layout {self.layout} takes one image at a '
                       'time; leave it out')
    if self.format == WEIGHTS:
      if self.precision == 'int8':
        raise InputError('precision int8 is for format tflite; weights are float32 or float16')
      if self.batch_size is not None:
        raise InputError(f'batch_size={self.batch_size}: format weights has no batch size; leave '
                         'it out')
    elif self.precision != 'float32' and self.format != 'tflite':
      raise InputError(f'precision {self.precision} is for format tflite; {self.format} is written '
                       'in float32')
    if self.batch_size is None and self.format == 'tflite':
      raise InputError('format tflite has a fixed batch size; give --batch_size=N')
    if self.batch_size is not None and self.batch_size < 1:
      raise InputError(f'batch_size={self.batch_size} must be at least 1')
    if self.precision == 'int8' and self.calibration_images < 1:
      raise InputError(f'int8 is calibrated on images, so calibration_images='
                       f'{self.calibration_images} must be at least 1')


def load_library(name: str, output_format: str):
  """Imports a module of an optional library.

  Raises:
    InputError: If it cannot be imported; the message says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as e:
    what, extra = (('format', FORMATS[output_format]) if output_format in FORMATS else
                   ('layout', output_format))
    raise InputError(f'{what} {output_format} needs {name.partition(".")[0]}, which cannot be '
                     f'imported ({e}); {install_command(extra)}') from e


def make_metadata(options: ExportOptions, *, image_size: ImageSize, resize: str, labels: list[str],
                  category_ids: list[int], step: int, model: dict[str, Any],
                  resize_mode: str = 'stretch', operating_point: dict[str, Any] | None = None,
                  decoder: dict[str, Any] | None = None) -> dict[str, Any]:
  """Returns the metadata of an export: what one needs to know to use the file.

  Args:
    options: options of the export.
    image_size: S, side of the input images in pixels, or (height, width).
    resize: kernel with which images were resized in training.
    labels: class names, in order of label.
    category_ids: category ids of the data set, in order of label.
    step: step of the run.
    model: `config.model`, so that archived weights can be used again.
    resize_mode: one of `frame.RESIZE_MODES`.
    operating_point: thresholds by class and calibration, see `metrics.operating_point`; the scores
      of the file itself are not calibrated.
    decoder: options of `nms.postprocess`, for a file of layout 'mediapipe'.
  """
  described = describe_input(options.batch_size, image_size, resize, resize_mode)
  whole = 'image' if resize_mode == 'stretch' else 'input'
  if options.layout != 'detections' and options.precision != 'int8':
    described |= {'type': 'float32', 'range': [-1, 1],
                  'preprocessing': described['preprocessing'].rpartition(';')[0]
                  + '; scale by pixel / 127.5 - 1'}
  if options.layout == 'detection_postprocess':
    outputs = {
        'detection_boxes': f'float32 [1, K, 4]: ymin, xmin, ymax, xmax, 0 to 1 of the {whole}, not '
                           'clipped',
        'detection_classes': 'float32 [1, K]: index into labels',
        'detection_scores': 'float32 [1, K], 0 to 1, best first',
        'num_detections': 'float32 [1]: how many of the K there are'}
  elif options.layout == 'mediapipe':
    outputs = {
        'boxes': 'float32 [1, A, 4]: ty, tx, th, tw to the anchors, scaled by 10, 10, 5, 5',
        'logits': 'float32 [1, A, C]: the sigmoid of each is the score of a class',
        'anchors': f'{ANCHORS} in this archive: boxes [A, 4], ymin, xmin, ymax, xmax; level [A]'}
  else:
    outputs = {
        'boxes': 'float32 [batch, K, 4]: ymin, xmin, ymax, xmax, 0 to 1 of the '
                 f'{whole}, clipped',
        'scores': 'float32 [batch, K], 0 to 1, best first',
        'labels': 'int32 [batch, K]: index into labels',
        'level': 'int32 [batch, K]: pyramid level, 0 the finest',
        'valid': 'bool [batch, K]: false pads, and the other outputs are zero there'}
  return {
      'format': options.format, 'layout': options.layout, 'precision': options.precision,
      'step': step, 'input': described, 'outputs': outputs, 'decoder': decoder,
      'labels': labels, 'category_ids': category_ids, 'operating_point': operating_point,
      'model': model}


def describe_input(batch_size: int | None, image_size: ImageSize, resize: str,
                   resize_mode: str = 'stretch') -> dict[str, Any]:
  """Returns what a detector takes and how it is made from an image; see `make_metadata`."""
  frame = InputFrame.of(image_size, resize_mode)
  size = f'{frame.height}x{frame.width}'
  resizing = f'resize to {size} without keeping the aspect ratio'
  if frame.keeps_aspect:
    resizing = (f'resize by s = min({frame.height} / height, {frame.width} / width), keeping the '
                f'aspect ratio, to whole pixels at the top left of {size}; fill the rest with '
                f'{FILL}; a pixel of the input divided by s is one of the image')
  return {'name': 'images', 'type': 'uint8',
          'shape': [batch_size or 'any', frame.height, frame.width, 3],
          'colors': 'RGB', 'range': [0, 255],
          'preprocessing': f'{resizing}; scaling to [-1, 1] is inside',
          'resize': resize, 'resize_mode': resize_mode}


def write_metadata(path: pathlib.Path, metadata: dict[str, Any]) -> None:
  """Writes metadata into an exported file, or beside it if the format is stablehlo."""
  text = json.dumps(metadata, indent=2) + '\n'
  match metadata['format']:
    case 'stablehlo':
      companion_file(path).write_text(text)
    case 'saved_model':
      file = path / _METADATA_IN_FOLDER
      file.parent.mkdir(exist_ok=True)
      file.write_text(text)
    case 'tflite':
      # A zip archive at the end, as in TensorFlow Lite's own metadata: `unzip model.tflite`.
      with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('metadata.json', text)
        archive.writestr('labels.txt', '\n'.join(metadata['labels']) + '\n')
    case 'onnx':
      onnx = load_library('onnx', 'onnx')
      model = onnx.load(path)
      onnx.helper.set_model_props(model, {METADATA_KEY: text})
      onnx.save(model, path)


def companion_file(path: pathlib.Path, suffix: str = '.json') -> pathlib.Path:
  """Returns the path of the file that accompanies `path`: PATH.json, or PATH.npz."""
  return path.with_name(path.name + suffix)


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
  """Reads the metadata of an exported file.

  Raises:
    InputError: If there is no such file, or it was not written by `ppn export`.
  """
  try:
    return _check_metadata(json.loads(_metadata_text(path)))
  except FileNotFoundError as e:
    if not path.exists():
      raise InputError(f'no file {path}; give a file that `ppn export` wrote') from e
    raise InputError(f'{path}: not an export: no file {e.filename}') from e
  except InputError:
    raise
  except Exception as e:  # Parsers of other files, such as onnxruntime's, can raise anything.
    raise InputError(f'{path}: not a file of `ppn export`, or damaged: '
                     f'{" ".join(str(e).split())}') from e


def exported_format(path: pathlib.Path) -> str | None:
  """Returns the format of a file or folder that `ppn export` wrote for another runtime.

  Needs none of their libraries, so an ONNX file is known by its name. None for other files.
  """
  if path.suffix == '.onnx':
    return 'onnx' if path.is_file() else None
  try:
    return _check_metadata(json.loads(_metadata_text(path)))['format']
  except Exception:  # As in `read_metadata`.
    return None


def _check_metadata(metadata: Any) -> dict[str, Any]:
  """Checks that metadata is from `ppn export`; Keras, for one, also writes a metadata.json."""
  if not isinstance(metadata, dict) or metadata.get('format') not in FORMATS:
    raise ValueError('its metadata does not name a format of `ppn export`')
  missing = [key for key in ('step', 'input', 'labels', 'category_ids') if key not in metadata]
  if missing:
    raise ValueError(f'its metadata lacks {", ".join(missing)}')
  return metadata


def _metadata_text(path: pathlib.Path) -> str:
  if path.is_dir():
    return (path / _METADATA_IN_FOLDER).read_text()
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      return archive.read('metadata.json').decode()
  if companion_file(path).is_file():
    return companion_file(path).read_text()
  with path.open('rb') as file:
    if file.read(1) != _ONNX_START:
      raise ValueError(f'there is no {companion_file(path).name} beside it')
  session = load_library('onnxruntime', 'onnx').InferenceSession(
      path, providers=['CPUExecutionProvider'])
  return session.get_modelmeta().custom_metadata_map[METADATA_KEY]
