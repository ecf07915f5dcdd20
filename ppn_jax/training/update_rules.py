"""Optimizers by name: optax's, with the options and defaults that configs have.

Any other of optax goes by its dotted path, dict(name='optax:lion', b1=0.9). The system supplies
`learning_rate`, a schedule. An optimizer that takes `weight_decay` and a mask decays the weights by
itself (decoupled from the gradient's moments) and gets `optim.weight_decay` and the mask of the
kernels; for others the loss includes a penalty, see `optimizer.weight_penalty`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

from ppn_jax import registry
from ppn_jax.errors import InputError
from ppn_jax.training.parameter_paths import is_kernel

OPTIMIZERS = {name: f'ppn_jax.training.update_rules:{name}'
              for name in ('sgd', 'adamw', 'rmsprop', 'lars')}

_DECAY = 'weight_decay'
_MASKS = ('mask', 'weight_decay_mask')


def build_update_rule(block: Mapping[str, Any], *, learning_rate: optax.Schedule,
                      weight_decay: float) -> tuple[optax.GradientTransformation, bool]:
  """Builds the optimizer of a config block.

  Args:
    block: {'name': a name of OPTIMIZERS or a dotted path, **its options}.
    learning_rate: maps a step to its learning rate.
    weight_decay: decay of the kernels.

  Returns:
    (the optimizer, whether it decays the weights by itself).

  Raises:
    InputError: If there is no such optimizer, an option is wrong, or it needs more than gradients
      and parameters.
  """
  name, options = block.get('name'), {**block}
  options.pop('name', None)
  function = registry.resolve('optim.optimizer', name, OPTIMIZERS)
  takes = inspect.signature(function).parameters
  mask = next((m for m in _MASKS if m in takes), None)
  decays = mask is not None and _DECAY in takes
  given = {'learning_rate': learning_rate}
  if decays:
    given |= {_DECAY: weight_decay, mask: kernel_mask}
  for option in options.keys() & given.keys():
    raise InputError(f'optim.optimizer.{option}={options[option]!r} is not an option of its own; '
                     + (f'set optim.{option}' if option not in _MASKS else 'kernels are decayed'))
  bound = registry.bind(f'optim.optimizer {name!r}', function, options, given=given)
  try:
    rule = bound(**given)
    _try(rule)
  except InputError:
    raise
  except Exception as e:  # Whatever a function of another package raises.
    raise InputError(f'optim.optimizer={dict(block)} cannot be used: '
                     f'{" ".join(str(e).split())[:300]}') from e
  return rule, decays


def _try(rule: optax.GradientTransformation) -> None:
  """Traces an update of a small tree, which fails if `rule` is no optimizer that can be used."""
  params = {'a': {'kernel': jnp.zeros((2, 2)), 'bias': jnp.zeros(2)}}
  jax.eval_shape(lambda: rule.update(params, rule.init(params), params))


def kernel_mask(params: Any) -> Any:
  """Returns a tree of bools: the parameters that weight decay applies to."""
  return path_aware_map(lambda path, _: is_kernel(path), params)


def sgd(learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9, nesterov: bool = False
        ) -> optax.GradientTransformation:
  """Momentum SGD, the reference's: a <- momentum a + g and w <- w - rate a.

  Args:
    learning_rate: a schedule.
    momentum: momentum, 0 to below 1.
    nesterov: whether to use Nesterov's correction.

  Raises:
    InputError: If a value is outside its range.
  """
  _check(momentum=momentum)
  return optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)


def adamw(learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, mask: Any,
          b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, nesterov: bool = False
          ) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

  A usual learning rate is 1e-3, a usual `optim.weight_decay` 1e-4 to 0.05: in each step a kernel
  loses `weight_decay` times the learning rate of itself.

  Args:
    learning_rate: a schedule.
    weight_decay: `optim.weight_decay`.
    mask: which parameters are decayed.
    b1: decay of the average of gradients, 0 to below 1.
    b2: decay of the average of their squares, 0 to below 1.
    eps: added to the square root of the latter.
    nesterov: whether to use Nesterov's correction.

  Raises:
    InputError: If a value is outside its range.
  """
  _check(b1=b1, b2=b2)
  _check_positive(eps=eps)
  return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask,
                     nesterov=nesterov)


def rmsprop(learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.9, momentum: float = 0.9,
            epsilon: float = 1.0) -> optax.GradientTransformation:
  """RMSProp as TensorFlow's, with the values of the original SSD MobileNet.

  v <- decay v + (1 - decay) g^2, from v = 1; a <- momentum a + rate g / sqrt(v + epsilon) and
  w <- w - a (TensorFlow's ApplyRMSProp, tf.compat.v1.train.RMSPropOptimizer).

  Args:
    learning_rate: a schedule.
    decay: decay of the average of squares, 0 to below 1.
    momentum: momentum, 0 to below 1.
    epsilon: added to the average of squares, below the root.

  Raises:
    InputError: If a value is outside its range.
  """
  _check(decay=decay, momentum=momentum)
  _check_positive(epsilon=epsilon)
  return optax.rmsprop(learning_rate, decay, epsilon, initial_scale=1.0, eps_in_sqrt=True,
                       momentum=momentum)


def lars(learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, mask: Any,
         momentum: float = 0.9, nesterov: bool = False, trust_coefficient: float = 0.001
         ) -> optax.GradientTransformation:
  """LARS, for large batches (You et al., arXiv 1708.03888): rates of layers follow their norms.

  The gradient of a kernel w is multiplied by trust_coefficient |w| / |g|, where g includes the
  weight decay. Biases and batch norm are left out of both.

  Args:
    learning_rate: a schedule.
    weight_decay: `optim.weight_decay`.
    mask: which parameters are decayed and scaled.
    momentum: momentum, 0 to below 1.
    nesterov: whether to use Nesterov's correction.
    trust_coefficient: length of a step as a fraction of the kernel's, at a learning rate of 1.

  Raises:
    InputError: If a value is outside its range.
  """
  _check(momentum=momentum)
  _check_positive(trust_coefficient=trust_coefficient)
  return optax.lars(learning_rate, weight_decay, mask, trust_coefficient, trust_ratio_mask=mask,
                    momentum=momentum, nesterov=nesterov)


def _check(**decays: float) -> None:
  for name, value in decays.items():
    if not 0 <= value < 1:
      raise InputError(f'optim.optimizer.{name}={value} must be at least 0 and below 1')


def _check_positive(**values: float) -> None:
  for name, value in values.items():
    if not value > 0:
      raise InputError(f'optim.optimizer.{name}={value} must be above 0')
