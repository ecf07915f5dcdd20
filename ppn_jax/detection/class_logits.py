"""Layout of class logits, and the scores and targets that follow from it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError, did_you_mean

ACTIVATIONS = ('sigmoid', 'softmax')


@dataclasses.dataclass(frozen=True)
class ClassLogitsSpec:
  """Layout and activation of a head's class logits, which are in order of label.

  Attributes:
    num_classes: C, the background not counted.
    background: Whether logit 0 is the background's, as in checkpoints of the TF Object Detection
      API. It is trained and takes no part in detection.
    activation: 'sigmoid' scores every logit on its own, 'softmax' all of an anchor together.
    anchors_per_cell: k, anchors of a cell, whose logits a head computes side by side; 1 where
      levels differ. It changes no result, see `by_cell`.

  Raises:
    InputError: If the activation is unknown, or is a softmax without a background, which could not
      predict that there is no object.
  """
  num_classes: int
  background: bool = False
  activation: str = 'sigmoid'
  anchors_per_cell: int = 1

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise InputError(f'model.score_activation={self.activation!r} is unknown; '
                       f'{did_you_mean(str(self.activation), ACTIVATIONS)}')
    if self.activation == 'softmax' and not self.background:
      raise InputError("model.score_activation='softmax' needs model.background_column=True: "
                       'without a background, every anchor would have to show an object')

  @property
  def num_logits(self) -> int:
    """Logits of an anchor: C, or 1 + C with a background."""
    return self.num_classes + self.background

  def scores(self, logits: Array) -> Array:
    """Converts logits [..., num_logits] to scores [..., C], 0 to 1."""
    activate = jax.nn.sigmoid if self.activation == 'sigmoid' else jax.nn.softmax
    return activate(logits)[..., int(self.background):]

  def by_cell(self, logits: Array) -> Array:
    """Reshapes logits [..., A, num_logits] to [..., A / k, k * num_logits], a row for each cell.

    This undoes the head's reshape, so that XLA sees neither: a TPU keeps the last axis in tiles of
    eight, and `num_logits` rarely fits them, so that each reshape would be written to memory.
    """
    *batch, anchors, count = logits.shape
    return logits.reshape(*batch, anchors // self.anchors_per_cell, self.anchors_per_cell * count)

  def expand_to_classes(self, values: Array) -> Array:
    """Repeats per-anchor values [..., A] over their anchor's logits: [..., A / k, k * num_logits].

    The result has the layout of `by_cell`.
    """
    *batch, anchors = values.shape
    values = values.reshape(*batch, anchors // self.anchors_per_cell, self.anchors_per_cell)
    logit = jnp.arange(self.anchors_per_cell * self.num_logits)
    # By selects, which fuse with what reads them; a repeat would be written to memory.
    expanded = jnp.broadcast_to(values[..., :1], (*values.shape[:-1], len(logit)))
    for anchor in range(1, self.anchors_per_cell):
      expanded = jnp.where(logit >= anchor * self.num_logits, values[..., anchor:anchor + 1],
                           expanded)
    return expanded

  def per_logit(self, values: Sequence[float]) -> np.ndarray:
    """Returns values of the C classes for the logits, f32 [num_logits]; a background's is 1."""
    return np.float32([1.0, *values] if self.background else values)

  def target_index(self, labels: Array, positive: Array) -> Array:
    """Returns the index of the label's logit where `positive`, -1 elsewhere; i32 [...]."""
    return jnp.where(positive, labels + self.background, -1)

  def targets(self, labels: Array, positive: Array) -> Array:
    """Encodes labels [...] as one-hot targets, bool [..., num_logits].

    Anchors that are not positive have no target at all, not even the background ("background as
    zeros").
    """
    return jax.nn.one_hot(self.target_index(labels, positive), self.num_logits, dtype=bool)

  def targets_with_background(self, labels: Array, positive: Array) -> Array:
    """Encodes labels as `targets` does, with the background, if any, as target of other anchors."""
    targets = self.targets(labels, positive)
    if not self.background:
      return targets
    return targets.at[..., 0].set(jnp.logical_not(positive))
