"""Files that `train` leaves behind; kills and restarts change no bit of them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE, tiny_config

from ppn_jax import storage
from ppn_jax.distributed import ownership, sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.jobs import train_loop
from ppn_jax.jobs.evaluate import evaluate
from ppn_jax.run import open_run
from ppn_jax.training.train_step import abstract_state

TESTS = pathlib.Path(__file__).resolve().parents[1]


def final_state(workdir):
  run = open_run(workdir)
  mesh = sharding.data_mesh()
  with run.checkpoints(read_only=True) as checkpoints:
    state = checkpoints.restore(abstract_state(run.detector(), run.optimizer(), mesh),
                                checkpoints.latest())
  return jax.device_get(state)


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def metrics(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  config = tiny_config(evaluate_every=6)
  config.unlock()
  config.optim.ema_decay = 0.9
  scores = train_job.train(config.lock(), workdir)
  return workdir, config, scores


@pytest.mark.slow
def test_a_run_leaves_everything_that_others_need(undisturbed):
  workdir, _, scores = undisturbed
  run = open_run(workdir)
  assert run.config.model.num_classes == 5 and len(run.categories) == 5
  lines = metrics(workdir)
  assert [line['step'] for line in lines] == [2, 3, 4, 6, 6]
  assert all(np.isfinite(line['train/loss']) for line in lines if 'train/loss' in line)
  assert lines[-1]['eval/AP'] == scores.metrics['AP']
  assert int(final_state(workdir).step) == 6
  # The same scores from the workdir alone.
  assert evaluate(run).scores == scores
  assert json.loads((workdir / 'evaluation' / '6' / 'scores.json').read_text())['figures'] == (
      scores.metrics)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(undisturbed, tmp_path):
  workdir, config, _ = undisturbed
  train_job.train(config, tmp_path)
  assert_same_bits(final_state(workdir), final_state(tmp_path))


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(undisturbed, tmp_path):
  workdir, config, _ = undisturbed
  config = config.copy_and_resolve_references().unlock()
  config.data.workers, config.data.threads = 'processes', 2
  train_job.train(config.lock(), tmp_path)
  assert_same_bits(final_state(workdir), final_state(tmp_path))


@pytest.mark.slow
def test_another_seed_gives_another_run(undisturbed, tmp_path):
  workdir, config, _ = undisturbed
  config = config.copy_and_resolve_references()
  config.seed = 1
  train_job.train(config, tmp_path)
  kernels = [jax.tree.leaves(final_state(w).variables['params'])[0] for w in (workdir, tmp_path)]
  assert not np.array_equal(*kernels)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(undisturbed, tmp_path, interrupted_after):
  workdir, config, _ = undisturbed
  with interrupted_after(4):
    train_job.train(config, tmp_path)
  assert metrics(tmp_path)[-1]['step'] == 4
  train_job.train(config, tmp_path)
  assert_same_bits(final_state(workdir), final_state(tmp_path))
  timing = ('train/images_per_second', 'train/data_wait', 'train/host_peak_bytes')
  strip = lambda lines: [{k: v for k, v in line.items() if k not in timing} for line in lines]
  assert strip(metrics(tmp_path)) == strip(metrics(workdir))


@pytest.mark.slow
def test_sigkill_and_restart_end_with_the_same_bits(tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  command = [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={config}',
             '--config.train.steps=30', '--config.train.checkpoint_every=5']
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  killed, undisturbed_run = tmp_path / 'killed', tmp_path / 'undisturbed_run'
  process = subprocess.Popen([*command, f'--workdir={killed}'], env=environment,
                             stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + HANG_SECONDS
  while not (killed / 'checkpoints' / '10').exists():
    assert process.poll() is None and time.monotonic() < deadline, 'no checkpoint to kill after'
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  for workdir in (killed, undisturbed_run):
    subprocess.run([*command, f'--workdir={workdir}'], env=environment, check=True,
                   timeout=HANG_SECONDS, stderr=subprocess.DEVNULL)
  assert int(final_state(killed).step) == 30
  assert_same_bits(final_state(killed), final_state(undisturbed_run))


@pytest.mark.slow
def test_a_finished_run_is_left_alone(undisturbed, log_lines):
  workdir, config, _ = undisturbed
  def files():
    return {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}

  before = files()
  assert train_job.train(config, workdir) is None
  assert 'trained to step 6 already' in log_lines[-1]
  assert files() == before


@pytest.mark.slow
def test_an_evaluation_that_fails_does_not_lose_the_step(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise InputError('bad image')

  monkeypatch.setattr(train_loop.TrainLoop, 'evaluate', fail)
  with pytest.raises(InputError, match='bad image'):
    train_job.train(tiny_config(evaluate_every=6, checkpoint_every=6), tmp_path)
  with open_run(tmp_path).checkpoints(read_only=True) as checkpoints:
    assert checkpoints.latest() == 6


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = tiny_config()
  train_job.train(config, tmp_path)
  config = config.copy_and_resolve_references()
  config.unlock()
  config.train.steps, config.train.checkpoint_every = 12, 1
  config.optim.learning_rate = 1e30
  with pytest.raises(train_loop.TrainingDiverged) as error:
    train_job.train(config.lock(), tmp_path)
  message = str(error.value)
  assert 'is nan at step' in message or 'is inf at step' in message
  with open_run(tmp_path).checkpoints(read_only=True) as checkpoints:
    good = checkpoints.latest()
  assert f'the last good checkpoint is step {good}' in message
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(final_state(tmp_path)))


@pytest.mark.slow
def test_another_model_in_the_workdir_is_refused(undisturbed):
  workdir, config, _ = undisturbed
  before = (workdir / 'config.json').read_text()
  other = config.copy_and_resolve_references()
  other.model.head.depth = 32
  with pytest.raises(InputError, match=r'model.head.depth is 16 there and 32 in this config'):
    train_job.train(other, workdir)
  assert (workdir / 'config.json').read_text() == before


@pytest.mark.slow
def test_more_steps_continue_the_run(undisturbed, tmp_path):
  train_job.train(tiny_config(), tmp_path)
  train_job.train(tiny_config(steps=8), tmp_path)
  assert int(final_state(tmp_path).step) == 8


@pytest.mark.slow
def test_other_images_cannot_be_held_out_later(undisturbed):
  """Refused, since the run would be evaluated on images that it was trained on."""
  workdir, config, _ = undisturbed
  config = config.copy_and_resolve_references().unlock()
  config.data.eval, config.data.eval_fraction = dict(name=''), 0.2
  with pytest.raises(InputError, match=r'started with data.eval_fraction=0.0 and seed=0; with'):
    train_job.train(config, workdir)


def test_the_python_call_completes_and_checks_its_config(tmp_path):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.train = dict(steps=2, batch_size=3, evaluate_every=1)
  config.data.eval = dict(name='')
  with pytest.raises(InputError, match=r'data.eval names no data to evaluate on'):
    train_job.train(config, tmp_path)
  config.train.chekpoint_every = 1
  with pytest.raises(InputError, match=r"train.chekpoint_every; did you mean 'checkpoint_every'"):
    train_job.train(config, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('entry, value', [
    ('steps', 0), ('batch_size', 0), ('log_every', 0), ('checkpoint_every', -1)])
def test_intervals_out_of_range(tmp_path, entry, value):
  with pytest.raises(InputError, match=f'train.{entry}={value}'):
    train_job.train(tiny_config(**{entry: value}), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_training_in_the_workdir_is_refused(undisturbed, monkeypatch):
  workdir, config, _ = undisturbed
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.05)
  with ownership.Ownership(workdir, 'training'):
    before |= {workdir / '.training.lock': (workdir / '.training.lock').stat().st_mtime_ns}
    with pytest.raises(InputError, match=rf'in use by another training: process {os.getpid()} on'):
      train_job.train(config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


@pytest.mark.slow
def test_files_of_killed_processes_are_removed(undisturbed):
  workdir, config, _ = undisturbed
  storage.write_text(workdir / 'readers/gone-1-a.json', 'no reader')
  left = [workdir / '.metrics.jsonl.abcdefgh.partial', workdir / 'evaluation/6/.a.abcdefgh.partial']
  for path in left:
    storage.write_text(path, '')
    os.utime(path, (1000, 1000))
  train_job.train(config, workdir)
  assert not any(path.exists() for path in left) and not [*(workdir / 'readers').iterdir()]
