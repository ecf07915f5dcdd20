"""Pascal VOC's average precision at IoU 0.5, as its devkit of 2010 and later defines it.

COCO's AP50 differs from it in three ways: precision is read at 101 recalls instead of at every
one; of two truth boxes a detection takes the best that is free, where VOC takes the best and
calls the second detection of it wrong; and a crowd (here a difficult object) swallows whatever
lies half within it, where VOC ignores only what overlaps it most, by IoU.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.metrics.matching import corners


def voc_ap50(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
             min_iou: float = 0.5) -> tuple[float | None, dict[str, float | None]]:
  """Mean over classes, and by class name; None where there is no truth to find.

  Boxes are taken as continuous, without the devkit's extra pixel: those of voc300 are reduced
  from the originals and no longer whole pixels.

  Args:
    ground_truth: COCO instances dict; `iscrowd` marks VOC's difficult objects.
    rows: detections in COCO's results format.
    min_iou: above which a detection is right; VOC says greater, not equal.
  """
  truth, found = collections.defaultdict(dict), collections.defaultdict(list)
  for a in ground_truth['annotations']:
    truth[a['category_id']].setdefault(a['image_id'], []).append(a)
  for r in rows:
    found[r['category_id']].append(r)
  by_class = {c['name']: _class_ap(truth[c['id']], found[c['id']], min_iou)
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
  right = []
  for row in sorted(rows, key=lambda r: -r['score']):
    image = row['image_id']
    if image not in boxes:
      right.append(False)
      continue
    overlap = box_ops.iou(corners([row['bbox']]), boxes[image])[0]
    best = int(np.argmax(overlap))
    if overlap[best] > min_iou and difficult[image][best]:
      continue
    right.append(bool(overlap[best] > min_iou and not taken[image][best]))
    taken[image][best] |= right[-1]
  return area_under_curve(np.array(right, bool), total)


def area_under_curve(right: np.ndarray, total: int) -> float:
  """Area under precision against recall, precision made to fall only.

  Args:
    right: bool [N], in order of falling score.
    total: objects to find, 1 or more.
  """
  hits = np.cumsum(right)
  precision = hits / np.arange(1, len(right) + 1)
  envelope = np.maximum.accumulate(precision[::-1])[::-1]
  return float((envelope * right).sum() / total)
