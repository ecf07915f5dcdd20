"""Shows features, scores and detections of one image on each pyramid level."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.detection.structures import Array, Detections
from ppn_jax.detector import Detector, Variables
from ppn_jax.visualization.drawing import draw_boxes
from ppn_jax.visualization.plotting import plain, plot

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SIDE, _DIMMED = 300, 0.55


class Activations(NamedTuple):
  """Features, scores and detections of one image, on the host."""
  features: tuple[Array, ...]  # f32 [h, w] of each level, finest first: RMS over channels.
  scores: tuple[Array, ...]  # f32 [h, w], the best score of any anchor and class of a cell.
  detections: Detections  # Without the batch dimension, valid ones only.


def build_activations(detector: Detector) -> Callable[[Variables, Array], Activations]:
  """Returns a function (variables, u8 [S, S, 3]) -> Activations, compiled on its first call."""
  @jax.jit
  def compute(variables: Variables, images: Array):
    maps = detector.network.apply(variables, images, train=False, method='pyramid')
    outputs = detector.forward(variables, images)
    return ([jnp.sqrt(jnp.mean(jnp.square(m[0].astype(jnp.float32)), axis=-1)) for m in maps],
            detector.class_spec.scores(outputs.class_logits[0]).max(axis=-1),
            detector.postprocess(outputs, detector.anchors))

  def activations(variables: Variables, image: Array) -> Activations:
    features, scores, detections = jax.device_get(
        compute(variables, np.asarray(image)[None]))
    by_level = [scores[detector.anchors.level == k].reshape(*cells.shape, -1).max(axis=-1)
                for k, cells in enumerate(features)]
    found = Detections(*(field[0] for field in detections))
    return Activations(tuple(features), tuple(by_level),
                       Detections(*(field[found.valid] for field in found)))

  return activations


def draw_levels(image: Array, activations: Activations, names: Sequence[str], *,
                threshold: float = 0.3) -> np.ndarray:
  """Draws features, scores and detections of each level.

  Args:
    image: u8 [S, S, 3], as the network got it.
    activations: of that image.
    names: of the classes, in order of label.
    threshold: least score of a detection that is drawn.

  Returns:
    u8 [H, W, 3], a column for each level.
  """
  count, found = len(activations.features), activations.detections
  with plot(2.5 * count + 0.4, 8) as picture:
    axes = picture.figure.subplots(3, count, squeeze=False)
    for k in range(count):
      cells = activations.features[k]
      axes[0, k].imshow(cells, cmap='viridis', vmin=0)
      axes[0, k].set_title(f'level {k}: {cells.shape[0]} x {cells.shape[1]} cells')
      axes[1, k].imshow(activations.scores[k], cmap='magma', vmin=0, vmax=1)
      chosen = (found.level == k) & (found.scores >= threshold)
      drawn = draw_boxes((image * _DIMMED).astype(np.uint8), found.boxes[chosen],
                         found.labels[chosen], names, found.scores[chosen], min_side=_SIDE,
                         weight=1.4)
      axes[2, k].imshow(drawn)
      axes[2, k].set_title(f'{chosen.sum()} found here', fontweight='normal')
    for row, name in zip(axes, ('features, root mean square', 'best score of a cell, 0 to 1',
                                f'detections of score {threshold:g} and more'), strict=True):
      row[0].set_ylabel(plain(name))
      for each in row:
        _hide_axes(each)
  return picture.pixels


def _hide_axes(axes: 'Axes') -> None:
  """Removes ticks, grid and frame, but keeps titles and labels."""
  axes.set_xticks([])
  axes.set_yticks([])
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)
