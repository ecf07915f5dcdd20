"""Annotations that a source has collected from all its records, to be shared or kept.

Reading every record of a large data set in a bucket takes minutes. A job can have it done once, for
all processes and later starts, by giving the means to keep bytes (`kept_by`).
"""

import contextlib
import contextvars
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.sources.record_images import Record


class Scan(NamedTuple):
  """What was found in N records.

  Fields:
    records: The records, without their image files.
    unreadable: Record -> reason why it cannot be read.
  """
  records: Sequence[Record]
  unreadable: dict[int, str]


# Returns the bytes of a key, from its function if they are not known.
Keeper = Callable[[Callable[[], str], Callable[[], bytes]], bytes]

_keeper: contextvars.ContextVar[Keeper | None] = contextvars.ContextVar('keeper', default=None)


@contextlib.contextmanager
def kept_by(keeper: Keeper) -> Iterator[None]:
  """Has sources that are built within the context keep what they scan."""
  token = _keeper.set(keeper)
  try:
    yield
  finally:
    _keeper.reset(token)


def scanned(key: Callable[[], str], scan: Callable[[], Scan]) -> Scan:
  """Returns a scan; makes it unless it is kept already.

  Args:
    key: Returns what identifies the data and how it is read. Called only where that is of use,
      since it may take a request for each file.
    scan: Makes the scan.

  Raises:
    Exception: Whatever `scan` raises.
  """
  keeper = _keeper.get()
  return scan() if keeper is None else decode(keeper(key, lambda: encode(scan())))


def encode(scan: Scan) -> bytes:
  """Returns a scan as bytes."""
  records = scan.records

  def joined(field: str, dtype: type) -> np.ndarray:
    values = [getattr(record, field) for record in records]
    return np.concatenate([np.zeros(0, dtype) if v is None else v.astype(dtype) for v in values]
                          or [np.zeros(0, dtype)])

  file = io.BytesIO()
  np.savez_compressed(
      file, counts=np.array([len(record.labels) for record in records], np.int64),
      boxes=np.concatenate([record.boxes for record in records] or [np.zeros((0, 4), np.float32)]),
      labels=joined('labels', np.int64), crowd=joined('crowd', bool),
      areas=joined('areas', np.float64),
      has_areas=np.array([record.areas is not None for record in records], bool),
      text=np.frombuffer(json.dumps({
          'ids': [record.image_id for record in records],
          'names': [record.file_name for record in records],
          'sizes': [record.size for record in records],
          'unreadable': list(scan.unreadable.items())}).encode(), np.uint8))
  return file.getvalue()


def decode(data: bytes) -> Scan:
  """Returns the scan that `encode` wrote.

  Raises:
    Exception: Of many types, if the bytes are something else.
  """
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    found = {name: file[name] for name in file.files}
  text = json.loads(found['text'].tobytes())
  ends = np.cumsum(found['counts'])[:-1]
  area_ends = np.cumsum(np.where(found['has_areas'], found['counts'], 0))[:-1]
  columns = [np.split(found[name], ends) for name in ('boxes', 'labels', 'crowd')]
  areas = np.split(found['areas'], area_ends)
  rows = zip(*columns, areas, found['has_areas'].tolist(), text['ids'], text['names'],
             text['sizes'], strict=True) if len(found['counts']) else ()
  return Scan(
      [Record(b'', boxes, labels, crowd, area if has_area else None, image_id, name,
              None if size is None else (size[0], size[1]))
       for boxes, labels, crowd, area, has_area, image_id, name, size in rows],
      dict(text['unreadable']))
