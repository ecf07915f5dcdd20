"""Draws the anchors over an image, and which of them its ground truth is assigned to."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Array, GroundTruth
from ppn_jax.detector import Detector
from ppn_jax.visualization.drawing import draw_boxes
from ppn_jax.visualization.plotting import class_rgb, plot

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_SIDE, _DIMMED = 400, 0.6


def draw_assigned_anchors(detector: Detector, image: Array, boxes: Array, labels: Array,
                          crowd: Array, *, matched_iou: float = 0.5) -> np.ndarray:
  """Draws the anchors of each level over an image.

  Dots are the centres of cells, grey boxes all anchors of a cell in the middle. Positive anchors
  have the colour of the class that they are to predict, dashed where their IoU with the box is
  below `matched_iou`, so that they are positive by force-match alone. Ground truth is dashed white.

  Args:
    detector: provides anchors and matching.
    image: u8 [S, S, 3].
    boxes, labels, crowd: the N ground-truth boxes of the image, as in `Example`.
    matched_iou: of the detector's matching.

  Returns:
    u8 [H, W, 3], a column for each level.
  """
  anchors = detector.anchors
  ground_truth = GroundTruth(
      np.asarray(boxes, np.float32)[None], np.asarray(labels, np.int32)[None],
      np.asarray(crowd, bool)[None], np.ones((1, len(boxes)), bool))
  if not len(boxes):  # One row that is not valid.
    ground_truth = GroundTruth(*(np.zeros((1, 1, *column.shape[2:]), column.dtype)
                                 for column in ground_truth))
  targets = jax.tree.map(lambda x: np.asarray(x)[0], detector.assign_targets(anchors, ground_truth))
  matched_boxes = box_ops.decode(targets.box_codes, anchors.boxes)[:, None]
  overlap = box_ops.iou(np.asarray(anchors.boxes)[:, None], matched_boxes)[:, 0, 0]
  background = draw_boxes((image * _DIMMED).astype(np.uint8), boxes, labels,
                          [''] * detector.num_classes, ground_truth=True, min_side=_SIDE)
  with plot(2.9 * detector.num_levels, 3.2) as picture:
    axes = np.atleast_1d(picture.figure.subplots(1, detector.num_levels))
    for k, each in enumerate(axes):
      each.imshow(background, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
      on_level = anchors.level == k
      _draw_grid(each, anchors.boxes[on_level])
      for at in np.flatnonzero(on_level & targets.positive):
        # Encoding and decoding changes the last digits.
        forced = overlap[at] < matched_iou - 1e-4
        _draw_box(each, anchors.boxes[at], color=class_rgb(int(targets.labels[at])), linewidth=1.6,
                  linestyle='--' if forced else '-')
      positive = int((on_level & targets.positive).sum())
      each.set_title(f'level {k}: {positive} of {int(on_level.sum()):,} positive')
      each.set(xlim=(-0.02, 1.02), ylim=(1.02, -0.02), xticks=[], yticks=[])
      each.spines[:].set_visible(False)
      each.grid(visible=False)
  return picture.pixels


def _draw_grid(axes: 'Axes', boxes: np.ndarray) -> None:
  """Draws the centres of all cells, and the anchors of the cell nearest to the middle."""
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  # Centres of the anchors of one cell differ by rounding.
  cells = np.unique(centres.round(5), axis=0)
  axes.plot(cells[:, 1], cells[:, 0], '.', color='white', markersize=2.2, alpha=0.7)
  middle = cells[np.argmin(((cells - 0.5)**2).sum(axis=1))]
  for box in boxes[(np.abs(centres - middle) < 1e-4).all(axis=1)]:
    _draw_box(axes, box, color='#e0e0e0', linewidth=0.8, alpha=0.7)


def _draw_box(axes: 'Axes', box: np.ndarray, **style) -> None:
  ymin, xmin, ymax, xmax = box.tolist()
  axes.plot([xmin, xmax, xmax, xmin, xmin], [ymin, ymin, ymax, ymax, ymin], **style)
