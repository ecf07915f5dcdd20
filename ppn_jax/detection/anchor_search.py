"""Search for anchors that match given boxes better, by a few changes of the config."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.detection.structures import Array

Grids = Sequence[tuple[int, int]]

_SCALES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7,
           0.8, 0.95)
_LARGEST_MIN_SCALE = 0.3  # Larger scales are tried as max_scale only.
_RATIOS = (1.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_MAX_CHANGES = 3
# A change must match this share more of all boxes, and of those that no anchor matches yet.
_MIN_GAIN, _MIN_RELATIVE_GAIN = 0.02, 0.2
# Boxes that candidates are tried on: enough to tell shares apart to about two percent.
_SAMPLE_SIZE = 600
_MAX_PAIRS = 2**22  # Overlaps that are computed at a time.


class Change(NamedTuple):
  """Change of one config entry, on top of those before it in a list.

  Fields:
    key: a key of the config, such as 'model.anchors.min_scale'.
    value: its new value.
    matched: bool [N], which of the boxes then overlap an anchor by `matched_iou`.
    cost: arithmetic of the network relative to the present one, roughly.
  """
  key: str
  value: Any
  matched: Array
  cost: float


def best_iou(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
  """Computes the IoU of each box with its best anchor: [N, 4], [A, 4] -> [N]."""
  step = max(_MAX_PAIRS // len(anchors), 1)
  return np.concatenate([np.zeros(0, np.float32), *(
      box_ops.iou(boxes[start:start + step], anchors).max(axis=1)
      for start in range(0, len(boxes), step))])


def search(boxes: np.ndarray, labels: np.ndarray, options: Mapping[str, Any],
           grids: Mapping[ImageSize, Grids], image_size: ImageSize, matched_iou: float, *,
           shared_head: bool = True) -> list[Change]:
  """Finds a few changes, the most useful first, with which more boxes overlap an anchor.

  The objective is half the share of all boxes and half the mean of the classes' shares, so that a
  rare class of small objects is not lost among large ones. The unmatched share is weighted by the
  square root of the cost, so larger images must match more boxes than other anchors do.

  Args:
    boxes: [N, 4], 0 to 1 of the image.
    labels: [N].
    options: present arguments of `ssd_anchors`.
    grids: for each image size of the same aspect ratio that may be proposed, the grid sizes of its
      pyramid.
    image_size: present size of the input, a key of `grids`.
    matched_iou: least IoU that counts as a match.
    shared_head: whether all levels need the same number of anchors per cell.

  Returns:
    At most three changes, each to be made on top of those before it. A key may occur twice; the
    later value replaces the earlier.
  """
  weights = _weights(labels)
  sample = np.unique(np.linspace(0, len(boxes) - 1, min(_SAMPLE_SIZE, len(boxes))).astype(int))
  # A sample would have few boxes of small classes, so all of theirs are added.
  sample = np.union1d(sample, _indices_of_small_classes(labels))

  def matched(state: Mapping[str, Any], chosen: np.ndarray) -> np.ndarray:
    anchors = ssd_anchors(grids[state['image_size']], state['image_size'],
                          **{k: v for k, v in state.items() if k != 'image_size'})
    return best_iou(boxes[chosen], anchors.boxes) >= matched_iou

  def unmatched_share(state: Mapping[str, Any]) -> float:
    weight = weights[sample]
    return float(weight[~matched(state, sample)].sum() / weight.sum())

  state = {**ssd_anchors.__kwdefaults__, **options, 'image_size': image_size}
  present, changes = unmatched_share(state), []
  side = lambda size: sides_of(size)[0]
  cost = lambda state: (side(state['image_size']) / side(image_size)) ** 2
  while len(changes) < _MAX_CHANGES:
    tried = []
    for key, value in _candidates(state, grids, boxes, shared_head):
      after = {**state, key: value}
      left = unmatched_share(after)
      if present - left >= max(_MIN_GAIN, _MIN_RELATIVE_GAIN * present):
        # The number settles ties, so that values are never compared.
        tried.append((left * cost(after) ** 0.5, left, len(tried), key, value))
    if not tried:
      break
    _, left, _, key, value = min(tried)
    state, present = {**state, key: value}, left
    path = f'model.{key}' if key == 'image_size' else f'model.anchors.{key}'
    changes.append(Change(path, value, matched(state, np.arange(len(boxes))), cost(state)))
  return changes


def _candidates(state: Mapping[str, Any], grids: Mapping[ImageSize, Grids],
                boxes: np.ndarray, shared_head: bool) -> Iterator[tuple[str, Any]]:
  """Yields every (key, value) that might replace a present one, nearest values first."""
  low, high = state['min_scale'], state['max_scale']
  nearest = lambda to: sorted(_SCALES, key=lambda scale: abs(np.log(scale / to)))
  largest = min(high, _LARGEST_MIN_SCALE)
  yield from (('min_scale', s) for s in nearest(low) if s != low and s <= largest)
  yield from (('max_scale', s) for s in nearest(high) if s != high and s > low)
  yield from (('aspect_ratios', ratios) for ratios in _ratios(state['aspect_ratios'], boxes))
  if state['reduce_lowest_level'] or not shared_head:
    yield 'reduce_lowest_level', not state['reduce_lowest_level']
  yield from (('image_size', size) for size in sorted(grids, key=sides_of)
             if sides_of(size) > sides_of(state['image_size']))


def _ratios(present: Sequence[float], boxes: np.ndarray) -> Iterator[tuple[float, ...]]:
  """Yields the present ratios with one or two others that boxes have: wide, high or both."""
  size = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
  low, high = np.percentile(size[:, 1] / size[:, 0], (2, 98))
  new = [r for r in _RATIOS if not any(abs(np.log(r / p)) < 0.1 for p in present)]
  for count in (1, 2):
    for wide in itertools.combinations(new, count):
      added = [r for ratio in wide for r in (ratio, round(1 / ratio, 4)) if low <= r <= high]
      if added:
        yield (*present, *added)


def _weights(labels: np.ndarray) -> np.ndarray:
  """Returns each box's weight [N]: half of all weight goes to boxes equally, half to classes."""
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return 0.5 / len(labels) + 0.5 / (len(count) * count[index])


def _indices_of_small_classes(labels: np.ndarray) -> np.ndarray:
  """Returns indices of boxes of classes that have at most 50, no more than `_SAMPLE_SIZE`."""
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return np.flatnonzero(count[index] <= 50)[:_SAMPLE_SIZE]
