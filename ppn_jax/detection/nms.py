"""Post-processing: from the network's outputs to detections, with non-maximum suppression.

Greedy non-maximum suppression per class visits every (anchor, class) pair in order of score, but
the first few hundred decide its result. So the pairs are taken in rounds of `candidates`, and one
round nearly always suffices. Shapes are static and the pairs are never sorted in full, yet the
result always equals that of the plain algorithm.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.structures import Anchors, Array, Detections, Outputs
from ppn_jax.errors import InputError

_SUPPRESSED = -1.0  # Replaces the score of a pair that is no candidate; scores are above it.


def postprocess(outputs: Outputs, anchors: Anchors, *, class_spec: ClassLogitsSpec,
                score_threshold: float = 1e-8, iou_threshold: float = 0.6,
                cross_class_iou: float = 1.0, max_per_class: int = 100, max_detections: int = 100,
                candidates: int = 256) -> Detections:
  """Decodes and scores boxes, and suppresses all but the best of those that show the same object.

  Within a class, a box is suppressed if its IoU with a kept box of higher score exceeds
  `iou_threshold`; unclipped boxes are compared. The kept boxes of all classes are merged by score
  and clipped to the image, and those without area inside it are dropped. An anchor may be reported
  for several classes. Ties go to the lower anchor, then the lower label.

  With `cross_class_iou` below 1, a box is also suppressed if its IoU with a kept box of any class
  and higher score exceeds that, so that an object is not reported as two classes.

  Boxes that are not finite (if the network diverged or `exp` overflowed) and scores that are NaN
  are ignored: they are not reported and suppress nothing.

  Args:
    outputs: predictions for B images, any float type; computed in float32.
    anchors: the boxes that the codes refer to, and their levels.
    class_spec: layout of the class logits; a background takes no part.
    score_threshold: only pairs with a score above this are considered; 0 to 1.
    iou_threshold: 0 to 1; at 1 nothing is suppressed.
    cross_class_iou: 0 to 1; at 1 classes do not suppress one another.
    max_per_class: largest number of boxes of a class that are kept.
    max_detections: K of the result.
    candidates: number of pairs that a round looks at. It changes the time, never the result; 256
      was the fastest on trained and on untrained scores.

  Returns:
    K detections for each image, best score first.

  Raises:
    InputError: If a threshold is outside its range, or a count is below 1.
  """
  _check(dict(score_threshold=score_threshold, iou_threshold=iou_threshold,
              cross_class_iou=cross_class_iou),
         dict(max_per_class=max_per_class, max_detections=max_detections, candidates=candidates))
  scores = class_spec.scores(outputs.class_logits.astype(jnp.float32))
  boxes = box_ops.decode(outputs.box_codes.astype(jnp.float32), jnp.asarray(anchors.boxes))
  found = batched_nms(
      boxes, scores, score_threshold=score_threshold, limits=Limits(
          iou_threshold, cross_class_iou, max_per_class),
      max_detections=max_detections, candidates=candidates)
  kept = jnp.take_along_axis(boxes, found.anchor[..., None], axis=1)
  valid = jnp.arange(max_detections) < found.count[:, None]
  return Detections(
      boxes=jnp.where(valid[..., None], box_ops.clip(kept), 0),
      scores=jnp.where(valid, found.score, 0),
      labels=jnp.where(valid, found.label, 0),
      level=jnp.where(valid, jnp.asarray(anchors.level)[found.anchor], 0),
      valid=valid)


class Limits(NamedTuple):
  """What decides whether a pair is suppressed; see `postprocess`."""
  iou_threshold: float
  cross_class_iou: float
  max_per_class: int

  @property
  def across_classes(self) -> bool:
    """Whether classes suppress one another."""
    return self.cross_class_iou < 1


class _Pairs(NamedTuple):
  """(anchor, class) pairs of one round, N of them, best first."""
  anchor: Array  # i32 [N].
  label: Array  # i32 [N].
  score: Array  # f32 [N].
  kept: Array  # bool [N], not suppressed.


class _Found(NamedTuple):
  """Detections so far, in the first `count` entries."""
  anchor: Array  # i32 [K].
  label: Array  # i32 [K].
  score: Array  # f32 [K].
  count: Array  # i32 [].


class _State(NamedTuple):
  """State passed from one round to the next."""
  scores: Array  # f32 [A, C]; _SUPPRESSED where suppressed or never a candidate.
  per_class: Array  # i32 [C], boxes kept so far, those outside the image included.
  last: _Pairs
  found: _Found


def batched_nms(boxes: Array, scores: Array, *, score_threshold: float, limits: Limits,
                 max_detections: int, candidates: int) -> _Found:
  """Finds the best `max_detections` of boxes [B, A, 4] with scores [B, A, C] in each image.

  See `postprocess`.
  """
  visible = box_ops.area(box_ops.clip(boxes)) > 0
  is_candidate = (scores > score_threshold) & jnp.isfinite(boxes).all(-1, keepdims=True)
  scores = jnp.where(is_candidate, scores, _SUPPRESSED)

  def run_round(scores: Array, per_class: Array, found: _Found, boxes: Array,
                visible: Array) -> _State:
    pairs = _best_pairs(scores, candidates)
    pairs, per_class = _greedy_nms(pairs, boxes, per_class, limits)
    return _State(scores, per_class, pairs, _collect(found, pairs, visible))

  def next_round(state: _State) -> _State:
    scores = _suppress(state, boxes, limits)
    return jax.vmap(run_round)(scores, state.per_class, state.found, boxes, visible)

  def unfinished(state: _State) -> Array:
    # Pairs are in order of score: if the last one is suppressed, no candidate is left.
    return ((state.found.count < max_detections) & (state.last.score[:, -1] > _SUPPRESSED)).any()

  batch, _, num_classes = scores.shape
  empty = jnp.zeros((batch, max_detections), jnp.int32)
  nothing = _Found(empty, empty, empty.astype(jnp.float32), jnp.zeros(batch, jnp.int32))
  first = jax.vmap(run_round)(
      scores, jnp.zeros((batch, num_classes), jnp.int32), nothing, boxes, visible)
  # The loop runs until the last image is done; further rounds change nothing for the others.
  return lax.while_loop(unfinished, next_round, first).found


def _best_pairs(scores: Array, candidates: int) -> _Pairs:
  """Finds the n = `candidates` best pairs of scores [A, C], in order.

  The order is total: score descending, then anchor, then class ascending. First the n anchors of
  the largest row maxima are chosen (of equal ones the lower index), then the n best pairs of their
  rows. No pair is lost: for an anchor `a` that is left out, n anchors are ahead of it, each with a
  maximum that is larger than all of a's scores, or equal to a's and of lower index. Their n best
  pairs all precede every pair of `a`. The rows are gathered in index order, so that `top_k`, which
  prefers the lower index, settles ties as the order requires.
  """
  num_anchors, num_classes = scores.shape
  _, rows = lax.top_k(scores.max(axis=1), min(candidates, num_anchors))
  rows = jnp.sort(rows)
  best, at = lax.top_k(scores[rows].reshape(-1), min(candidates, rows.size * num_classes))
  return _Pairs(rows[at // num_classes], at % num_classes, best, kept=best > _SUPPRESSED)


def _greedy_nms(pairs: _Pairs, boxes: Array, per_class: Array, limits: Limits
                ) -> tuple[_Pairs, Array]:
  """Suppresses greedily among the pairs of a round; returns them with the new counts per class.

  A pair is kept if no earlier kept pair of its class overlaps it. Applying this rule to all pairs
  at once, starting with all kept, settles pair i after at most i passes. The rule has only one
  solution, so a pass that changes nothing has found the greedy result; in practice after a handful
  of passes.
  """
  position = jnp.arange(pairs.anchor.size)
  is_later = position[:, None] > position
  ranks_below = (pairs.label[:, None] == pairs.label) & is_later
  pair_boxes = boxes[pairs.anchor]
  overlap = box_ops.iou(pair_boxes, pair_boxes)
  suppressed_by = ranks_below & (overlap > limits.iou_threshold)
  if limits.across_classes:
    suppressed_by |= is_later & (overlap > limits.cross_class_iou)

  def has_room(kept: Array) -> Array:
    return per_class[pairs.label] + _count(ranks_below, kept) < limits.max_per_class

  def settle(state: tuple[Array, Array]) -> tuple[Array, Array]:
    kept, _ = state
    settled = pairs.kept & (_count(suppressed_by, kept) == 0)
    # A pair that its full class leaves out suppresses no other class.
    return settled & has_room(kept) if limits.across_classes else settled, kept

  kept, _ = lax.while_loop(lambda state: (state[0] != state[1]).any(), settle,
                           settle((pairs.kept, pairs.kept)))
  kept &= has_room(kept)
  of_class = pairs.label == jnp.arange(per_class.size)[:, None]
  return pairs._replace(kept=kept), per_class + _count(of_class, kept)


def _count(table: Array, chosen: Array) -> Array:
  """Counts in each row of a table bool [N, M] those chosen by bool [M] (or [M, P]); i32.

  A matrix product is the fastest way on every platform; sums of 0 and 1 up to 2^24 are exact in
  float32, whatever the precision of the factors.
  """
  return jnp.dot(table.astype(jnp.bfloat16), chosen.astype(jnp.bfloat16),
                 preferred_element_type=jnp.float32).astype(jnp.int32)


def _collect(found: _Found, pairs: _Pairs, visible: Array) -> _Found:
  """Appends the kept pairs that have area inside the image, as long as there is room."""
  kept = pairs.kept & visible[pairs.anchor]
  room = found.anchor.size
  slot = jnp.where(kept, found.count + jnp.cumsum(kept) - 1, room)

  def append(into: Array, new: Array) -> Array:
    return into.at[slot].set(new, mode='drop')

  return _Found(append(found.anchor, pairs.anchor), append(found.label, pairs.label),
                append(found.score, pairs.score),
                jnp.minimum(found.count + kept.sum(dtype=jnp.int32), room))


def _suppress(state: _State, boxes: Array, limits: Limits) -> Array:
  """Removes from the scores [B, A, C] what cannot be detected after the last round.

  These are the pairs of that round, those that its kept pairs suppress, and classes that are full.
  Only second and later rounds pay for this.
  """
  pairs, scores = state.last, state.scores
  _, num_anchors, num_classes = scores.shape
  # A round takes a prefix of the order, so comparing a pair with its last one shows if it is taken.
  index = jnp.arange(num_anchors * num_classes).reshape(num_anchors, num_classes)
  end = pairs.score[:, -1, None, None]
  end_index = (pairs.anchor * num_classes + pairs.label)[:, -1, None, None]
  taken = (scores > end) | ((scores == end) & (index <= end_index))
  full = (state.per_class >= limits.max_per_class)[:, None]

  # Kept pairs are moved to the front and handled 32 at a time. In an anchor's word, bit j means
  # that kept pair j overlaps it; in a class's word, that kept pair j belongs to it.
  order = jnp.argsort(~pairs.kept, axis=1)
  anchor, label, kept = (jnp.take_along_axis(x, order, 1)
                         for x in (pairs.anchor, pairs.label, pairs.kept))
  block = min(32, order.shape[1])
  bits = jnp.uint32(1) << jnp.arange(block, dtype=jnp.uint32)

  def suppress_block(i: Array, suppressed: Array) -> Array:
    # The last slice is shifted back to fit; suppressing twice does no harm.
    block_anchor, block_label, block_kept = (
        lax.dynamic_slice_in_dim(x, i * block, block, 1) for x in (anchor, label, kept))
    block_boxes = jnp.take_along_axis(boxes, block_anchor[..., None], 1)
    overlap = box_ops.iou(boxes, block_boxes)
    members = block_kept[:, None] & (
        block_label[:, None] == jnp.arange(num_classes)[:, None])
    of_anchor, of_class = (jnp.where(table, bits, 0).sum(-1, dtype=jnp.uint32)
                           for table in (overlap > limits.iou_threshold, members))
    suppressed |= of_anchor[:, :, None] & of_class[:, None] != 0
    if limits.across_classes:
      overlaps_kept = (overlap > limits.cross_class_iou) & block_kept[:, None]
      suppressed |= overlaps_kept.any(-1)[:, :, None]
    return suppressed

  blocks = (pairs.kept.sum(axis=1).max() + block - 1) // block
  suppressed = lax.fori_loop(0, blocks, suppress_block, taken | full)
  return jnp.where(suppressed, _SUPPRESSED, scores)


def _check(shares: Mapping[str, float], counts: Mapping[str, int]) -> None:
  """Raises InputError if an option of `postprocess` is outside its range."""
  for name, value in shares.items():
    if not 0 <= value <= 1:
      raise InputError(f'postprocess: {name} is {value!r}; legal: 0 to 1')
  for name, value in counts.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise InputError(f'postprocess: {name} is {value!r}; legal: an integer of at least 1')
