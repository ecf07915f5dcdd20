"""Which checkpoints are the best, by whoever has scored them.

The trainer and evaluation jobs on other machines share no lock. They meet in files that are
written whole, one writer each:

  evaluation/STEP/scores.json  by a job: what a step is worth; by the trainer where it saved a step
                               before it could score it
  evaluation/reading.json      by a job: the step that it is at, which must not be deleted now

The trainer reads both each time that it decides what to keep, and is never written to.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from ppn_jax import files


@dataclasses.dataclass(frozen=True)
class BestScored:
  """Orbax's preservation policy: the `n` best checkpoints, and one that is being evaluated.

  Attributes:
    n: how many.
    rank: metrics -> what is best where it is highest, -inf if they do not have it.
    evaluations: folder of the records; None to go by the figures saved with checkpoints alone.
      Where a step has both, the record counts.
  """
  n: int
  rank: Callable[[dict[str, float | None]], float]
  evaluations: files.Path | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Whether to keep each; one without metrics, or without a rank, is not kept for its worth."""
    del context
    ranks = {}
    for checkpoint in checkpoints:
      figures = self._record(checkpoint.step) or checkpoint.metrics
      if figures is not None and (rank := self.rank(figures)) > -math.inf:
        ranks[checkpoint.step] = rank
    by_rank = sorted(ranks, key=lambda step: (ranks[step], step))
    kept = {*by_rank[len(by_rank) - min(self.n, len(by_rank)):]}
    if self.evaluations is not None:
      kept.add(being_read(self.evaluations))
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def _record(self, step: int) -> dict[str, float | None] | None:
    return None if self.evaluations is None else recorded_figures(self.evaluations, step)


def recorded_figures(evaluations: files.Path, step: int) -> dict[str, float | None] | None:
  """COCO's figures of a step that has been scored, None if it has not.

  Those that do not exist are None, also in files of versions that wrote -1.
  """
  found = _read(evaluations / str(step) / 'scores.json')
  figures = found.get('figures') if isinstance(found, dict) else None
  if not isinstance(figures, dict):
    return None
  return {name: None if value == -1 else value for name, value in figures.items()}


def being_read(evaluations: files.Path) -> int | None:
  """The step that a job is at. One that was killed leaves its last, so at most one too many."""
  found = _read(evaluations / 'reading.json')
  return found.get('step') if isinstance(found, dict) else None


def set_being_read(evaluations: files.Path, step: int | None) -> None:
  """Asks for a step not to be deleted; None takes that back."""
  path = evaluations / 'reading.json'
  if step is None:
    path.unlink(missing_ok=True)
  else:
    files.write_text(path, json.dumps({'step': step}) + '\n')


def _read(path: files.Path) -> Any:
  """What a JSON file holds, None if there is none or it is no JSON."""
  try:
    return json.loads(files.read_text(path))
  except (OSError, ValueError):
    return None
