"""Decides when a run ends before `train.steps`, from its evaluations and from measured times."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from ppn_jax.errors import InputError
from ppn_jax.metrics.coco import DESCRIPTIONS, format_metric

# Steps are timed in this many chunks at most, however short they are. The first ones do not count.
MAX_CHUNKS, WARM_UP_CHUNKS = 10_000, 2

_WINDOWS = 10  # See `slow_step_seconds`.
_MOST_STEPS = 2**32  # More than any run takes, see `time_budget`.


class BestStep(NamedTuple):
  """The evaluated step whose metric is highest; the last of equal ones."""
  step: int
  value: float


def best_step(values: Mapping[int, float | None]) -> BestStep | None:
  """Returns the best of the evaluated steps, step -> metric; None if no metric exists."""
  known = [(value, step) for step, value in values.items() if value is not None]
  if not known:
    return None
  value, step = max(known)
  return BestStep(step, value)


def without_improvement(values: Mapping[int, float | None], min_improvement: float = 0.0) -> int:
  """Returns the number of evaluations since the last improvement.

  An evaluation is an improvement if its metric is more than `min_improvement` above that of the
  last improvement, so small gains count once they add up. The first metric that exists is one. A
  metric that does not exist (None) is no improvement.

  Args:
    values: Step -> metric, in any order.
    min_improvement: Least gain, not included, at least 0.
  """
  reference, count = None, 0
  for _, value in sorted(values.items()):
    if value is not None and (reference is None or value > reference + min_improvement):
      reference, count = value, 0
    elif reference is not None:
      count += 1
  return count


@dataclasses.dataclass
class EarlyStopping:
  """Ends a run when a metric has not improved for some evaluations.

  Whether to end is a function of the evaluations up to now, so a run that was killed and has read
  them again ends at the same step.

  Attributes:
    metric: One of COCO's, such as 'AP50'.
    patience: Number of evaluations without an improvement after which to end; 0 for never.
    min_improvement: See `without_improvement`.
    values: Step -> metric, of all evaluations up to now.

  Raises:
    InputError: If the metric is unknown or a number is out of range.
  """
  metric: str = 'AP'
  patience: int = 0
  min_improvement: float = 0.0
  values: dict[int, float | None] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.metric not in DESCRIPTIONS:
      raise InputError(f'train.stop_metric={self.metric!r} is unknown; legal: '
                       f'{", ".join(DESCRIPTIONS)}')
    for name in ('patience', 'min_improvement'):
      if not getattr(self, name) >= 0:
        raise InputError(f'train.{name}={getattr(self, name)} must be at least 0')

  def reached(self) -> bool:
    """Returns whether to end after the evaluations up to now."""
    return 0 < self.patience <= without_improvement(self.values, self.min_improvement)

  def reason(self) -> str:
    """Describes why the run ended."""
    count = without_improvement(self.values, self.min_improvement)
    return (f'{self.metric} has not improved for {count} evaluation{"s" if count > 1 else ""} '
            f'(train.patience={self.patience})')

  def describe_best(self) -> str:
    """Describes the best step; '' if no metric exists."""
    best = best_step(self.values)
    if best is None:
      return ''
    return f'step {best.step:,} was best, {self.metric} {format_metric(best.value, 4)}'


def steps_that_fit(seconds: float, *, step_seconds: float, evaluation_seconds: float = 0.0,
                   evaluate_every: int = 0, save_seconds: float = 0.0, checkpoint_every: int = 0,
                   start: int = 0) -> int:
  """Returns the last step that can be taken, evaluated and saved within a time.

  Args:
    seconds: The time.
    step_seconds: Time of a step, above 0.
    evaluation_seconds: Time of an evaluation.
    evaluate_every: Steps between two evaluations; the last step is evaluated too. 0 for none.
    save_seconds: Time of a save.
    checkpoint_every: Steps between two saves; evaluated steps and the last one are saved too. 0 for
      none but these.
    start: Number of steps taken before.

  Returns:
    The number of that step, or `start` if none fits.
  """
  def needed(last: int) -> float:
    def multiples(every: int) -> int:
      return (last - 1) // every - start // every if every else 0

    evaluations = multiples(evaluate_every) + 1 if evaluate_every else 0
    both = math.lcm(evaluate_every, checkpoint_every)
    saves = multiples(evaluate_every) + multiples(checkpoint_every) - multiples(both) + 1
    return ((last - start) * step_seconds + evaluations * evaluation_seconds
            + saves * save_seconds)

  most = min(max(seconds / step_seconds, 0), _MOST_STEPS)
  candidates = range(start + 1, start + 1 + int(most))
  return start + bisect.bisect_right(candidates, seconds, key=needed)


def is_timed(chunks: list[float], limit: float) -> bool:
  """Returns whether enough was timed to know the time of a step.

  Args:
    chunks: Seconds that each of several equal numbers of steps took. The first
      `WARM_UP_CHUNKS` do not count, since they find batches that were prepared before.
    limit: Seconds that are enough.
  """
  counted = chunks[WARM_UP_CHUNKS:]
  return bool(counted) and (sum(counted) >= limit or len(counted) >= MAX_CHUNKS)


def slow_step_seconds(chunks: list[float], steps_per_chunk: int) -> float:
  """Returns the mean time of a step in the slower half of what `is_timed`, at least a microsecond.

  A plan by the mean of everything would be too optimistic for half of the runs on a machine whose
  speed varies. Chunks are first joined to `_WINDOWS`, since neighbours differ by how batches
  arrive.
  """
  counted = chunks[WARM_UP_CHUNKS:]
  bounds = [len(counted) * n // _WINDOWS for n in range(_WINDOWS + 1)]
  means = sorted(sum(counted[a:b]) / (b - a) for a, b in itertools.pairwise(bounds) if a < b)
  slower = means[len(means) // 2:]
  return max(sum(slower) / (steps_per_chunk * len(slower)), 1e-6)

