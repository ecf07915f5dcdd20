"""Lists of image ids, by which published splits are defined."""

import numpy as np

from ppn_jax.data.images import decoding as image_files
from ppn_jax.errors import InputError


def read(file: str) -> np.ndarray:
  """The ids in a text file: integers, one a line; empty lines and those from a # on do not count.

  Returns:
    i64 [M], sorted, no two the same.

  Raises:
    InputError: it cannot be read, has no ids, or something else in it; the line is named.
  """
  lines = image_files.read(file).decode('utf-8', 'replace').splitlines()
  ids = []
  for number, line in enumerate(lines, start=1):
    text = line.partition('#')[0].strip()
    if text:
      try:
        ids.append(np.int64(int(text)))
      except (ValueError, OverflowError):
        raise InputError(f'{file}:{number}: {text[:50]!r}, legal: an image id, one a '
                         'line') from None
  if not ids:
    raise InputError(f'{file}: no image ids')
  return np.unique(np.array(ids))


def select(ids: np.ndarray, *, exclude: str, include: str) -> np.ndarray:
  """Which of the images to take.

  Args:
    ids: i64 [N], of all images.
    exclude: file of ids to leave out, '' for none.
    include: file of ids to take, '' for all.

  Returns:
    bool [N].

  Raises:
    InputError: see `read`; an id to take that is not there, a list to leave out of which none
      is there, or nothing left.
  """
  kept = np.ones(len(ids), bool)
  if include:
    listed = read(include)
    absent = np.setdiff1d(listed, ids)
    if len(absent):
      raise InputError(f'{include}: {len(absent)} of its {len(listed)} ids are not in the data, '
                       f'such as {absent[0]}')
    kept &= np.isin(ids, listed)
  if exclude:
    listed = read(exclude)
    if not np.isin(ids, listed).any():
      raise InputError(f'{exclude}: none of its {len(listed)} ids is in the data, such as '
                       f'{listed[0]}; it belongs to other data')
    kept &= ~np.isin(ids, listed)
  if not kept.any():
    raise InputError(f'{exclude or include}: leaves no images')
  return kept
