"""What a run starts from instead of random values."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax import storage
from ppn_jax.detection.structures import Array, Category
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState
from ppn_jax.weights import importer, workdir
from ppn_jax.weights.fitting import Columns, Fitted, Weights, fit
from ppn_jax.weights.read import WeightFile, read_weights

_OR_WORKDIR = ', or the workdir of a run (WORKDIR, WORKDIR@STEP or WORKDIR@best)'


def initial_weights(like: Mapping[str, Any], categories: Sequence[Category], *, weights: str = '',
                    backbone: str = '', report: Sequence[str] = ()) -> Fitted | None:
  """Reads the weights that the config block `init` names, and takes what fits the detector.

  Args:
    like: the detector's variables, or their shapes.
    categories: the detector's classes, in order of label.
    weights: what to start from: the workdir of a run ('WORKDIR' for its newest step,
      'WORKDIR@2000', or 'WORKDIR@best' for the step of highest AP), a TensorFlow checkpoint or
      frozen graph, or a Keras file; '' starts from random values. Every variable of the same
      path and shape is taken, batch norm's statistics too, from the moving average where the run
      keeps one; class columns are carried over by class name. What does not fit stays random.
    backbone: as `weights`, for the backbone alone; of a file the whole backbone must fit. The
      paper starts from one trained on ImageNet (section 4.1).
    report: what was taken, what is fresh and what was not used: written to config.json by the
      run, and not read.

  Returns:
    What was taken; None if the block names nothing.

  Raises:
    InputError: A path that leads to no weights, or nothing in them fits; see `read_weights`,
      `read_workdir` and `import_backbone`.
  """
  del report
  for key, path in (('weights', weights), ('backbone', backbone)):
    if not isinstance(path, str):
      raise InputError(f'init.{key}={path!r} is not a path')
  if weights and backbone:
    raise InputError(f'init.weights={weights} and init.backbone={backbone} are both given, and '
                     'both have a backbone; leave one of them out')
  key, path = ('weights', weights) if weights else ('backbone', backbone)
  if not path:
    return None
  return fit(_read(f'init.{key}', path, like), like, categories,
             part='' if weights else 'backbone')


def _read(key: str, text: str, like: Mapping[str, Any]) -> Weights:
  """What a path leads to: a run if it is the workdir of one, else a file."""
  text = os.path.expanduser(text)
  # A folder of this name goes before a step.
  path, step = (text, '') if pathlib.Path(text).exists() else workdir.split_step(text)
  folder = sharding.all_or_none(lambda: storage.folder_path(path, key))
  sharding.all_or_none(lambda: workdir.check_not_inside(folder))
  if sharding.all_or_none(lambda: workdir.is_workdir(folder)):
    return workdir.read_workdir(folder, step)
  file = sharding.all_or_none(lambda: _read_file(key, text))
  if key == 'init.weights':
    return importer.named_values(file, like)
  # Of a file all must be there: it is a network that is known.
  imported = importer.import_backbone(file, like)
  return Weights(imported.report.path, imported.report.description,
                 flatten_dict(imported.variables), unused=imported.report.unused)


def _read_file(key: str, path: str) -> WeightFile:
  try:
    return read_weights(path)
  except InputError as e:
    if pathlib.Path(path).is_file():
      raise
    raise InputError(f'{key}={path}: {e}{_OR_WORKDIR}') from e


def with_weights(state: TrainState, variables: Mapping[str, Any],
                 columns: Columns | None = None) -> TrainState:
  """Returns a state before its first step with some of its variables replaced.

  Those of the moving average are replaced too.

  Args:
    state: as it was initialised.
    variables: a part of the tree of variables.
    columns: entries along the last axis of further variables, as of `Fitted`.
  """
  merged = lambda into: _merge(into, variables, columns or {})
  return state._replace(variables=merged(state.variables),
                        average=merged(state.average) if state.average else state.average)


def _merge(variables: Mapping[str, Any], imported: Mapping[str, Any], columns: Columns
           ) -> Mapping[str, Any]:
  """`variables` with those of `imported` in their place, on the same devices."""
  flat, values = flatten_dict(variables), flatten_dict(imported)
  for path, (entries, columns_values) in columns.items():
    values[path] = _whole(flat[path])
    values[path][..., entries] = columns_values
  # Copied, since a step donates its buffers and NumPy may still hold these.
  return unflatten_dict({
      path: jnp.copy(jax.device_put(values[path], leaf.sharding)) if path in values else leaf
      for path, leaf in flat.items()})


def _whole(array: Array) -> np.ndarray:
  """A copy on the host; an average may be split over devices, and devices over processes."""
  if array.is_fully_replicated:
    return np.array(array.addressable_data(0))
  return np.array(sharding.to_host(array))
