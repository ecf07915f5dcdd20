"""Training losses of class logits and box codes, over a whole batch.

Each entry of `LOSSES` is a function of outputs and targets, named in a config's `loss` block. A
detector passes `class_spec`, and also `anchors` to those that take them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.detection.batch_groups import check_group_size, num_groups
from ppn_jax.detection.box_losses import box_loss, check_localization, smooth_l1
from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.class_weights import ClassWeights, check_class_weights
from ppn_jax.detection.structures import Anchors, Array, Outputs, Targets
from ppn_jax.errors import InputError

LOSSES = {
    'focal': 'ppn_jax.detection.losses:focal_loss',
    'hard_negative_mining': 'ppn_jax.detection.losses:hard_negative_mining_loss',
}
__all__ = ['LOSSES', 'DetectionLoss', 'focal_loss', 'hard_negative_mining_loss', 'sigmoid_focal',
           'smooth_l1']
_IGNORED = -2  # Marks an ignored anchor in place of a target index.


class DetectionLoss(NamedTuple):
  """Parts of the loss, f32 scalars; `classification + localization` is minimised."""
  classification: Array
  localization: Array
  num_positive: Array  # Positive anchors of the whole batch.


def focal_loss(outputs: Outputs, targets: Targets, *, class_spec: ClassLogitsSpec,
               anchors: Anchors | None = None, alpha: float = 0.25, gamma: float = 2.0,
               localization: str = 'smooth_l1', localization_weight: float = 1.0,
               label_smoothing: float = 0.0, class_weights: ClassWeights = (),
               group_size: int = 0) -> DetectionLoss:
  """Computes the focal loss for classes, normalised by the number of positive anchors.

  classification = sum(focal) / n and localization = w sum(smooth L1) / (4 n), where n is the
  number of positive anchors of the whole batch, at least 1, and 4 the size of a box code
  (RetinaNet, section 4.1; PPN, section 3). The first sum is over all logits of all anchors that are
  not ignored, the second over positive anchors. A background logit is never a target
  (docs/reference.md 7). Losses of decoded boxes take the place of smooth L1 / 4.

  Args:
    outputs: outputs of the network, f32.
    targets: targets of `matching.assign_targets`.
    class_spec: layout of the class logits.
    anchors: the A anchors, which losses of decoded boxes need.
    alpha: weight of positive logits, 0 to 1; negative ones have 1 - alpha. The paper states .25,
      the reference's config has .75.
    gamma: how fast the weight of well classified logits falls, at least 0.
    localization: loss of a box: 'smooth_l1' of its code, or 'giou' or 'ciou' of the decoded box
      (`box_losses`).
    localization_weight: w. The reference's PPN config has 1.5.
    label_smoothing: e, 0 to below 1: the cross-entropy is that of the targets y (1 - e) + e / 2, as
      in EfficientDet; alpha and the factor of gamma are those of y.
    class_weights: factors above 0 of the positive logits of each class, as `pos_weight` in PyTorch:
      by name, {'person': 2.0}, where others have 1, as pairs, or one for each label; empty: none.
      Negative logits and boxes have no such factor.
    group_size: images that n is counted over: 0 for the whole batch; otherwise the loss is the mean
      over groups of this size, as the reference's replicas compute it (see `batch_groups`).

  Raises:
    InputError: If a value is outside its range, or the logits are scored by softmax.
  """
  if not (0 <= alpha <= 1 and gamma >= 0 and localization_weight >= 0):
    raise InputError(f'loss: alpha={alpha} must lie in 0 to 1, gamma={gamma} and '
                     f'localization_weight={localization_weight} must be at least 0')
  _check_options(localization, anchors, label_smoothing)
  factors = check_class_weights(class_weights, class_spec.num_classes)
  if class_spec.activation != 'sigmoid':
    raise InputError("loss 'focal' needs sigmoid scores, but model.score_activation is "
                     f"{class_spec.activation!r}; use loss.name='hard_negative_mining'")
  index = class_spec.target_index(targets.labels, targets.positive)
  # One number per anchor holds both its target and whether it is ignored, so that only one has to
  # be expanded to the logits.
  index = class_spec.expand_to_classes(jnp.where(targets.ignored, _IGNORED, index))
  is_target = index == jnp.arange(index.shape[-1]) % class_spec.num_logits
  # Constant along the batch, in the layout of `by_cell`.
  factor = np.tile(class_spec.per_logit(factors), class_spec.anchors_per_cell) if factors else None
  class_loss = sigmoid_focal(class_spec.by_cell(outputs.class_logits), is_target, alpha=alpha,
                             gamma=gamma, label_smoothing=label_smoothing, target_weight=factor)
  size = outputs.box_codes.shape[-1] if localization == 'smooth_l1' else 1
  return _normalise(class_loss, index != _IGNORED,
                    box_loss(outputs.box_codes, targets.box_codes, localization, anchors),
                    targets.positive, localization_weight / size, group_size)


def hard_negative_mining_loss(
    outputs: Outputs, targets: Targets, *, class_spec: ClassLogitsSpec,
    anchors: Anchors | None = None, negatives_per_positive: float = 3.0,
    localization: str = 'smooth_l1', localization_weight: float = 1.0,
    label_smoothing: float = 0.0, class_weights: ClassWeights = (),
    group_size: int = 0) -> DetectionLoss:
  """Computes the cross-entropy of positive anchors and the hardest negatives (SSD, section 2.2).

  Only those negative anchors of an image count that have the highest class loss, at most
  `negatives_per_positive` times as many as it has positive ones; an image without positive
  anchors has no loss. classification = sum(cross-entropy) / n and localization =
  w sum(smooth L1) / n with n as in `focal_loss`. The target of negative anchors is the background,
  where there is one.

  The activation of `class_spec` decides which cross-entropy: softmax is the SSD paper's, sigmoid
  (summed over logits) that of the reference's first SSD config, which also leaves out anchors whose
  decoded box overlaps that of a harder one by more than .99.

  Args:
    outputs, targets, class_spec, anchors: see `focal_loss`.
    negatives_per_positive: largest number of negative anchors for each positive one, at least 0.
    localization: loss of a box, as in `focal_loss`: 'smooth_l1', 'giou' or 'ciou'.
    localization_weight: w, at least 0.
    label_smoothing: e, 0 to below 1: the targets of sigmoid scores are y (1 - e) + e / 2, those of
      a softmax over n logits y (1 - e) + e / n.
    class_weights: factors of the cross-entropy of positive anchors by their class; with sigmoid
      scores, of that of the class's own logit. Given as in `focal_loss`.
    group_size: images that n is counted over, as in `focal_loss`; 0 for the whole batch.

  Raises:
    InputError: If a value is below 0.
  """
  if not (negatives_per_positive >= 0 and localization_weight >= 0):
    raise InputError(f'loss: negatives_per_positive={negatives_per_positive} and '
                     f'localization_weight={localization_weight} must be at least 0')
  _check_options(localization, anchors, label_smoothing)
  factors = check_class_weights(class_weights, class_spec.num_classes)
  one_hot = class_spec.targets_with_background(targets.labels, targets.positive)
  class_loss = _cross_entropy(outputs.class_logits, one_hot, class_spec.activation,
                              label_smoothing, class_spec.per_logit(factors) if factors else None)
  hard = _hardest(jax.lax.stop_gradient(class_loss), ~(targets.positive | targets.ignored),
                  negatives_per_positive * jnp.sum(targets.positive, axis=-1))
  return _normalise(class_loss, targets.positive | hard,
                    box_loss(outputs.box_codes, targets.box_codes, localization, anchors),
                    targets.positive, localization_weight, group_size)


def _check_options(localization: str, anchors: Anchors | None, label_smoothing: float) -> None:
  check_localization(localization, takes_anchors=anchors is not None)
  if not 0 <= label_smoothing < 1:
    raise InputError(f'loss: label_smoothing={label_smoothing} must be at least 0 and below 1')


def _normalise(class_loss: Array, class_mask: Array, box_loss: Array, positive: Array,
               weight: float, group_size: int) -> DetectionLoss:
  """Divides masked sums of losses [B, ...] by the positive anchors; averages over groups."""
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


def _cross_entropy(logits: Array, one_hot: Array, activation: str, smoothing: float,
                   factor: Array | None) -> Array:
  """Sums the cross-entropy over each anchor's logits: [B, A, num_logits] -> [B, A].

  Args:
    logits, one_hot: the logits and their targets.
    activation: 'softmax' or 'sigmoid'.
    smoothing: e of the smoothed targets.
    factor: f32 [num_logits], factor of the terms that have a logit as their target; None: 1.
  """
  if activation == 'softmax':
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.sum(jnp.where(one_hot, log_p, 0.0), axis=-1)
    if smoothing:
      loss = (1 - smoothing) * loss - smoothing * jnp.mean(log_p, axis=-1)
    return loss if factor is None else loss * jnp.sum(jnp.where(one_hot, factor, 0.0), axis=-1)
  error = jnp.where(one_hot, -logits, logits)
  loss = jax.nn.softplus(error)
  if smoothing:  # That of the opposite target is softplus(-error) = softplus(error) - error.
    loss = loss - smoothing / 2 * error
  return jnp.sum(loss if factor is None else jnp.where(one_hot, factor, 1.0) * loss, axis=-1)


def _hardest(loss: Array, eligible: Array, count: Array) -> Array:
  """Marks the eligible entries of highest loss, at most `count` [B] of each row [B, A].

  Ties go to the first.
  """
  order = jnp.argsort(jnp.where(eligible, -loss, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return eligible & (rank < count[:, None])


def sigmoid_focal(logits: Array, targets: Array, *, alpha: float = 0.25, gamma: float = 2.0,
                  label_smoothing: float = 0.0, target_weight: Array | None = None) -> Array:
  """Computes the sigmoid focal loss, elementwise (RetinaNet, equation 5).

  FL = -alpha_t (1 - p_t)^gamma log p_t. With z the logit, negated where the target is False,
  s = softplus(-z) = -log p_t and 1 - p_t = exp(-(z + s)). No probability is formed, so unlike
  `optax.losses.sigmoid_focal_loss` value and gradient are finite for every finite logit and gamma.

  Args:
    logits: any shape, f32.
    targets: same shape, bool.
    alpha: weight of positive entries; negative ones have 1 - alpha.
    gamma: focusing parameter, at least 0: how fast the weight of well classified entries falls; 0
      gives the weighted cross-entropy.
    label_smoothing: e: s is replaced by the cross-entropy of the target 1 - e / 2 or e / 2 (Tan et
      al., 2020), s + z e / 2.
    target_weight: factor of positive entries, broadcast against `targets`; None: 1.
  """
  z = jnp.where(targets, logits, -logits)
  cross_entropy = jax.nn.softplus(-z)
  positive = alpha if target_weight is None else alpha * target_weight
  weight = jnp.where(targets, positive, 1.0 - alpha)
  focus = jnp.exp(-gamma * (z + cross_entropy))
  if label_smoothing:
    cross_entropy = cross_entropy + label_smoothing / 2 * z
  return weight * focus * cross_entropy
