"""TFRecord files of the TF Object Detection API with a label map, read without TensorFlow."""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, check_on_bad_example
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.label_map import ordered_categories, parse_items
from ppn_jax.data.sources.annotations import (
  check_choices,
  check_paths,
  number_images,
  quote,
  reader_pool,
)
from ppn_jax.data.sources.record_images import NOTHING, Record, RecordImages
from ppn_jax.data.sources.tf_example import (
  Span,
  Values,
  index_records,
  mapped,
  masked_crc,
  parse_example,
)
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

_BOX = 'image/object/bbox/'


class _Place(NamedTuple):
  """Where a record's image is."""
  path: str
  record: Span
  image: Span


class TfRecords(RecordImages):
  """TFRecord files as the TF Object Detection API's `create_..._tf_record.py` write them.

  The features are image/encoded and image/object/bbox/{ymin, xmin, ymax, xmax} in 0 to 1, with
  image/object/class/label (the ids of the label map) or class/text (its names); image/filename,
  source_id, height, width and object/{is_crowd, group_of, difficult, area} are used if they exist.
  Groups and difficult objects count as crowds, which are ignored in training and scoring.

  The files are read once to index them. Checksums of all lengths are compared then, and that of a
  record when its image is read. Image ids are the numbers of source_id if all have one and no two
  the same, else those of `annotations.number_images`.

  Args:
    records: The files: one, several, or a pattern such as 'train.record-*'.
    label_map: The label map, .pbtxt, which also gives the category ids; '' takes the names in
      class/text, in alphabetical order.
    on_bad_box: For boxes that are not finite, have no area or are outside their image. 'clip' cuts
      those that extend beyond the edge and keep half of their area, and raises for the others;
      'drop' leaves the others out; 'raise' raises for all.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    on_bad_example: For records that cannot be read: 'raise', or 'skip' until they are indexed. What
      follows a damaged length cannot be found; it counts as the number of records of average size.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for files that do not exist or are damaged and for wrong records;
      by indexing, for an image that cannot be decoded.
  """

  def __init__(self, records: str | Sequence[str], label_map: str = '', on_bad_box: str = 'clip',
               duplicates: str = 'merge', on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    paths = _list_files(records)
    check_paths('tf_records', label_map=label_map or paths[0])
    classes = _read_label_map(os.fspath(label_map)) if label_map else None
    with reader_pool() as pool:
      shards = list(pool.map(lambda path: _read_shard(path, on_bad_example), paths))
    entries = [entry for shard in shards for entry in shard]
    if not entries:
      raise InputError(f'{paths[0]}: no records' + (
          '' if len(paths) == 1 else f', and none in the {len(paths) - 1} other files'))
    if classes is None:
      names = sorted({name for e in entries for name in e.texts})
      if not names:
        raise InputError(f'{paths[0]}: class/text is empty, so the classes need '
                         'tf_records.label_map, a .pbtxt file')
      classes = [(number, (name,)) for number, name in enumerate(names, start=1)]
    self.categories = ordered_categories([(n, names[-1]) for n, names in classes], label_map)
    labels = _Labels(self.categories, classes, with_ids=bool(label_map))
    read, unreadable = [], {}
    for i, entry in enumerate(entries):
      why = entry.error or labels.error_of(entry)
      if why:
        if on_bad_example == 'raise':
          raise InputError(f'{why}; {SKIP_IMAGES}')
        unreadable[i] = why
        read.append(NOTHING._replace(file_name=entry.name))
        continue
      read.append(Record(b'', entry.boxes, labels.of(entry), entry.crowd, entry.areas,
                         None, entry.name, entry.size))
    self._places = [entry.place for entry in entries]
    if any(record.areas is None for record in read):
      read = [record._replace(areas=None) for record in read]
    self._take(read, _number(entries), [e.where for e in entries], on_bad_box=on_bad_box,
               duplicates=duplicates, unreadable=unreadable)

  def encoded(self, index: int) -> bytes:
    """Returns the bytes of the image file in a record, whose checksum is compared."""
    place, name = self._places[index], self._images.files[index]
    if place is None:
      raise InputError(f'{name}: cannot be read')
    path, record, image = place
    try:
      with open(path, 'rb') as file:
        file.seek(record.start)
        data = file.read(record.end - record.start + 4)
    except OSError as e:
      raise InputError(f'{name}: cannot be read: {e.strerror}') from e
    content, checksum = data[:-4], data[-4:]
    if len(data) != record.end - record.start + 4 or (
        masked_crc(content) != int.from_bytes(checksum, 'little')):
      raise InputError(f'{name}: its checksum is wrong, or the file has changed since it was read')
    return content[image.start - record.start:image.end - record.start]

  def stamp(self, index: int) -> bytes:
    """Returns the stamp of the file and the place of the record; see `OptionalMembers`."""
    place = self._places[index]
    stamp = place and image_files.stamp(place.path)
    return repr((stamp, place.image)).encode() if stamp else b''


class _Entry(NamedTuple):
  """What a record says, before the classes are known."""
  where: str
  name: str = ''
  error: str = ''
  place: _Place | None = None
  source_id: str = ''
  size: tuple[int, int] | None = None
  boxes: np.ndarray = NOTHING.boxes
  ids: np.ndarray = NOTHING.labels
  texts: tuple[str, ...] = ()
  crowd: np.ndarray = NOTHING.crowd
  areas: np.ndarray | None = None


class _Labels:
  """Finds the labels of a record by id or, where there are none, by name."""

  def __init__(self, categories: Sequence[Category], classes: list[tuple[int, tuple[str, ...]]],
               *, with_ids: bool):
    self._by_id = {c.id: k for k, c in enumerate(categories)} if with_ids else {}
    self._by_name = {name: k for k, c in enumerate(categories)
                     for number, names in classes if number == c.id for name in names}

  def of(self, entry: _Entry) -> np.ndarray:
    """Returns i64 [N]."""
    if self._by_id and len(entry.ids):
      return np.array([self._by_id[i] for i in entry.ids.tolist()], np.int64)
    return np.array([self._by_name[name] for name in entry.texts], np.int64)

  def error_of(self, entry: _Entry) -> str:
    """Returns what is wrong with the classes of a record, '' if nothing is."""
    by_id = self._by_id and len(entry.ids)
    given, known = ((entry.ids.tolist(), self._by_id) if by_id else
                    (list(entry.texts), self._by_name))
    if len(given) != len(entry.boxes):
      return (f'{entry.where}: {len(entry.boxes)} boxes, but {len(entry.ids)} entries of '
              f'class/label and {len(entry.texts)} of class/text')
    wrong = [value for value in given if value not in known]
    return (f'{entry.where}: class {quote(wrong[0])} is not in the label map, which has '
            f'{quote(sorted(known))}' if wrong else '')


def _list_files(records: str | Sequence[str]) -> list[str]:
  """Returns the paths that `records` stands for.

  Raises:
    InputError: If there are none.
  """
  written = list(records) if isinstance(records, (list, tuple)) else [records]
  paths: list[str] = []
  for pattern in written:
    check_paths('tf_records', records=pattern)
    pattern = os.fspath(pattern)
    if pattern.startswith('gs://'):
      raise InputError(f'tf_records.records={pattern}: legal: local files; copy them, or turn them '
                       'into shards that can be read from a bucket with `ppn prepare`')
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not found:
      raise InputError(f'no files {pattern!r}')
    paths += [path for path in found if path not in paths]
  _check_complete(paths)
  return paths


def _check_complete(paths: Sequence[str]) -> None:
  """Raises InputError if files are called NAME-00000-of-00010 and some of them are missing."""
  sets: dict[tuple[str, int], set[int]] = {}
  for path in paths:
    if shard := re.fullmatch(r'(.*)-([0-9]{5})-of-([0-9]{5})', path):
      sets.setdefault((shard[1], int(shard[3])), set()).add(int(shard[2]))
  for (name, total), found in sets.items():
    missing = sorted(set(range(total)).difference(found))
    if missing and len(found) > 1:  # One file alone may be meant as a sample.
      raise InputError(f'{len(missing)} of the {total} files {name}-*-of-{total:05} are missing, '
                       f'such as {name}-{missing[0]:05}-of-{total:05}; name those to use one by '
                       'one if that is intended' if len(found) < total - 1 else
                       f'{name}-{missing[0]:05}-of-{total:05} is missing')


def _read_label_map(path: str) -> list[tuple[int, tuple[str, ...]]]:
  """Returns (id, names) of each class, of which the last name is to be shown."""
  try:
    items = parse_items(image_files.read(path).decode())
  except ValueError as e:  # Also an error of decoding; InputErrors are passed on as they are.
    if isinstance(e, InputError):
      raise
    raise InputError(f'{path}: not a label map (.pbtxt): {e}') from e
  return [(number, tuple(n for n in (name, shown) if n) or ('',)) for number, name, shown in items]


def _read_shard(path: str, on_bad_example: str) -> list[_Entry]:
  """Reads the annotations of all records of a file.

  Raises:
    InputError: If the file is damaged, unless 'skip' accepts it.
  """
  with mapped(path) as data:
    spans, damage = index_records(data, path)
    entries = [_read_entry(data, span, path, i) for i, span in enumerate(spans)]
    if damage and on_bad_example == 'raise':
      raise InputError(f'{damage}; copy the file again; {SKIP_IMAGES}')
    if damage:
      read = spans[-1].end + 4 if spans else 0
      lost = max(1, round((len(data) - read) / max(read, 1) * len(spans)))
      entries += [_Entry(f'{path}: record {len(spans) + i}', f'record {len(spans) + i}',
                         f'{damage} (record {len(spans) + i})') for i in range(lost)]
  return entries


def _read_entry(data: memoryview, span: Span, path: str, number: int) -> _Entry:
  """Reads one record; its `error` says what is wrong."""
  where = f'{path}: record {number}'
  try:
    features = parse_example(data, span)
    # Encoders that write one empty value for a missing text are common.
    text = lambda key: [bytes(data[a:b]).decode('utf-8', 'replace') for a, b in _bytes(
        features, key)]
    name = next(iter(text('image/filename')), '') or f'record {number}'
    images = _bytes(features, 'image/encoded')
    if len(images) != 1 or images[0][0] == images[0][1]:
      raise ValueError('no image in image/encoded')
    place = _Place(path, span, Span(*images[0]))
    columns = [_numbers(features, _BOX + side) for side in ('ymin', 'xmin', 'ymax', 'xmax')]
    if len({len(c) for c in columns}) > 1:
      raise ValueError(f'{[len(c) for c in columns]} values of ymin, xmin, ymax and xmax')
    boxes = np.stack(columns, axis=-1).astype(np.float32)
    crowd = np.zeros(len(boxes), bool)
    for flag in ('is_crowd', 'group_of', 'difficult'):
      values = _numbers(features, f'image/object/{flag}')
      if len(values) not in (0, len(boxes)):
        raise ValueError(f'{len(values)} values of object/{flag} for {len(boxes)} boxes')
      crowd |= values.astype(bool) if len(values) else False
    areas = _numbers(features, 'image/object/area')
    size = [_numbers(features, f'image/{side}').tolist() for side in ('height', 'width')]
    if not all(len(s) == 1 and s[0] >= 1 for s in size):
      image = bytes(data[place.image.start:place.image.end])
      size = [[side] for side in image_files.stored_size(image, where)]
    return _Entry(
        f'{where} ({name})', name, '', place, next(iter(text('image/source_id')), ''),
        (int(size[0][0]), int(size[1][0])), boxes,
        _numbers(features, 'image/object/class/label').astype(np.int64),
        tuple(text('image/object/class/text')), crowd,
        areas.astype(np.float64) if len(areas) == len(boxes) else None)
  except ValueError as e:  # Also an InputError of an image's header.
    return _Entry(where, f'record {number}', f'{where}: cannot be read: {e}')


def _bytes(features: dict[str, Values], key: str) -> list[tuple[int, int]]:
  values = features.get(key, [])
  if not isinstance(values, list) and len(values):
    raise ValueError(f'{key!r} has numbers instead of texts')
  return list(values)  # An empty list of any type.


def _numbers(features: dict[str, Values], key: str) -> np.ndarray:
  values = features.get(key, [])
  if isinstance(values, list):
    if values:
      raise ValueError(f'{key!r} has texts instead of numbers')
    return np.zeros(0)
  return values


def _number(entries: Sequence[_Entry]) -> np.ndarray:
  """Returns image ids, i64 [N]."""
  ids = [int(e.source_id) if re.fullmatch('[0-9]{1,18}', e.source_id) else -1 for e in entries]
  known = [i for i in ids if i >= 0]
  readable = sum(not e.error for e in entries)
  if readable and len(known) == readable == len(set(known)):  # Those that cannot be read follow.
    free = iter(range(max(known) + 1, max(known) + 1 + len(ids)))
    return np.array([i if i >= 0 else next(free) for i in ids], np.int64)
  return number_images([e.name for e in entries])
