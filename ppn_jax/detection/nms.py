"""From what the network says of every anchor to what is reported of an image.

Greedy non-maximum suppression per class looks at every (anchor, class) pair in order of
score; its result is decided by the first few hundred. So the pairs are taken in rounds of
`candidates`, and one round nearly always suffices. Shapes are static and nothing is sorted
in full, yet the result is that of the plain algorithm, always.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.class_logits import ClassColumns
from ppn_jax.detection.structures import Anchors, Array, Detections, Outputs
from ppn_jax.errors import InputError

_GONE = -1.0  # In place of a score that is out of the race; scores are above it.


def postprocess(outputs: Outputs, anchors: Anchors, *, columns: ClassColumns,
                score_threshold: float = 1e-8, iou_threshold: float = 0.6,
                max_per_class: int = 100, max_detections: int = 100,
                candidates: int = 256) -> Detections:
  """Decodes boxes, scores them and keeps the best of those that show the same object.

  Within a class a box is suppressed when its IoU with a better box that was kept exceeds
  `iou_threshold`; unclipped boxes are compared. The survivors of all classes are merged by
  score, clipped to the image, and those without area inside it are dropped. One anchor may
  be reported for several classes. Equal scores go to the lower anchor, then the lower label.

  Boxes that are not finite (a network that diverged, `exp` that overflowed) and scores that
  are NaN take no part: they are not reported and suppress nothing.

  Args:
    outputs: of B images, any float type; computed in float32.
    anchors: the boxes that the codes refer to, and their levels.
    columns: what the class logits mean; a background column takes no part.
    score_threshold: a pair takes part when its score is above this; 0 to 1.
    iou_threshold: 0 to 1; at 1 nothing is suppressed.
    max_per_class: how many boxes of a class may survive.
    max_detections: K of the result.
    candidates: how many pairs a round looks at. It changes the time, never the result; 256
      was the fastest on trained and on untrained scores.

  Raises:
    InputError: a threshold outside its range, a count below 1.
  """
  _check(score_threshold, iou_threshold, max_per_class, max_detections, candidates)
  scores = columns.scores(outputs.class_logits.astype(jnp.float32))
  boxes = box_ops.decode(outputs.box_codes.astype(jnp.float32), jnp.asarray(anchors.boxes))
  found = _suppress(
      boxes, scores, score_threshold=score_threshold, iou_threshold=iou_threshold,
      max_per_class=max_per_class, max_detections=max_detections, candidates=candidates)
  picked = jnp.take_along_axis(boxes, found.anchor[..., None], axis=1)
  valid = jnp.arange(max_detections) < found.count[:, None]
  return Detections(
      boxes=jnp.where(valid[..., None], box_ops.clip(picked), 0),
      scores=jnp.where(valid, found.score, 0),
      labels=jnp.where(valid, found.label, 0),
      level=jnp.where(valid, jnp.asarray(anchors.level)[found.anchor], 0),
      valid=valid)


class _Pairs(NamedTuple):
  """The (anchor, class) pairs of one round, best first, N of them."""
  anchor: Array  # i32 [N].
  label: Array  # i32 [N].
  score: Array  # f32 [N].
  kept: Array  # bool [N], survives the suppression.


class _Found(NamedTuple):
  """The detections so far; the first `count` entries are theirs."""
  anchor: Array  # i32 [K].
  label: Array  # i32 [K].
  score: Array  # f32 [K].
  count: Array  # i32 [].


class _State(NamedTuple):
  """What one round hands to the next."""
  scores: Array  # f32 [A, C]; _GONE where suppressed or never in the race.
  per_class: Array  # i32 [C], survivors so far, those outside the image included.
  last: _Pairs
  found: _Found


def _suppress(boxes: Array, scores: Array, *, score_threshold: float, iou_threshold: float,
              max_per_class: int, max_detections: int, candidates: int) -> _Found:
  """Boxes [B, A, 4] and scores [B, A, C] -> the first `max_detections` survivors of each image."""
  visible = box_ops.area(box_ops.clip(boxes)) > 0
  racing = (scores > score_threshold) & jnp.isfinite(boxes).all(-1, keepdims=True)
  scores = jnp.where(racing, scores, _GONE)

  def round_(scores: Array, per_class: Array, found: _Found, boxes: Array,
             visible: Array) -> _State:
    pairs = _best_pairs(scores, candidates)
    pairs, per_class = _greedy(pairs, boxes, per_class, iou_threshold, max_per_class)
    return _State(scores, per_class, pairs, _collect(found, pairs, visible))

  def next_round(state: _State) -> _State:
    scores = _strike_out(state, boxes, iou_threshold, max_per_class)
    return jax.vmap(round_)(scores, state.per_class, state.found, boxes, visible)

  def unfinished(state: _State) -> Array:
    # The pairs come best first: a round that ended on one that is gone has emptied the race.
    return ((state.found.count < max_detections) & (state.last.score[:, -1] > _GONE)).any()

  batch, _, num_classes = scores.shape
  empty = jnp.zeros((batch, max_detections), jnp.int32)
  nothing = _Found(empty, empty, empty.astype(jnp.float32), jnp.zeros(batch, jnp.int32))
  first = jax.vmap(round_)(
      scores, jnp.zeros((batch, num_classes), jnp.int32), nothing, boxes, visible)
  # The loop runs until the last image is done; further rounds change nothing for the others.
  return lax.while_loop(unfinished, next_round, first).found


def _best_pairs(scores: Array, candidates: int) -> _Pairs:
  """The best pairs of scores [A, C], in order.

  The order is total: score descending, then anchor, then class ascending. First come the n
  anchors of the largest row maxima (of equal ones the lower index), then the n best pairs
  of their rows. No pair is lost: for an anchor `a` left out, n anchors are ahead of it, each
  with a maximum that is larger than all of a's scores, or equal to a's and of lower index.
  Their n best pairs all precede every pair of `a`. The rows are gathered in index order, so
  that `top_k`, which prefers the lower index, settles ties as the order demands.
  """
  num_anchors, num_classes = scores.shape
  _, rows = lax.top_k(scores.max(axis=1), min(candidates, num_anchors))
  rows = jnp.sort(rows)
  best, at = lax.top_k(scores[rows].reshape(-1), min(candidates, rows.size * num_classes))
  return _Pairs(rows[at // num_classes], at % num_classes, best, kept=best > _GONE)


def _greedy(pairs: _Pairs, boxes: Array, per_class: Array, iou_threshold: float,
            max_per_class: int) -> tuple[_Pairs, Array]:
  """Greedy suppression among the pairs of a round, and the class counts that result.

  A pair survives if no earlier surviving pair of its class overlaps it. Starting from all
  and applying that rule to everything at once settles pair i after at most i passes, and the
  rule has one solution only, so a pass that changes nothing has found the greedy result.
  In practice it takes a handful of passes.
  """
  position = jnp.arange(pairs.anchor.size)
  rival = (pairs.label[:, None] == pairs.label) & (position[:, None] > position)
  picked = boxes[pairs.anchor]
  beaten_by = rival & (box_ops.iou(picked, picked) > iou_threshold)

  def settle(state: tuple[Array, Array]) -> tuple[Array, Array]:
    kept, _ = state
    return pairs.kept & (_count(beaten_by, kept) == 0), kept

  kept, _ = lax.while_loop(lambda state: (state[0] != state[1]).any(), settle,
                           settle((pairs.kept, pairs.kept)))
  kept &= per_class[pairs.label] + _count(rival, kept) < max_per_class
  of_class = pairs.label == jnp.arange(per_class.size)[:, None]
  return pairs._replace(kept=kept), per_class + _count(of_class, kept)


def _count(table: Array, chosen: Array) -> Array:
  """bool [N, M] and bool [M] (or [M, P]) -> i32, how many of the chosen each row holds.

  A product of matrices is the fastest way to it everywhere; sums of 0 and 1 up to 2^24 are
  exact in float32, whatever the precision of the factors.
  """
  return jnp.dot(table.astype(jnp.bfloat16), chosen.astype(jnp.bfloat16),
                 preferred_element_type=jnp.float32).astype(jnp.int32)


def _collect(found: _Found, pairs: _Pairs, visible: Array) -> _Found:
  """Appends the survivors that have area inside the image, as long as there is room."""
  kept = pairs.kept & visible[pairs.anchor]
  room = found.anchor.size
  slot = jnp.where(kept, found.count + jnp.cumsum(kept) - 1, room)

  def append(into: Array, new: Array) -> Array:
    return into.at[slot].set(new, mode='drop')

  return _Found(append(found.anchor, pairs.anchor), append(found.label, pairs.label),
                append(found.score, pairs.score),
                jnp.minimum(found.count + kept.sum(dtype=jnp.int32), room))


def _strike_out(state: _State, boxes: Array, iou_threshold: float, max_per_class: int) -> Array:
  """The scores [B, A, C] without what the last round took, what its survivors suppress, and
  classes that are full. Only a second and later rounds pay for this.
  """
  pairs, scores = state.last, state.scores
  _, num_anchors, num_classes = scores.shape
  # A round takes a prefix of the order, so its last pair tells for every pair if it was taken.
  index = jnp.arange(num_anchors * num_classes).reshape(num_anchors, num_classes)
  end = pairs.score[:, -1, None, None]
  end_index = (pairs.anchor * num_classes + pairs.label)[:, -1, None, None]
  taken = (scores > end) | ((scores == end) & (index <= end_index))
  full = (state.per_class >= max_per_class)[:, None]

  # Survivors come in front and are worked off 32 at a time: bit j of a word says of an anchor
  # that survivor j overlaps it, of a class that survivor j belongs to it.
  order = jnp.argsort(~pairs.kept, axis=1)
  anchor, label, kept = (jnp.take_along_axis(x, order, 1)
                         for x in (pairs.anchor, pairs.label, pairs.kept))
  block = min(32, order.shape[1])
  bits = jnp.uint32(1) << jnp.arange(block, dtype=jnp.uint32)

  def beaten_by_block(i: Array, beaten: Array) -> Array:
    # The last slice is shifted back to fit; striking out twice does no harm.
    at, of, alive = (
        lax.dynamic_slice_in_dim(x, i * block, block, 1) for x in (anchor, label, kept))
    rivals = jnp.take_along_axis(boxes, at[..., None], 1)
    overlaps = box_ops.iou(boxes, rivals) > iou_threshold
    members = alive[:, None] & (of[:, None] == jnp.arange(num_classes)[:, None])
    of_anchor, of_class = (
        jnp.where(table, bits, 0).sum(-1, dtype=jnp.uint32) for table in (overlaps, members))
    return beaten | (of_anchor[:, :, None] & of_class[:, None] != 0)

  blocks = (pairs.kept.sum(axis=1).max() + block - 1) // block
  beaten = lax.fori_loop(0, blocks, beaten_by_block, taken | full)
  return jnp.where(beaten, _GONE, scores)


def _check(score_threshold: float, iou_threshold: float, max_per_class: int,
           max_detections: int, candidates: int) -> None:
  for name, value in (('score_threshold', score_threshold), ('iou_threshold', iou_threshold)):
    if not 0 <= value <= 1:
      raise InputError(f'{name} is {value!r}; legal: 0 to 1')
  counts = (('max_per_class', max_per_class), ('max_detections', max_detections),
            ('candidates', candidates))
  for name, value in counts:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise InputError(f'{name} is {value!r}; legal: an integer of at least 1')
