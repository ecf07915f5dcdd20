"""Which truth box each anchor has to predict."""

import jax
import jax.numpy as jnp

from ppn_jax.detection import boxes
from ppn_jax.detection.structures import Anchors, Array, GroundTruth, Targets
from ppn_jax.errors import InputError

# An anchor is neither right nor wrong where this share of what the image shows of it lies in a
# crowd box.
CROWD_COVERAGE = 0.5


def assign(anchors: Anchors, truth: GroundTruth, *, matched_iou: float = 0.5,
           force_match: bool = True, ignore_crowd: bool = True) -> Targets:
  """Decides what each anchor should predict (SSD, section 2.2, "Matching strategy").

  An anchor is positive for the truth box that it overlaps most, the first of equals, if their
  IoU reaches `matched_iou`. With `force_match` each truth box also claims the anchor that
  overlaps it most, whatever the IoU and whatever that anchor's own match; where several claim
  one anchor, the first truth box gets it.

  Args:
    anchors: A anchors.
    truth: G truth boxes for each of B images; rows that are not valid take no part.
    matched_iou: least IoU of a positive anchor, above 0 and at most 1.
    force_match: whether each truth box claims its best anchor.
    ignore_crowd: crowd boxes get no anchor, and anchors half covered by one are ignored unless
      positive; of anchors that reach over the image's border, what lies inside counts. If False, a
      crowd box is a box like any other, as in the reference.

  Returns:
    Targets with leading dimensions [B, A]. Codes and labels of anchors that are not positive
    are zero and must be masked by `positive`.

  Raises:
    InputError: `matched_iou` is outside its range.
  """
  if not 0 < matched_iou <= 1:
    raise InputError(f'matching: matched_iou={matched_iou} must be above 0 and at most 1')
  wanted = truth.valid & ~truth.crowd if ignore_crowd else truth.valid
  # Truth by anchors, so that the long axis lies in a TPU's lanes.
  overlap = jnp.where(wanted[..., None], boxes.iou(truth.boxes, anchors.boxes), -1.0)  # [B, G, A]
  best_overlap, match = _first_max(overlap, axis=-2)
  positive = best_overlap >= matched_iou
  if force_match:
    claimant = _claims(overlap, wanted)
    claimed = claimant < overlap.shape[-2]
    match = jnp.where(claimed, claimant, match)
    positive |= claimed
  matched_boxes = jnp.take_along_axis(truth.boxes, match[..., None], axis=-2)
  codes = boxes.encode(matched_boxes, anchors.boxes)
  labels = jnp.take_along_axis(truth.labels, match, axis=-1)
  return Targets(
      box_codes=jnp.where(positive[..., None], codes, 0.0),
      labels=jnp.where(positive, labels, 0),
      positive=positive,
      ignored=_in_crowd(anchors, truth) & ~positive if ignore_crowd else jnp.zeros_like(positive))


def _claims(overlap: Array, wanted: Array) -> Array:
  """[B, G, A] -> [B, A]: the first truth box whose best anchor this is, or G if there is none."""
  num_truth, num_anchors = overlap.shape[-2:]
  _, best_anchor = _first_max(overlap, axis=-1)
  claims = (jnp.arange(num_anchors) == best_anchor[..., None]) & wanted[..., None]
  return jnp.min(jnp.where(claims, jnp.arange(num_truth)[:, None], num_truth), axis=-2)


def _in_crowd(anchors: Anchors, truth: GroundTruth) -> Array:
  """[B, A]: whether a crowd box covers enough of the anchor."""
  # Crowds end at the border, at the latest: beyond it an anchor is over nothing.
  inside = boxes.coverage(boxes.clip(anchors.boxes), truth.boxes) >= CROWD_COVERAGE  # [B, A, G]
  return jnp.any(inside & (truth.valid & truth.crowd)[..., None, :], axis=-1)


def _first_max(x: Array, axis: int) -> tuple[Array, Array]:
  """The maximum along `axis` and the first index that holds it.

  `argmax` alone lets the TPU compiler reduce (bf16, index) pairs, which changes matches.
  """
  highest = jnp.max(x, axis=axis, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)
  first = jnp.min(jnp.where(x == highest, index, x.shape[axis]), axis=axis)
  return jnp.squeeze(highest, axis), first
