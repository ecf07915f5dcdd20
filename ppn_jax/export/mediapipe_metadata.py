"""Metadata by which MediaPipe's ObjectDetector reads a TensorFlow Lite file of raw predictions.

The schema is that of MediaPipe Tasks, `metadata_schema.fbs` and
`object_detector_metadata_schema.fbs`. Its package has the classes; its own writer cannot be
imported (1.2 lacks a compiled module), and takes thousands of Python objects for the anchors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppn_jax.detection.boxes import CODE_SCALES
from ppn_jax.detection.structures import Array
from ppn_jax.export import tflite_operations as tflite
from ppn_jax.export.formats import load_library

LABELS = 'labels.txt'  # File at the end of the TFLite file, see `formats.write_metadata`.
_DETECTOR = 'DETECTOR_METADATA'  # Name by which MediaPipe finds anchors and decoding.
_KEY = 'TFLITE_METADATA'
_MEAN = _STD = 127.5
_PARSER = '1.5.0'  # Version of the schema that has the custom metadata of a subgraph.


def add(content: bytes, *, anchors: Array, num_classes: int, sigmoid: bool) -> bytes:
  """Returns a TensorFlow Lite file with the metadata of a detector without post-processing.

  Args:
    content: of a file with one input, images, and two outputs, box codes [1, A, 4] and class
      values [1, A, C], in any order.
    anchors: [A, 4].
    num_classes: C.
    sigmoid: whether class values are logits; otherwise they are scores.

  Raises:
    InputError: If mediapipe is not installed.
  """
  model = tflite.unpack(content)
  metadata = tflite.pack(_metadata(model, anchors, num_classes, sigmoid), b'M001')
  buffer, entry = tflite.schema().BufferT(), tflite.schema().MetadataT()
  buffer.data = np.frombuffer(metadata, np.uint8)
  entry.name, entry.buffer = _KEY, len(model.buffers)
  model.buffers.append(buffer)
  model.metadata = [*(m for m in model.metadata or () if _text(m.name) != _KEY), entry]
  return tflite.pack(model)


def _text(name: Any) -> str:
  return name.decode() if isinstance(name, bytes) else name


def _metadata(model: Any, anchors: Array, num_classes: int, sigmoid: bool) -> Any:
  schema = load_library('mediapipe.tasks.metadata.metadata_schema_py_generated', 'mediapipe')
  subgraph = model.subgraphs[0]
  described, described.name = schema.ModelMetadataT(), 'ObjectDetector'
  described.minParserVersion = _PARSER
  parts = schema.SubGraphMetadataT()
  parts.inputTensorMetadata = [_image(schema)]
  parts.outputTensorMetadata = [
      _location(schema) if subgraph.tensors[at].shape[-1] == 4 and not _is_scores(
          subgraph.tensors[at]) else _score(schema) for at in subgraph.outputs]
  custom = schema.CustomMetadataT()
  custom.name = _DETECTOR
  options = tflite.pack(_options(anchors, num_classes, sigmoid), b'V001')
  custom.data = np.frombuffer(options, np.uint8)
  parts.customMetadata = [custom]
  described.subgraphMetadata = [parts]
  return described


def _is_scores(tensor: Any) -> bool:
  """Returns whether an output of four columns is that of four classes."""
  return _text(tensor.name).endswith(':1')


def _image(schema: Any) -> Any:
  tensor, tensor.name = schema.TensorMetadataT(), 'image'
  tensor.content, unit = schema.ContentT(), schema.ProcessUnitT()
  tensor.content.contentPropertiesType = schema.ContentProperties.ImageProperties
  tensor.content.contentProperties = schema.ImagePropertiesT()
  tensor.content.contentProperties.colorSpace = schema.ColorSpaceType.RGB
  unit.optionsType, unit.options = (schema.ProcessUnitOptions.NormalizationOptions,
                                    schema.NormalizationOptionsT())
  unit.options.mean, unit.options.std = [_MEAN], [_STD]
  tensor.processUnits = [unit]
  return tensor


def _location(schema: Any) -> Any:
  tensor, tensor.name = schema.TensorMetadataT(), 'location'
  tensor.content = schema.ContentT()
  tensor.content.contentPropertiesType = schema.ContentProperties.BoundingBoxProperties
  tensor.content.contentProperties = box = schema.BoundingBoxPropertiesT()
  box.type, box.coordinateType = (schema.BoundingBoxType.BOUNDARIES, schema.CoordinateType.RATIO)
  box.index = [1, 0, 3, 2]  # Of left, top, right and bottom in a row.
  return tensor


def _score(schema: Any) -> Any:
  tensor, tensor.name = schema.TensorMetadataT(), 'score'
  tensor.content = schema.ContentT()
  tensor.content.contentPropertiesType = schema.ContentProperties.FeatureProperties
  tensor.content.contentProperties = schema.FeaturePropertiesT()
  labels = schema.AssociatedFileT()
  labels.name, labels.type = LABELS, schema.AssociatedFileType.TENSOR_AXIS_LABELS
  tensor.associatedFiles = [labels]
  return tensor


def _options(anchors: Array, num_classes: int, sigmoid: bool) -> Any:
  schema = load_library('mediapipe.tasks.metadata.object_detector_metadata_schema_py_generated',
                        'mediapipe')
  placed = []
  for ymin, xmin, ymax, xmax in np.asarray(anchors, np.float64).tolist():
    anchor = schema.FixedAnchorT()
    anchor.xCenter, anchor.yCenter = (xmin + xmax) / 2, (ymin + ymax) / 2
    anchor.width, anchor.height = xmax - xmin, ymax - ymin
    placed.append(anchor)
  options, ssd, fixed = (schema.ObjectDetectorOptionsT(), schema.SsdAnchorsOptionsT(),
                         schema.FixedAnchorsSchemaT())
  fixed.anchors, ssd.fixedAnchorsSchema, options.ssdAnchorsOptions = placed, fixed, ssd
  decoding = schema.TensorsDecodingOptionsT()
  decoding.numClasses, decoding.numBoxes, decoding.numCoords = num_classes, len(placed), 4
  decoding.keypointCoordOffset, decoding.numKeypoints, decoding.numValuesPerKeypoint = 0, 0, 2
  decoding.yScale, decoding.xScale, decoding.hScale, decoding.wScale = CODE_SCALES
  decoding.applyExponentialOnBoxSize, decoding.sigmoidScore = True, sigmoid
  options.tensorsDecodingOptions = decoding
  return options


def output_names(content: bytes) -> Sequence[str]:
  """Returns the names of the outputs of a file, in order."""
  subgraph = tflite.unpack(content).subgraphs[0]
  return [_text(subgraph.tensors[at].name) for at in subgraph.outputs]
