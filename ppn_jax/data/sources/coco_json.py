"""Reads COCO's files: instances, segmentations, and lists of image ids.

Errors name the file and the entry or line.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.sources.annotations import quote
from ppn_jax.errors import InputError

_MAX_DIGITS = 12  # Digits, of five bits, of a run's length in COCO's compressed form.

# Advice about annotations that have outlines and no boxes.
USE_SEGMENTATION = ("boxes_from='segmentation' takes the box around its segmentation "
                    '(--config.data.train.boxes_from=segmentation)')


def read(file: str) -> dict[str, 'Table']:
  """Reads the tables 'images', 'annotations' and 'categories' of a COCO instances file.

  Returns:
    The tables, and as the only entry of a table 'info' what the file says about itself.

  Raises:
    InputError: If there is no such file, or it is not JSON or not an instances file.
  """
  try:
    with open(file, 'rb') as f:
      return parse(f.read(), file)
  except OSError as e:
    raise InputError(f'no annotations at {file!r}: {e.strerror}') from e


def parse(text: bytes | str, file: str) -> dict[str, 'Table']:
  """Parses the text of a file; see `read`."""
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise InputError(f'{file}: not valid JSON: {e}') from e
  if isinstance(content, list):
    raise InputError(f'{file}: a list, not a COCO instances file; it looks like COCO results '
                     "(detections); legal: an object with 'images', 'annotations', 'categories'")
  for key in ('images', 'annotations', 'categories'):
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise InputError(f'{file}: not a COCO instances file: no list {key!r} in it; '
                       f'{_guess_file(content)}')
  info = content.get('info')
  return {key: Table(file, key, content[key]) for key in ('images', 'annotations', 'categories')
          } | {'info': Table(file, 'info', [info if isinstance(info, dict) else {}])}


class Table:
  """One list of a COCO file, read by columns.

  A column is taken from all entries at once, and the entry with an error is searched for only if
  there is one, since a file has up to a million annotations.
  """

  def __init__(self, file: str, name: str, entries: list):
    self._file, self._name, self._entries = file, name, entries

  def __len__(self) -> int:
    return len(self._entries)

  def error(self, index: int, message: str) -> InputError:
    """Makes an error about an entry."""
    return InputError(f'{self._file}: {self._name}[{index}]: {message}')

  def column(self, key: str, legal: Callable[[Any], Any] | None = None,
             description: str = '') -> list:
    """Returns entry[key] of every entry.

    Args:
      key: The key.
      legal: Returns whether a value is legal.
      description: The legal values in words.

    Raises:
      InputError: If an entry lacks the key or has a value that is not legal.
    """
    try:
      values = [entry[key] for entry in self._entries]
    except (KeyError, TypeError, IndexError):
      i = next(i for i, e in enumerate(self._entries) if not isinstance(e, dict) or key not in e)
      entry = self._entries[i]
      raise self.error(i, f'no {key!r} in {quote(entry)}; {_guess(entry, key)}') from None
    for i, value in enumerate(values if legal else ()):
      if not legal(value):
        raise self.error(i, f'{key} is {quote(value)}, legal: {description}')
    return values

  def optional(self, key: str) -> list:
    """Returns entry.get(key) of every entry."""
    return [entry.get(key) for entry in self._entries]

  def integers(self, key: str) -> np.ndarray:
    """Returns a column as i64 [N]; whole floats count as integers, strings are rejected."""
    return np.array([int(v) for v in self.column(key, _is_whole, 'an integer')], np.int64)

  def ids(self) -> tuple[np.ndarray, dict[Any, int]]:
    """Returns the entries' own ids.

    Whole floats and strings of digits stand for their number. If some ids are other strings, or
    different strings have the same number, all are numbered from 1 in the order of the file.

    Returns:
      The ids, i64 [N], unique, and a map from what the file has to the id, which is empty unless
      ids are numbered here.

    Raises:
      InputError: If an id is neither a whole number nor a string, or is repeated.
    """
    written = self.column('id', lambda v: _is_whole(v) or (isinstance(v, str) and v.strip()),
                          'an integer or a string')
    numbers, texts = [_to_number(v) for v in written], [_to_text(v) for v in written]
    names = {}
    # '7' and '007' in one file are two names.
    if None in numbers or len(set(numbers)) < len(set(texts)):
      names = {text: n for n, text in reversed(list(enumerate(texts, start=1)))}
      numbers = [names[text] for text in texts]
    ids = np.array(numbers, np.int64)
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    for k in np.flatnonzero(counts > 1)[:1]:
      raise self.error(first[k], f'id {quote(written[first[k]])} is listed {counts[k]} times; ids '
                                 'must be unique')
    return ids, names

  def references(self, key: str, ids: Sequence[int] | np.ndarray,
                 names: Mapping[Any, int] | None = None) -> np.ndarray:
    """Returns positions in `ids` of each entry's `key`, i64 [N], with the results of `ids()`."""
    written = self.column(key, lambda v: _is_whole(v) or isinstance(v, str),
                          'the id of an entry')
    numbers = ([names.get(_to_text(v)) for v in written] if names else
               [_to_number(v) for v in written])
    for i in [numbers.index(None)] if None in numbers else ():
      raise self.error(i, f'{key} is {quote(written[i])}, which the file does not list')
    values, ids = np.array(numbers, np.int64), np.asarray(ids)
    order = np.argsort(ids)
    at = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)]
    for i in np.flatnonzero(ids[at] != values)[:1]:
      raise self.error(i, f'{key} is {quote(written[i])}, which the file does not list')
    return at


def _is_whole(value: Any) -> bool:
  """Returns whether a value is an integer of 64 bits, or a float that equals one exactly."""
  if type(value) is float:
    return value.is_integer() and abs(value) <= 2**53
  return type(value) is int and -2**63 <= value < 2**63


def _to_number(value: Any) -> int | None:
  """Returns the number that an id stands for, None for other strings."""
  if not isinstance(value, str):
    return int(value)
  text = value.strip()
  if re.fullmatch(r'[+-]?[0-9]{1,18}(\.0*)?', text):
    return int(text.partition('.')[0])
  return None


def _to_text(value: Any) -> str:
  """Converts an id to a name."""
  return value.strip() if isinstance(value, str) else str(int(value))


def _guess_file(content: Any) -> str:
  """Describes a file that is no instances file."""
  if not isinstance(content, dict):
    return f'it holds {quote(content)}'
  annotations = content.get('annotations')
  if isinstance(annotations, list) and annotations:
    return _guess(annotations[0])
  if 'images' in content and 'categories' in content:
    return 'it looks like an image_info file, which has no annotations'
  return f'its keys: {quote(sorted(content))}'


def _guess(entry: Any, key: str = '') -> str:
  """Guesses which kind of COCO file an entry comes from, or gives advice."""
  if key == 'bbox' and isinstance(entry, dict) and entry.get('segmentation'):
    return USE_SEGMENTATION
  for key, kind in (('caption', 'captions'), ('segments_info', 'panoptic')):
    if isinstance(entry, dict) and key in entry:
      return f'it looks like a {kind} file; needed: an instances file'
  return 'needed: the entries of a COCO instances file'


def box_around(segmentation: Any) -> list[float] | None:
  """Computes the box around a segmentation.

  Args:
    segmentation: Polygons [[x1, y1, x2, y2, ...], ...] in pixels, or a run-length encoded mask
      {'size': [height, width], 'counts': list or COCO's compressed string}.

  Returns:
    x, y, width, height in pixels, for masks as pycocotools' `toBbox` computes them; None for
    anything else and for an empty mask.
  """
  if isinstance(segmentation, dict):
    return _box_of_mask(segmentation)
  if not isinstance(segmentation, list) or not segmentation:
    return None
  polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
  if not all(isinstance(p, list) and len(p) >= 4 and len(p) % 2 == 0
             and all(type(n) in (int, float) for n in p) for p in polygons):
    return None
  try:
    points = np.array([n for p in polygons for n in p], np.float64).reshape(-1, 2)
  except OverflowError:  # An integer of hundreds of digits.
    return None
  low, high = points.min(axis=0), points.max(axis=0)
  with np.errstate(invalid='ignore', over='ignore'):
    return [*low.tolist(), *(high - low).tolist()]


def _box_of_mask(mask: dict) -> list[float] | None:
  """Computes the box around a run-length encoded mask."""
  size, counts = mask.get('size'), mask.get('counts')
  if not isinstance(size, list) or len(size) != 2 or not all(
      type(n) is int and 0 < n < 2**31 for n in size):
    return None
  runs = _decompress(counts) if isinstance(counts, str) else counts
  if not isinstance(runs, list) or not all(type(n) is int and 0 <= n < 2**62 for n in runs):
    return None
  height, width = size
  if sum(runs) > height * width:
    return None
  # Runs go down the columns and alternate between 0 and 1.
  ends = np.cumsum(np.array(runs, np.int64))
  first, last = ends[:-1:2], ends[1::2] - 1
  filled = last >= first
  first, last = first[filled], last[filled]
  if not len(first):
    return None
  across = first // height != last // height
  top = np.where(across, 0, first % height).min()
  bottom = np.where(across, height - 1, last % height).max()
  left, right = (first // height).min(), (last // height).max()
  return [float(v) for v in (left, top, right - left + 1, bottom - top + 1)]


def _decompress(text: str) -> list[int] | None:
  """Returns the runs of COCO's compressed string, None if it is not one."""
  runs, at = [], 0
  while at < len(text):
    value = digits = 0
    more = True
    while more:
      if at == len(text) or digits == _MAX_DIGITS:
        return None
      code = ord(text[at]) - 48
      if not 0 <= code < 64:
        return None
      value |= (code & 31) << 5 * digits
      more = code & 32
      at, digits = at + 1, digits + 1
    if code & 16:
      value -= 1 << 5 * digits
    # From the fourth run on, the difference from the run two before.
    runs.append(value + runs[-2] if len(runs) > 2 else value)
  return runs


def read_ids(file: str) -> np.ndarray:
  """Reads image ids, which define published splits, from a text file.

  Each line has one integer; empty lines and text after a # are ignored.

  Returns:
    i64 [M], sorted and unique.

  Raises:
    InputError: If it cannot be read, has no ids, or has a line with something else.
  """
  lines = image_files.read(file).decode('utf-8', 'replace').splitlines()
  ids = []
  for number, line in enumerate(lines, start=1):
    text = line.partition('#')[0].strip()
    if text:
      try:
        ids.append(np.int64(int(text)))
      except (ValueError, OverflowError):
        raise InputError(f'{file}:{number}: {text[:50]!r}, legal: an image id, one per '
                         'line') from None
  if not ids:
    raise InputError(f'{file}: no image ids')
  return np.unique(np.array(ids))


def select_ids(ids: np.ndarray, *, exclude: str, include: str) -> np.ndarray:
  """Selects images by lists of ids.

  Args:
    ids: i64 [N], ids of all images.
    exclude: File of ids to leave out, '' for none.
    include: File of ids to keep, '' for all.

  Returns:
    bool [N], whether an image is kept.

  Raises:
    InputError: If a file is wrong (see `read_ids`), an id of `include` or all ids of `exclude` are
      not in the data, or no image is left.
  """
  kept = np.ones(len(ids), bool)
  if include:
    listed = read_ids(include)
    absent = np.setdiff1d(listed, ids)
    if len(absent):
      raise InputError(f'{include}: {len(absent)} of its {len(listed)} ids are not in the data, '
                       f'such as {absent[0]}')
    kept &= np.isin(ids, listed)
  if exclude:
    listed = read_ids(exclude)
    if not np.isin(ids, listed).any():
      raise InputError(f'{exclude}: none of its {len(listed)} ids is in the data, such as '
                       f'{listed[0]}; it belongs to other data')
    kept &= ~np.isin(ids, listed)
  if not kept.any():
    raise InputError(f'{exclude or include}: leaves no images')
  return kept
