"""Which detections are right: COCO's matching at one IoU, told detection by detection."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array

DETECTION_LIMIT = 100  # Of an image and class, as in COCO's AP; what comes after is ignored.


class Judged(NamedTuple):
  """N detections and what they are worth, NumPy, in the order of their rows."""
  image: Array  # i64 [N], position in the truth's list of images.
  label: Array  # i64 [N], position among its categories in order of id.
  level: Array  # i64 [N].
  area: Array  # f64 [N], of the detection's own box, square pixels of the original.
  score: Array  # f64 [N].
  correct: Array  # bool [N].
  ignored: Array  # bool [N], neither right nor wrong.

  def take(self, chosen: Array) -> 'Judged':
    """Those that a mask or an index array chooses."""
    return Judged(*(field[chosen] for field in self))

  def above(self, floor: float) -> 'Judged':
    """Those that count, of score `floor` and more."""
    return self.take(~self.ignored & (self.score >= floor))


def judge(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
          min_iou: float = 0.5) -> Judged:
  """Judges rows of `coco.to_rows` against a COCO instances dict; see `match`."""
  images = {image['id']: i for i, image in enumerate(ground_truth['images'])}
  labels = {i: k for k, i in enumerate(sorted(c['id'] for c in ground_truth['categories']))}
  column = lambda values, dtype: np.fromiter(values, dtype, len(rows))
  return Judged(
      column((images[r['image_id']] for r in rows), np.int64),
      column((labels[r['category_id']] for r in rows), np.int64),
      column((r['level'] for r in rows), np.int64),
      column((r['bbox'][2] * r['bbox'][3] for r in rows), np.float64),
      column((r['score'] for r in rows), np.float64), *match(ground_truth, rows, min_iou=min_iou))


def match(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
          min_iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
  """Which detections are right: `pair`, without saying what each has found.

  Returns:
    correct and ignored, bool [N] each, never both.
  """
  taken, ignored = pair(ground_truth, rows, min_iou=min_iou)
  return taken >= 0, ignored


def pair(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
         min_iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
  """Which truth each detection has found, by COCO's greedy matching over all sizes.

  Within an image and class, in order of score, a detection takes the free truth box that it
  overlaps most, if their IoU reaches `min_iou`, and is right. One that finds none but has
  `min_iou` of its own area in a crowd is ignored, and so is what comes after the first
  `DETECTION_LIMIT`.

  Args:
    ground_truth: COCO instances dict; a missing `iscrowd` is 0.
    rows: N rows of image_id, category_id, bbox and score.

  Returns:
    taken: i64 [N], position among the annotations, -1 for a detection that is not right.
    ignored: bool [N], False where `taken` is not -1.
  """
  truth, found = collections.defaultdict(list), collections.defaultdict(list)
  for at, a in enumerate(ground_truth['annotations']):
    truth[a['image_id'], a['category_id']].append((at, int(a.get('iscrowd', 0)), a['bbox']))
  for i, r in enumerate(rows):
    found[r['image_id'], r['category_id']].append(i)
  taken, ignored = np.full(len(rows), -1), np.zeros(len(rows), bool)
  for key, members in found.items():
    order = sorted(members, key=lambda i: -rows[i]['score'])
    ignored[order[DETECTION_LIMIT:]] = True
    order = order[:DETECTION_LIMIT]
    if key in truth:
      at, crowd, boxes = (np.array(column) for column in zip(*truth[key], strict=True))
      crowd, boxes = crowd.astype(bool), corners(boxes)
      which, ignored[order] = _greedy(
          corners([rows[i]['bbox'] for i in order]), boxes[~crowd], boxes[crowd], min_iou)
      taken[order] = np.where(which >= 0, np.append(at[~crowd], -1)[which], -1)
  return taken, ignored


def corners(xywh: Sequence[Sequence[float]]) -> np.ndarray:
  """COCO's [x, y, width, height], [N, 4] -> f64 [N, 4], ymin, xmin, ymax, xmax in pixels."""
  x, y, w, h = np.asarray(xywh, np.float64).reshape(-1, 4).T
  return np.stack([y, x, y + h, x + w], axis=-1)


def _greedy(found: np.ndarray, wanted: np.ndarray, crowds: np.ndarray,
            min_iou: float) -> tuple[np.ndarray, np.ndarray]:
  """Position in `wanted` of what each has found, or -1; and which are ignored."""
  overlap = box_ops.iou(found, wanted)[:, ::-1]  # COCO takes the last of equals.
  which = np.full(len(found), -1)
  for d in np.flatnonzero((overlap >= min_iou).any(axis=1)):
    best = np.argmax(overlap[d])
    if overlap[d, best] >= min_iou:
      which[d] = len(wanted) - 1 - best
      overlap[:, best] = -1
  in_crowd = (box_ops.coverage(found, crowds) >= min_iou).any(axis=1)
  return which, (which < 0) & in_crowd
