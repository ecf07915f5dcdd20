"""Initial weights of a run: read from another run or a file, and placed into a train state."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax import storage, zoo
from ppn_jax.detection.structures import Array, Category
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export.formats import exported_format
from ppn_jax.export.weights_file import is_weights_file
from ppn_jax.training.state import TrainState
from ppn_jax.weights import importer, workdir
from ppn_jax.weights.read import LEGAL, WeightFile, read_weights
from ppn_jax.weights.shared import read_shared
from ppn_jax.weights.transfer import (
  PartialValues,
  PretrainedWeights,
  TransferredWeights,
  transfer_weights,
)

logger = logging.getLogger(__name__)

# Value of `init.weights`: a model of the zoo, if one fits.
AUTO = 'auto'

_OURS = ('the workdir of a run (WORKDIR, WORKDIR@STEP or WORKDIR@best), or a weights file '
         '(.safetensors)')


def initial_weights(like: Mapping[str, Any], categories: Sequence[Category], *, weights: str = '',
                    backbone: str = '', class_names: Sequence[str] = (),
                    norm_images: int = 256, report: Sequence[str] = ()
                    ) -> TransferredWeights | None:
  """Reads the weights that the config block `init` names, and selects what fits the detector.

  Args:
    like: the detector's variables, or their shapes.
    categories: the detector's classes, in order of label.
    weights: the weights to start from: the workdir of a run ('WORKDIR' for its newest step,
      'WORKDIR@2000', or 'WORKDIR@best' for the step with the highest AP), a weights file of
      `ppn export --format=weights`, a TensorFlow checkpoint or frozen graph, a TFLite file, or a
      Keras file; '' starts from random values. 'auto' is the model that comes with the package and
      has the same backbone, if there is one and `backbone` is not given. Every variable with the
      same path and shape is used, batch norm statistics included, from the moving average if the
      run keeps one. Class columns are matched by class name, whose case, spaces, hyphens and
      underscores do not matter. All other variables stay random.
    backbone: as `weights`, for the backbone alone. If it is a file, the whole backbone must fit.
      The paper starts from one trained on ImageNet (section 4.1).
    class_names: classes with another name in the weights, 'NAME=THEIRS' each, such as
      'sofa=couch'; 'NAME=' lets a class start from random values.
    norm_images: number of training images from which batch norm is put back where the weights have
      it folded into convolutions, as TFLite files have; 0 leaves it a mere addition of the bias,
      which batch statistics of training then replace.
    report: which weights were used, unused and random. The run writes it to config.json; it is
      not read.

  Returns:
    The weights that fit, or None if the block names none.

  Raises:
    InputError: If a path leads to no weights, or none of them fit; see `read_weights`,
      `read_workdir`, `read_shared` and `import_backbone`.
  """
  del report
  check_norm_images(norm_images)
  for key, path in (('weights', weights), ('backbone', backbone)):
    if not isinstance(path, str):
      raise InputError(f'init.{key}={path!r} is not a path')
  if class_names and not weights:
    raise InputError(f'init.class_names={tuple(class_names)} needs init.weights; a backbone has no '
                     'classes')
  if weights == AUTO and not backbone:
    found = _zoo_weights(like)
    return None if found is None else transfer_weights(found, like, categories,
                                                       class_names=class_names)
  weights = '' if weights == AUTO else weights
  if weights and backbone:
    raise InputError(f'init.weights={weights} and init.backbone={backbone} are both given, and '
                     'both contain a backbone; leave one of them out')
  key, path = ('weights', weights) if weights else ('backbone', backbone)
  if not path:
    return None
  return transfer_weights(_read(f'init.{key}', path, like), like, categories,
                          part='' if weights else 'backbone', class_names=class_names)


def _zoo_weights(like: Mapping[str, Any]) -> PretrainedWeights | None:
  """Reads the model of the zoo that has the whole backbone of a detector.

  Of several it is the one that shares most variables with the detector. Without any, it says so and
  returns None.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(like).items()}
  best, most = None, 0
  for path in filter(is_weights_file, map(zoo.model_file, zoo.names())):
    read = read_shared(path)
    fits = {path for path, shape in shapes.items()
            if path in read.values and read.values[path].shape == shape}
    if all(path in fits for path in shapes if path[1] == 'backbone') and len(fits) > most:
      best, most = read, len(fits)
  if best is None:
    logger.info("init.weights='auto': no model that comes with the package has this backbone, so "
                'training starts from random values; trained ones need far fewer images and steps '
                f'({", ".join(zoo.names())} at its own depth multiplier, or init.backbone=FILE)')
  return best


def check_norm_images(count: int) -> None:
  """Raises InputError if `init.norm_images` is not a number of images."""
  if count < 0:
    raise InputError(f'init.norm_images={count} must be a number of images, or 0')


def _read(key: str, text: str, like: Mapping[str, Any]) -> PretrainedWeights:
  """Reads the run at a path if it is the workdir of one, otherwise the file."""
  text = zoo.find(storage.expand_home(text))
  # A folder whose name ends in '@2000' takes precedence over a step.
  path, step = (text, '') if pathlib.Path(text).exists() else workdir.split_step(text)
  folder = sharding.all_or_none(lambda: storage.folder_path(path, key))
  sharding.all_or_none(lambda: workdir.check_not_inside(folder))
  if sharding.all_or_none(lambda: workdir.is_workdir(folder)):
    return workdir.read_workdir(folder, step)
  if is_weights_file(path):
    return sharding.all_or_none(lambda: _read_shared(key, path, step))
  file = sharding.all_or_none(lambda: _read_file(key, text))
  if key == 'init.weights':
    return importer.import_matching(file, like)
  # A file must have the whole backbone, since its network is a known one.
  imported = importer.import_backbone(file, like)
  return PretrainedWeights(imported.report.path, imported.report.description,
                           flatten_dict(imported.variables), unused=imported.report.unused)


def _read_shared(key: str, path: str, step: str) -> PretrainedWeights:
  """Reads a weights file; a step behind its name is a mistake."""
  if step:
    raise InputError(f'{key}={path}@{step}: a weights file holds one step; leave out @{step}')
  try:
    return read_shared(path)
  except InputError as e:
    raise InputError(f'{key}: {e}') from e


def _read_file(key: str, path: str) -> WeightFile:
  """Reads a file of weights; the error for a path that leads nowhere also mentions workdirs.

  Raises:
    InputError: See `read_weights`; also if it is a file of `ppn export` for another runtime.
  """
  if found := exported_format(pathlib.Path(path)):
    raise InputError(f'{key}={path} is a program in the format {found}, whose weights cannot be '
                     'taken out; give the run that it comes from, or a file of '
                     '`ppn export --format=weights`')
  try:
    return read_weights(path)
  except InputError as e:
    if pathlib.Path(path).is_file():
      raise
    more = f', or {_OURS}' if LEGAL in str(e) else f'; {LEGAL}, or {_OURS}'
    raise InputError(f'{key}={path}: {e}{more}{zoo.suggestion(path)}') from e


def with_weights(state: TrainState, variables: Mapping[str, Any],
                 partial: PartialValues | None = None) -> TrainState:
  """Returns an initial state with some of its variables replaced, also in the moving average.

  Args:
    state: the state before its first step.
    variables: a subtree of the state's variables.
    partial: entries of further variables, see `TransferredWeights`.
  """
  merged = lambda into: _merge(into, variables, partial or {})
  return state._replace(variables=merged(state.variables),
                        average=merged(state.average) if state.average else state.average)


def _merge(variables: Mapping[str, Any], imported: Mapping[str, Any], partial: PartialValues
           ) -> Mapping[str, Any]:
  """Returns `variables` with the imported values in place, on the same devices."""
  flat, values = flatten_dict(variables), flatten_dict(imported)
  for path, (indices, entries) in partial.items():
    values[path] = _to_host(flat[path])
    values[path][..., indices] = entries
  # Copied because the training step donates its buffers, which NumPy may still hold.
  return unflatten_dict({
      path: jnp.copy(jax.device_put(values[path], leaf.sharding)) if path in values else leaf
      for path, leaf in flat.items()})


def _to_host(array: Array) -> np.ndarray:
  """Returns a copy on the host of an array that may be split over devices and processes."""
  if array.is_fully_replicated:
    return np.array(array.addressable_data(0))
  return np.array(sharding.to_host(array))
