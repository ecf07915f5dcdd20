"""The box around an object's outline, in the forms that COCO's `segmentation` has."""

from typing import Any

import numpy as np

_MAX_DIGITS = 12  # Of a run's length in COCO's compressed form, five bits each.


def box_around(segmentation: Any) -> list[float] | None:
  """Computes the box around a segmentation.

  Args:
    segmentation: polygons [[x1, y1, x2, y2, ...], ...] in pixels, or a run-length encoded mask
      {'size': [height, width], 'counts': list or COCO's compressed string}.

  Returns:
    x, y, width, height in pixels, as pycocotools' `toBbox` computes them for masks; None for
    anything else, and for a mask of no pixels.
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
  # Runs go down the columns, of 0 and 1 by turns.
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
  """The runs of COCO's compressed string; None if it is none."""
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
    # From the fourth on, what it differs from the run two before.
    runs.append(value + runs[-2] if len(runs) > 2 else value)
  return runs
