"""Writes TensorFlow Lite files that end with its own operation for decoding and suppression."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from ppn_jax.detection.frame import sides_of
from ppn_jax.detector import Detector, Variables
from ppn_jax.errors import InputError
from ppn_jax.export import tensorflow
from ppn_jax.export.detection_operation import detection_operation, with_outputs_in_order
from ppn_jax.export.formats import ExportOptions
from ppn_jax.jobs.mediapipe_file import scaled_images


def check_supported(config: ConfigDict, options: ExportOptions) -> None:
  """Raises InputError if the operation cannot compute what a config asks for."""
  across = config.postprocess.cross_class_iou
  if across < 1:
    raise InputError(f'postprocess.cross_class_iou={across}: layout {options.layout} suppresses '
                     'within a class only; use --layout=detections')
  if config.model.score_activation != 'sigmoid' and options.precision == 'int8':
    raise InputError(f'model.score_activation={config.model.score_activation!r}: layout '
                     f'{options.layout} computes it in floats; use --precision=float16 or float32')


def write(path: pathlib.Path, detector: Detector, variables: Variables, options: ExportOptions,
          config: ConfigDict, load_images: Callable[[], np.ndarray]) -> None:
  """Writes a file of detections.

  Args:
    path: path of the new file.
    detector: with convolutions in their native form.
    variables: NumPy arrays.
    options: options of the export.
    config: the config; its block `postprocess` becomes the operation's attributes.
    load_images: returns images u8 [N, S, S, 3] to calibrate 'int8' on.
  """
  sides, spec = sides_of(detector.image_size), detector.class_spec

  def predict(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    outputs = detector.forward_scaled(variables, x)
    return outputs.box_codes, spec.scores(outputs.class_logits)

  tensorflow.write_heads(
      path, predict, jax.ShapeDtypeStruct((1, *sides, 3), np.float32), options,
      scaled_images(detector, options, load_images),
      detection_operation(detector.anchors.boxes, spec.num_classes, config.postprocess))
  path.write_bytes(with_outputs_in_order(path.read_bytes()))
