"""What the columns of class logits mean, and the scores and targets that follow from it."""

import dataclasses

import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError, did_you_mean

ACTIVATIONS = ('sigmoid', 'softmax')


@dataclasses.dataclass(frozen=True)
class ClassColumns:
  """The class columns of a head, in order of label, with the background in front if it has one.

  Attributes:
    num_classes: C, the background not counted.
    background: column 0 is the background's, as in checkpoints of the TF Object Detection API.
      It is trained and takes no part in detection.
    activation: 'sigmoid' scores every column on its own, 'softmax' all of them together.
    cell_anchors: k, anchors of a cell, whose columns a head computes side by side; 1 where
      levels differ. It changes no result, see `by_cell`.

  Raises:
    InputError: an unknown activation, or a softmax that cannot say "nothing".
  """
  num_classes: int
  background: bool = False
  activation: str = 'sigmoid'
  cell_anchors: int = 1

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise InputError(f'model.score_activation={self.activation!r}; '
                       f'{did_you_mean(str(self.activation), ACTIVATIONS)}')
    if self.activation == 'softmax' and not self.background:
      raise InputError("model.score_activation='softmax' needs model.background_column=True: "
                       'without it no anchor could be empty')

  @property
  def count(self) -> int:
    """How many columns there are."""
    return self.num_classes + self.background

  def scores(self, logits: Array) -> Array:
    """Logits [..., count] -> scores [..., C], 0 to 1."""
    activate = jax.nn.sigmoid if self.activation == 'sigmoid' else jax.nn.softmax
    return activate(logits)[..., int(self.background):]

  def by_cell(self, logits: Array) -> Array:
    """Logits [..., A, count] -> [..., A / k, k * count], a row for each cell.

    It undoes the head's reshape, so that XLA sees neither: a TPU keeps the last axis in tiles of
    eight, and `count` rarely fits them, so that each reshape would be written to memory.
    """
    *batch, anchors, count = logits.shape
    return logits.reshape(*batch, anchors // self.cell_anchors, self.cell_anchors * count)

  def spread(self, values: Array) -> Array:
    """A value for each anchor, [..., A] -> at each of its columns, [..., A / k, k * count]."""
    *batch, anchors = values.shape
    values = values.reshape(*batch, anchors // self.cell_anchors, self.cell_anchors)
    column = jnp.arange(self.cell_anchors * self.count)
    # By selects, which fuse with what reads them; a repeat would be written to memory.
    spread = jnp.broadcast_to(values[..., :1], (*values.shape[:-1], len(column)))
    for anchor in range(1, self.cell_anchors):
      spread = jnp.where(column >= anchor * self.count, values[..., anchor:anchor + 1], spread)
    return spread

  def label_columns(self, labels: Array, positive: Array) -> Array:
    """Labels and positive [...] -> i32 [...], the label's column where positive, -1 elsewhere."""
    return jnp.where(positive, labels + self.background, -1)

  def targets(self, labels: Array, positive: Array) -> Array:
    """Labels and positive [...] -> bool [..., count], the label's column where positive.

    Other anchors have no column at all, the background's included ("background as zeros").
    """
    return jax.nn.one_hot(self.label_columns(labels, positive), self.count, dtype=bool)

  def targets_with_background(self, labels: Array, positive: Array) -> Array:
    """As `targets`, but other anchors have the background's column, if there is one."""
    wanted = self.targets(labels, positive)
    if not self.background:
      return wanted
    return wanted.at[..., 0].set(jnp.logical_not(positive))
