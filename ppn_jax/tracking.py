"""Ids that objects keep over the frames of a video.

By ByteTrack (Zhang et al., 2022, https://arxiv.org/abs/2110.06864) of the library trackforge.
"""

import itertools
from types import ModuleType
from typing import Any

import numpy as np

from ppn_jax.errors import InputError, install_command

# Of frames whose rate is unknown.
FRAMES_PER_SECOND = 30.0
# How long an object may be away and keep its id.
_SECONDS_AWAY = 1.0
# An object is followed down to this share of the score that starts it.
_LOWEST_SHARE = 0.5


class Tracker:
  """Gives the detections of a video ids, frame by frame.

  Each class is followed on its own. A detector may find one object as two classes, and their ids
  would change places otherwise. So what changes its class gets another id.

  Args:
    thresholds: f32 [C], least score of a detection of each class that starts an object.
    frames_per_second: Rate of the frames. An object without a detection keeps its id for a second.

  Raises:
    InputError: If trackforge is not installed, or the rate is not a positive number.
  """

  def __init__(self, thresholds: np.ndarray, frames_per_second: float = FRAMES_PER_SECOND):
    self._library = load_library()
    if not 0 < frames_per_second < float('inf'):
      raise InputError(f'frames_per_second={frames_per_second} must be a positive number')
    self._thresholds = np.asarray(thresholds, np.float32)
    self._frames_away = max(1, round(_SECONDS_AWAY * frames_per_second))
    self._trackers: dict[int, Any] = {}  # By label, of the classes seen so far.
    self._ids: dict[tuple[int, int], int] = {}  # By label and the id within the class.

  @property
  def lowest(self) -> np.ndarray:
    """Returns the least score of a detection of each class that is of use, f32 [C]."""
    return self._thresholds * np.float32(_LOWEST_SHARE)

  def update(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the ids of the detections of the next frame.

    Args:
      boxes: f32 [N, 4], [ymin, xmin, ymax, xmax] in pixels.
      scores: f32 [N].
      labels: i32 [N], indices into `thresholds`.

    Returns:
      i32 [N], counted from 1; 0 for a detection below its threshold that continues no object.
    """
    ids = np.zeros(len(scores), np.int32)
    useful = scores >= self.lowest[labels]
    low, high = boxes[:, [1, 0]], boxes[:, [3, 2]]
    # The library's filter divides by the height.
    corner_and_size = np.concatenate([low, np.maximum(high - low, 1)], axis=1)
    # Objects move on in frames without a detection, too.
    for label in sorted({*self._trackers, *labels[useful].tolist()}):
      rows = np.flatnonzero(useful & (labels == label))
      for within, *_, row in self._tracker_of(label).update(
          list(zip(corner_and_size[rows].tolist(), scores[rows].tolist(),
                   itertools.repeat(label)))):
        ids[rows[row]] = self._ids.setdefault((label, within), len(self._ids) + 1)
    return ids

  def _tracker_of(self, label: int) -> Any:
    if label not in self._trackers:
      threshold = float(self._thresholds[label])
      self._trackers[label] = self._library.BYTETRACK(
          track_thresh=threshold, det_thresh=threshold, track_buffer=self._frames_away)
    return self._trackers[label]


def load_library() -> ModuleType:
  """Imports trackforge; raises InputError with the command that installs it."""
  try:
    import trackforge
  except ImportError as e:
    raise InputError(f"tracking needs trackforge; {install_command('track')}") from e
  return trackforge
