"""Loggers beside metrics.jsonl and TensorBoard: Weights & Biases, MLflow, or one of your own."""

import importlib.util
import json
import logging
import math
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ppn_jax import registry, storage
from ppn_jax.errors import InputError, install_command

logger = logging.getLogger(__name__)

LOGGERS = {'mlflow': 'ppn_jax.telemetry.loggers:MLflow', 'wandb': 'ppn_jax.telemetry.loggers:WandB'}
_GIVEN = ('workdir', 'config')
_MAX_TEXT = 500  # Length of a value of a parameter that MLflow takes.


class Logger(Protocol):
  """Receives the metrics of a run in its first process.

  It is built with `workdir`, the folder of the run, `config`, a dict of its config, and the other
  entries of its block in `train.loggers`. An exception of `write` or `close` is reported, and ends
  the logger, not the run.
  """

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the finite scalars of a step. A resumed run may repeat steps."""
    ...

  def close(self, failed: bool) -> None:
    """Ends the log; `failed` says that the run ends with an error."""
    ...


def check_loggers(loggers: Sequence[Any]) -> list[dict[str, Any]]:
  """Returns blocks of loggers that are given as names or blocks.

  Raises:
    InputError: If there is no such logger or option, or its package is not installed.
  """
  blocks = [{'name': entry} if isinstance(entry, str) else entry for entry in loggers]
  for block in blocks:
    if not isinstance(block, Mapping):
      raise InputError(f'train.loggers has {block!r}, legal: names, or dict(name=NAME, ...)')
    registry.select('logger', block, LOGGERS, given=_GIVEN)
    name = block['name']
    if name in LOGGERS and importlib.util.find_spec(name) is None:
      raise InputError(f"train.loggers={name}: {name} is not installed; {install_command(name)}")
  return [dict(block) for block in blocks]


class Loggers:
  """The loggers of a run, of which each ends at its first error.

  Args:
    loggers: `train.loggers` of the config, names or blocks.
    workdir: Folder of the run.
    config: Its config.

  Raises:
    InputError: If one cannot be started.
  """

  def __init__(self, loggers: Sequence[Any], workdir: storage.Path, config: Mapping[str, Any]):
    self._loggers: dict[str, Logger] = {}
    for block in check_loggers(loggers):
      name = block['name']
      try:
        self._loggers[name] = registry.build('logger', block, LOGGERS, workdir=workdir,
                                             config=config)
      except InputError:
        raise
      except Exception as e:  # Whatever a service answers, such as that nobody is logged in.
        self.close(failed=True)
        raise InputError(f'train.loggers: {name} cannot be started: {_line(e)}') from e

  def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
    """Writes the scalars of a step, without those that do not exist or are not finite."""
    finite = {key: float(value) for key, value in scalars.items()
              if value is not None and math.isfinite(value)}
    self._try('write', step, finite)

  def close(self, failed: bool) -> None:
    """Ends all loggers."""
    self._try('close', failed)
    self._loggers.clear()

  def _try(self, method: str, *args: Any) -> None:
    for name in list(self._loggers):
      try:
        getattr(self._loggers[name], method)(*args)
      except Exception as e:
        del self._loggers[name]
        logger.warning(f'{name} has failed and gets no more metrics: {_line(e)}')


class WandB:
  """Weights & Biases. A resumed run continues its log.

  Args:
    workdir: Folder of the run.
    config: Its config.
    project: Name of the project.
    entity: User or team, '' for your default.
    mode: 'online', 'offline' or 'disabled'; '' as the environment says.
  """

  def __init__(self, workdir: storage.Path, config: Mapping[str, Any], project: str = 'ppn_jax',
               entity: str = '', mode: str = ''):
    import wandb  # pyright: ignore[reportMissingImports]
    place = workdir if storage.is_local(workdir) else pathlib.Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    self._run = wandb.init(
        project=project, entity=entity or None, mode=mode or None, dir=os.fspath(place),
        name=workdir.name, config=dict(config), resume='allow',
        id=_remembered(workdir, 'wandb', lambda: uuid.uuid4().hex[:12]))
    # Steps of a resumed run begin at its checkpoint, before the last one that was logged.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """See `Logger`."""
    self._run.log({'step': step, **scalars})

  def close(self, failed: bool) -> None:
    """See `Logger`."""
    self._run.finish(exit_code=int(failed))


class MLflow:
  """MLflow. A resumed run continues its log.

  Args:
    workdir: Folder of the run.
    config: Its config, whose entries become parameters.
    experiment: Name of the experiment.
    tracking_uri: Address of the server or of a local store, '' as the environment says.
  """

  def __init__(self, workdir: storage.Path, config: Mapping[str, Any], experiment: str = 'ppn_jax',
               tracking_uri: str = ''):
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
    self._client = MlflowClient(tracking_uri or None)
    found = self._client.get_experiment_by_name(experiment)
    where = found.experiment_id if found else self._client.create_experiment(experiment)
    new = lambda: self._client.create_run(where, run_name=workdir.name).info.run_id
    self._id, self._last = _remembered(workdir, 'mlflow', new), None
    self._client.update_run(self._id, status='RUNNING')
    known = self._client.get_run(self._id).data.params
    params = [Param(key, str(value)[:_MAX_TEXT]) for key, value in _flat(config).items()
              if key not in known]
    for start in range(0, len(params), 100):  # As many as a request may have.
      self._client.log_batch(self._id, params=params[start:start + 100])

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """See `Logger`. A slow server does not hold up the run."""
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
    now = int(time.time() * 1000)
    self._last = self._client.log_batch(
        self._id, [Metric(key, value, now, step) for key, value in scalars.items()],
        synchronous=False)

  def close(self, failed: bool) -> None:
    """See `Logger`."""
    if self._last is not None:
      self._last.wait()
    self._client.set_terminated(self._id, 'FAILED' if failed else 'FINISHED')


def _remembered(workdir: storage.Path, name: str, make: Any) -> str:
  """Returns the id of a run at a service, which the workdir remembers for when it resumes."""
  path = workdir / 'loggers.json'
  ids = json.loads(storage.read_text(path)) if path.is_file() else {}
  if name not in ids:
    ids[name] = make()
    storage.write_text(path, json.dumps(ids, indent=1) + '\n')
  return ids[name]


def _flat(config: Mapping[str, Any], path: str = '') -> dict[str, Any]:
  """Returns the entries of a config by their dotted keys."""
  flat = {}
  for key, value in config.items():
    inner = f'{path}{key}'
    flat |= _flat(value, f'{inner}.') if isinstance(value, Mapping) and value else {inner: value}
  return flat


def _line(error: Exception) -> str:
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= 300 else text[:297] + '...'
