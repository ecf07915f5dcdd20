"""Looks for anchors that fit given boxes better, by small changes of the config."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.structures import Array

Grids = Sequence[tuple[int, int]]

_SCALES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7,
           0.8, 0.95)
_LARGEST_MIN = 0.3  # Larger ones are tried as max_scale only.
_RATIOS = (1.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_MOST_CHANGES = 3
# A further change must fit so many boxes more, in points and as a share of those left, to be named.
_LEAST_POINTS, _LEAST_SHARE = 0.02, 0.2
# Boxes that candidates are tried on: their shares are then told apart to about two points.
_SAMPLE = 600
_AT_ONCE = 2**22  # Overlaps that are computed at a time.


class Change(NamedTuple):
  """One entry of the config to change, after those before it in a list.

  Fields:
    key: of the config, such as 'model.anchors.min_scale'.
    value: what to set it to.
    fits: bool [N], which of the boxes overlap an anchor by enough then.
    work: how many times the arithmetic of the network as it is, roughly.
  """
  key: str
  value: Any
  fits: Array
  work: float


def best_iou(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
  """IoU of each box with the anchor that fits best: [N, 4], [A, 4] -> [N]."""
  step = max(_AT_ONCE // len(anchors), 1)
  return np.concatenate([np.zeros(0, np.float32), *(
      box_ops.iou(boxes[at:at + step], anchors).max(axis=1)
      for at in range(0, len(boxes), step))])


def search(boxes: np.ndarray, labels: np.ndarray, options: Mapping[str, Any],
           grids: Mapping[int, Grids], image_size: int, matched_iou: float, *,
           shared_head: bool = True) -> list[Change]:
  """Finds a few changes, the most useful first, that let more boxes overlap an anchor.

  Half of what counts is the share of all boxes, half the mean of the classes' shares, so that a
  rare class of small objects is not lost among large ones. Larger images must fit more boxes than
  other anchors do, as the root of the work that they cost.

  Args:
    boxes: [N, 4], 0 to 1 of the image.
    labels: [N].
    options: of `ssd_anchors`, as they are.
    grids: the pyramid's for each side of the input in pixels that may be proposed.
    image_size: the present side, one of `grids`.
    matched_iou: the least overlap that counts as fitting.
    shared_head: whether all levels need as many anchors.

  Returns:
    At most three changes; each stands for itself and those before it, and a key that comes again
    replaces its value.
  """
  weights = _weights(labels)
  sample = np.unique(np.linspace(0, len(boxes) - 1, min(_SAMPLE, len(boxes))).astype(int))
  # Small classes are looked at whole.
  sample = np.union1d(sample, _of_small_classes(labels))

  def fits(state: Mapping[str, Any], chosen: np.ndarray) -> np.ndarray:
    anchors = ssd_anchors(grids[state['image_size']],
                          **{k: v for k, v in state.items() if k != 'image_size'})
    return best_iou(boxes[chosen], anchors.boxes) >= matched_iou

  def unfit(state: Mapping[str, Any]) -> float:
    share = weights[sample]
    return float(share[~fits(state, sample)].sum() / share.sum())

  state = {**_defaults(options), 'image_size': image_size}
  present, found = unfit(state), []
  work = lambda state: (state['image_size'] / image_size) ** 2
  while len(found) < _MOST_CHANGES:
    tried = []
    for key, value in _candidates(state, grids, boxes, shared_head):
      after = {**state, key: value}
      left = unfit(after)
      if present - left >= max(_LEAST_POINTS, _LEAST_SHARE * present):
        tried.append((left * work(after) ** 0.5, left, len(tried), key, value))
    if not tried:
      break
    _, left, _, key, value = min(tried)
    state, present = {**state, key: value}, left
    found.append(Change(f'model.{key}' if key == 'image_size' else f'model.anchors.{key}', value,
                        fits(state, np.arange(len(boxes))), work(state)))
  return found


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
  """All options of `ssd_anchors`, those that a config leaves out too."""
  return {**ssd_anchors.__kwdefaults__, **options}


def _candidates(state: Mapping[str, Any], grids: Mapping[int, Grids], boxes: np.ndarray,
                shared_head: bool) -> Iterator[tuple[str, Any]]:
  """Every (key, value) that might replace the present one, nearest first."""
  low, high = state['min_scale'], state['max_scale']
  near = lambda to: sorted(_SCALES, key=lambda scale: abs(np.log(scale / to)))
  yield from (('min_scale', s) for s in near(low) if s != low and s <= min(high, _LARGEST_MIN))
  yield from (('max_scale', s) for s in near(high) if s != high and s > low)
  yield from (('aspect_ratios', ratios) for ratios in _ratios(state['aspect_ratios'], boxes))
  if state['reduce_lowest_level'] or not shared_head:
    yield 'reduce_lowest_level', not state['reduce_lowest_level']
  yield from (('image_size', size) for size in sorted(grids) if size > state['image_size'])


def _ratios(present: Sequence[float], boxes: np.ndarray) -> Iterator[tuple[float, ...]]:
  """Present ratios with further ones: those of boxes that there are, wide, high or both."""
  size = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
  least, most = np.percentile(size[:, 1] / size[:, 0], (2, 98))
  new = [r for r in _RATIOS if not any(abs(np.log(r / p)) < 0.1 for p in present)]
  for count in (1, 2):
    for wide in itertools.combinations(new, count):
      further = [r for ratio in wide for r in (ratio, round(1 / ratio, 4)) if least <= r <= most]
      if further:
        yield (*present, *further)


def _weights(labels: np.ndarray) -> np.ndarray:
  """[N], of each box: half of all weight is spread over boxes, half over classes."""
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return 0.5 / len(labels) + 0.5 / (len(count) * count[index])


def _of_small_classes(labels: np.ndarray) -> np.ndarray:
  """Which boxes are of classes that a sample would have few of, at most as many as it has."""
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return np.flatnonzero(count[index] <= 50)[:_SAMPLE]
