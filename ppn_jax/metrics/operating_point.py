"""How a detector's scores are used: a threshold for each class, and a calibration of the scores.

Both are found on evaluation data and kept with a run, in files that share it and in exports:

  {'thresholds': [{'name': 'cat', 'threshold': 0.31}, ...],
   'calibration': null or {'method': 'platt', 'levels': [{'slope': 1.2, 'intercept': 0.4}, ...]}}

A calibrated score is sigmoid(slope * logit(score) + intercept), with the values of the pyramid
level that the detection comes from. Thresholds are those of calibrated scores.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppn_jax.detection.structures import Array, Detections
from ppn_jax.metrics.platt import Platt, apply_by_level


class OperatingPoint(NamedTuple):
  """Thresholds and calibration of a detector.

  Attributes:
    names: of the classes, in order of label.
    thresholds: least score of a detection of each class, 0 to 1.
    method: name of the calibration in `platt.METHODS`; '' for none.
    maps: calibration of the scores of each pyramid level; () for none.
  """
  names: tuple[str, ...]
  thresholds: tuple[float, ...]
  method: str = ''
  maps: tuple[Platt, ...] = ()

  def calibrate(self, scores: Array, level: Array) -> np.ndarray:
    """Returns calibrated scores f32 [N] of scores [N] of detections on these levels, [N]."""
    if not self.maps:
      return np.asarray(scores)
    return apply_by_level(self.maps, scores, level).astype(np.float32)

  def calibrated(self, found: Detections) -> Detections:
    """Returns the detections of one image, [N, ...], with calibrated scores, best first."""
    if not self.maps:
      return found
    found = found._replace(scores=self.calibrate(found.scores, found.level))
    order = np.argsort(-found.scores, kind='stable')
    return Detections(*(field[order] for field in found))

  def describe(self) -> dict[str, Any]:
    """Returns it as values of JSON; see the module."""
    thresholds = [{'name': name, 'threshold': threshold}
                  for name, threshold in zip(self.names, self.thresholds, strict=True)]
    levels = []
    for platt in self.maps:
      platt = platt.centred(0.0)
      levels.append({'slope': math.exp(platt.log_slope), 'intercept': platt.intercept})
    return {'thresholds': thresholds,
            'calibration': {'method': self.method, 'levels': levels} if levels else None}


def parse(described: Any, names: Sequence[str]) -> OperatingPoint | None:
  """Returns what `describe` wrote; None if there is nothing, or it is of other classes.

  Args:
    described: values of JSON, of any kind.
    names: of the detector's classes, in order of label.

  Raises:
    ValueError: If it is damaged.
  """
  if described is None:
    return None
  try:
    entries, calibration = described['thresholds'], described['calibration']
    if [e['name'] for e in entries] != list(names):
      return None
    thresholds = tuple(_number(e['threshold'], 0, 1) for e in entries)
    maps = tuple(Platt(math.log(_number(m['slope'], 1e-9)), _number(m['intercept']), 0.0)
                 for m in (calibration['levels'] if calibration else ()))
    return OperatingPoint(tuple(names), thresholds, calibration['method'] if maps else '', maps)
  except (KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{e!r}') from e


def _number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
  """Returns a finite number within bounds; raises ValueError for anything else."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
      math.isfinite(value) and low <= value <= high):
    raise ValueError(f'{value!r} is not a number of {low:g} to {high:g}')
  return float(value)
