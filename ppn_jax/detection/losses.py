"""Training objectives: what class logits and box codes cost, for a whole batch.

Each objective is a function of outputs and targets, named in a config's `loss` block; smooth L1
serves the boxes in all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppn_jax.detection.batch_groups import check_group_size, num_groups
from ppn_jax.detection.class_logits import ClassColumns
from ppn_jax.detection.structures import Array, Outputs, Targets
from ppn_jax.errors import InputError

LOSSES = {
    'focal': 'ppn_jax.detection.losses:focal_objective',
    'hard_negative_mining': 'ppn_jax.detection.losses:mined_objective',
}
_IGNORED = -2  # In place of an anchor's label.


class DetectionLoss(NamedTuple):
  """Scalars, f32. The objective is `classification + localization`."""
  classification: Array
  localization: Array
  num_positive: Array  # Positive anchors of the whole batch.


def focal_objective(outputs: Outputs, targets: Targets, *, columns: ClassColumns,
                    alpha: float = 0.25, gamma: float = 2.0, localization_weight: float = 1.0,
                    group_size: int = 0) -> DetectionLoss:
  """Focal loss for classes, normalised by the number of positive anchors in the batch.

  classification = sum(focal) / n and localization = w sum(smooth L1) / (4 n), where n is the
  number of positive anchors of the whole batch, at least 1, and 4 the size of a box code
  (RetinaNet, section 4.1; PPN, section 3). Every column of every anchor that is not ignored
  counts in the first sum, positive anchors in the second. A background column is always wrong
  (docs/reference.md 7).

  Args:
    outputs: of the network, f32.
    targets: of `matching.assign`.
    columns: what the class logits mean.
    alpha, gamma: of `focal`. The paper states .25 and 2; the reference's config has .75.
    localization_weight: w. The reference's PPN config has 1.5.
    group_size: images that n is counted over: 0 the whole batch; else the loss is the mean of
      those of groups of so many, as the reference's replicas have it (see `groups`).

  Raises:
    InputError: a value outside its range, or columns scored by softmax.
  """
  if not 0 <= alpha <= 1 or gamma < 0 or localization_weight < 0:
    raise InputError(f'loss: alpha={alpha} must lie in 0 to 1, gamma={gamma} and '
                     f'localization_weight={localization_weight} be at least 0')
  if columns.activation != 'sigmoid':
    raise InputError("loss 'focal' is of sigmoid scores, but model.score_activation is "
                     f"{columns.activation!r}; take loss.name='hard_negative_mining'")
  wanted = columns.label_columns(targets.labels, targets.positive)
  # One number says all of an anchor, so that only one has to reach its columns.
  wanted = columns.spread(jnp.where(targets.ignored, _IGNORED, wanted))
  is_wanted = wanted == jnp.arange(wanted.shape[-1]) % columns.count
  class_loss = focal(columns.by_cell(outputs.class_logits), is_wanted, alpha=alpha, gamma=gamma)
  weight = localization_weight / outputs.box_codes.shape[-1]
  return _normalised(class_loss, wanted != _IGNORED, _box_loss(outputs, targets),
                     targets.positive, weight, group_size)


def mined_objective(outputs: Outputs, targets: Targets, *, columns: ClassColumns,
                    negatives_per_positive: float = 3.0, localization_weight: float = 1.0,
                    group_size: int = 0) -> DetectionLoss:
  """Cross-entropy over the positive anchors and the hardest negatives (SSD, section 2.2).

  Of each image's negative anchors those with the highest class loss count, at most
  `negatives_per_positive` times as many as it has positive ones; an image without positive
  anchors costs nothing. classification = sum(cross-entropy) / n and localization =
  w sum(smooth L1) / n with n as in `focal_objective`. Negative anchors want the background's
  column where there is one.

  The activation of `columns` decides which cross-entropy: softmax is the SSD paper's, sigmoid
  (summed over columns) that of the reference's first SSD config, which besides leaves out
  anchors whose decoded box overlaps that of a harder one by more than .99.

  Args:
    outputs, targets, columns: see `focal_objective`.
    negatives_per_positive: at least 0.
    localization_weight: w, at least 0.
    group_size: see `focal_objective`.

  Raises:
    InputError: a value below 0.
  """
  if negatives_per_positive < 0 or localization_weight < 0:
    raise InputError(f'loss: negatives_per_positive={negatives_per_positive} and '
                     f'localization_weight={localization_weight} must be at least 0')
  wanted = columns.targets_with_background(targets.labels, targets.positive)
  class_loss = _cross_entropy(outputs.class_logits, wanted, columns.activation)
  hard = _hardest(jax.lax.stop_gradient(class_loss), ~(targets.positive | targets.ignored),
                  negatives_per_positive * jnp.sum(targets.positive, axis=-1))
  return _normalised(class_loss, targets.positive | hard, _box_loss(outputs, targets),
                     targets.positive, localization_weight, group_size)


def _normalised(class_loss: Array, class_mask: Array, box_loss: Array, positive: Array,
                weight: float, group_size: int) -> DetectionLoss:
  """Losses [B, ...] -> their masked sums over the number of positive anchors, the groups' mean."""
  check_group_size('loss.group_size', group_size)
  groups = num_groups('loss.group_size', group_size, len(positive))

  def sums(mask: Array, value: Array | float) -> Array:
    kept = jnp.where(mask, value, 0.0)
    while kept.ndim > 1:  # Axis by axis: a long float32 sum loses digits.
      kept = jnp.sum(kept, axis=-1)
    return jnp.sum(kept.reshape(groups, -1), axis=1)

  num_positive = sums(positive, 1.0)
  normalizer = jnp.maximum(num_positive, 1.0)
  return DetectionLoss(jnp.mean(sums(class_mask, class_loss) / normalizer),
                       weight * jnp.mean(sums(positive, box_loss) / normalizer),
                       jnp.sum(num_positive))


def _box_loss(outputs: Outputs, targets: Targets) -> Array:
  return jnp.sum(smooth_l1(outputs.box_codes - targets.box_codes), axis=-1)


def _cross_entropy(logits: Array, wanted: Array, activation: str) -> Array:
  """[B, A, columns] -> [B, A]."""
  if activation == 'softmax':
    return -jnp.sum(jnp.where(wanted, jax.nn.log_softmax(logits), 0.0), axis=-1)
  return jnp.sum(jax.nn.softplus(jnp.where(wanted, -logits, logits)), axis=-1)


def _hardest(loss: Array, eligible: Array, count: Array) -> Array:
  """Marks the eligible entries of highest loss, `count` [B] of each row [B, A] at most.

  Of equal losses the first comes first.
  """
  order = jnp.argsort(jnp.where(eligible, -loss, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return eligible & (rank < count[:, None])


def focal(logits: Array, targets: Array, *, alpha: float = 0.25, gamma: float = 2.0) -> Array:
  """Sigmoid focal loss (RetinaNet, equation 5): -alpha_t (1 - p_t)^gamma log p_t, elementwise.

  With z the logit turned so that the right answer is up, s = softplus(-z) = -log p_t and
  1 - p_t = exp(-(z + s)): no probability is formed, so value and gradient stay finite for every
  finite logit and every gamma.

  Args:
    logits: any shape, f32.
    targets: the same shape, bool.
    alpha: weight of the positive entries, 1 - alpha that of the negative ones.
    gamma: how fast well classified entries lose weight; 0 is weighted cross-entropy.
  """
  z = jnp.where(targets, logits, -logits)
  cross_entropy = jax.nn.softplus(-z)
  weight = jnp.where(targets, alpha, 1.0 - alpha)
  return weight * jnp.exp(-gamma * (z + cross_entropy)) * cross_entropy


def smooth_l1(error: Array, *, delta: float = 1.0) -> Array:
  """Huber's loss, elementwise: error^2 / 2 within `delta`, linear with slope `delta` beyond."""
  size = jnp.abs(error)
  inside = jnp.minimum(size, delta)
  return inside * (size - 0.5 * inside)
