"""Decoded images kept for the epochs to come, in memory or in a memory-mapped file.

Decoding is nearly all of what the input costs, so what is decoded once, reduced to about the size
that the network takes, saves it from the second epoch on.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import google_crc32c
import numpy as np

from ppn_jax import files
from ppn_jax.data import geometry
from ppn_jax.data.checks import check_integer
from ppn_jax.data.sources import Source, open_example
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError
from ppn_jax.host_memory import available_memory

MEMORY = 'memory'
_VERSION = 1  # Of the file's layout.


class CachedSource:
  """A source that decodes each image once and remembers its pixels, reduced; a `sources.Source`.

  Images come back no larger than `longest_side`, boxes and `size` unchanged: `Example.size` is
  the original's. A file serves later runs and several processes of one machine at a time; an
  image counts as cached when its checksum, written last, is right, so a run killed while it
  writes leaves nothing wrong behind.

  Args:
    source: of the images.
    where: 'memory', or a folder, new or that of an earlier cache of the same images.
    longest_side: larger images are reduced to this, in pixels, the aspect ratio kept.

  Attributes:
    categories, max_boxes, bad_boxes, contents: the source's.

  Raises:
    InputError: not enough room, with both numbers, or a folder that holds something else.
  """

  def __init__(self, source: Source, where: str, longest_side: int):
    check_integer('data.train.cache_size', longest_side, 1)
    self._source, self._side = source, longest_side
    self.categories, self.max_boxes = source.categories, source.max_boxes
    self.bad_boxes = getattr(source, 'bad_boxes', None)
    self.contents = getattr(source, 'contents', None)
    layout = _layout(longest_side, source.max_boxes)
    self._records = (_in_memory(len(source), layout) if where == MEMORY
                     else _in_folder(pathlib.Path(where), source, longest_side, layout))
    # What this process has seen to be right is not checked again.
    self._checked = np.zeros(len(source), bool)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    if not (self._checked[index] or record['crc'] == _checksum(record)):
      self._store(record, self._reduced(index))
    self._checked[index] = True
    return _example(record)

  def ground_truth(self) -> dict[str, Any]:
    """The source's."""
    return self._source.ground_truth()

  def _reduced(self, index: int) -> Example:
    example = open_example(self._source, index)
    height, width = example.image.shape[:2]
    scale = min(1.0, self._side / max(height, width))
    # Of the whole decoded image: a JPEG decoded at a half would shift the boxes by half a pixel.
    return geometry.resize(example, max(1, round(height * scale)), max(1, round(width * scale)),
                           reduced_decoding=False)

  def _store(self, record: np.void, example: Example) -> None:
    record['crc'] = 0
    image, count = example.image, len(example.boxes)
    record['shape'], record['size'] = image.shape[:2], example.size
    record['image_id'], record['count'] = example.image_id, count
    record['boxes'][:count], record['labels'][:count] = example.boxes, example.labels
    record['crowd'][:count] = example.crowd
    record['pixels'][:image.size] = image.reshape(-1)
    record['crc'] = _checksum(record)


def _layout(side: int, max_boxes: int) -> np.dtype:
  """One image with its truth."""
  boxes = max(max_boxes, 1)
  return np.dtype([
      ('crc', 'u4'), ('shape', 'i4', 2), ('size', 'i4', 2), ('image_id', 'i8'), ('count', 'i4'),
      ('boxes', 'f4', (boxes, 4)), ('labels', 'i4', boxes), ('crowd', '?', boxes),
      ('pixels', 'u1', side * side * 3)])


def _example(record: np.void) -> Example:
  height, width = record['shape'].tolist()
  count = int(record['count'])
  # The pixels are a view: transforms change nothing in place.
  image = record['pixels'][:height * width * 3].reshape(height, width, 3)
  return Example(image, record['boxes'][:count].copy(), record['labels'][:count].copy(),
                 record['crowd'][:count].copy(), int(record['image_id']),
                 tuple(record['size'].tolist()))


def _checksum(record: np.void) -> int:
  """Of all that is used of a record; 0, which a fresh one holds, stands for none."""
  height, width = record['shape'].tolist()
  used = height * width * 3
  if not 0 < used <= record['pixels'].size or not 0 <= record['count'] <= len(record['labels']):
    return -1
  crc = google_crc32c.value(record.tobytes()[4:record.dtype.fields['pixels'][1] + used])
  return crc or 1


def _in_memory(count: int, layout: np.dtype) -> np.ndarray:
  needed, there = count * layout.itemsize, available_memory()
  if needed > there:
    raise InputError(f'data.train.cache={MEMORY!r} needs up to {needed / 1e9:.1f} GB for {count:,} '
                     f'images, but {there / 1e9:.1f} GB are available; give a folder, or a smaller '
                     'data.train.cache_size')
  return np.zeros(count, layout)  # The kernel hands out pages as they are written.


def _in_folder(folder: pathlib.Path, source: Source, side: int, layout: np.dtype) -> np.ndarray:
  about = {'version': _VERSION, 'longest_side': side, 'images': len(source),
           'max_boxes': source.max_boxes, 'data': _fingerprint(source)}
  label, pixels = folder / 'cache.json', folder / 'images.bin'
  if label.exists():
    _check_label(label, about)
  elif folder.is_dir() and any(folder.iterdir()):
    raise InputError(f'data.train.cache={str(folder)!r} is not empty and no cache; '
                     'give a new folder')
  size = len(source) * layout.itemsize
  folder.mkdir(parents=True, exist_ok=True)
  if not pixels.exists() or pixels.stat().st_size != size:
    _allocate(pixels, size)
  files.write_text(label, json.dumps(about, indent=2) + '\n')
  return np.memmap(pixels, layout, 'r+', shape=len(source))


def _check_label(label: pathlib.Path, about: dict[str, Any]) -> None:
  try:
    there = json.loads(label.read_text())
    different = [key for key, value in about.items() if there.get(key) != value]
  except (OSError, ValueError, AttributeError) as e:
    raise InputError(f'{label}: cannot be read: {e}; delete the folder or give another') from e
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


def _fingerprint(source: Source) -> str:
  """Of the images and boxes that a source says it has."""
  truth = source.ground_truth()
  return hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).hexdigest()
