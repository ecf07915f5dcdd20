"""What a run has learned so far: arrays and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Array
from ppn_jax.detector import Detector, Variables
from ppn_jax.training.optimizer import Optimizer


class TrainState(NamedTuple):
  """Everything that a step changes and a checkpoint holds.

  Fields:
    step: i32 [], how many steps have been taken.
    variables: of the detector, `{'params', 'batch_stats'}`.
    opt_state: of the optimizer.
    average: moving average of `variables`, or `{}` when none is kept.
  """
  step: Array
  variables: Variables
  opt_state: Any
  average: Variables

  def best_variables(self) -> Variables:
    """What to evaluate and ship: the moving average where one is kept."""
    return self.average or self.variables


def init_state(detector: Detector, optimizer: Optimizer, seed: int) -> TrainState:
  """The state before the first step, a function of `seed`."""
  return first_state(detector.init(jax.random.key(seed)), optimizer)


def first_state(variables: Variables, optimizer: Optimizer) -> TrainState:
  """The state before the first step from these variables."""
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      variables=variables,
      opt_state=optimizer.transform.init(variables['params']),
      # A copy: the step donates its input, and one buffer cannot be donated twice.
      average=jax.tree.map(jnp.copy, variables) if optimizer.ema_decay else {})
