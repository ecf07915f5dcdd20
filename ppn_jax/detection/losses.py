"""The training objective: focal loss for classes, smooth L1 for boxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Array, Outputs, Targets
from ppn_jax.errors import InputError


class DetectionLoss(NamedTuple):
  """Scalars, f32. The objective is `classification + localization`."""
  classification: Array
  localization: Array
  num_positive: Array  # Positive anchors of the whole batch.


def detection_loss(outputs: Outputs, targets: Targets, *, alpha: float = 0.25, gamma: float = 2.0,
                   localization_weight: float = 1.0) -> DetectionLoss:
  """Loss of a batch, normalised by the number of positive anchors in it.

  classification = sum(focal) / n and localization = w sum(smooth L1) / (4 n), where n is the
  number of positive anchors of the whole batch, at least 1, and 4 the size of a box code
  (RetinaNet, section 4.1; PPN, section 3). Every class of every anchor that is not ignored
  counts in the first sum, positive anchors in the second.

  Args:
    outputs: of the network, f32.
    targets: of `matching.assign`.
    alpha, gamma: of `focal`. The paper states .25 and 2; the reference's config has .75.
    localization_weight: w. The reference's PPN config has 1.5.

  Raises:
    InputError: a weight outside its range.
  """
  if not 0 <= alpha <= 1 or gamma < 0 or localization_weight < 0:
    raise InputError(f'loss: alpha={alpha} must lie in 0 to 1, gamma={gamma} and '
                     f'localization_weight={localization_weight} be at least 0')
  num_classes = outputs.class_logits.shape[-1]
  # The label of an anchor that is not positive is masked off, which leaves all columns zero.
  wanted = jax.nn.one_hot(targets.labels, num_classes, dtype=bool) & targets.positive[..., None]
  class_loss = focal(outputs.class_logits, wanted, alpha=alpha, gamma=gamma)
  class_loss = jnp.sum(jnp.where(targets.ignored[..., None], 0.0, class_loss))
  box_loss = smooth_l1(outputs.box_codes - targets.box_codes)
  box_loss = jnp.sum(jnp.where(targets.positive[..., None], box_loss, 0.0))
  num_positive = jnp.sum(targets.positive, dtype=jnp.float32)
  normalizer = jnp.maximum(num_positive, 1.0)
  code_size = outputs.box_codes.shape[-1]
  return DetectionLoss(class_loss / normalizer,
                       localization_weight * box_loss / (code_size * normalizer),
                       num_positive)


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
