"""Learning-rate schedules, and the warm-up before them.

A schedule is a function of a step that returns a factor of `optim.learning_rate`. A function that
builds one is called with those of `steps`, `warmup_steps` and `warmup_factor` that it has as
arguments. optax's need none of them: dict(name='optax:polynomial_schedule', init_value=1.0,
end_value=0.01, power=2, transition_steps=10_000).
"""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppn_jax import registry
from ppn_jax.detection.structures import Array
from ppn_jax.errors import InputError

SCHEDULES = {name: f'ppn_jax.training.schedules:{name}'
             for name in ('cosine', 'step', 'exponential', 'constant', 'one_cycle')}

_GIVEN = ('steps', 'warmup_steps', 'warmup_factor')


def build_schedule(block: Mapping[str, Any], *, base_rate: float, steps: int, warmup_steps: int,
                   warmup_rate: float) -> optax.Schedule:
  """Builds the learning rate of a run: a linear warm-up, then the schedule of a config block.

  Step 0 has `warmup_rate`, step `warmup_steps` what the schedule says. A schedule that takes
  `warmup_factor` has a warm-up of its own.

  Args:
    block: {'name': a name of SCHEDULES or a dotted path, **its options}.
    base_rate: highest learning rate.
    steps: steps of the run.
    warmup_steps: steps of the warm-up.
    warmup_rate: learning rate at step 0.

  Raises:
    InputError: If there is no such schedule, or an option is wrong.
  """
  function = registry.select('optim.schedule', block, SCHEDULES, given=_GIVEN)
  takes = inspect.signature(function).parameters
  values = {'steps': steps, 'warmup_steps': warmup_steps,
            'warmup_factor': warmup_rate / base_rate if base_rate else 1.0}
  try:
    factor = function(**{name: value for name, value in values.items() if name in takes})
    jax.eval_shape(factor, jnp.zeros((), jnp.float32))
  except InputError:
    raise
  except Exception as e:  # Whatever a function of another package raises.
    raise InputError(f'optim.schedule={dict(block)}: {e}') from e
  if 'warmup_factor' in takes:
    return lambda step: base_rate * factor(step)

  def rate(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    warmup = warmup_rate + (base_rate - warmup_rate) * step / max(warmup_steps, 1)
    return jnp.where(step < warmup_steps, warmup, base_rate * factor(step))

  return rate


def cosine(*, steps: int, warmup_steps: int, final_factor: float = 0.0) -> optax.Schedule:
  """Falls along half a cosine from the end of the warm-up to the last step.

  Same as the reference's `cosine_decay_learning_rate`.

  Args:
    steps: steps of the run.
    warmup_steps: steps of the warm-up.
    final_factor: where it ends, as a fraction of `optim.learning_rate`.

  Raises:
    InputError: If `final_factor` is not in [0, 1].
  """
  _check('cosine', 'final_factor', final_factor, 0 <= final_factor <= 1, '0 to 1')

  # optax.warmup_cosine_decay_schedule differs in the last bits and needs warmup_steps < steps.
  def factor(step: Array) -> Array:
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    fall = jnp.where(step > steps, 0.0, fall)
    return final_factor + (1 - final_factor) * fall if final_factor else fall

  return factor


def step(*, steps: int, boundaries: Sequence[float] = (2 / 3, 8 / 9), factor: float = 0.1
         ) -> optax.Schedule:
  """Multiplies the learning rate by a factor at each of a few steps.

  Args:
    steps: steps of the run.
    boundaries: where, ascending: shares of the run's steps below 1, or numbers of steps.
    factor: what the rate is multiplied by at each of them.

  Raises:
    InputError: If a value is outside its range.
  """
  _check('step', 'factor', factor, factor > 0, 'above 0')
  for at in boundaries:
    _check('step', 'boundaries', tuple(boundaries), 0 < at < 1 or (at >= 1 and at == int(at)),
           'shares of the steps, between 0 and 1, or whole numbers of steps')
  places = [round(at * steps) if at < 1 else int(at) for at in boundaries]
  _check('step', 'boundaries', tuple(boundaries),
         all(a < b for a, b in itertools.pairwise(places)),
         f'in ascending order, of different steps, but they are the steps {places}')
  return optax.piecewise_constant_schedule(1.0, dict.fromkeys(places, factor))


def exponential(*, warmup_steps: int, decay_steps: int = 800_720, decay_factor: float = 0.95,
                staircase: bool = True) -> optax.Schedule:
  """Multiplies the learning rate by a factor after each so many steps, counted from the warm-up on.

  The TF Object Detection API's `exponential_decay_learning_rate`; the defaults are those of its
  SSD MobileNet, with `optim.learning_rate=0.004`, `rate_batch_size=0` and `warmup_fraction=0`.

  Args:
    warmup_steps: steps of the warm-up.
    decay_steps: number of steps after which the rate is multiplied.
    decay_factor: what it is multiplied by.
    staircase: whether it changes at once after `decay_steps`, or a little in each step.

  Raises:
    InputError: If a value is outside its range.
  """
  _check('exponential', 'decay_steps', decay_steps, decay_steps >= 1, 'at least 1')
  _check('exponential', 'decay_factor', decay_factor, decay_factor > 0, 'above 0')
  return optax.exponential_decay(1.0, decay_steps, decay_factor, transition_begin=warmup_steps,
                                 staircase=staircase)


def constant() -> optax.Schedule:
  """Keeps the learning rate after the warm-up."""
  return optax.constant_schedule(1.0)


def one_cycle(*, steps: int, warmup_steps: int, warmup_factor: float, final_factor: float = 4e-6
              ) -> optax.Schedule:
  """Rises and falls along half a cosine each (Smith et al., arXiv 1708.07120).

  The rise takes the place of the warm-up: `optim.warmup_fraction=0.3` and `warmup_factor=0.04` are
  usual.

  Args:
    steps: steps of the run.
    warmup_steps: steps of the rise.
    warmup_factor: where it starts, as a fraction of `optim.learning_rate`.
    final_factor: where it ends.

  Raises:
    InputError: If a value is outside its range.
  """
  _check('one_cycle', 'final_factor', final_factor, 0 < final_factor <= 1, 'above 0, at most 1')
  if not (0 < warmup_steps < steps and warmup_factor > 0):
    raise InputError("optim.schedule 'one_cycle' needs a warm-up of at least a step, which starts "
                     f'above 0, but {warmup_steps} of {steps} steps warm up from a factor of '
                     f'{warmup_factor}; set optim.warmup_fraction=0.3 and warmup_factor=0.04')
  return optax.cosine_onecycle_schedule(
      # Half a step more, as the product is rounded down to the number of steps.
      steps, 1.0, (warmup_steps + 0.5) / steps, div_factor=1 / warmup_factor,
      final_div_factor=warmup_factor / final_factor)


def _check(schedule: str, option: str, value: Any, legal: bool, words: str) -> None:
  if not legal or (isinstance(value, float) and not math.isfinite(value)):
    raise InputError(f'optim.schedule.{option}={value} of {schedule!r} must be {words}')
