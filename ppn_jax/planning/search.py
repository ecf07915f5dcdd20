"""The largest batch that fits into the memory of a slice's chips."""

import math
from collections.abc import Mapping

from ppn_jax.planning import estimation
from ppn_jax.planning.estimation import Estimate, Request

# Compiles that the search may take.
MAX_TRIALS = 6


def largest_batch(request: Request, known: Estimate) -> int:
  """Images a chip that were found to fit, within about a sixteenth of the most; 0 for none.

  Compiles a few times: near the limit the compiler recomputes more, so memory is not linear.

  Args:
    request: its batch is where the search begins.
    known: what `planning.plan` gave for it.

  Raises:
    InputError: see `planning.plan`.
  """
  tried, unit = {request.batch_per_chip: known}, _unit(request, known)
  while len(tried) <= MAX_TRIALS:
    guess = next_batch(tried, unit)
    if guess is None:
      break
    tried[guess] = estimation.plan(request._replace(batch_per_chip=guess))
  return max((batch for batch, e in tried.items() if e.fits), default=0)


def _unit(request: Request, known: Estimate) -> int:
  """Images a chip that batches are multiples of: a tile's rows, and what the config divides."""
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
  """The multiple of `unit` to try after those; None where they tell enough.

  In proportion to what the last one needed, and halfway where that leads outside what is open.
  """
  batch, last = list(tried.items())[-1]
  fitting = max((b for b, e in tried.items() if e.fits), default=0)
  failing = min((b for b, e in tried.items() if not e.fits), default=None)
  # Of the memory a sixtieth or so is the compiler's own.
  guess = int(0.97 * batch * last.hbm / last.peak_hbm) // unit * unit
  if failing is None:
    return guess if guess > fitting + fitting // 16 else None
  if failing - fitting <= max(unit, failing // 16):
    return None
  if not fitting < guess < failing:
    guess = (fitting + failing) // 2 // unit * unit
  return guess if fitting < guess < failing else None
