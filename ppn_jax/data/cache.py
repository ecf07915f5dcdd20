"""Decoded images kept for the epochs to come, in memory or in a memory-mapped file.

Decoding is nearly all of what the input costs, so what is decoded once, reduced to about the size
that the network takes, saves it from the second epoch on.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import google_crc32c
import numpy as np

from ppn_jax import storage
from ppn_jax.data.checks import check_integer
from ppn_jax.data.images import decoding
from ppn_jax.data.source import Source, open_example
from ppn_jax.data.transforms import geometry
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError
from ppn_jax.telemetry.host_memory import available_memory

MEMORY = 'memory'
_VERSION = 2  # Of the file's layout, and of what is checked before an image is taken from it.
_ALIGNMENT = 64  # Bytes; of each image's record.


class CachedSource:
  """A source that decodes each image once and remembers its pixels, reduced; a `sources.Source`.

  Images come back reduced until their shorter side is `side`, boxes and `size` unchanged:
  `Example.size` is the original's. A network of that input size then sees a whole image nearly as
  sharp as without a cache: of COCO's images the finest detail keeps 0.95 of its amplitude along the
  shorter side and 0.9 along the longer one, which is averaged twice. Of crops it sees less, unless
  `side` is larger. An image of 640 x 480 takes 0.36 MB for a side of 300, so COCO's 118,287 take
  42 GB.

  A file serves later runs and several processes of one machine at a time; an image counts as cached
  when its checksum, written last, is right, so a run killed while it writes leaves nothing wrong
  behind. Before a process takes an image from the file for the first time, it asks the source
  whether the image is still the one that was stored: by its `stamp`, and where that is another or
  there is none, by the file's contents (`encoded`). So images that were changed or exchanged are
  decoded again, and a folder that was copied or moved is not. Of a source that has neither method
  all images are decoded once in each run. While a process runs, it keeps what it has.

  Args:
    source: of the images.
    where: 'memory', or a folder, new or that of an earlier cache of the same annotations.
    side: images are reduced until their shorter side has so many pixels, the aspect ratio kept.

  Attributes:
    categories, max_boxes, bad_boxes, contents: the source's.

  Raises:
    InputError: not enough room, with both numbers, or a folder that holds something else.
  """

  def __init__(self, source: Source, where: str, side: int):
    check_integer('data.train.cache_size', side, 1)
    self._source, self._side = source, side
    self._stamp = getattr(source, 'stamp', lambda index: b'')
    self._encoded = getattr(source, 'encoded', None)
    self._in_memory = where == MEMORY
    self.categories, self.max_boxes = source.categories, source.max_boxes
    self.bad_boxes = getattr(source, 'bad_boxes', None)
    self.contents = getattr(source, 'contents', None)
    self._header, truth = _header(source.max_boxes), source.ground_truth()
    self._starts = _starts(truth['images'], self._header.itemsize, side)
    size = int(self._starts[-1])
    self._bytes = (_allocate_memory(size, len(source)) if self._in_memory
                   else _open_folder(pathlib.Path(where), _label(source, truth, side), size))
    # What this process has seen to be right is not checked again.
    self._checked = np.zeros(len(source), bool)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    index = range(len(self))[index]
    record, pixels = self._record(index)
    if not self._checked[index]:
      whole = record['crc'] == _checksum(record, pixels)
      if not (whole and self._is_current(record, pixels, index)):
        self._store(record, pixels, index)
      self._checked[index] = True
    return _example(record, pixels)

  def ground_truth(self) -> dict[str, Any]:
    """The source's."""
    return self._source.ground_truth()

  def _record(self, index: int) -> tuple[np.void, np.ndarray]:
    """What is known of an image, and room for its pixels: u8 [N]. Views of the cache."""
    start, end = self._starts[index:index + 2]
    pixels = start + self._header.itemsize
    return self._bytes[start:pixels].view(self._header)[0], self._bytes[pixels:end]

  def _is_current(self, record: np.void, pixels: np.ndarray, index: int) -> bool:
    """Whether the source's image is still the one that was stored."""
    if self._in_memory:  # Another thread has just stored it.
      return True
    stamp = _digest(self._stamp(index))
    if any(stamp) and stamp == record['stamp'].tobytes():
      return True
    if self._encoded is None or _digest(self._encoded(index)) != record['content'].tobytes():
      return False
    _write(record, pixels, stamp=np.frombuffer(stamp, np.uint8))
    return True

  def _store(self, record: np.void, pixels: np.ndarray, index: int) -> None:
    # Before the image is read, so that one which changes meanwhile is found to have changed.
    stamp = content = b''
    if not self._in_memory:
      stamp = self._stamp(index)
      content = self._encoded(index) if self._encoded else b''
    example = self._reduced(index, len(pixels))
    image, count = example.image, len(example.boxes)
    record['crc'] = 0
    pixels[:image.size] = image.reshape(-1)
    _write(record, pixels, stamp=np.frombuffer(_digest(stamp), np.uint8),
           content=np.frombuffer(_digest(content), np.uint8),
           shape=image.shape[:2], size=example.size, image_id=example.image_id, count=count,
           boxes=_fill_up(example.boxes, record['boxes']),
           labels=_fill_up(example.labels, record['labels']),
           crowd=_fill_up(example.crowd, record['crowd']))

  def _reduced(self, index: int, room: int) -> Example:
    example = open_example(self._source, index)
    size = _reduced_size(example.image.shape[:2], self._side)
    if math.prod(size) * 3 > room:  # The source has told another size than the image has.
      factor = math.sqrt(room / 3 / math.prod(size))
      size = tuple(max(1, int(side * factor)) for side in size)
    # Of the whole decoded image, which is averaged more truly than one that is decoded reduced.
    return geometry.resize(example, *size, reduced_decoding=False)


def _reduced_size(size: Iterable[int], side: int) -> tuple[int, int]:
  """(height, width) of an image of `size` when its shorter side is reduced to `side`."""
  height, width = size
  scale = min(1.0, side / min(height, width))
  return max(1, round(height * scale)), max(1, round(width * scale))


def _header(max_boxes: int) -> np.dtype:
  """What is known of one image, with its truth."""
  boxes = max(max_boxes, 1)
  return np.dtype([
      ('crc', 'u4'), ('stamp', 'u1', 16), ('content', 'u1', 16), ('shape', 'i4', 2),
      ('size', 'i4', 2), ('image_id', 'i8'), ('count', 'i4'), ('boxes', 'f4', (boxes, 4)),
      ('labels', 'i4', boxes), ('crowd', '?', boxes)])


def _starts(images_of_truth: list[dict[str, Any]], header: int, side: int) -> np.ndarray:
  """i64 [N + 1]: where each image's record begins, and where the last one ends, in bytes."""
  # A pixel more in each direction, since an image that was stored smaller may round otherwise.
  pixels = [math.prod(length + 1 for length in _reduced_size((i['height'], i['width']), side))
            for i in images_of_truth]
  lengths = header + 3 * np.array(pixels, np.int64)
  return np.concatenate([[0], np.cumsum(-(-lengths // _ALIGNMENT) * _ALIGNMENT)])


def _example(record: np.void, pixels: np.ndarray) -> Example:
  height, width = record['shape'].tolist()
  count = int(record['count'])
  # The pixels are a view: transforms change nothing in place.
  image = pixels[:height * width * 3].reshape(height, width, 3)
  return Example(image, record['boxes'][:count].copy(), record['labels'][:count].copy(),
                 record['crowd'][:count].copy(), int(record['image_id']),
                 tuple(record['size'].tolist()))


def _write(record: np.void, pixels: np.ndarray, **values: Any) -> None:
  """Writes fields of a record, and its checksum last."""
  record['crc'] = 0
  for name, value in values.items():
    record[name] = value
  record['crc'] = _checksum(record, pixels)


def _fill_up(values: np.ndarray, like: np.ndarray) -> np.ndarray:
  filled = np.zeros_like(like)
  filled[:len(values)] = values
  return filled


def _checksum(record: np.void, pixels: np.ndarray) -> int:
  """Of all that is used of a record; 0, which a fresh one holds, stands for none."""
  height, width = record['shape'].tolist()
  used = height * width * 3
  if not 0 < used <= pixels.size or not 0 <= record['count'] <= len(record['labels']):
    return -1
  crc = google_crc32c.value(record.tobytes()[4:])
  return google_crc32c.extend(crc, pixels[:used].tobytes()) or 1


def _digest(data: bytes) -> bytes:
  """16 bytes that stand for any others; zeros for none."""
  return hashlib.blake2b(data, digest_size=16).digest() if data else bytes(16)


def _allocate_memory(size: int, count: int) -> np.ndarray:
  there = available_memory()
  if size > there:
    raise InputError(f'data.train.cache={MEMORY!r} needs up to {size / 1e9:.1f} GB for {count:,} '
                     f'images, but {there / 1e9:.1f} GB are available; give a folder, or a smaller '
                     'data.train.cache_size')
  return np.zeros(size, np.uint8)  # The kernel hands out pages as they are written.


def _label(source: Source, truth: dict[str, Any], side: int) -> dict[str, Any]:
  """All that decides what is in a folder, but for the images' contents."""
  text = json.dumps(truth, sort_keys=True)
  return {'version': _VERSION, 'decoding': decoding.DECODING, 'cache_size': side,
          'images': len(source), 'max_boxes': source.max_boxes,
          'data': hashlib.sha256(text.encode()).hexdigest()}


def _open_folder(folder: pathlib.Path, about: dict[str, Any], size: int) -> np.ndarray:
  """The bytes of a folder's cache: a view of its file, u8 [size]."""
  label, pixels = folder / 'cache.json', folder / 'images.bin'
  if label.exists():
    _check_label(label, about)
  elif folder.is_dir() and any(folder.iterdir()):
    raise InputError(f'data.train.cache={str(folder)!r} is not empty and no cache; '
                     'give a new folder')
  folder.mkdir(parents=True, exist_ok=True)
  if not pixels.exists() or pixels.stat().st_size != size:
    _allocate(pixels, size)
  storage.write_text(label, json.dumps(about, indent=2) + '\n')
  return np.asarray(np.memmap(pixels, np.uint8, 'r+', shape=size))


def _check_label(label: pathlib.Path, about: dict[str, Any]) -> None:
  try:
    there = json.loads(label.read_text())
    different = [key for key, value in about.items() if there.get(key) != value]
  except (OSError, ValueError, AttributeError) as e:
    raise InputError(f'{label}: cannot be read: {e}; delete the folder or give another') from e
  if different and different[0] in ('version', 'decoding'):
    raise InputError(f'{label.parent} holds a cache that another version of ppn_jax made, by other '
                     'rules; delete it or give another data.train.cache')
  if different:
    key = different[0]
    raise InputError(f'{label.parent} holds a cache of something else: {key} is '
                     f'{there.get(key)!r} there and {about[key]!r} here; delete it or give another '
                     'data.train.cache')


def _allocate(path: pathlib.Path, size: int) -> None:
  """A file of zeros with its room on the disk: a full one would kill who writes to the mapping."""
  free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
  if size > free:
    raise InputError(f'data.train.cache={str(path.parent)!r} needs {size / 1e9:.1f} GB, but the '
                     f'disk has {free / 1e9:.1f} GB left; give another, or a smaller '
                     'data.train.cache_size')
  with open(path, 'wb') as f:
    f.truncate(size)
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(f.fileno(), 0, size)

