"""What a network makes of one image on each level of its pyramid."""

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


class Inside(NamedTuple):
  """One image seen from within, on the host."""
  features: tuple[Array, ...]  # f32 [h, w] of each level, finest first: see `looker`.
  scores: tuple[Array, ...]  # f32 [h, w], the best score of any anchor and class of a cell.
  detections: Detections  # Without the axis of images.


def looker(detector: Detector) -> Callable[[Variables, Array], Inside]:
  """(variables, u8 [S, S, 3]) -> Inside; compiled on the first call.

  Of the features, which have hundreds of channels, a cell shows their root mean square.
  """
  @jax.jit
  def look(variables: Variables, images: Array):
    maps = detector.network.apply(variables, images, train=False, method='pyramid')
    outputs = detector.forward(variables, images)
    return ([jnp.sqrt(jnp.mean(jnp.square(m[0].astype(jnp.float32)), axis=-1)) for m in maps],
            detector.class_spec.scores(outputs.class_logits[0]).max(axis=-1),
            detector.postprocess(outputs, detector.anchors))

  def inside(variables: Variables, image: Array) -> Inside:
    features, scores, detections = jax.device_get(look(variables, np.asarray(image)[None]))
    by_level = [scores[detector.anchors.level == k].reshape(*cells.shape, -1).max(axis=-1)
                for k, cells in enumerate(features)]
    found = Detections(*(field[0] for field in detections))
    return Inside(tuple(features), tuple(by_level),
                  Detections(*(field[found.valid] for field in found)))

  return inside


def levels(image: Array, inside: Inside, names: Sequence[str], *, threshold: float = 0.3
           ) -> np.ndarray:
  """Features, scores and detections of each level, a column each; u8 [H, W, 3].

  Args:
    image: u8 [S, S, 3], as it was looked at.
    inside: of that image.
    names: of the classes, in order of label.
    threshold: least score of a detection that is drawn.
  """
  count, found = len(inside.features), inside.detections
  with plot(2.5 * count + 0.4, 8) as picture:
    axes = picture.figure.subplots(3, count, squeeze=False)
    for k in range(count):
      cells = inside.features[k]
      axes[0, k].imshow(cells, cmap='viridis', vmin=0)
      axes[0, k].set_title(f'level {k}: {cells.shape[0]} x {cells.shape[1]} cells')
      axes[1, k].imshow(inside.scores[k], cmap='magma', vmin=0, vmax=1)
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
        _bare(each)
  return picture.pixels


def _bare(axes: 'Axes') -> None:
  axes.set_xticks([])
  axes.set_yticks([])
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)
