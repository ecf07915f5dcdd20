"""Assignment of ground-truth boxes to anchors."""

import jax
import jax.numpy as jnp

from ppn_jax.detection import boxes
from ppn_jax.detection.structures import Anchors, Array, GroundTruth, Targets
from ppn_jax.errors import InputError

# An anchor is ignored if a crowd box covers this share of the part of it inside the image.
CROWD_COVERAGE = 0.5


def assign_targets(anchors: Anchors, ground_truth: GroundTruth, *, matched_iou: float = 0.5,
                   force_match: bool = True, ignore_crowd: bool = True) -> Targets:
  """Assigns a ground-truth box, or background, to every anchor.

  Implements the matching of SSD (Liu et al., 2016, section 2.2, "Matching strategy"). An anchor is
  positive for the box that it overlaps most if their IoU is at least `matched_iou`; ties go to the
  first box. With `force_match`, every box also claims the anchor that overlaps it most, whatever
  their IoU and whatever that anchor's own match; if several boxes claim an anchor, the first gets
  it.

  Args:
    anchors: A anchors.
    ground_truth: G boxes for each of B images; entries that are not `valid` are ignored.
    matched_iou: least IoU of a positive anchor, above 0 and at most 1.
    force_match: whether each ground-truth box claims its best anchor.
    ignore_crowd: whether crowd boxes get no anchor, and anchors that a crowd box covers by half are
      ignored unless they are positive; only the part of an anchor inside the image counts. If
      False, crowd boxes are treated as any other, as in the reference.

  Returns:
    Targets with leading dimensions [B, A]. Box codes and labels of anchors that are not positive
    are zero and must be masked by `positive`.

  Raises:
    InputError: If `matched_iou` is not in (0, 1].
  """
  if not 0 < matched_iou <= 1:
    raise InputError(f'matching: matched_iou={matched_iou} must be above 0 and at most 1')
  usable = ground_truth.valid & ~ground_truth.crowd if ignore_crowd else ground_truth.valid
  # Boxes by anchors, so that the long axis lies in a TPU's lanes.
  overlap = jnp.where(usable[..., None], boxes.iou(ground_truth.boxes, anchors.boxes),
                      -1.0)  # [B, G, A]
  best_overlap, match = _first_max(overlap, axis=-2)
  positive = best_overlap >= matched_iou
  if force_match:
    forced_match = _force_match(overlap, usable)
    is_forced = forced_match < overlap.shape[-2]
    match = jnp.where(is_forced, forced_match, match)
    positive |= is_forced
  matched_boxes = jnp.take_along_axis(ground_truth.boxes, match[..., None], axis=-2)
  codes = boxes.encode(matched_boxes, anchors.boxes)
  labels = jnp.take_along_axis(ground_truth.labels, match, axis=-1)
  return Targets(
      box_codes=jnp.where(positive[..., None], codes, 0.0),
      labels=jnp.where(positive, labels, 0),
      positive=positive,
      ignored=(_in_crowd(anchors, ground_truth) & ~positive if ignore_crowd
               else jnp.zeros_like(positive)))


def _force_match(overlap: Array, usable: Array) -> Array:
  """Returns the first box whose best anchor this is, or G if there is none: [B, G, A] -> [B, A]."""
  num_boxes, num_anchors = overlap.shape[-2:]
  _, best_anchor = _first_max(overlap, axis=-1)
  is_best = (jnp.arange(num_anchors) == best_anchor[..., None]) & usable[..., None]
  return jnp.min(jnp.where(is_best, jnp.arange(num_boxes)[:, None], num_boxes), axis=-2)


def _in_crowd(anchors: Anchors, ground_truth: GroundTruth) -> Array:
  """Returns whether a crowd box covers enough of each anchor, bool [B, A]."""
  # Crowds end at the image's border, so only the part of an anchor inside it can be covered.
  covered = boxes.coverage(boxes.clip(anchors.boxes), ground_truth.boxes) >= CROWD_COVERAGE
  is_crowd = ground_truth.valid & ground_truth.crowd
  return jnp.any(covered & is_crowd[..., None, :], axis=-1)  # Over G of [B, A, G].


def _first_max(x: Array, axis: int) -> tuple[Array, Array]:
  """Returns the maximum along `axis` (negative) and the first index that holds it.

  `argmax` alone lets the TPU compiler reduce (bf16, index) pairs, which changes matches.
  """
  highest = jnp.max(x, axis=axis, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)
  first = jnp.min(jnp.where(x == highest, index, x.shape[axis]), axis=axis)
  return jnp.squeeze(highest, axis), first
