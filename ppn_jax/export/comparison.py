"""Compares the detections of a runtime with those of JAX."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection.structures import Detections


class Difference(NamedTuple):
  """Difference between two sets of detections on the same images.

  The counterpart of a detection has the same image and label, and is the nearest in box and score.
  If it is farther than `Tolerance` allows, the detection has none.

  Fields:
    boxes: largest difference of a box coordinate between counterparts, 0 to 1 of the image.
    scores: largest difference of a score between counterparts.
    missing: number of JAX's detections without a counterpart.
    detections: number of JAX's detections that were compared.
    same_order: whether all counterparts are at the same position.
  """
  boxes: float
  scores: float
  missing: int
  detections: int
  same_order: bool


class Tolerance(NamedTuple):
  """Difference that a correct conversion may have.

  Fields:
    boxes, scores: largest differences between counterparts.
    missing: share of detections that may have no counterpart, because an overlap or a score close
      to a threshold can fall on either side of it.
    floor: scores below this share of the highest are not compared.
  """
  boxes: float
  scores: float
  missing: float
  floor: float


# float32 differs by rounding. Half-precision weights change logits by some thousandths. With 8-bit
# activations no single detection is certain, but most of the confident ones must be found.
TOLERANCES = {'float32': Tolerance(1e-3, 1e-3, 0.01, 0.0),
              'float16': Tolerance(0.02, 0.02, 0.05, 0.05),
              'int8': Tolerance(0.3, 0.5, 0.5, 0.3)}


def compare(expected: Detections, found: Detections, tolerance: Tolerance) -> Difference:
  """Returns the difference between two sets of detections, NumPy [B, K, ...]."""
  boxes = scores = 0.0
  missing = count = 0
  same_order = True
  for row in range(len(expected.valid)):
    a, b = (Detections(*(field[row][d.valid[row]] for field in d)) for d in (expected, found))
    # If all K places are used, rounding decides which detections are last.
    last = a.scores[-1] if expected.valid[row].all() else 0
    least = max(tolerance.floor * expected.scores.max(initial=0), last * (1 + tolerance.scores))
    for i in np.flatnonzero(a.scores >= least):
      j, box, score = _counterpart(a, b, i)
      count += 1
      same_order &= i == j
      if box > tolerance.boxes or score > tolerance.scores:
        missing += 1
      else:
        boxes, scores = max(boxes, box), max(scores, score)
  return Difference(float(boxes), float(scores), missing, count, bool(same_order))


def _counterpart(a: Detections, b: Detections, i: int) -> tuple[int, float, float]:
  """Returns the index of `b`'s detection nearest to `a[i]`, and its box and score distances."""
  apart_boxes = np.abs(b.boxes - a.boxes[i]).max(-1, initial=0)
  apart_scores = np.abs(b.scores - a.scores[i])
  apart = np.where(b.labels == a.labels[i], apart_boxes + apart_scores, np.inf)
  if not np.isfinite(apart).any():
    return -1, np.inf, np.inf
  j = int(apart.argmin())
  return j, apart_boxes[j], apart_scores[j]


def is_wrong(difference: Difference, tolerance: Tolerance) -> bool:
  """Returns whether too many detections are missing for a correct conversion."""
  return difference.missing > tolerance.missing * max(difference.detections, 1)


def latency(detect: Callable[[np.ndarray], Any], images: np.ndarray, repeats: int = 10) -> float:
  """Returns the median duration of a call in seconds, after one warm-up call."""
  detect(images)
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    detect(images)
    times.append(time.perf_counter() - start)
  return float(np.median(times))
