"""The confusion matrix of detections, and the results of each image."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.metrics import matching

MIN_IOU = 0.5


class ImageResult(NamedTuple):
  """What was right and wrong in an image, at given thresholds.

  Attributes:
    image_id: of the data set.
    file_name: '' if the data set names none.
    objects: ground-truth boxes, without crowds.
    correct: detections that match one of their class.
    confused: detections that match one of another class.
    background: other wrong detections.
    missed: objects that nothing of their class matches.
  """
  image_id: int
  file_name: str
  objects: int
  correct: int
  confused: int
  background: int
  missed: int

  @property
  def errors(self) -> int:
    """Number of wrong detections and missed objects."""
    return self.confused + self.background + self.missed


class PairedDetections(NamedTuple):
  """One-to-one pairs of N detections and the annotations, of any class.

  Attributes:
    annotation: i64 [N], position of the annotation, -1 for none.
    ignored: bool [N], in a crowd, or below its threshold.
  """
  annotation: np.ndarray
  ignored: np.ndarray


def keep_from(rows: Sequence[Mapping[str, Any]], thresholds: Mapping[int, float]) -> np.ndarray:
  """Returns which rows score at least the threshold of their category id, bool [N]."""
  return np.array([r['score'] >= thresholds[r['category_id']] for r in rows], bool)


def pair(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], kept: np.ndarray
         ) -> PairedDetections:
  """Pairs detections with annotations, first within classes, then across.

  Within a class they are matched as COCO does at IoU 0.5. Then each detection that is left, in
  order of score, takes the annotation of its image that it overlaps most, of those that are left,
  if their IoU is at least 0.5. So every object and every detection counts once.

  Args:
    ground_truth: COCO instances dict.
    rows: N detections, see `coco.to_rows`.
    kept: bool [N], detections that take part.
  """
  annotation, ignored = np.full(len(rows), -1), ~kept
  annotation[kept], ignored[kept] = matching.match(
      ground_truth, [r for r, keep in zip(rows, kept, strict=True) if keep], min_iou=MIN_IOU)
  taken = set(annotation[annotation >= 0].tolist())
  free = collections.defaultdict(list)
  for at, a in enumerate(ground_truth['annotations']):
    if at not in taken and not a.get('iscrowd', 0):
      free[a['image_id']].append(at)
  wrong = collections.defaultdict(list)
  for i in np.flatnonzero((annotation < 0) & ~ignored).tolist():
    wrong[rows[i]['image_id']].append(i)
  for image in wrong.keys() & free.keys():
    places = sorted(wrong[image], key=lambda i: -rows[i]['score'])
    overlap = box_ops.iou(
        matching.corners([rows[i]['bbox'] for i in places]),
        matching.corners([ground_truth['annotations'][at]['bbox'] for at in free[image]]))
    for i, row in zip(places, overlap, strict=True):
      best = int(row.argmax())
      if row[best] >= MIN_IOU:
        annotation[i] = free[image][best]
        overlap[:, best] = -1
  return PairedDetections(annotation, ignored)


def confusion_matrix(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
                     paired: PairedDetections) -> np.ndarray:
  """Counts pairs by class.

  Returns:
    i64 [C + 1, C + 1]: objects of the row's class that were found as the column's. The last column
    counts objects that were missed, the last row detections without an object.
  """
  labels = {i: k for k, i in enumerate(sorted(c['id'] for c in ground_truth['categories']))}
  matrix = np.zeros((len(labels) + 1,) * 2, np.int64)
  annotations, found = ground_truth['annotations'], set()
  for i in np.flatnonzero(~paired.ignored).tolist():
    at = int(paired.annotation[i])
    found.add(at)
    truth = len(labels) if at < 0 else labels[annotations[at]['category_id']]
    matrix[truth, labels[rows[i]['category_id']]] += 1
  for at, a in enumerate(annotations):
    if at not in found and not a.get('iscrowd', 0):
      matrix[labels[a['category_id']], len(labels)] += 1
  return matrix


def image_results(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
                  paired: PairedDetections) -> list[ImageResult]:
  """Returns the results of all images, those with the most errors first.

  Of equal ones, those with more objects come first, then in order of the data set.
  """
  counts = {image['id']: collections.Counter() for image in ground_truth['images']}
  annotations = ground_truth['annotations']
  for a in annotations:
    counts[a['image_id']]['objects'] += not a.get('iscrowd', 0)
  for i in np.flatnonzero(~paired.ignored).tolist():
    at = int(paired.annotation[i])
    kind = ('background' if at < 0 else
            'correct' if annotations[at]['category_id'] == rows[i]['category_id'] else 'confused')
    counts[rows[i]['image_id']][kind] += 1
  results = [ImageResult(
      image['id'], str(image.get('file_name', '')), c['objects'], c['correct'], c['confused'],
      c['background'], c['objects'] - c['correct'])
      for image in ground_truth['images'] for c in [counts[image['id']]]]
  return sorted(results, key=lambda r: (-r.errors, -r.objects))
