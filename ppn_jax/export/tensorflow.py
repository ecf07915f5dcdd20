"""Writes SavedModel, TensorFlow Lite and ONNX files, all from one TensorFlow graph.

The graph consists of TensorFlow's own operations (see `tensorflow_ops`) instead of an XLA program,
so that the converters see convolutions as convolutions.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ppn_jax.detection.structures import Detections
from ppn_jax.errors import InputError
from ppn_jax.export.formats import ExportOptions, load_library

# Version of ONNX's operators, the newest that tf2onnx writes.
ONNX_OPSET = 18
# Operations that 'int8' computes in integers: the whole network except a shared predictor's batch
# norm.
_INTEGER_OPERATIONS = ('CONV_2D', 'DEPTHWISE_CONV_2D', 'MAX_POOL_2D')


def check_libraries(options: ExportOptions) -> None:
  """Raises InputError, with the install command, if a library for `options` is missing."""
  names = {'saved_model': ['tensorflow'], 'onnx': ['tensorflow', 'onnx', 'tf2onnx', 'onnxruntime'],
           'tflite': ['tensorflow', 'ai_edge_litert.interpreter']
           + ['ai_edge_quantizer.quantizer'] * (
               options.precision == 'int8' and options.layout == 'detections')}[options.format]
  with quiet():
    for name in names:
      load_library(name, options.format)
    if options.layout == 'mediapipe':
      load_library('mediapipe.tasks.python.vision', 'mediapipe')


def write(path: pathlib.Path, detect: Callable, images: jax.ShapeDtypeStruct,
          options: ExportOptions, calibration: Sequence[np.ndarray] = ()) -> None:
  """Writes `path`, which is a folder if the format is SavedModel.

  Args:
    path: path of the new file or folder.
    detect: maps images to Detections, with convolutions in their native form.
    images: shape of the input, see `stablehlo.input_shape`.
    options: options of the export.
    calibration: images u8 [B, S, S, 3] for 'int8'.

  Raises:
    InputError: If an operation has no counterpart in TensorFlow, or a library is missing.
  """
  check_libraries(options)
  function = _graph(jax.make_jaxpr(detect)(images), images, options.format)
  with quiet():
    if options.format == 'onnx':
      _write_onnx(path, function)
    elif options.format == 'saved_model':
      _save(path, function)
    else:
      path.write_bytes(_tflite(function, options, calibration))


def write_heads(path: pathlib.Path, predict: Callable, images: jax.ShapeDtypeStruct,
                options: ExportOptions, calibration: Sequence[np.ndarray] = (),
                decode: Callable | None = None) -> None:
  """Writes a TensorFlow Lite file of predictions, for a decoder outside the file.

  With 'int8' the whole network is computed in integers: the input is uint8, and the outputs are
  converted to float32 at the end.

  Args:
    path: path of the new file.
    predict: maps images to (box codes, class logits), with convolutions in their native form.
      With `decode`, scores take the place of the logits.
    images: float32 [1, S, S, 3], in [-1, 1].
    options: options of the export.
    calibration: such images, for 'int8'.
    decode: the last operation of the file, see `detection_operation`.
  """
  function = _graph(jax.make_jaxpr(predict)(images), images, options.format, ('boxes', 'logits'),
                    decode)
  import tensorflow as tf
  with quiet(), _converter(function, options) as converter:
    converter.allow_custom_ops = decode is not None
    if options.precision == 'int8':
      converter.optimizations = [tf.lite.Optimize.DEFAULT]
      converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
      converter.inference_input_type = tf.uint8
      converter.representative_dataset = lambda: ({'images': x} for x in calibration)
    path.write_bytes(converter.convert())


def _graph(closed: Any, images: jax.ShapeDtypeStruct, output_format: str,
           names: Sequence[str] = Detections._fields, then: Callable | None = None) -> Any:
  """Returns a tf.function of a closed jaxpr with names for its outputs, or those of `then`."""
  import tensorflow as tf

  from ppn_jax.export import tensorflow_ops
  batch = images.shape[0] if isinstance(images.shape[0], int) else None
  specification = tf.TensorSpec((batch, *images.shape[1:]), images.dtype, name='images')

  def by_name(images):
    outputs = tensorflow_ops.convert(closed, images, output_format)
    if then is not None:
      return then(*outputs)
    return {name: tf.identity(output, name=name) for name, output in zip(
        names, outputs, strict=True)}

  return tf.function(by_name, input_signature=[specification], autograph=False)


def _save(path: pathlib.Path, function: Any) -> None:
  import tensorflow as tf
  # Saved as a signature only: as an attribute of the module, the weights would be stored twice.
  tf.saved_model.save(tf.Module(), str(path), signatures=function.get_concrete_function())


def _tflite(function: Any, options: ExportOptions, calibration: Sequence[np.ndarray]) -> bytes:
  with _converter(function, options) as converter:
    content = converter.convert()
  return _quantized(content, calibration) if options.precision == 'int8' else content


@contextlib.contextmanager
def _converter(function: Any, options: ExportOptions) -> Iterator[Any]:
  """Yields the converter of a function to TensorFlow Lite."""
  import tensorflow as tf
  with tempfile.TemporaryDirectory() as folder:
    # Converted from a SavedModel, because otherwise inputs and outputs lose their names.
    _save(pathlib.Path(folder), function)
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if options.precision == 'float16':
      converter.optimizations = [tf.lite.Optimize.DEFAULT]
      converter.target_spec.supported_types = [tf.float16]
    yield converter


def _quantized(content: bytes, calibration: Sequence[np.ndarray]) -> bytes:
  """Quantizes the convolutions of a float model to 8-bit integers.

  Weights have a scale per channel, activations one per tensor, so that boxes and classes have
  separate ones. Decoding and NMS stay in float32.
  """
  from ai_edge_quantizer import qtyping, quantizer
  result = quantizer.Quantizer(bytearray(content))
  for name in _INTEGER_OPERATIONS:
    result.add_static_config('.*', qtyping.TFLOperationName(name), 8, 8)
  ranges: dict[str, dict[str, np.ndarray]] = {}
  for images in calibration:
    # One batch per call: over several the library would average the extremes and clip values
    # beyond them. Profiling mode, because the other reads tensors of loops that were not entered.
    found = result.calibrate({'serving_default': [{'images': images}]}, num_threads=os.cpu_count(),
                             mode=quantizer._CalibrationMode.CALIBRATION_PROFILER_BASED)
    for tensor, range_ in found.items():
      _widen(ranges.setdefault(tensor, dict(range_)), range_)
  return bytes(result.quantize(ranges).quantized_model)


def _widen(range_: dict[str, Any], other: dict[str, Any]) -> None:
  """Extends a range of activations to include another."""
  for name, extreme in (('min', np.minimum), ('max', np.maximum)):
    if name in other and name in range_:
      range_[name] = extreme(range_[name], other[name])


def _write_onnx(path: pathlib.Path, function: Any) -> None:
  import onnx
  import tf2onnx
  model, _ = tf2onnx.convert.from_function(
      function, input_signature=function.input_signature, opset=ONNX_OPSET)
  for value in (*model.graph.input, *model.graph.output):
    first = value.type.tensor_type.shape.dim[0]
    if first.dim_param:
      first.dim_param = 'batch'
  onnx.save(model, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Captures the output of converters, their C++ code included, and shows it only on failure."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as log:
    os.dup2(log.fileno(), 2)
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        yield
    except InputError:
      raise
    except BaseException:
      log.seek(0)
      os.write(kept, log.read()[-20_000:])
      raise
    finally:
      sys.stderr.flush()
      os.dup2(kept, 2)
      os.close(kept)
