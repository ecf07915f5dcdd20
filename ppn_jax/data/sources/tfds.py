"""Data sets in TensorFlow Datasets' format, read from ArrayRecord files without TensorFlow."""

import functools
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, check_on_bad_example
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.data.sources import coco_json, scans, tfds_records
from ppn_jax.data.sources.annotations import (
  check_choices,
  check_paths,
  join,
  join_findings,
  join_names,
  number_images,
  reader_pool,
)
from ppn_jax.data.sources.coco import read_boxes, read_file
from ppn_jax.data.sources.record_images import NOTHING, Record, RecordImages
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, install_command


class Tfds(RecordImages):
  """Split of a TFDS data set with the features of object detection.

  Images are one feature, and objects are a sequence with a BBoxFeature and a ClassLabel. The
  features is_crowd or is_difficult, area, image/id and image/filename are used if they exist. TFDS
  numbers classes from 0 without gaps, so category ids are 1 .. C in that order (COCO's own ids are
  lost). Image ids are image/id, else those of `annotations.number_images`. As boxes are normalised
  and in float32, `ground_truth` has pixels with rounding errors.

  Data of `ppn prepare` comes with its ground truth, so ids and boxes are those of the original data
  and the records need not be read at the start. Other data sets, and slices of their splits, are
  read completely when the source is built; `ppn train` does so once, for all processes and later
  starts. If splits that are joined, as by 'train+eval', have ids
  in common, images are numbered from 1 in their order.

  Args:
    dataset: TFDS's name, such as 'coco/2017' or 'voc/2007:5.0.0', below `data_dir`; '' if
      `data_dir` is itself the folder with dataset_info.json.
    split: A split, a slice of one, or several of them, such as 'train', 'validation[:500]' or
      'train+validation[500:]'.
    data_dir: A local folder or gs://; '' is TFDS's own default.
    on_bad_box: For boxes that are not finite, have no area or are outside their image. 'clip' cuts
      those that extend beyond the edge and keep half of their area, and raises for the others;
      'drop' leaves the others out; 'raise' raises for all.
    objects: The feature with the objects, if there are several candidates.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    on_bad_example: For records that cannot be read and images without a size: 'raise', or 'skip'
      until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for data that does not exist, has other features or is not in
      ArrayRecord files, and for wrong records; by indexing, for an image that cannot be decoded.
  """

  def __init__(self, dataset: str = '', split: str = 'train', data_dir: str = '',
               on_bad_box: str = 'clip', objects: str = '', duplicates: str = 'merge',
               on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_paths('tfds', **({'dataset': dataset} if dataset else {'data_dir': data_dir}))
    builder = _find_builder(dataset, os.fspath(data_dir))
    self._where = f'{builder.data_dir}: {split}'
    self._schema = tfds_records.find_schema(builder.info.features, self._where, objects)
    self._records = _open_split(builder, split)
    self._parts = _read_parts(builder, split)
    self._shards = [os.fspath(path) for name, _, _ in self._parts
                    for path in builder.info.splits[name].filepaths]
    if not self._read_beside(builder, on_bad_box, duplicates):
      self._scan(on_bad_box, duplicates, on_bad_example)

  def encoded(self, index: int) -> bytes:
    """Returns the bytes of the image file in a record."""
    return self._stored(index)[0]

  def stamp(self, index: int) -> bytes:
    """Returns the stamp of all shards together; see `OptionalMembers`."""
    return self._stamp

  @functools.cached_property
  def _stamp(self) -> bytes:
    stamps = [_stamp(path) for path in self._shards]
    return repr((self._where, stamps)).encode() if all(stamps) else b''

  def _pixels(self, index: int, size: tuple[int, int]) -> LazyImage:
    data, _, image_id = self._stored(index)
    name = self._images.files[index]
    if image_id not in (None, self._record_ids[index]):
      raise InputError(f'{name} has the id {image_id}, but its ground truth says '
                       f'{self._record_ids[index]}; prepare the data again')
    stored = image_files.stored_size(data, name)
    # An image that was stored smaller was turned at that time and has no annotated size.
    if sorted(stored) != sorted(size):
      size = stored
    return image_files.open_image(data, name=name, size=size)

  def _stored(self, index: int) -> tuple[bytes, tuple[int, int] | None, int | None]:
    index = range(len(self))[index]
    return self._parse(index, tfds_records.read_image)

  def _parse(self, index: int, parse: Any) -> Any:
    try:
      return parse(self._records[index], self._schema)
    except (ValueError, RuntimeError, OSError, IndexError) as e:
      raise InputError(f'{self._where}: record {index}: cannot be read: '
                       f'{" ".join(str(e).split())}') from e

  def _read_beside(self, builder: Any, on_bad_box: str, duplicates: str) -> bool:
    """Takes the ground truth that `ppn prepare` wrote; returns False if there is none."""
    read = []
    for name, first, last in self._parts:
      file = f'{builder.data_dir}/{tfds_records.truth_name(name)}'
      text = tfds_records.read_beside(file)
      if text is None:
        return False
      beside = read_file(file, str(builder.data_dir), coco_json.parse(text, file))
      self.categories = beside.categories
      kept = np.zeros(len(beside.images.ids), bool)
      kept[first:last] = True
      read.append(read_boxes(beside, kept, self.categories, on_bad_box=on_bad_box))
    columns = join([columns for columns, _ in read])
    if (tuple(c.name for c in self.categories) != self._schema.classes
        or len(columns.images.ids) != len(self._records)):
      raise InputError(f'{self._where}: the ground truth has '
                       f'{len(columns.images.ids)} images and {len(self.categories)} classes, the '
                       f'records have {len(self._records)} and {len(self._schema.classes)}; '
                       'prepare the data again')
    images = columns.images._replace(ids=self._distinct(columns.images.ids))
    self._set_data(columns._replace(images=images),
                   join_findings([findings for _, findings in read]), duplicates=duplicates,
                   no_boxes='without objects')
    return True

  def _distinct(self, ids: np.ndarray) -> np.ndarray:
    """Returns the records' ids, or new ones if joined splits have some in common.

    Raises:
      InputError: If an id is repeated within a split.
    """
    self._record_ids = ids
    ends = np.cumsum([last - first for _, first, last in self._parts])
    for part in np.split(ids, ends[:-1]):
      if len(np.unique(part)) < len(part):
        raise InputError(f'{self._where}: {self._schema.image_id or "image/id"} is not unique')
    return ids if len(np.unique(ids)) == len(ids) else np.arange(1, len(ids) + 1)

  def _scan(self, on_bad_box: str, duplicates: str, on_bad_example: str) -> None:
    """Takes the annotations from the records themselves."""
    self.categories = tuple(
        Category(i, name) for i, name in enumerate(self._schema.classes, 1))

    def key() -> str:  # Without a stamp the files may still change, so no other has this key.
      stamp = hashlib.sha256(self._stamp).hexdigest() if self._stamp else f'{time.time_ns()}'
      return repr((self._where, self._schema, on_bad_example, len(self._records), stamp))

    read, unreadable = scans.scanned(key, lambda: self._read_all(on_bad_example))
    names = [record.file_name for record in read]
    ids = self._distinct(self._number(read, names))
    self._take(read, ids, [f'{self._where}: {name}' for name in names], on_bad_box=on_bad_box,
               duplicates=duplicates, unreadable=unreadable)

  def _read_all(self, on_bad_example: str) -> scans.Scan:
    """Reads the annotations of all records."""
    unreadable = {}

    def read_one(index: int) -> Record:
      record = None
      try:
        record = self._parse(index, tfds_records.read_record)
        name = record.file_name or f'record {index}'
        size = record.size or image_files.stored_size(record.image, f'{self._where}: {name}')
      except InputError as e:
        if on_bad_example == 'raise':
          raise InputError(f'{e}; {SKIP_IMAGES}') from e
        unreadable[index], name, size = str(e), f'record {index}', None
      return (record or NOTHING)._replace(image=b'', file_name=name, size=size)

    with reader_pool() as pool:
      return scans.Scan(list(pool.map(read_one, range(len(self._records)))), unreadable)

  def _number(self, read: Sequence[Record], names: list[str]) -> np.ndarray:
    """Returns image ids, i64 [N]; records that cannot be read get the next free ones."""
    if not self._schema.image_id:
      return number_images(names) if self._schema.file_name else np.arange(1, len(read) + 1)
    known = [record.image_id for record in read if record.image_id is not None]
    free = iter(range(max(known, default=0) + 1, max(known, default=0) + 1 + len(read)))
    return np.array([next(free) if record.image_id is None else record.image_id
                     for record in read], np.int64)


def _find_builder(dataset: str, data_dir: str) -> Any:
  """Finds the builder of a prepared data set, whose own code is not needed."""
  tfds = tfds_records.load_tfds()
  from tensorflow_datasets.core import read_only_builder
  _check_remote(data_dir)
  try:
    with tfds_records.without_foreign_imports():
      if not dataset:
        return tfds.builder_from_directory(data_dir)
      return read_only_builder.builder_from_files(dataset, data_dir=data_dir or None)
  except InputError as e:
    raise InputError(f'tfds {dataset or data_dir!r}: {e}') from e
  except Exception as e:  # A wrong name or folder leads to exceptions of any type.
    if not dataset:
      raise InputError(f'tfds.data_dir {data_dir!r}: no data set there: {_line(e)}; give the '
                       'folder with dataset_info.json, or the name as `dataset`') from e
    raise InputError(
        f'tfds.dataset {dataset!r} is not prepared in {data_dir or "the default data_dir"}: make '
        'it with `ppn prepare`, or with TensorFlow and `tfds build '
        f'{dataset} --file_format=array_record`; {_line(e)}') from e


def _check_remote(data_dir: str) -> None:
  if data_dir.startswith('gs://'):
    try:
      import gcsfs  # noqa: F401
    except ImportError as e:
      raise InputError(f"tfds.data_dir {data_dir}: gcsfs is not installed; "
                       f"{install_command('tfds')}") from e


def _open_split(builder: Any, split: str) -> Any:
  """Returns random access to the bytes of the records of a split."""
  tfds = tfds_records.load_tfds()
  if not isinstance(split, str) or not split:
    raise InputError(f'tfds.split is {split!r}, legal: {join_names(list(builder.info.splits))}')
  try:
    return builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES).data_source
  except NotImplementedError as e:
    raise InputError(f'{builder.data_dir} has no ArrayRecord files; make them with `tfds '
                     f'convert_format --dataset_version_dir={builder.data_dir} '
                     '--out_file_format=array_record`') from e
  except Exception as e:  # The split's name is wrong, or a shard is missing or damaged.
    raise InputError(f'{builder.data_dir}: split {split!r} cannot be read: {_line(e)} (splits: '
                     f'{join_names(list(builder.info.splits))})') from e


def _stamp(path: str) -> bytes:
  """Returns the stamp of a file, also in a bucket; see `decoding.stamp`."""
  if '://' not in path:
    return image_files.stamp(path)
  from etils import epath
  stat = epath.Path(path).stat()
  return repr((path, stat.length, stat.mtime)).encode()


def _read_parts(builder: Any, split: str) -> list[tuple[str, int, int]]:
  """Returns the slices of a split: name, first and last + 1 of the records.

  Raises:
    InputError: If two of them overlap.
  """
  tfds, parts = tfds_records.load_tfds(), []
  for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits):
    first = part.from_ or 0
    last = builder.info.splits[part.splitname].num_examples if part.to is None else part.to
    for name, from_, to in parts:
      if name == part.splitname and max(first, from_) < min(last, to):
        raise InputError(f'{builder.data_dir}: split {split!r} names records of {name!r} twice')
    parts.append((part.splitname, first, max(first, last)))
  return parts


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return text if len(text) <= 300 else text[:297] + '...'
