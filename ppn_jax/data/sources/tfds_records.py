"""Finds and reads object annotations in the records of TensorFlow Datasets.

A record is a tf.Example whose features are the flattened features.json: 'objects/bbox' has all
boxes of an image in a row. It is parsed with protobuf alone, which takes a third of the time of
TFDS's own decoding and never imports TensorFlow.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.data.sources.record_images import Record
from ppn_jax.errors import InputError, install_command


class Schema(NamedTuple):
  """Names of the features that are used, '' for those that a data set lacks."""
  image: str
  bbox: str
  label: str
  crowd: str
  area: str
  image_id: str
  file_name: str
  height: str
  width: str
  classes: tuple[str, ...]


def load_tfds() -> ModuleType:
  """Imports TensorFlow Datasets, which is an optional dependency.

  Raises:
    InputError: If it is not installed.
  """
  try:
    import tensorflow_datasets
  except ImportError as e:
    raise InputError(f"TensorFlow Datasets is not installed; {install_command('tfds')}") from e
  return tensorflow_datasets


_import_lock = threading.Lock()


@contextlib.contextmanager
def without_foreign_imports() -> Iterator[None]:
  """Keeps TFDS from importing modules other than its own that a features.json names.

  TFDS would run any module that such a file names, and a data set can come from anywhere. Features
  that this process has already imported are accepted.

  Raises:
    InputError: Inside the context, if a feature is from another module.
  """
  connector = load_tfds().features.FeatureConnector
  original = vars(connector)['cls_from_name']

  def cls_from_name(cls: type, name: str) -> type:
    if name not in cls._registered_features and not str(name).startswith('tensorflow_datasets.'):
      raise InputError(f'features.json names the feature {name!r}, which is code from outside '
                       'TensorFlow Datasets and is not imported; if you trust it, import its '
                       'module first, for example in the config file')
    return original.__func__(cls, name)

  with _import_lock:
    connector.cls_from_name = classmethod(cls_from_name)
    try:
      yield
    finally:
      connector.cls_from_name = original


def sort_features(data: bytes) -> bytes:
  """Sorts the features of a serialized tf.Example by name.

  Otherwise they have the order of a hash table, which differs between processes.
  """
  return _parse_example(data).SerializeToString(deterministic=True)


def find_schema(features: Any, where: str, objects: str = '') -> Schema:
  """Finds images, boxes and classes among the features of a data set.

  Args:
    features: A tfds FeaturesDict.
    where: Name of the data set, for messages.
    objects: The sequence of boxes to use if there are several, '' for the only one.

  Raises:
    InputError: If there are none, or several.
  """
  kinds = load_tfds().features
  images = [name for name, f in features.items() if type(f) is kinds.Image]
  if len(images) != 1:
    raise InputError(f'{where}: {len(images)} features are images, needed: 1 '
                     f'({_kinds(features)})')
  found = {name: parts for name, f in features.items() if (parts := _box_parts(f, kinds))}
  if objects:
    found = {name: parts for name, parts in found.items() if name == objects}
  if len(found) != 1:
    raise InputError(f"{where}: {len(found)} features are sequences of boxes with classes"
                     f"{f' called {objects!r}' if objects else ''}, needed: 1, which the option "
                     f"objects names ({_kinds(features)})")
  (name, (bbox, label, inner)), = found.items()
  crowd = next((f'{name}/{key}' for key in ('is_crowd', 'is_difficult') if key in inner), '')
  scalars = {key: key if key in features else '' for key in (
      'image/id', 'image/filename', 'image/height', 'image/width')}
  return Schema(images[0], f'{name}/{bbox}', f'{name}/{label}', crowd,
                f'{name}/area' if 'area' in inner else '', *scalars.values(),
                tuple(inner[label].names))


def read_record(data: bytes, schema: Schema) -> Record:
  """Parses a record.

  Raises:
    ValueError: If it does not have this schema.
  """
  features = _parse(data)
  boxes = np.array(_values(features, schema.bbox), np.float32)
  labels = np.array(_values(features, schema.label), np.int64)
  crowd = np.array(_values(features, schema.crowd), bool)
  areas = np.array(_values(features, schema.area), np.float64) if schema.area else None
  if boxes.size != 4 * labels.size or (schema.crowd and crowd.shape != labels.shape) or (
      areas is not None and areas.shape != labels.shape):
    raise ValueError(f'{boxes.size} box coordinates for {labels.size} labels')
  if labels.size and not 0 <= labels.min() <= labels.max() < len(schema.classes):
    raise ValueError(f'labels from {labels.min()} to {labels.max()}, legal: 0 to '
                     f'{len(schema.classes) - 1}')
  name = _single(features, schema.file_name)
  return Record(_image(features, schema), boxes.reshape(-1, 4), labels,
                crowd if schema.crowd else np.zeros(labels.shape, bool), areas,
                _single(features, schema.image_id),
                name.decode('utf-8', 'replace') if isinstance(name, bytes) else '',
                _size(features, schema))


def read_image(data: bytes, schema: Schema) -> tuple[bytes, tuple[int, int] | None, int | None]:
  """Returns the image file, the original's (height, width) and the image id of a record."""
  features = _parse(data)
  return (_image(features, schema), _size(features, schema), _single(features, schema.image_id))


def _parse(data: bytes) -> Any:
  return _parse_example(data).features.feature


def _parse_example(data: bytes) -> Any:
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2
  try:
    return tf_example_pb2.Example.FromString(data)
  except DecodeError as e:
    raise ValueError(f'not a tf.Example: {e}') from e


def _values(features: Any, key: str) -> Sequence:
  """Returns the list of a feature, empty if there is none."""
  if not key or key not in features:
    return ()
  kind = features[key].WhichOneof('kind')
  return getattr(features[key], kind).value if kind else ()


def _single(features: Any, key: str) -> Any:
  """Returns the only value of a feature, None if the schema has no such feature."""
  if not key:
    return None
  values = _values(features, key)
  if len(values) != 1:
    raise ValueError(f'{len(values)} values of {key!r}, needed: 1')
  return values[0]


def _image(features: Any, schema: Schema) -> bytes:
  image = _single(features, schema.image)
  if not isinstance(image, bytes):
    raise ValueError(f'{schema.image!r} is no image file')
  return image


def _size(features: Any, schema: Schema) -> tuple[int, int] | None:
  size = _single(features, schema.height), _single(features, schema.width)
  if None in size:
    return None
  if not all(isinstance(side, int) and side > 0 for side in size):
    raise ValueError(f'height and width are {size}, legal: 1 and more')
  return size


def _box_parts(feature: Any, kinds: ModuleType) -> tuple[str, str, Any] | None:
  """Returns the names of boxes and classes in a sequence of objects, None for other features."""
  inner = getattr(feature, 'feature', None)
  if not isinstance(feature, kinds.Sequence) or not isinstance(inner, kinds.FeaturesDict):
    return None
  boxes = [k for k, f in inner.items() if isinstance(f, kinds.BBoxFeature)
           and getattr(f.bbox_format, 'value', None) in (None, 'REL_YXYX')]
  labels = [k for k, f in inner.items() if isinstance(f, kinds.ClassLabel)]
  labels = ['label'] if 'label' in labels else labels
  return (boxes[0], labels[0], inner) if len(boxes) == len(labels) == 1 else None


def _kinds(features: Any) -> str:
  text = ', '.join(f'{name}: {type(f).__name__}' for name, f in features.items())
  return text if len(text) <= 500 else text[:497] + '...'


def truth_name(split: str) -> str:
  """Returns the name of the file beside the shards with a split's ground truth in COCO's format."""
  return f'instances_{split}.json'


def read_beside(file: str) -> bytes | None:
  """Reads a file of a data set, local or gs://; None if it does not exist."""
  from etils import epath
  try:
    return epath.Path(file).read_bytes()
  except FileNotFoundError:
    return None
