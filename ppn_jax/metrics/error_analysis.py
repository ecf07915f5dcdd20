"""Classifies wrong detections by kind of error, and computes the cost of each kind.

Kinds and costs are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020, section 2). The kind of a detection that is not correct at IoU 0.5 is
the first of these that applies:

  poorly placed    IoU of 0.1 to 0.5 with ground truth of its class
  wrong class      IoU of 0.5 and more with ground truth of another class
  duplicate        IoU of 0.5 and more with ground truth of its class that a better score matched
  background       IoU below 0.1 with all ground truth
  wrong class and place   otherwise: IoU of 0.1 to 0.5 with ground truth of another class

A ground-truth box is

  missed           if nothing matched it and it is not the target of the first two kinds.

The cost of a kind is the AP50 gained by fixing it alone. Detections of the first two kinds become
correct, if they have the best score of those with their target and nothing matched it, and are
removed otherwise; detections of the other kinds and missed ground truth are removed. Costs do not
add up to 1 - AP50. They are computed by hotcoco, which agrees with the authors' tidecv.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array
from ppn_jax.metrics import coco, matching

KINDS = ('missed', 'duplicate', 'wrong class', 'poorly placed', 'wrong class and place',
         'background')
MISSED, DUPLICATE, WRONG_CLASS, POORLY_PLACED, BOTH, BACKGROUND = range(len(KINDS))
NO_ERROR = -1
_HOTCOCO_NAMES = dict(zip(KINDS, ('Miss', 'Dupe', 'Cls', 'Loc', 'Both', 'Bkg'), strict=True))
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1


class Errors(NamedTuple):
  """Errors of N detections, and the M ground-truth boxes that were missed, as NumPy arrays."""
  kind: Array  # i64 [N], index into KINDS; NO_ERROR for correct and ignored detections.
  target: Array  # i64 [N], position of the matched or closest annotation, -1 for background.
  iou: Array  # f64 [N], with the target; for background, the largest with any ground truth.
  missed: Array  # i64 [M], positions among the annotations.

  def counts(self) -> dict[str, int]:
    """Returns {kind: number of errors}."""
    counts = np.bincount(self.kind[self.kind >= 0], minlength=len(KINDS))
    counts[MISSED] = len(self.missed)
    return dict(zip(KINDS, counts.tolist(), strict=True))


def classify(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
             min_score: float = 0.0) -> Errors:
  """Determines the kind of error of each detection; see the module for the kinds.

  Crowds do not count as ground truth; detections inside them are ignored.

  Args:
    ground_truth: COCO instances dict.
    rows: N detections, see `coco.to_rows`.
    min_score: detections of a lower score are ignored.
  """
  weak = np.array([r['score'] < min_score for r in rows], bool)
  matched, ignored = np.full(len(rows), -1), weak.copy()
  matched[~weak], ignored[~weak] = matching.match(
      ground_truth, [r for r in rows if r['score'] >= min_score], min_iou=FOREGROUND_IOU)
  kind, target, iou = np.full(len(rows), NO_ERROR), matched.copy(), np.zeros(len(rows))
  annotations_of, wrong_of = collections.defaultdict(list), collections.defaultdict(list)
  for at, annotation in enumerate(ground_truth['annotations']):
    if not annotation.get('iscrowd', 0):
      annotations_of[annotation['image_id']].append(at)
  for i in np.flatnonzero(~ignored & (matched < 0)).tolist():
    wrong_of[rows[i]['image_id']].append(i)
  for image, wrong in wrong_of.items():
    positions = annotations_of.get(image, [])
    kind[wrong], target[wrong], iou[wrong] = _classify_image(
        [rows[i] for i in wrong], [ground_truth['annotations'][at] for at in positions], positions)
  hit = np.concatenate([matched[matched >= 0],
                        target[np.isin(kind, (WRONG_CLASS, POORLY_PLACED))]]).astype(int)
  every = np.array([at for positions in annotations_of.values() for at in positions], int)
  return Errors(kind, target, iou, np.setdiff1d(every, hit))


def _classify_image(rows: Sequence[Mapping], annotations: Sequence[Mapping],
                    positions: Sequence[int]) -> tuple[Array, Array, Array]:
  """Returns kind, target and IoU of the wrong detections of an image."""
  if not annotations:
    return np.full(len(rows), BACKGROUND), np.full(len(rows), -1), np.zeros(len(rows))
  overlap = box_ops.iou(matching.corners([r['bbox'] for r in rows]),
                        matching.corners([a['bbox'] for a in annotations]))
  same = (np.array([r['category_id'] for r in rows])[:, None]
          == np.array([a['category_id'] for a in annotations]))
  own, other = np.where(same, overlap, -1.0), np.where(same, -1.0, overlap)
  best_own, best_other = own.max(axis=1), other.max(axis=1)
  conditions = ((best_own >= BACKGROUND_IOU) & (best_own < FOREGROUND_IOU),
                best_other >= FOREGROUND_IOU, best_own >= FOREGROUND_IOU,
                np.maximum(best_own, best_other) < BACKGROUND_IOU)
  kind = np.select(conditions, (POORLY_PLACED, WRONG_CLASS, DUPLICATE, BACKGROUND), BOTH)
  of_own = np.isin(kind, (POORLY_PLACED, DUPLICATE))
  target = np.asarray(positions)[np.where(of_own, own.argmax(axis=1), other.argmax(axis=1))]
  iou = np.where(of_own, best_own, best_other)
  background = kind == BACKGROUND
  return kind, np.where(background, -1, target), np.where(background, overlap.max(axis=1), iou)


def costs(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns {kind: AP50 gained, 0 to 1, by fixing the errors of this kind alone}.

  Args:
    ground_truth: COCO instances dict.
    rows: detections, of any score.
  """
  found = coco.tide_errors(ground_truth, rows, min_iou=FOREGROUND_IOU,
                           background_iou=BACKGROUND_IOU)
  return {kind: float(found['delta_ap'][name]) for kind, name in _HOTCOCO_NAMES.items()}
