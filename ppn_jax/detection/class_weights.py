"""Weights of classes in the loss, by label or by name."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from ppn_jax.errors import InputError, did_you_mean

# {name: weight}, pairs of the two, or a weight for each label; empty: no weights.
ClassWeights = Mapping[str, float] | Sequence[Any]


def by_name(weights: Any) -> dict[str, Any]:
  """Returns {name: weight} of weights that are given by name, {} of others.

  Raises:
    InputError: If a name is given twice.
  """
  if isinstance(weights, Mapping):
    return dict(weights)
  if not isinstance(weights, Sequence) or isinstance(weights, str):
    return {}
  pairs = [w for w in weights if isinstance(w, Sequence) and not isinstance(w, str) and len(w) == 2]
  if not pairs or len(pairs) != len(weights):
    return {}
  named = dict(pairs)
  if len(named) < len(pairs):
    names = [name for name, _ in pairs]
    again = next(name for name in names if names.count(name) > 1)
    raise InputError(f'loss.class_weights names the class {again!r} twice; give one weight')
  return named


def resolve_class_weights(weights: ClassWeights, names: Sequence[str]) -> tuple[Any, ...]:
  """Returns the weight of each label; classes that are not named have weight 1.

  Args:
    weights: weights by name, or by label, which are returned as they are.
    names: C names of classes, in order of label.

  Raises:
    InputError: If no class has a name.
  """
  named = by_name(weights)
  if not named:
    return tuple(weights)
  for name in named:
    if name not in names:
      raise InputError(f'loss.class_weights: no class of the training data is named {name!r}; '
                       f'{did_you_mean(str(name), names)}')
  return tuple(named.get(name, 1.0) for name in names)


def check_class_weights(weights: ClassWeights, num_classes: int) -> tuple[float, ...]:
  """Returns the weight of each of C labels, or () if none are given.

  Raises:
    InputError: If weights are given by name, are not C, or not finite numbers above 0.
  """
  if not isinstance(weights, (Mapping, Sequence)) or isinstance(weights, str):
    raise InputError(f"loss.class_weights={weights!r} must be weights by name, {{'person': 2.0}}")
  if named := by_name(weights):
    raise InputError(f'loss.class_weights names classes, such as {next(iter(named))!r}, but their '
                     'labels are not known here; give a weight for each label, (1.0, 2.0, ...)')
  if not weights:
    return ()
  for weight in weights:
    if (not isinstance(weight, numbers.Real) or isinstance(weight, bool)
        or not 0 < weight < math.inf):
      raise InputError(f'loss.class_weights: {weight!r} is no weight; legal: a number above 0')
  if len(weights) != num_classes:
    raise InputError(f'loss.class_weights has {len(weights)} weights, but there are {num_classes} '
                     "classes; give one for each, or by name, {'person': 2.0}")
  return tuple(float(weight) for weight in weights)
