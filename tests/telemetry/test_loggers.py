"""Loggers beside TensorBoard; the real ones where they are installed."""

import json
import math

import pytest
from tiny import tiny_config

from ppn_jax.config import complete, plain
from ppn_jax.config_files import override
from ppn_jax.errors import InputError
from ppn_jax.telemetry.loggers import Loggers, check_loggers
from ppn_jax.telemetry.metrics import MetricsWriter

SCALARS = {'train/loss': 1.5, 'eval/AP': None, 'rate': math.nan}


class Recorder:
  """Logger that remembers its calls."""
  calls = []  # noqa: RUF012 (it is built by name)

  def __init__(self, workdir, config, fail_at: int = 0):
    self.calls.append(('start', workdir.name, config['train']['steps']))
    self._fail_at = fail_at

  def write(self, step, scalars):
    if step == self._fail_at:
      raise OSError('no network')
    self.calls.append((step, scalars))

  def close(self, failed):
    self.calls.append(('close', failed))


@pytest.fixture
def calls():
  Recorder.calls.clear()
  return Recorder.calls


NAME = f'{__name__}:Recorder'


def test_the_same_scalars_as_in_the_metrics(tmp_path, calls):
  loggers = Loggers((NAME,), tmp_path, plain(tiny_config()))
  with MetricsWriter(tmp_path, 0, loggers=loggers) as writer:
    writer.write(2, SCALARS)
  assert calls == [('start', tmp_path.name, 6), (2, {'train/loss': 1.5}), ('close', False)]


def test_a_run_that_fails(tmp_path, calls):
  loggers = Loggers((NAME,), tmp_path, plain(tiny_config()))
  with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, 0, loggers=loggers):
    raise ZeroDivisionError
  assert calls[-1] == ('close', True)


def test_a_logger_that_fails_ends_alone(tmp_path, calls, log_lines):
  blocks = ({'name': NAME, 'fail_at': 4},)
  with MetricsWriter(tmp_path, 0, loggers=Loggers(blocks, tmp_path, plain(tiny_config()))
                     ) as writer:
    for step in (2, 4, 6):
      writer.write(step, SCALARS)
  assert [c[0] for c in calls] == ['start', 2]
  assert log_lines == [f'{NAME} has failed and gets no more metrics: no network']
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3


def test_entries_of_the_command_line():
  config = override(complete(tiny_config()), ['train.loggers=a:B,c:D'])
  assert config.train.loggers == ('a:B', 'c:D')
  config = override(complete(tiny_config()), ["train.loggers=(dict(name='a:B', project='x'),)"])
  assert plain(config.train.loggers) == ({'name': 'a:B', 'project': 'x'},)


@pytest.mark.parametrize('loggers, message', [
    (('wandbb',), "unknown logger 'wandbb'; did you mean 'wandb'"), ((3,), 'train.loggers has 3'),
    (({'name': NAME, 'fail': 1},), "no option 'fail'; did you mean 'fail_at'"),
    (({'name': NAME, 'workdir': 'x'},), "no option 'workdir'")])
def test_mistakes(loggers, message):
  with pytest.raises(InputError, match=message):
    check_loggers(loggers)


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_missing_package_is_named(name, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda package: None)
  with pytest.raises(InputError, match=rf"{name} is not installed; pip install .*\[{name}\]"):
    check_loggers((name,))


@pytest.mark.slow
def test_wandb(tmp_path):
  pytest.importorskip('wandb', reason="pip install 'ppn_jax[wandb]'")
  block = dict(name='wandb', project='test', mode='offline')
  for step in (2, 4):
    with MetricsWriter(tmp_path, step - 2, loggers=Loggers(
        (block,), tmp_path, plain(tiny_config()))) as writer:
      writer.write(step, SCALARS)
  name = json.loads((tmp_path / 'loggers.json').read_text())['wandb']
  written = [p for p in (tmp_path / 'wandb').glob('offline-run-*') if p.name.endswith(name)]
  # Its own process writes the contents, maybe later.
  assert len(written) == 2 and all((p / f'run-{name}.wandb').exists() for p in written)


@pytest.mark.slow
def test_mlflow(tmp_path):
  pytest.importorskip('mlflow', reason="pip install 'ppn_jax[mlflow]'")
  pytest.importorskip('sqlalchemy', reason='MLflow keeps a local store in a database')
  from mlflow import MlflowClient
  uri = f'sqlite:///{tmp_path}/store.db'
  block = dict(name='mlflow', experiment='test', tracking_uri=uri)
  for step in (2, 4):
    with MetricsWriter(tmp_path, step - 2, loggers=Loggers(
        (block,), tmp_path, plain(tiny_config()))) as writer:
      writer.write(step, SCALARS)
  run, = MlflowClient(uri).search_runs(
      [MlflowClient(uri).get_experiment_by_name('test').experiment_id])
  assert run.data.metrics == {'train/loss': 1.5} and run.info.status == 'FINISHED'
  assert run.data.params['train.steps'] == '6'
  history = MlflowClient(uri).get_metric_history(run.info.run_id, 'train/loss')
  assert [m.step for m in history] == [2, 4]
