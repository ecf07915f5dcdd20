"""Searches the largest batch that fits into the memory of a slice's chips."""

import math
from collections.abc import Mapping

from ppn_jax.planning import estimation
from ppn_jax.planning.estimation import Estimate, Request

MAX_TRIALS = 6  # Compilations that the search may take.


def largest_batch(request: Request, known: Estimate) -> int:
  """Searches the largest batch that fits, to within about a sixteenth.

  Several batches must be compiled, because memory is not linear: near the limit the compiler
  recomputes more.

  Args:
    request: the request with the first batch to try.
    known: the result of `estimation.plan` for it.

  Returns:
    Images per chip, 0 if none fit.

  Raises:
    InputError: As `estimation.plan`.
  """
  tried, unit = {request.batch_per_chip: known}, _unit(request, known)
  while len(tried) <= MAX_TRIALS:
    guess = next_batch(tried, unit)
    if guess is None:
      break
    tried[guess] = estimation.plan(request._replace(batch_per_chip=guess))
  return max((batch for batch, e in tried.items() if e.fits), default=0)


def _unit(request: Request, known: Estimate) -> int:
  """Returns the number of images per chip that must divide a batch: rows of a tile, and groups."""
  rows = 8 * known.devices_per_chip
  if request.program != 'train':
    return rows
  config = request.config
  groups = math.lcm(config['model']['layers'].get('norm_group_size') or 1,
                    config['loss'].get('group_size') or 1)
  whole = config['optim'].get('micro_batches', 1) * math.lcm(
      groups, known.chips * known.devices_per_chip)
  return math.lcm(rows, whole // math.gcd(whole, known.chips))


def next_batch(tried: Mapping[int, Estimate], unit: int) -> int | None:
  """Returns the next multiple of `unit` to try, None if the search is finished.

  The guess is proportional to the memory that the last batch needed. If that is outside the open
  interval, it is bisected.
  """
  batch, last = list(tried.items())[-1]
  fitting = max((b for b, e in tried.items() if e.fits), default=0)
  failing = min((b for b, e in tried.items() if not e.fits), default=None)
  # The compiler itself uses about a sixtieth of the memory.
  guess = int(0.97 * batch * last.hbm / last.peak_hbm) // unit * unit
  if failing is None:
    return guess if guess > fitting + fitting // 16 else None
  if failing - fitting <= max(unit, failing // 16):
    return None
  if not fitting < guess < failing:
    guess = (fitting + failing) // 2 // unit * unit
  return guess if fitting < guess < failing else None
