"""A trained detector, whether a run or a weights file holds it.

A run is a `run.Run`; `run.open_model` opens either. Detection, evaluation and export need no more
than a `TrainedModel`.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppn_jax import detector as detector_lib
from ppn_jax import registry, storage
from ppn_jax.config import complete, plain
from ppn_jax.detection.structures import Category
from ppn_jax.detector import Detector, Variables
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export.weights_file import Path, read_weights_file
from ppn_jax.metrics import operating_point
from ppn_jax.metrics.operating_point import OperatingPoint


class TrainedModel(abc.ABC):
  """Config, classes and weights of a detector.

  Attributes:
    config: its config, locked, with `config.model.num_classes` set.
    categories: its classes, in order of label.
    unknown_keys: keys of the recorded config that this version does not have, and ignores.
  """
  config: ConfigDict
  categories: tuple[Category, ...]
  unknown_keys: tuple[str, ...]

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """Name of the folder or file, for titles."""

  def detector(self, **layers: Any) -> Detector:
    """Builds the detector of the config, with entries of `config.model.layers` changed.

    Args:
      **layers: the entries; None leaves one as it is.
    """
    config = self.config.copy_and_resolve_references()
    with config.unlocked():
      config.model.layers.update({k: v for k, v in layers.items() if v is not None})
    return build_detector(config.lock())

  def with_eval_data(self, data: Mapping[str, Any]) -> Self:
    """Returns the model with entries of `config.data.eval` changed.

    Another `name` of a source replaces the block. The source may be imported.
    """
    config = plain(self.config)
    block = config['data']['eval']
    other = 'name' in data and data['name'] != block.get('name')
    config['data']['eval'] = dict(data) if other else block | data
    # Blocked components of the rest stay blocked.
    return dataclasses.replace(self, config=ConfigDict(plain(complete(config))).lock())  # pyright: ignore

  @abc.abstractmethod
  def check_average(self, ema: bool | None, option: str) -> None:
    """Raises InputError, naming `option`, if there is no such choice of weights."""

  @abc.abstractmethod
  def load_variables(self, detector: Detector, mesh: Mesh, *, step: int | None = None,
                     ema: bool | None = None) -> tuple[int, Variables]:
    """Returns (step, variables) on the mesh; see `run.load_variables`."""

  @abc.abstractmethod
  def operating_point(self, step: int, *, ema: bool | None = None) -> OperatingPoint | None:
    """Returns the thresholds and calibration kept with a step, None if there are none.

    Raises:
      InputError: If they are damaged.
    """

  @abc.abstractmethod
  def metrics(self) -> list[dict[str, float | None]]:
    """Returns recorded metrics, in order of step."""


@dataclasses.dataclass(frozen=True)
class SharedModel(TrainedModel):
  """A weights file, read whole.

  Attributes:
    path: the file.
    config, categories, unknown_keys: see `TrainedModel`. The config names no data.
    step: of the run that the weights come from.
    values: arrays by path.
    provenance: where the weights come from, see `jobs.export_weights`.
    point: thresholds and calibration, None if the file has none.
  """
  path: storage.Path
  config: ConfigDict
  categories: tuple[Category, ...]
  step: int
  values: Mapping[Path, np.ndarray]
  provenance: Mapping[str, Any]
  unknown_keys: tuple[str, ...] = ()
  point: OperatingPoint | None = None

  @property
  def name(self) -> str:
    """See `TrainedModel`."""
    return self.path.name

  def check_average(self, ema: bool | None, option: str) -> None:
    """See `TrainedModel`; a file holds one set of weights."""
    if ema is not None:
      self._refuse(option)

  def load_variables(self, detector: Detector, mesh: Mesh, *, step: int | None = None,
                     ema: bool | None = None) -> tuple[int, Variables]:
    """See `TrainedModel`.

    Raises:
      InputError: If the file's variables are not those of its config, or `step` or `ema` is given.
    """
    if step is not None or ema is not None:
      self._refuse('step' if step is not None else 'ema')
    like = flatten_dict(jax.eval_shape(detector.init, jax.random.key(0)))
    self._check_variables(like)
    placed = {path: np.asarray(self.values[path], leaf.dtype)  # pyright: ignore
              for path, leaf in like.items()}
    return self.step, jax.device_put(unflatten_dict(placed), sharding.replicated(mesh))

  def operating_point(self, step: int, *, ema: bool | None = None) -> OperatingPoint | None:
    """See `TrainedModel`."""
    return self.point

  def metrics(self) -> list[dict[str, float | None]]:
    """See `TrainedModel`; a file has no curves."""
    return []

  def _refuse(self, option: str) -> None:
    raise InputError(f'{option} chooses among the weights of a run, and {self.path} is a weights '
                     'file, which holds one set; leave it out')

  def _check_variables(self, like: Mapping[Path, Any]) -> None:
    """Raises InputError if names or shapes differ from those of the detector's variables."""
    for path in [*(like.keys() - self.values.keys()), *(self.values.keys() - like.keys())]:
      raise InputError(f'{self.path} does not fit its own config: {"/".join(path)} is '
                       + ('missing' if path in like else 'not a variable of that model'))
    for path, leaf in like.items():
      if self.values[path].shape != leaf.shape:
        raise InputError(
            f'{self.path} does not fit its own config: {"/".join(path)} is '
            f'{list(self.values[path].shape)}, and {list(leaf.shape)} in that model')


def open_weights_file(path: str | storage.Path, *, allow: Sequence[str] = ()) -> SharedModel:
  """Opens a weights file.

  Components of its config that are given by a dotted path may be anybody's code; see
  `run.open_run`.

  Args:
    path: a file of `ppn export --format=weights`, local or in a bucket.
    allow: packages, modules or components that may be imported, see `registry.block_imports`.

  Raises:
    InputError: See `weights_file.read_weights_file`; also if its config cannot be used.
  """
  file = read_weights_file(path)
  unknown: list[str] = []
  try:
    config = trusted_config(file.header['config'], allow, file.path, unknown)
  # Whatever a config with unexpected content leads to.
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise InputError(f'{path}: its config cannot be used: {e}') from e
  try:
    point = operating_point.parse(file.header.get('operating_point'),
                                  [c.name for c in file.categories])
  except ValueError as e:
    raise InputError(f'{path}: its thresholds are damaged: {e}; export it again') from e
  if config.model.num_classes != len(file.categories):
    raise InputError(f'{path}: a model of {config.model.num_classes} classes with '
                     f'{len(file.categories)} names')
  provenance = file.header.get('provenance')
  return SharedModel(storage.folder_path(file.path, 'the file'), config, file.categories,
                     file.step, file.values, provenance if isinstance(provenance, dict) else {},
                     tuple(unknown), point)


def trusted_config(written: Mapping[str, Any], allow: Sequence[str], origin: str,
                   unknown: list[str]) -> ConfigDict:
  """Returns a recorded config, locked, with components that are not allowed blocked.

  Args:
    written: the config as a file has it.
    allow: see `registry.block_imports`.
    origin: the file, for messages.
    unknown: collects keys that this version does not have.

  Raises:
    InputError: If a value has the wrong type.
  """
  config = complete(written, unknown=unknown)
  allow = (allow,) if isinstance(allow, str) else allow
  return ConfigDict(registry.block_imports(plain(config), allow, origin)).lock()


def build_detector(config: ConfigDict) -> Detector:
  """Builds the detector of a config whose `model.num_classes` is set.

  Raises:
    InputError: See `detector.build`.
  """
  given = {block: config[block].to_dict() for block in ('matching', 'loss', 'postprocess')}
  return registry.bind('model', detector_lib.build, config.model.to_dict(), given=given)(**given)
