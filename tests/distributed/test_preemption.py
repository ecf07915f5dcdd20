"""SIGTERM, or notice of maintenance: the step is saved, the exit code is 75, and a restart ends
with the same bits."""

import contextlib
import datetime
import http.server
import itertools
import json
import os
import pathlib
import signal
import threading

import jax
import numpy as np
import pytest
from time_limits import wait_until
from tiny import tiny_config
from two_processes import train_in_two_processes

from ppn_jax.checkpoints.manager import Checkpoints, SaveFailed
from ppn_jax.distributed import preemption, sharding
from ppn_jax.distributed.preemption import (
  MaintenanceWatch,
  Preempted,
  PreemptionNotice,
  upcoming_notices,
)
from ppn_jax.jobs import train as train_job
from ppn_jax.jobs import train_loop
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.run import open_run
from ppn_jax.training.train_step import abstract_state

TESTS = pathlib.Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def final_state(workdir):
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(like, checkpoints.latest()))


def steps_of(workdir):
  with open_run(workdir).checkpoints(read_only=True) as checkpoints:
    return checkpoints.steps()


def evaluated_steps(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if 'eval/AP' in line]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  train_job.train(tiny_config(evaluate_every=3), workdir)
  return final_state(workdir)


def terminate_when(monkeypatch, name, step):
  """Sends SIGTERM twice at a step's report (name='_report') or evaluation ('evaluate')."""
  original = getattr(train_loop.TrainLoop, name)

  def with_signal(self, at, *arguments):
    if at == step:
      for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, at, *arguments)

  monkeypatch.setattr(train_loop.TrainLoop, name, with_signal)


@pytest.mark.slow
@pytest.mark.parametrize('where, step, saved, scored', [
    ('_report', 2, [3], []), ('_report', 4, [3, 5], [3]),
    ('evaluate', 3, [3], []), ('evaluate', 6, [3, 6], [3])])
def test_a_preempted_run_resumes_with_the_same_bits(
    uninterrupted, tmp_path, monkeypatch, where, step, saved, scored):
  terminate_when(monkeypatch, where, step)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Preempted, match=f'step {saved[-1]} is saved'):
    train_job.train(tiny_config(evaluate_every=3), tmp_path)
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGTERM) == before
  assert steps_of(tmp_path) == saved and evaluated_steps(tmp_path) == scored
  train_job.train(tiny_config(evaluate_every=3), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), uninterrupted)
  assert evaluated_steps(tmp_path) == [3, 6]


@pytest.mark.slow
def test_a_step_evaluated_after_a_restart_is_kept_if_it_is_the_best(tmp_path, monkeypatch):
  config = tiny_config(steps=9, evaluate_every=3, keep_last=1, keep_best=1)
  terminate_when(monkeypatch, 'evaluate', 3)
  with pytest.raises(Preempted):
    train_job.train(config, tmp_path)
  monkeypatch.undo()
  score, worth = Evaluator.score, iter((0.9, 0.2, 0.1))

  def scored(self, rows):
    found = score(self, rows)
    return found._replace(metrics={**found.metrics, 'AP': next(worth)})

  monkeypatch.setattr(Evaluator, 'score', scored)
  train_job.train(config, tmp_path)
  assert evaluated_steps(tmp_path) == [3, 6, 9] and steps_of(tmp_path) == [3, 9]


def test_a_preempted_last_step_without_evaluation_completes_the_run(tmp_path, monkeypatch):
  terminate_when(monkeypatch, '_report', 6)
  assert train_job.train(tiny_config(), tmp_path) is None
  assert steps_of(tmp_path) == [3, 6]


def fail_saves(monkeypatch, steps):
  original = Checkpoints.save

  def save(self, step, *arguments):
    if step in steps:
      steps.remove(step)
      raise self._failed(f'step {step} could not be saved', OSError('No space left on device'))
    return original(self, step, *arguments)

  monkeypatch.setattr(Checkpoints, 'save', save)


@pytest.mark.slow
def test_a_failed_save_is_reported_and_training_continues(tmp_path, monkeypatch, log_lines):
  fail_saves(monkeypatch, [1, 2, 6])
  train_job.train(tiny_config(checkpoint_every=1), tmp_path)
  output = '\n'.join(log_lines)
  assert 'step 1 could not be saved: No space left on device' in output
  assert 'training continues' in output
  assert steps_of(tmp_path) == [4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize('options, failing, kept', [
    ({'on_save_error': 'stop'}, [2], [1]), ({}, [2, 3, 4, 5, 6], [1])])
def test_too_many_failed_saves_end_the_run(tmp_path, monkeypatch, options, failing, kept):
  fail_saves(monkeypatch, failing)
  with pytest.raises(SaveFailed, match=r'the newest checkpoint in .* is step 1'):
    train_job.train(tiny_config(checkpoint_every=1, **options), tmp_path)
  assert steps_of(tmp_path) == kept


@pytest.mark.slow
@pytest.mark.parametrize('where, step', [('_report', 2), ('evaluate', 3)])
def test_a_preempted_run_that_cannot_save_says_so(tmp_path, monkeypatch, where, step):
  fail_saves(monkeypatch, [3])
  terminate_when(monkeypatch, where, step)
  with pytest.raises(Preempted, match=r'step 3 could not be saved; .* resume from step 0'):
    train_job.train(tiny_config(evaluate_every=3), tmp_path)
  assert steps_of(tmp_path) == []


def test_outside_the_main_thread_signals_are_left_to_the_caller():
  before, after = signal.getsignal(signal.SIGTERM), []

  def use():
    with PreemptionNotice() as notice:
      after.append((signal.getsignal(signal.SIGTERM), notice.reached()))

  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert after == [(before, False)]


@contextlib.contextmanager
def metadata_server(**more):
  """Runs a stand-in for the metadata server; yields its address and the values that it returns."""
  values = {'maintenance-event': 'NONE', 'preempted': 'FALSE', 'flavor': 'Google', 'asked': 0,
            **more}

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      key = self.path.removeprefix('/computeMetadata/v1/instance/')
      there = key in values and self.headers['Metadata-Flavor'] == 'Google'
      text = values.get(key, 'no such key')
      values['asked'] += 1
      self.send_response(200 if there else 404)
      self.send_header('Metadata-Flavor', values['flavor'])
      self.end_headers()
      self.wfile.write(f'{text}\n'.encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'127.0.0.1:{server.server_port}', values
    server.shutdown()


@pytest.fixture
def metadata(monkeypatch):
  """Runs a stand-in for the metadata server; tests change the values that it returns."""
  with metadata_server() as (address, values):
    monkeypatch.setenv('GCE_METADATA_HOST', address)
    monkeypatch.setenv('NO_GCE_CHECK', 'false')
    yield values


@pytest.mark.slow
@pytest.mark.parametrize('key, value', [
    ('maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE'),
    ('preempted', 'TRUE')])
def test_notice_of_maintenance_acts_like_sigterm(
    uninterrupted, tmp_path, monkeypatch, metadata, key, value):
  original = train_loop.TrainLoop._report

  def with_notice(self, at, *arguments):
    if at == 4:
      metadata[key] = value
      wait_until(self.notice.given)
    return original(self, at, *arguments)

  monkeypatch.setattr(train_loop.TrainLoop, '_report', with_notice)
  with pytest.raises(Preempted, match='step 5 is saved'):
    train_job.train(tiny_config(evaluate_every=3), tmp_path)
  monkeypatch.undo()
  train_job.train(tiny_config(evaluate_every=3), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), uninterrupted)


def noticed(values, monkeypatch, before, *changes):
  """Returns whether there is a notice at first and after each change, after several polls."""
  monkeypatch.setattr(preemption, '_POLL_SECONDS', 0.01)
  notices, after = [], []
  values.update(before)
  with MaintenanceWatch(lambda: notices.append(True)):
    for change in ({}, *changes):
      values.update(change)
      seen = values['asked']
      wait_until(lambda seen=seen: values['asked'] > seen + 8 or notices)
      after.append(bool(notices))
  return after


def test_only_new_notices_of_termination_count(metadata, monkeypatch):
  standing = {'maintenance-event': 'TERMINATE_ON_HOST_MAINTENANCE'}
  # As a run finds it that has ended for it and is started again on the same machine.
  assert noticed(metadata, monkeypatch, standing, {'maintenance-event': 'NONE'}, standing) == [
      False, False, True]
  migrating = {'maintenance-event': 'MIGRATE_ON_HOST_MAINTENANCE'}
  assert noticed(metadata, monkeypatch, {'maintenance-event': 'NONE'}, migrating,
                 {'preempted': 'TRUE'}) == [False, False, True]


def maintenance(seconds, status='PENDING', names='window_start_time maintenance_status'):
  """Returns what the metadata server says of maintenance that begins in so many seconds."""
  start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
  text = start.isoformat(timespec='seconds').replace('+00:00', 'Z')
  return json.dumps({'can_reschedule': 'false', 'type': 'SCHEDULED',
                     **dict(zip(names.split(), (text, status), strict=True))})


WEEK = 7 * 86_400


@pytest.mark.parametrize('text, count', [
    ('', 0), ('NONE', 0), ('{}', 0), ('"NONE"', 0), ('[1]', 0),
    ('{ "error": "no notifications have been received yet, try again later" }', 0),
    ('{"window_start_time": "soon"}', 0),
    (maintenance(WEEK), 0), (maintenance(3600), 0), (maintenance(60), 1), (maintenance(-60), 1),
    (maintenance(WEEK, 'ONGOING'), 1),
    (maintenance(60, names='windowStartTime maintenanceStatus'), 1),
    (f'{{"upcomingMaintenance": {maintenance(60)}}}', 1),
    (f'[{maintenance(60)}, {maintenance(WEEK)}]', 1),
], ids=itertools.count())  # Names with times would differ between workers.
def test_upcoming_maintenance_counts_when_its_window_is_near(text, count):
  assert len(upcoming_notices(text)) == count


def test_maintenance_in_a_week_is_no_notice_until_it_begins(metadata, monkeypatch):
  key = 'upcoming-maintenance?alt=json'
  assert noticed(metadata, monkeypatch, {}, {key: maintenance(WEEK)}, {key: maintenance(100)}) == [
      False, False, True]
  # The run was started again on the same machine after the first notice.
  metadata[key] = maintenance(100)
  assert noticed(metadata, monkeypatch, {}, {key: maintenance(100, 'ONGOING')}) == [False, True]
  metadata[key] = '{}'
  assert noticed(metadata, monkeypatch, {'scheduling/on-host-maintenance': 'MIGRATE'},
                 {key: maintenance(100)}) == [False, False]


@pytest.mark.parametrize('environment, output', [
    ({'NO_GCE_CHECK': 'true'}, {}), ({'GCE_METADATA_HOST': '127.0.0.1:9'}, {}),
    ({}, {'flavor': 'other'})])
def test_without_a_metadata_server_polling_ends(
    metadata, monkeypatch, environment, output):
  monkeypatch.setattr(preemption, '_POLL_SECONDS', 0.01)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  metadata.update({**output, 'preempted': 'TRUE'})
  with PreemptionNotice() as notice:
    wait_until(lambda: 'ppn maintenance' not in {t.name for t in threading.enumerate()})
    assert not notice.given()
  assert metadata['asked'] <= preemption._ATTEMPTS


@pytest.mark.slow
def test_sigterm_in_one_of_two_processes_saves_the_same_step_in_both(tmp_path):
  def on_line(line, processes):
    if line.startswith('step 20/'):
      processes[1].send_signal(signal.SIGTERM)

  codes, output, _ = train_in_two_processes(tmp_path, tmp_path / 'run', on_line)
  assert codes == [preemption.EXIT_CODE] * 2, output
  assert 'ppn: preempted: told to end; step ' in output
  at = steps_of(tmp_path / 'run')[-1]
  assert 20 <= at < 400 and f'step {at} is saved' in output
  codes, output, _ = train_in_two_processes(tmp_path, tmp_path / 'run')
  assert codes == [0, 0] and f'from step {at}' in output, output
  codes, output, _ = train_in_two_processes(tmp_path, tmp_path / 'uninterrupted')
  assert codes == [0, 0], output
  jax.tree.map(np.testing.assert_array_equal, *map(final_state, (tmp_path / 'run',
                                                                 tmp_path / 'uninterrupted')))


@pytest.mark.slow
def test_workers_find_each_other_on_compute_engine_and_heed_one_notice(tmp_path):
  def on_line(line, processes):
    if line.startswith('step 20/'):
      of_second['upcoming-maintenance?alt=json'] = maintenance(100)

  attributes = {'attributes/worker-network-endpoints': 'a:b:127.0.0.1,c:d:127.0.0.1',
                'attributes/tpu-env': "ACCELERATOR_TYPE: 'v5litepod-8'"}
  key = 'attributes/agent-worker-number'
  with (metadata_server(**attributes, **{key: '0'}) as (first, _),
        metadata_server(**attributes, **{key: '1'}) as (second, of_second)):
    codes, output, _ = train_in_two_processes(tmp_path, tmp_path / 'run', on_line, steps=4000,
                                           slice_of=(first, second))
  assert codes == [preemption.EXIT_CODE] * 2, output
  at = steps_of(tmp_path / 'run')[-1]
  assert 20 <= at < 4000 and f'ppn: preempted: told to end; step {at:,} is saved' in output
  assert 'on 2 x cpu' in output


@pytest.mark.slow
def test_notice_in_an_evaluation_of_two_processes_is_heeded_before_it_ends(tmp_path):
  def on_line(line, processes):
    if line.startswith('step 20/'):  # Directly before the evaluation of 2,500 batches.
      processes[1].send_signal(signal.SIGTERM)

  codes, output, _ = train_in_two_processes(
      tmp_path, tmp_path / 'run', on_line, steps=40, more=[
          '--config.train.evaluate_every=20', '--config.data.eval.num_images=10000'])
  assert codes == [preemption.EXIT_CODE] * 2, output
  assert 'ppn: preempted: told to end; step 20 is saved' in output
  assert 'evaluated step' not in output and steps_of(tmp_path / 'run') == [20]
