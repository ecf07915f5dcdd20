"""COCO's matching of detections to ground truth at one IoU, with the result of each detection."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array

DETECTION_LIMIT = 100  # Per image and class, as in COCO's AP; detections after it are ignored.


class MatchedDetections(NamedTuple):
  """N detections and whether each is correct, as NumPy arrays in the order of their rows."""
  image: Array  # i64 [N], position in the ground truth's list of images.
  label: Array  # i64 [N], position among its categories in order of id.
  level: Array  # i64 [N], pyramid level.
  area: Array  # f64 [N], of the detection's own box, square pixels of the original image.
  score: Array  # f64 [N].
  correct: Array  # bool [N].
  ignored: Array  # bool [N], neither correct nor wrong.

  def select(self, chosen: Array) -> 'MatchedDetections':
    """Returns the detections that a mask or an index array chooses."""
    return MatchedDetections(*(field[chosen] for field in self))

  def at_least(self, min_score: float) -> 'MatchedDetections':
    """Returns the detections that are not ignored and score at least `min_score`."""
    return self.select(~self.ignored & (self.score >= min_score))


def match_detections(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
                     min_iou: float = 0.5) -> MatchedDetections:
  """Matches rows of `coco.to_rows` to a COCO instances dict; see `match` for the rule."""
  images = {image['id']: i for i, image in enumerate(ground_truth['images'])}
  labels = {i: k for k, i in enumerate(sorted(c['id'] for c in ground_truth['categories']))}
  column = lambda values, dtype: np.fromiter(values, dtype, len(rows))
  matched, ignored = match(ground_truth, rows, min_iou=min_iou)
  return MatchedDetections(
      image=column((images[r['image_id']] for r in rows), np.int64),
      label=column((labels[r['category_id']] for r in rows), np.int64),
      level=column((r['level'] for r in rows), np.int64),
      area=column((r['bbox'][2] * r['bbox'][3] for r in rows), np.float64),
      score=column((r['score'] for r in rows), np.float64),
      correct=matched >= 0, ignored=ignored)


def match(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
          min_iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ground-truth box that each detection matches, by COCO's greedy matching.

  The rule is that of pycocotools' `evaluateImg` over all sizes. Within an image and class, in order
  of score, a detection takes the unmatched box that it overlaps most, if their IoU reaches
  `min_iou`, and is then correct. An unmatched detection with at least `min_iou` of its own area
  inside a crowd is ignored, and so are detections after the first `DETECTION_LIMIT`.

  Args:
    ground_truth: COCO instances dict; a missing `iscrowd` is 0.
    rows: N rows of image_id, category_id, bbox and score.
    min_iou: least IoU of a match, above 0 and up to 1.

  Returns:
    matched: i64 [N], position among the annotations, or -1 for a detection that is not correct.
    ignored: bool [N], False where `matched` is not -1.
  """
  annotations, detections = collections.defaultdict(list), collections.defaultdict(list)
  for at, a in enumerate(ground_truth['annotations']):
    annotations[a['image_id'], a['category_id']].append((at, int(a.get('iscrowd', 0)), a['bbox']))
  for i, r in enumerate(rows):
    detections[r['image_id'], r['category_id']].append(i)
  matched, ignored = np.full(len(rows), -1), np.zeros(len(rows), bool)
  for key, members in detections.items():
    order = sorted(members, key=lambda i: -rows[i]['score'])
    ignored[order[DETECTION_LIMIT:]] = True
    order = order[:DETECTION_LIMIT]
    if key in annotations:
      at, crowd, boxes = (np.array(column) for column in zip(*annotations[key], strict=True))
      crowd, boxes = crowd.astype(bool), corners(boxes)
      which, ignored[order] = _match_greedily(
          corners([rows[i]['bbox'] for i in order]), boxes[~crowd], boxes[crowd], min_iou)
      matched[order] = np.where(which >= 0, np.append(at[~crowd], -1)[which], -1)
  return matched, ignored


def corners(xywh: Sequence[Sequence[float]]) -> np.ndarray:
  """Converts COCO's [x, y, width, height], [N, 4], to f64 [N, 4] of (ymin, xmin, ymax, xmax)."""
  x, y, w, h = np.asarray(xywh, np.float64).reshape(-1, 4).T
  return np.stack([y, x, y + h, x + w], axis=-1)


def _match_greedily(detections: np.ndarray, boxes: np.ndarray, crowds: np.ndarray,
                    min_iou: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the index into `boxes` that each detection matches, or -1, and which are ignored."""
  overlap = box_ops.iou(detections, boxes)[:, ::-1]  # COCO takes the last of equals.
  which = np.full(len(detections), -1)
  for d in np.flatnonzero((overlap >= min_iou).any(axis=1)):
    best = np.argmax(overlap[d])
    if overlap[d, best] >= min_iou:
      which[d] = len(boxes) - 1 - best
      overlap[:, best] = -1
  in_crowd = (box_ops.coverage(detections, crowds) >= min_iou).any(axis=1)
  return which, (which < 0) & in_crowd
