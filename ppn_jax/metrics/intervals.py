"""Intervals of 95%. Detections of one image resemble one another, so images are what is redrawn."""

from collections.abc import Sequence

import numpy as np
from scipy import special

JACKKNIFE_GROUPS = 20


def wilson(correct: int, count: int) -> tuple[float, float]:
  """Wilson's 95% interval of a share."""
  z, p = 1.96, correct / count
  middle, half = p + z**2 / (2 * count), z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
  scale = 1 + z**2 / count
  return float(max(middle - half, 0) / scale), float(min((middle + half) / scale, 1))


def percentiles(drawn: np.ndarray) -> list[float]:
  """95% interval of a figure from its resampled values."""
  return [float(x) for x in np.percentile(drawn, (2.5, 97.5))]


def norm_interval(value: float, by_chance: np.ndarray, along: np.ndarray) -> list[float]:
  """Interval of a norm of noisy parts, which noise makes larger, most of all near zero.

  A bootstrap's percentiles never reach zero there. Down, it goes as far as the noise alone would
  have made the value (the triangle inequality); up, as far as the noise moves a large value.
  Simulated, it held the true ECE in 96 to 100% of cases, calibrated or not, of 120 and more
  detections; percentiles held it in 0 to 93%.

  Args:
    value: as measured.
    by_chance: the norm of the noise alone, resampled.
    along: change of the value by resampled noise, to first order.
  """
  return [float(max(value - np.percentile(by_chance, 97.5), 0)),
          float(value + np.percentile(along, 97.5))]


def jackknife_masks(place: np.ndarray, num_images: int,
                    groups: int = JACKKNIFE_GROUPS) -> list[np.ndarray]:
  """Places [N] of images, 0 to num_images - 1 -> per group of images, bool [N] of the others."""
  groups = min(groups, num_images)
  return [place % groups != group for group in range(groups)]


def jackknife_interval(whole: float, parts: Sequence[float]) -> list[float] | None:
  """95% interval of a figure, from its values with one group of images left out each.

  By Student's t; None of fewer than two groups.
  """
  parts, g = np.asarray(parts), len(parts)
  if g < 2:
    return None
  error = np.sqrt((g - 1) / g * np.sum((parts - parts.mean())**2))  # pyright: ignore
  half = float(special.stdtrit(g - 1, 0.975) * error)
  return [whole - half, whole + half]
