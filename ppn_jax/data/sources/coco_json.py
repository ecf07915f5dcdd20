"""The json of a COCO instances file -> checked columns. Errors name the file and the entry."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.errors import InputError

# Advice about annotations that have outlines and no boxes.
USE_SEGMENTATION = ("boxes_from='segmentation' takes the box around its segmentation "
                    '(--config.data.train.boxes_from=segmentation)')


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
      raise self.error(i, f'no {key!r} in {quote(entry)}; {_guess(entry, key)}') from None
    for i, value in enumerate(values if legal else ()):
      if not legal(value):
        raise self.error(i, f'{key} is {quote(value)}, legal: {wanted}')
    return values

  def optional(self, key: str) -> list:
    """entry[key] of every entry, None where there is none."""
    return [entry.get(key) for entry in self._entries]

  def integers(self, key: str) -> np.ndarray:
    """As `column`, i64 [N]; whole floats count as integers, strings are refused."""
    return np.array([int(v) for v in self.column(key, _is_whole, 'an integer')], np.int64)

  def ids(self) -> tuple[np.ndarray, dict[Any, int]]:
    """The entries' own ids, i64 [N], all different.

    Whole floats and strings of digits stand for their number. If some are other strings, or
    strings that differ have the same number, all are numbered from 1 in the order of the file.

    Returns:
      The ids, and what the file writes for each -> id, if they are numbered here; else empty.

    Raises:
      InputError: an id that is neither a whole number nor a string, or that is there twice.
    """
    written = self.column('id', lambda v: _is_whole(v) or (isinstance(v, str) and v.strip()),
                          'an integer or a string')
    numbers, texts = [_to_number(v) for v in written], [_to_text(v) for v in written]
    names = {}
    # Also '7' and '007' of one file are two names.
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
    """The position in `ids` of every entry's `key`, i64 [N]; both as `ids` returns them."""
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
  """Whether a number is an integer of 64 bits, or a float that stands for one exactly."""
  if type(value) is float:
    return value.is_integer() and abs(value) <= 2**53
  return type(value) is int and -2**63 <= value < 2**63


def _to_number(value: Any) -> int | None:
  """The number that an id stands for, None for other strings."""
  if not isinstance(value, str):
    return int(value)
  text = value.strip()
  if re.fullmatch(r'[+-]?[0-9]{1,18}(\.0*)?', text):
    return int(text.partition('.')[0])
  return None


def _to_text(value: Any) -> str:
  """An id as a name."""
  return value.strip() if isinstance(value, str) else str(int(value))


def _guess_file(content: Any) -> str:
  if not isinstance(content, dict):
    return f'it holds {quote(content)}'
  annotations = content.get('annotations')
  if isinstance(annotations, list) and annotations:
    return _guess(annotations[0])
  if 'images' in content and 'categories' in content:
    return 'it looks like an image_info file, which has no truth'
  return f'its keys: {quote(sorted(content))}'


def _guess(entry: Any, key: str = '') -> str:
  """What sort of COCO file an entry that lacks something comes from, or what helps."""
  if key == 'bbox' and isinstance(entry, dict) and entry.get('segmentation'):
    return USE_SEGMENTATION
  for key, kind in (('caption', 'captions'), ('segments_info', 'panoptic')):
    if isinstance(entry, dict) and key in entry:
      return f'it looks like a {kind} file; wanted: an instances file'
  return 'wanted: the entries of a COCO instances file'


def quote(value: Any) -> str:
  """What a file says, in a message: on one line and not at any length."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 100 else text[:97] + '...'
