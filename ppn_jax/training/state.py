"""The state of a training run: arrays and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppn_jax.detection.structures import Array
from ppn_jax.detector import Detector, Variables
from ppn_jax.training.optimizer import Optimizer


class TrainState(NamedTuple):
  """Everything that a step changes and a checkpoint holds.

  Fields:
    step: i32 [], number of steps taken.
    variables: Variables of the detector, `{'params', 'batch_stats'}`.
    opt_state: State of the optimizer; None if it was left out when a checkpoint was restored.
    average: Moving average of `variables`, or `{}` if none is kept.
  """
  step: Array
  variables: Variables
  opt_state: Any
  average: Variables

  def best_variables(self) -> Variables:
    """Returns the variables to evaluate and ship: the moving average if one is kept."""
    return self.average or self.variables


def init_state(detector: Detector, optimizer: Optimizer, seed: int) -> TrainState:
  """Returns the state before the first step, a function of `seed`."""
  return first_state(detector.init(jax.random.key(seed)), optimizer)


def first_state(variables: Variables, optimizer: Optimizer) -> TrainState:
  """Returns the state before the first step, starting from these variables."""
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      variables=variables,
      opt_state=optimizer.init(variables['params']),
      # A copy: the step donates its input, and one buffer cannot be donated twice.
      average=jax.tree.map(jnp.copy, variables) if optimizer.ema_decay else {})
