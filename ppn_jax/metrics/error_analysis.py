"""What kind of mistake each wrong detection is, and what each kind costs.

The kinds and their costs are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors", ECCV 2020, section 2): of a detection that is not right at IoU 0.5,

  poorly placed    IoU of 0.1 to 0.5 with truth of its class
  wrong class      IoU of 0.5 and more with truth of another class
  duplicate        IoU of 0.5 and more with truth of its class that a better score has found
  background       IoU below 0.1 with all truth
  wrong class and place   what is left: IoU of 0.1 to 0.5 with truth of another class

the first that fits, and a truth box is

  missed           if nothing found it and no detection of the first two kinds is meant for it.

The cost of a kind is what AP50 would gain if it alone were mended: misplaced and misnamed
detections become right, unless their truth is found already; duplicates and the last two kinds of
detections vanish, and so does missed truth. Costs do not add up to 1 - AP50.
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
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1


class Errors(NamedTuple):
  """N detections and their mistakes, and the truth that was missed; NumPy."""
  kind: Array  # i64 [N], index into KINDS; NO_ERROR for what is right or ignored.
  target: Array  # i64 [N], the truth meant or found, position among the annotations, or -1.
  iou: Array  # f64 [N], with the target; of background, the largest with any truth.
  missed: Array  # i64 [M], positions among the annotations.

  def counts(self) -> dict[str, int]:
    """How many there are of each kind."""
    found = np.bincount(self.kind[self.kind >= 0], minlength=len(KINDS))
    found[MISSED] = len(self.missed)
    return dict(zip(KINDS, found.tolist(), strict=True))


def classify(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
             floor: float = 0.0) -> Errors:
  """The kind of every mistake among rows of `coco.to_rows`; see the module.

  Crowds are no truth here; detections in them are ignored.

  Args:
    ground_truth: COCO instances dict.
    rows: N detections.
    floor: detections of a lower score are no errors, and find nothing.
  """
  weak = np.array([r['score'] < floor for r in rows], bool)
  taken, ignored = np.full(len(rows), -1), weak.copy()
  taken[~weak], ignored[~weak] = matching.pair(
      ground_truth, [r for r in rows if r['score'] >= floor], min_iou=FOREGROUND_IOU)
  kind, target, iou = np.full(len(rows), NO_ERROR), taken.copy(), np.zeros(len(rows))
  truth, found = collections.defaultdict(list), collections.defaultdict(list)
  for at, annotation in enumerate(ground_truth['annotations']):
    if not annotation.get('iscrowd', 0):
      truth[annotation['image_id']].append(at)
  for i in np.flatnonzero(~ignored).tolist():
    found[rows[i]['image_id']].append(i)
  for image, members in found.items():
    wanted = truth.get(image, [])
    wrong = [i for i in members if taken[i] < 0]
    kind[wrong], target[wrong], iou[wrong] = _of_image(
        [rows[i] for i in wrong], [ground_truth['annotations'][at] for at in wanted], wanted)
  hit = np.concatenate([taken[taken >= 0],
                        target[np.isin(kind, (WRONG_CLASS, POORLY_PLACED))]]).astype(int)
  every = np.array([at for members in truth.values() for at in members], int)
  return Errors(kind, target, iou, np.setdiff1d(every, hit))


def _of_image(rows: Sequence[Mapping], annotations: Sequence[Mapping], places: Sequence[int]
              ) -> tuple[Array, Array, Array]:
  """Kind, target and IoU of the wrong detections of an image."""
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
  target = np.asarray(places)[np.where(of_own, own.argmax(axis=1), other.argmax(axis=1))]
  iou = np.where(of_own, best_own, best_other)
  nothing = kind == BACKGROUND
  return kind, np.where(nothing, -1, target), np.where(nothing, overlap.max(axis=1), iou)


def costs(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], errors: Errors, *,
          scorer: str = 'hotcoco') -> dict[str, float]:
  """Kind -> what AP50 gains, 0 to 1, if mistakes of this kind alone were mended.

  Args:
    ground_truth, rows: as classified, with a floor of 0.
    errors: of `classify`.
    scorer: see `coco.score`.
  """
  ap50 = lambda truth, rows: coco.score(truth, rows, scorer=scorer).metrics['AP50'] or 0.0
  as_is, gains = ap50(ground_truth, rows), {}
  for kind, name in enumerate(KINDS):
    truth, mended = _mended(ground_truth, rows, errors, kind)
    gains[name] = ap50(truth, mended) - as_is
  return gains


def _mended(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], errors: Errors,
            kind: int) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
  """Truth and rows without the mistakes of one kind."""
  if kind == MISSED:
    missed = set(errors.missed.tolist())
    kept = [a for at, a in enumerate(ground_truth['annotations']) if at not in missed]
    return {**ground_truth, 'annotations': kept}, list(rows)
  right = errors.kind == NO_ERROR
  found = set(errors.target[right & (errors.target >= 0)].tolist())
  mended = [row for row, k in zip(rows, errors.kind.tolist(), strict=True) if k != kind]
  if kind in (WRONG_CLASS, POORLY_PLACED):
    for i in sorted(np.flatnonzero(errors.kind == kind).tolist(), key=lambda i: -rows[i]['score']):
      at = int(errors.target[i])
      if at not in found:
        found.add(at)
        truth = ground_truth['annotations'][at]
        mended.append({**rows[i], 'category_id': truth['category_id'], 'bbox': truth['bbox']})
  return ground_truth, mended
