"""Cache of decoded images for later epochs, in memory or in a memory-mapped file.

Decoding is nearly all of the cost of the input. Images that are decoded once and reduced to about
the size of the network's input save it from the second epoch on.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any, cast

import google_crc32c
import numpy as np

from ppn_jax import storage
from ppn_jax.data.checks import check_integer
from ppn_jax.data.contents import Contents
from ppn_jax.data.images import decoding
from ppn_jax.data.source import OptionalMembers, Source, encoded_of, open_example, stamp_of
from ppn_jax.data.transforms import geometry
from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError
from ppn_jax.telemetry.host_memory import available_memory

MEMORY = 'memory'
_PIXELS = 'images.bin'
_VERSION = 2  # Increases if the file's layout changes, or the checks before an image is taken.
_ALIGNMENT = 64  # Bytes; each image's record starts at a multiple of it.


def cache_source(source: Source, where: str = '', size: int = 0, *,
                 image_size: ImageSize) -> Source:
  """Adds a cache of decoded images to a source.

  Args:
    source: The source of the images.
    where: 'memory', or a folder, in which later runs find the decoded images too; '' for no cache.
    size: Shorter side of cached images in pixels; 0 is that of the network's input.
    image_size: Side of the network's input in pixels, or (height, width).

  Returns:
    A `CachedSource`, or `source` itself if `where` is ''.

  Raises:
    InputError: If `size` is negative, there is not enough room, or the folder holds something else.
  """
  check_integer('data.cache.size', size, 0)
  if not where:
    return source
  return CachedSource(source, storage.expand_home(where), size or max(sides_of(image_size)))


class CachedSource:
  """Source that decodes each image once and keeps its pixels at a reduced size.

  The shorter side of a reduced image is `side`, or its own if that is smaller. Boxes and
  `Example.size`, which is the size of the original, do not change. A network with this input size
  sees a whole image nearly as sharp as without a cache: in COCO's images the finest detail keeps
  0.95 of its amplitude along the shorter side and 0.9 along the longer one, which is averaged
  twice. Crops lose more, unless `side` is larger. An image of 640 x 480 takes 0.36 MB for a side of
  300, so COCO's 118,287 take 42 GB.

  A file serves later runs and several processes of one machine at a time. An image counts as cached
  if its checksum, which is written last, is correct, so a run killed while it writes does no harm.
  Before a process takes an image from the file for the first time, it asks the source whether the
  image is still the stored one: by its `stamp` and, if that differs or is missing, by the contents
  of the file (`encoded`). Changed images are therefore decoded again, but a folder that was copied
  or moved is not. If the source has neither method, every run decodes all images once.

  Args:
    source: The source of the images.
    where: 'memory', or a folder, new or with a cache of the same annotations.
    side: Shorter side of reduced images in pixels; the aspect ratio is kept.

  Attributes:
    categories, max_boxes, contents: Those of the source.

  Raises:
    InputError: If there is not enough room or the folder holds something else.
  """

  def __init__(self, source: Source, where: str, side: int):
    check_integer('data.cache.size', side, 1)
    self._source, self._side = cast(OptionalMembers, source), side
    self._stamp: Callable[[int], bytes] = stamp_of(source) or (lambda index: b'')
    self._encoded = encoded_of(source)
    self._in_memory = where == MEMORY
    self.categories, self.max_boxes = source.categories, source.max_boxes
    self._header, truth = _record_dtype(source.max_boxes), source.ground_truth()
    self._starts = _record_starts(truth['images'], self._header.itemsize, side)
    size = int(self._starts[-1])
    self._file = pathlib.Path(where) / _PIXELS
    self._bytes = (_allocate_memory(size, len(source)) if self._in_memory
                   else _open_folder(pathlib.Path(where), _label(source, truth, side), size))
    # Images that this process has checked already.
    self._checked = np.zeros(len(source), bool)

  def __getstate__(self) -> dict[str, Any]:
    """Leaves out the images, since another process opens the file."""
    if self._in_memory:
      raise TypeError('a cache in memory belongs to one process')
    return {k: v for k, v in vars(self).items() if k not in ('_bytes', '_stamp', '_encoded')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._stamp = stamp_of(self._source) or (lambda index: b'')
    self._encoded = encoded_of(self._source)
    self._bytes = _map(self._file, int(self._starts[-1]))

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

  @property
  def contents(self) -> Contents | None:
    """See `OptionalMembers`."""
    return self._source.contents

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth of the source."""
    return self._source.ground_truth()

  def _record(self, index: int) -> tuple[np.void, np.ndarray]:
    """Returns views of an image's record and of the room for its pixels, u8 [N]."""
    start, end = self._starts[index:index + 2]
    pixels = start + self._header.itemsize
    return self._bytes[start:pixels].view(self._header)[0], self._bytes[pixels:end]

  def _is_current(self, record: np.void, pixels: np.ndarray, index: int) -> bool:
    """Returns whether the source's image is still the stored one."""
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
    # Before the image is read, so that a change in the meantime is noticed.
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
    if math.prod(size) * 3 > room:  # The image is larger than its ground truth says.
      factor = math.sqrt(room / 3 / math.prod(size))
      size = tuple(max(1, int(side * factor)) for side in size)
    # Averaging the whole decoded image is more accurate than decoding at a reduced size.
    return geometry.resize(example, *size, reduced_decoding=False)


def _reduced_size(size: Iterable[int], side: int) -> tuple[int, int]:
  """Returns (height, width) of an image of `size` if its shorter side is reduced to `side`."""
  height, width = size
  scale = min(1.0, side / min(height, width))
  return max(1, round(height * scale)), max(1, round(width * scale))


def _record_dtype(max_boxes: int) -> np.dtype:
  """Returns the type of an image's record, which has its annotations."""
  boxes = max(max_boxes, 1)
  return np.dtype([
      ('crc', 'u4'), ('stamp', 'u1', 16), ('content', 'u1', 16), ('shape', 'i4', 2),
      ('size', 'i4', 2), ('image_id', 'i8'), ('count', 'i4'), ('boxes', 'f4', (boxes, 4)),
      ('labels', 'i4', boxes), ('crowd', '?', boxes)])


def _record_starts(images: list[dict[str, Any]], header: int, side: int) -> np.ndarray:
  """Returns the start of each image's record and the end of the last, in bytes, i64 [N + 1]."""
  # One pixel more in each direction, since an image that was stored smaller may round differently.
  pixels = [math.prod(length + 1 for length in _reduced_size((i['height'], i['width']), side))
            for i in images]
  lengths = header + 3 * np.array(pixels, np.int64)
  return np.concatenate([[0], np.cumsum(-(-lengths // _ALIGNMENT) * _ALIGNMENT)])


def _example(record: np.void, pixels: np.ndarray) -> Example:
  height, width = record['shape'].tolist()
  count = int(record['count'])
  # The pixels are a view, since transforms change nothing in place.
  image = pixels[:height * width * 3].reshape(height, width, 3)
  return Example(image, record['boxes'][:count].copy(), record['labels'][:count].copy(),
                 record['crowd'][:count].copy(), int(record['image_id']),
                 tuple(record['size'].tolist()))


def _write(record: np.void, pixels: np.ndarray, **values: Any) -> None:
  """Writes fields of a record, then its checksum."""
  record['crc'] = 0
  for name, value in values.items():
    record[name] = value
  record['crc'] = _checksum(record, pixels)


def _fill_up(values: np.ndarray, like: np.ndarray) -> np.ndarray:
  filled = np.zeros_like(like)
  filled[:len(values)] = values
  return filled


def _checksum(record: np.void, pixels: np.ndarray) -> int:
  """Computes the checksum of a record and its pixels; never 0, which an empty record holds."""
  height, width = record['shape'].tolist()
  used = height * width * 3
  if not 0 < used <= pixels.size or not 0 <= record['count'] <= len(record['labels']):
    return -1
  crc = google_crc32c.value(record.tobytes()[4:])
  return google_crc32c.extend(crc, pixels[:used].tobytes()) or 1


def _digest(data: bytes) -> bytes:
  """Returns a digest of 16 bytes; zeros for no data."""
  return hashlib.blake2b(data, digest_size=16).digest() if data else bytes(16)


def _allocate_memory(size: int, count: int) -> np.ndarray:
  available = available_memory()
  if size > available:
    raise InputError(f'data.cache.where={MEMORY!r} needs up to {size / 1e9:.1f} GB for {count:,} '
                     f'images, but {available / 1e9:.1f} GB are available; give a folder, or a '
                     'smaller data.cache.size')
  return np.zeros(size, np.uint8)  # The kernel hands out pages as they are written.


def _label(source: Source, truth: dict[str, Any], side: int) -> dict[str, Any]:
  """Returns everything but the images that decides what is in a folder."""
  text = json.dumps(truth, sort_keys=True)
  return {'version': _VERSION, 'decoding': decoding.DECODING, 'cache_size': side,
          'images': len(source), 'max_boxes': source.max_boxes,
          'data': hashlib.sha256(text.encode()).hexdigest()}


def _open_folder(folder: pathlib.Path, about: dict[str, Any], size: int) -> np.ndarray:
  """Opens or creates the cache of a folder; returns a view of its file, u8 [size]."""
  label, pixels = folder / 'cache.json', folder / _PIXELS
  if label.exists():
    _check_label(label, about)
  elif folder.is_dir() and any(folder.iterdir()):
    raise InputError(f'data.cache.where={str(folder)!r} is not empty and holds no cache; '
                     'give a new folder')
  folder.mkdir(parents=True, exist_ok=True)
  if not pixels.exists() or pixels.stat().st_size != size:
    _allocate(pixels, size)
  storage.write_text(label, json.dumps(about, indent=2) + '\n')
  return _map(pixels, size)


def _map(path: pathlib.Path, size: int) -> np.ndarray:
  return np.asarray(np.memmap(path, np.uint8, 'r+', shape=size))


def _check_label(label: pathlib.Path, about: dict[str, Any]) -> None:
  """Raises InputError if a folder holds a cache of something else."""
  try:
    found = json.loads(label.read_text())
    different = [key for key, value in about.items() if found.get(key) != value]
  except (OSError, ValueError, AttributeError) as e:
    raise InputError(f'{label}: cannot be read: {e}; delete the folder or give another') from e
  if different and different[0] in ('version', 'decoding'):
    raise InputError(f'{label.parent} holds a cache that another version of ppn_jax made, by other '
                     'rules; delete it or give another data.cache.where')
  if different:
    key = different[0]
    raise InputError(f'{label.parent} holds a cache of something else: {key} is '
                     f'{found.get(key)!r} there and {about[key]!r} here; delete it or give another '
                     'data.cache.where')


def _allocate(path: pathlib.Path, size: int) -> None:
  """Creates a file of zeros that has its room on the disk.

  Otherwise, on a full disk, writing to the mapping would kill the process.
  """
  free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
  if size > free:
    raise InputError(f'data.cache.where={str(path.parent)!r} needs {size / 1e9:.1f} GB, but the '
                     f'disk has {free / 1e9:.1f} GB left; give another, or a smaller '
                     'data.cache.size')
  with open(path, 'wb') as f:
    f.truncate(size)
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(f.fileno(), 0, size)

