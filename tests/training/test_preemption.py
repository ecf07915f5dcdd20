"""SIGTERM: the step is saved, the exit code is 75, and a restart ends with the same bits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.run import open_run
from ppn_jax.training import loop, partition, preemption
from ppn_jax.training.checkpoint import Checkpoints, SaveFailed
from ppn_jax.training.preemption import Preempted, PreemptionNotice
from ppn_jax.training.step import abstract_state

TESTS = pathlib.Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def final_state(workdir):
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), partition.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(like, checkpoints.latest()))


def steps_of(workdir):
  with open_run(workdir).checkpoints(read_only=True) as checkpoints:
    return checkpoints.steps()


def evaluated_steps(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if 'eval/AP' in line]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  loop.train(tiny_config(evaluate_every=3), workdir)
  return final_state(workdir)


def terminate_when(monkeypatch, name, step):
  """SIGTERM, twice, at a step's report (name='_report') or evaluation ('evaluate')."""
  original = getattr(loop._Steps, name)

  def with_signal(self, at, *arguments):
    if at == step:
      for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, at, *arguments)

  monkeypatch.setattr(loop._Steps, name, with_signal)


@pytest.mark.parametrize('where, step, saved, scored', [
    ('_report', 2, [3], []), ('_report', 4, [3, 5], [3]), ('evaluate', 3, [3], []),
    ('evaluate', 6, [3, 6], [3])])
def test_a_run_that_is_told_to_end_goes_on_with_the_same_bits(
    whole, tmp_path, monkeypatch, where, step, saved, scored):
  terminate_when(monkeypatch, where, step)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Preempted, match=f'step {saved[-1]} is saved'):
    loop.train(tiny_config(evaluate_every=3), tmp_path)
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGTERM) == before
  assert steps_of(tmp_path) == saved and evaluated_steps(tmp_path) == scored
  loop.train(tiny_config(evaluate_every=3), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), whole)
  assert evaluated_steps(tmp_path) == [3, 6]


def test_a_run_without_evaluation_that_is_at_its_end_is_done(tmp_path, monkeypatch):
  terminate_when(monkeypatch, '_report', 6)
  assert loop.train(tiny_config(), tmp_path) is None
  assert steps_of(tmp_path) == [3, 6]


def fail_saves(monkeypatch, steps):
  original = Checkpoints.save

  def save(self, step, *arguments):
    if step in steps:
      steps.remove(step)
      raise self._failed(f'step {step} could not be saved', OSError('No space left on device'))
    return original(self, step, *arguments)

  monkeypatch.setattr(Checkpoints, 'save', save)


def test_a_save_that_fails_is_said_and_tried_again_at_the_next(tmp_path, monkeypatch, capsys):
  fail_saves(monkeypatch, [1, 2, 6])
  loop.train(tiny_config(checkpoint_every=1), tmp_path)
  said = capsys.readouterr().err
  assert 'step 1 could not be saved: No space left on device' in said and 'going on' in said
  assert steps_of(tmp_path) == [4, 5, 6]


@pytest.mark.parametrize('options, failing, kept', [
    ({'on_save_error': 'stop'}, [2], [1]), ({}, [2, 3, 4, 5, 6], [1])])
def test_saves_that_fail_end_the_run(tmp_path, monkeypatch, options, failing, kept):
  fail_saves(monkeypatch, failing)
  with pytest.raises(SaveFailed, match=r'the newest checkpoint in .* is step 1'):
    loop.train(tiny_config(checkpoint_every=1, **options), tmp_path)
  assert steps_of(tmp_path) == kept


def test_outside_the_main_thread_signals_are_left_to_the_caller():
  before, after = signal.getsignal(signal.SIGTERM), []

  def use():
    with PreemptionNotice() as notice:
      after.append((signal.getsignal(signal.SIGTERM), notice.reached(1)))

  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert after == [(before, False)]


def train_in_two_processes(tmp_path, workdir, on_line=None):
  """Runs until both have ended; `on_line` gets each line of process 0 and the processes."""
  (tmp_path / 'config.py').write_text(CONFIG_FILE.format(folder=str(TESTS)))
  port = partition_port()
  processes = [subprocess.Popen(
      [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={tmp_path}/config.py',
       f'--workdir={workdir}', '--config.train.steps=400', '--config.train.checkpoint_every=100',
       '--config.train.log_every=10', '--config.model.backbone.last_block=3',
       '--config.model.neck.stride=4', '--config.model.neck.num_levels=2',
       f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={i}',
       '--local_devices=1'],
      stderr=subprocess.PIPE, text=True, cwd=ROOT,
      env={**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}) for i in range(2)]
  tail = threading.Thread(target=processes[1].stderr.read)
  tail.start()
  lines = []
  for line in processes[0].stderr:
    lines.append(line)
    if on_line:
      on_line(line, processes)
  codes = [p.wait(timeout=120) for p in processes]
  tail.join()
  return codes, ''.join(lines)


def partition_port():
  import socket
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def test_of_two_processes_one_is_told_and_both_save_the_same_step(tmp_path):
  def on_line(line, processes):
    if line.startswith('step 20/'):
      processes[1].send_signal(signal.SIGTERM)

  codes, said = train_in_two_processes(tmp_path, tmp_path / 'run', on_line)
  assert codes == [preemption.EXIT_CODE] * 2, said
  assert 'ppn: preempted: told to end; step ' in said
  at = steps_of(tmp_path / 'run')[-1]
  assert 20 <= at < 400 and f'step {at} is saved' in said
  codes, said = train_in_two_processes(tmp_path, tmp_path / 'run')
  assert codes == [0, 0] and f'from step {at}' in said, said
  codes, said = train_in_two_processes(tmp_path, tmp_path / 'whole')
  assert codes == [0, 0], said
  jax.tree.map(np.testing.assert_array_equal, *map(final_state, (tmp_path / 'run',
                                                                 tmp_path / 'whole')))
