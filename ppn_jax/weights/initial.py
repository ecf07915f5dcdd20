"""What a run starts from instead of random values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState
from ppn_jax.weights.files import read_weights
from ppn_jax.weights.importer import Imported, import_backbone


def initial_weights(like: Mapping[str, Any], *, backbone: str = '') -> Imported | None:
  """The weights that the config block `init` names; None if it names none.

  Args:
    like: the detector's variables, or their shapes.
    backbone: where to read the backbone from, any path that `files.read_weights` takes; '' for
      nowhere. The paper starts from one trained on ImageNet (section 4.1).

  Raises:
    InputError: see `read_weights` and `import_backbone`.
  """
  if not isinstance(backbone, str):
    raise InputError(f'init.backbone={backbone!r} is not a path')
  return import_backbone(read_weights(backbone), like) if backbone else None


def with_weights(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
  """A state before its first step, with some of its variables replaced, in the average too."""
  return state._replace(
      variables=_merge(state.variables, variables),
      average=_merge(state.average, variables) if state.average else state.average)


def _merge(variables: Mapping[str, Any], imported: Mapping[str, Any]) -> Mapping[str, Any]:
  """`variables` with those of `imported` in their place, on the same devices."""
  flat, values = flatten_dict(variables), flatten_dict(imported)
  # Copied, since a step donates its buffers and NumPy may still hold these.
  return unflatten_dict({
      path: jnp.copy(jax.device_put(values[path], leaf.sharding)) if path in values else leaf
      for path, leaf in flat.items()})
