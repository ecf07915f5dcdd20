"""The json of a COCO instances file -> checked columns. Errors name the file and the entry."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppn_jax.errors import InputError


def read(file: str) -> dict[str, 'Table']:
  """The tables 'images', 'annotations' and 'categories' of a COCO instances file.

  Raises:
    InputError: no such file, not JSON, or not a file of this sort.
  """
  try:
    with open(file, 'rb') as f:
      return parse(f.read(), file)
  except OSError as e:
    raise InputError(f'no annotations at {file!r}: {e.strerror}') from e


def parse(text: bytes | str, file: str) -> dict[str, 'Table']:
  """As `read`, of the text of a file."""
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
  return {key: Table(file, key, content[key]) for key in ('images', 'annotations', 'categories')}


class Table:
  """One list of a COCO file, read by columns.

  Columns are taken from all entries at once, and a culprit is searched for only when there is
  one: a file has up to a million annotations.
  """

  def __init__(self, file: str, name: str, entries: list):
    self._file, self._name, self._entries = file, name, entries

  def __len__(self) -> int:
    return len(self._entries)

  def error(self, index: int, message: str) -> InputError:
    return InputError(f'{self._file}: {self._name}[{index}]: {message}')

  def column(self, key: str, legal: Callable[[Any], Any] | None = None,
             wanted: str = '') -> list:
    """entry[key] of every entry.

    Raises:
      InputError: an entry has no such key, or a value that `legal` refuses; `wanted` says in
        words what it takes.
    """
    try:
      values = [entry[key] for entry in self._entries]
    except (KeyError, TypeError, IndexError):
      i = next(i for i, e in enumerate(self._entries) if not isinstance(e, dict) or key not in e)
      entry = self._entries[i]
      raise self.error(i, f'no {key!r} in {quote(entry)}; {_guess(entry)}') from None
    for i, value in enumerate(values if legal else ()):
      if not legal(value):
        raise self.error(i, f'{key} is {quote(value)}, legal: {wanted}')
    return values

  def optional(self, key: str) -> list:
    """entry[key] of every entry, None where there is none."""
    return [entry.get(key) for entry in self._entries]

  def integers(self, key: str) -> np.ndarray:
    """As `column`, i64 [N]; strings and floats are refused."""
    return np.array(self.column(key, _is_int64, 'an integer'), np.int64)

  def ids(self) -> np.ndarray:
    """The entries' own ids, i64 [N], all different."""
    ids = self.integers('id')
    values, first, counts = np.unique(ids, return_index=True, return_counts=True)
    for k in np.flatnonzero(counts > 1)[:1]:
      raise self.error(first[k], f'id {values[k]} is listed {counts[k]} times; ids must be unique')
    return ids

  def references(self, key: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The position in `ids` of every entry's `key`, i64 [N]."""
    values, ids = self.integers(key), np.asarray(ids)
    order = np.argsort(ids)
    at = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)]
    for i in np.flatnonzero(ids[at] != values)[:1]:
      raise self.error(i, f'{key} is {values[i]}, which the file does not list')
    return at


def _is_int64(value: Any) -> bool:
  return type(value) is int and -2**63 <= value < 2**63


def _guess_file(content: Any) -> str:
  if not isinstance(content, dict):
    return f'it holds {quote(content)}'
  annotations = content.get('annotations')
  if isinstance(annotations, list) and annotations:
    return _guess(annotations[0])
  if 'images' in content and 'categories' in content:
    return 'it looks like an image_info file, which has no truth'
  return f'its keys: {quote(sorted(content))}'


def _guess(entry: Any) -> str:
  """What sort of COCO file an entry that lacks something comes from."""
  for key, kind in (('caption', 'captions'), ('segments_info', 'panoptic')):
    if isinstance(entry, dict) and key in entry:
      return f'it looks like a {kind} file; wanted: an instances file'
  return 'wanted: the entries of a COCO instances file'


def quote(value: Any) -> str:
  """What a file says, in a message: on one line and not at any length."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 100 else text[:97] + '...'
