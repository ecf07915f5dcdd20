"""Pascal VOC's average precision at IoU 0.5, as defined by its devkit since 2010.

COCO's AP50 differs in three ways. It reads precision at 101 recalls instead of every one. It
matches a detection to the best ground-truth box that is free, where VOC matches the best box and
counts a second detection of it as wrong. And it ignores every detection that lies half within a
crowd (here a difficult object), where VOC ignores only those that overlap it most by IoU.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.metrics.matching import corners


def voc_ap50(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
             min_iou: float = 0.5) -> tuple[float | None, dict[str, float | None]]:
  """Computes VOC's AP50: the mean over classes, and by class name; None without ground truth.

  Boxes are continuous, without the devkit's extra pixel, because data sets may hold scaled copies
  whose boxes are no whole pixels.

  Args:
    ground_truth: COCO instances dict; `iscrowd` marks VOC's difficult objects.
    rows: detections in COCO's results format.
    min_iou: a detection is correct if its IoU is greater; as in VOC, not if it is equal.
  """
  truth, found = collections.defaultdict(dict), collections.defaultdict(list)
  for a in ground_truth['annotations']:
    truth[a['category_id']].setdefault(a['image_id'], []).append(a)
  for r in rows:
    found[r['category_id']].append(r)
  by_class = {str(c.get('name', c['id'])): _class_ap(truth[c['id']], found[c['id']], min_iou)
              for c in sorted(ground_truth['categories'], key=lambda c: c['id'])}
  scored = [ap for ap in by_class.values() if ap is not None]
  return (float(np.mean(scored)) if scored else None), by_class


def _class_ap(truth: Mapping[int, list[Mapping]], rows: list[Mapping], min_iou: float
              ) -> float | None:
  boxes = {i: corners([a['bbox'] for a in them]) for i, them in truth.items()}
  difficult = {i: np.array([bool(a.get('iscrowd', 0)) for a in them])
               for i, them in truth.items()}
  total = sum(int((~d).sum()) for d in difficult.values())
  if not total:
    return None
  taken = {i: np.zeros(len(d), bool) for i, d in difficult.items()}
  rows = sorted(rows, key=lambda r: -r['score'])
  which, overlap = _best_boxes(boxes, rows)
  right = []
  for row, best, iou in zip(rows, which.tolist(), overlap.tolist(), strict=True):
    image = row['image_id']
    hit = iou > min_iou
    if hit and difficult[image][best]:
      continue
    right.append(hit and not taken[image][best])
    if right[-1]:
      taken[image][best] = True
  return area_under_curve(np.array(right, bool), total)


def _best_boxes(boxes: Mapping[int, np.ndarray], rows: Sequence[Mapping]
                ) -> tuple[np.ndarray, np.ndarray]:
  """Returns the box of its image that each detection overlaps most, and that IoU; 0 without any."""
  which, overlap = np.zeros(len(rows), int), np.zeros(len(rows))
  of_image = collections.defaultdict(list)
  for i, row in enumerate(rows):
    of_image[row['image_id']].append(i)
  for image in of_image.keys() & boxes.keys():
    at = of_image[image]
    table = box_ops.iou(corners([rows[i]['bbox'] for i in at]), boxes[image])
    which[at], overlap[at] = table.argmax(axis=1), table.max(axis=1)
  return which, overlap


def area_under_curve(right: np.ndarray, total: int) -> float:
  """Computes the area under the precision-recall curve, with precision made monotonic.

  Args:
    right: bool [N], whether each detection is correct, in order of decreasing score.
    total: number of objects, at least 1.
  """
  hits = np.cumsum(right)
  precision = hits / np.arange(1, len(right) + 1)
  envelope = np.maximum.accumulate(precision[::-1])[::-1]
  return float((envelope * right).sum() / total)
