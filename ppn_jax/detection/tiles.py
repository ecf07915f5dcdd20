"""Overlapping tiles of a picture, in which small objects are larger, and what is found in them."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from ppn_jax.detection.structures import Detections
from ppn_jax.errors import InputError

MAX_TILES = 32  # Along the longer side.
MERGE_IOU = 0.5  # Above this, two boxes of a class from different tiles are one object.
_MAX_MERGED = 1000  # Detections of a picture.
_EDGE = 0.01  # Distance from the edge of a tile, as a share of it, at which an object is cut off.


def check_tiles(tiles: int, overlap: float) -> None:
  """Raises InputError unless both are in the range of `tile_windows`."""
  if not isinstance(tiles, int) or isinstance(tiles, bool) or not 1 <= tiles <= MAX_TILES:
    raise InputError(f'tiles={tiles!r} must be an integer from 1 to {MAX_TILES}')
  if not isinstance(overlap, (int, float)) or not 0 <= overlap <= 0.5:
    raise InputError(f'overlap={overlap!r} must be a number from 0 to 0.5')


def tile_windows(size: tuple[int, int], tiles: int, overlap: float = 0.2) -> np.ndarray:
  """Computes the windows of tiles, with the whole picture as the last one.

  Tiles of one axis have the same length L, with n L - (n - 1) overlap L equal to the side of the
  picture but for rounding. The shorter side has as many as make tiles as square as possible.

  Args:
    size: (height, width) of the picture in pixels.
    tiles: n along the longer side, 1 to `MAX_TILES`; 1 is the whole picture alone.
    overlap: share of a tile that it has in common with the next, 0 to 0.5.

  Returns:
    i64 [T, 4], [top, left, bottom, right] in pixels, the last two exclusive.

  Raises:
    InputError: If an option is out of range.
  """
  check_tiles(tiles, overlap)
  whole = np.array([[0, 0, *size]])
  if tiles == 1:
    return whole
  spans = []
  for side in size:
    count = max(1, min(side, round(tiles * side / max(size))))
    length = min(side, math.ceil(side / (count - (count - 1) * overlap)))
    starts = np.unique(np.round(np.linspace(0, side - length, count)).astype(int))
    spans.append([(start, start + length) for start in starts.tolist()])
  rows, columns = spans
  windows = [(top, left, bottom, right) for top, bottom in rows for left, right in columns]
  return np.concatenate([np.array(windows), whole]) if len(windows) > 1 else whole


def merge_tiles(found: Sequence[Detections], windows: np.ndarray, size: tuple[int, int],
                num_classes: int) -> Detections:
  """Merges the detections of tiles by non-maximum suppression within each class.

  A box of a tile that ends at an edge inside the picture shows a part of an object, and is left
  out: another tile or the whole picture shows all of it.

  Args:
    found: the detections in each of T windows, N of them without padding; boxes are 0 to 1 of the
      window.
    windows: i64 [T, 4] of `tile_windows`.
    size: (height, width) of the picture in pixels.
    num_classes: C.

  Returns:
    Detections with leading axis N, boxes 0 to 1 of the picture, highest score first.
  """
  scale = np.float32([*size, *size])
  parts = []
  for detections, window in zip(found, windows, strict=True):
    corner = np.float32([*window[:2], *window[:2]])
    extent = np.float32([*(window[2:] - window[:2])] * 2)
    inside = [window[0] > 0, window[1] > 0, window[2] < size[0], window[3] < size[1]]
    near = np.concatenate([detections.boxes[:, :2] < _EDGE, detections.boxes[:, 2:] > 1 - _EDGE],
                          axis=1)
    whole = ~(near & inside).any(axis=1)
    moved = detections._replace(boxes=(detections.boxes * extent + corner) / scale)
    parts.append(Detections(*(field[whole] for field in moved)))
  joined = Detections(*map(np.concatenate, zip(*parts, strict=True)))
  if not len(joined.scores):
    return joined
  # Sizes of powers of two, so that few programs are compiled.
  padded = max(128, 1 << (len(joined.scores) - 1).bit_length())
  fill = lambda field: np.pad(field, [(0, padded - len(field))] + [(0, 0)] * (field.ndim - 1))
  kept, count = _merge(num_classes)(*map(fill, (joined.boxes, joined.scores, joined.labels)))
  return Detections(*(field[np.asarray(kept)[:int(count)]] for field in joined))


@functools.cache
def _merge(num_classes: int):
  """Returns a compiled function from boxes [N, 4], scores [N] and labels [N] to those to keep."""
  import jax  # Exported files run without it, unless tiles are asked for.
  import jax.numpy as jnp

  from ppn_jax.detection.nms import Limits, batched_nms

  @jax.jit
  def merge(boxes, scores, labels):
    of_class = jnp.where(labels[:, None] == jnp.arange(num_classes), scores[:, None], 0)
    found = batched_nms(boxes[None], of_class[None], score_threshold=0.0,
                        limits=Limits(MERGE_IOU, 1.0, _MAX_MERGED), max_detections=_MAX_MERGED,
                        candidates=256)
    return found.anchor[0], found.count[0]

  return merge
