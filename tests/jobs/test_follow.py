"""Tests the evaluation of many steps: during training, after kills and deletions, and retention."""

import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from log_lines import logged
from tensorboardX.proto import event_pb2
from time_limits import HANG_SECONDS
from tiny import tiny_config

from ppn_jax import storage
from ppn_jax.checkpoints import retention
from ppn_jax.checkpoints.manager import Checkpoints
from ppn_jax.checkpoints.retention import Reader, Stamp
from ppn_jax.distributed import ownership
from ppn_jax.distributed.ownership import Ownership, Process
from ppn_jax.errors import InputError
from ppn_jax.jobs import follow
from ppn_jax.jobs import train as train_job
from ppn_jax.jobs.evaluate import EvaluationJob, EvaluationOptions, evaluate, prepare_evaluation
from ppn_jax.jobs.follow import REMIND_SECONDS, Clock, Polling, wait_for_run
from ppn_jax.run import Ending
from ppn_jax.training.state import TrainState

STEPS = (2, 4, 6)


class Killed(BaseException):
  """Raised in place of a signal."""


class FakeTime:
  """Clock that calls the next of its events each time someone sleeps."""

  def __init__(self, *events):
    self.seconds, self.events = 0.0, list(events)

  def sleep(self, seconds):
    self.seconds += seconds
    if self.events:
      self.events.pop(0)()

  def polling(self, **options):
    return Polling(clock=Clock(lambda: self.seconds, self.sleep), **options)


class RecordingJob(EvaluationJob):
  """Job that records its steps, and can be disturbed before it reads a checkpoint."""

  def load(self, step=None):
    self.notes.disturb(step)
    return super().load(step)

  def evaluate(self, step, variables, folder):
    self.notes.evaluated.append(step)
    return super().evaluate(step, variables, folder)


@pytest.fixture(scope='module')
def followed(tmp_path_factory):
  """Trains a run of 6 steps with checkpoints 2, 4, 6, and follows it from before it begins."""
  workdir = tmp_path_factory.mktemp('followed') / 'run'
  config = tiny_config(checkpoint_every=2, keep_last=9)
  with config.unlocked():
    config.optim.ema_decay = 0.9
    config.model.backbone.last_block = 3
    config.model.neck.update(stride=4, num_levels=2)
  training = threading.Thread(target=train_job.train, args=(config, workdir))
  clock = FakeTime(training.start)  # Training begins while the follower waits for it.
  clock.sleep = lambda seconds, then=clock.sleep: (then(seconds), training.join(0.05))
  with logged() as messages:
    run = wait_for_run(workdir, clock.polling())
    job = prepare_evaluation(run, EvaluationOptions())
    outcome = follow.score_steps(job, polling=clock.polling(interval=0.05))
    training.join()
  return job, outcome, messages


@pytest.fixture(scope='module')
def trained(followed, tmp_path_factory):
  """Copies that run without its evaluations; the job is compiled once for all tests."""
  job, _, _ = followed
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  shutil.copytree(job.run.workdir, workdir)
  shutil.rmtree(workdir / 'evaluation')
  shutil.rmtree(workdir / 'tensorboard' / 'evaluation')
  return dataclasses.replace(job, run=dataclasses.replace(job.run, workdir=workdir))


@pytest.fixture
def job(trained, tmp_path, log_lines):
  """Returns that job with a workdir of its own."""
  workdir = tmp_path / 'run'
  shutil.copytree(trained.run.workdir, workdir)
  made = job_for(trained, workdir)
  made.notes.messages = log_lines
  return made


@pytest.fixture
def nothing_logged(log_lines):
  yield
  assert not log_lines


def job_for(job, workdir, **changes):
  fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(EvaluationJob)}
  fields |= {'run': dataclasses.replace(job.run, workdir=workdir)} | changes
  made = RecordingJob(**fields)
  object.__setattr__(made, 'notes', SimpleNamespace(evaluated=[], disturb=lambda step: None))
  return made


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def event_steps(folder, tag):
  found = []
  for path in sorted(folder.glob('events*')):
    data = path.read_bytes()
    while data:  # Records: length u64, crc u32, payload, crc u32.
      length = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12:12 + length])
      data = data[16 + length:]
      found += [event.step for value in event.summary.value if value.tag == tag]
  return found


def checkpoint(job, step):
  return job.run.workdir / 'checkpoints' / str(step)


@pytest.mark.slow
def test_follows_a_training_that_is_running(followed):
  job, outcome, messages = followed
  workdir = job.run.workdir
  assert messages[0] == f'waiting for training to begin in {workdir}'
  assert outcome.complete and not outcome.deleted and not outcome.unreadable
  assert tuple(outcome.metrics) == STEPS
  assert [line for line in messages if line.startswith('evaluating')] == [
      f'evaluating step {step} on 6 images' for step in STEPS]
  assert [line['step'] for line in lines(workdir / 'evaluation' / 'metrics.jsonl')] == [*STEPS]
  assert event_steps(workdir / 'tensorboard' / 'evaluation', 'eval/AP') == [*STEPS]
  assert not any('eval/AP' in line for line in lines(workdir / 'metrics.jsonl'))
  assert not retention.steps_being_read(job.run.readers) and not [*job.run.readers.iterdir()]


@pytest.mark.slow
def test_all_steps_run_one_program(job):
  programs = []
  job.notes.disturb = lambda step: programs.append(job.evaluator.detect._cache_size())
  assert tuple(follow.score_steps(job, polling=FakeTime().polling()).metrics) == STEPS
  assert job.evaluator.detect._cache_size() == programs[1] == programs[2] > 0, programs


@pytest.mark.slow
@pytest.mark.parametrize('where', ['before the record', 'after the record', 'half a line'])
def test_a_restart_scores_no_step_twice_and_skips_none(job, where, monkeypatch):
  root = job.root
  with monkeypatch.context() as patch:
    def kill(*_):
      raise Killed
    if where == 'before the record':
      patch.setattr('ppn_jax.jobs.evaluate.write_scores', kill)
    else:
      patch.setattr('ppn_jax.telemetry.metrics.MetricsWriter.write', kill)
    with pytest.raises(Killed):
      follow.score_steps(job)
  assert job.notes.evaluated == [2]
  if where == 'half a line':
    (root / 'metrics.jsonl').write_text('{"step": 2, "eval/A')
  outcome = follow.score_steps(job, polling=FakeTime().polling())
  assert job.notes.evaluated == ([2, 2, 4, 6] if where == 'before the record' else [2, 4, 6])
  assert tuple(outcome.metrics) == STEPS
  curve = lines(root / 'metrics.jsonl')
  assert [line['step'] for line in curve] == [*STEPS]
  assert [line['eval/AP'] for line in curve] == [f['AP'] for f in outcome.metrics.values()]
  # And once more, with nothing left to do.
  assert follow.score_steps(job).metrics == outcome.metrics
  assert job.notes.evaluated[-3:] == [2, 4, 6] and lines(root / 'metrics.jsonl') == curve


@pytest.mark.slow
@pytest.mark.parametrize('half', [False, True])
def test_a_checkpoint_deleted_while_it_is_read_is_skipped(job, half):
  def delete(step):
    if step == 4 and half:  # Some of its files are deleted.
      shutil.rmtree(next(checkpoint(job, 4).glob('state/**/d')), ignore_errors=True)
    elif step == 4:
      shutil.rmtree(checkpoint(job, 4))
  job.notes.disturb = delete
  rest = FakeTime(lambda: shutil.rmtree(checkpoint(job, 4), ignore_errors=True))
  outcome = follow.score_steps(job, polling=rest.polling())
  assert tuple(outcome.metrics) == (2, 6) and outcome.deleted == (4,) and outcome.complete
  assert 'step 4 was deleted before it was scored and is skipped' in job.notes.messages
  assert not (job.root / '4' / 'scores.json').exists() and not outcome.unreadable


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_delay_the_others(job):
  shutil.rmtree(next(checkpoint(job, 4).glob('state/**/d')))
  outcome = follow.score_steps(job, polling=FakeTime().polling())
  assert tuple(outcome.metrics) == (2, 6) and list(outcome.unreadable) == [4]
  assert sum('step 4 cannot be read and is skipped' in line for line in job.notes.messages) == 1


@pytest.mark.slow
def test_another_model_is_an_error_at_once(job):
  other = job.run.config.copy_and_resolve_references()
  other.model.head.depth = 8
  run = dataclasses.replace(job.run, config=other.lock())
  wrong = dataclasses.replace(prepare_evaluation(run, EvaluationOptions()))
  with pytest.raises(InputError, match='another model'):
    follow.score_steps(wrong, polling=FakeTime().polling())


@pytest.mark.slow
def test_waits_for_the_last_step_of_the_present_config(job):
  final = job.run.workdir / 'config.json'
  config = json.loads(final.read_text())

  def set_steps(steps):
    final.write_text(json.dumps(config | {'train': config['train'] | {'steps': steps}}))

  set_steps(8)
  clock = FakeTime(*[lambda: None] * 3, lambda: set_steps(6))
  assert follow.score_steps(job, polling=clock.polling()).complete and not clock.events
  set_steps(8)
  long = FakeTime().polling(timeout=3 * REMIND_SECONDS)
  outcome = follow.score_steps(job, polling=long)
  assert not outcome.complete and tuple(outcome.metrics) == STEPS
  waiting = [line for line in job.notes.messages if line.startswith('waiting')]
  assert waiting[-3:] == [f'waiting for a new checkpoint in {job.run.workdir}{since}'
                          for since in ('', ', for 10m00s', ', for 20m00s')]


@pytest.mark.slow
def test_training_that_ended_early_is_not_waited_for(job):
  """Nor is one that ended at a step which is not the newest: it was resumed."""
  config = json.loads((job.run.workdir / 'config.json').read_text())
  config['train']['steps'] = 8
  (job.run.workdir / 'config.json').write_text(json.dumps(config))
  job.run.note_ending(Ending(4, 'AP has not improved'))
  long = FakeTime(*[lambda: None] * 3, lambda: job.run.note_ending(Ending(6, 'time is over')))
  outcome = follow.score_steps(job, polling=long.polling(timeout=60))
  assert outcome.complete and tuple(outcome.metrics) == STEPS and not long.events
  job.run.note_ending(None)  # As a resumed training does.
  assert not follow.score_steps(job, polling=FakeTime().polling(timeout=60)).complete


def test_training_that_never_begins_is_an_error(tmp_path):
  with pytest.raises(InputError, match=r'no training has begun in .* within --timeout=30'):
    wait_for_run(tmp_path, FakeTime().polling(timeout=30))
  with pytest.raises(InputError, match='poll=0'):
    Polling(interval=0)


@pytest.mark.parametrize('text, expected', [
    ('all', [0, 5, 10, 15, 20]), (':', [0, 5, 10, 15, 20]), ('5:15', [5, 10, 15]),
    ('::10', [0, 10, 20]), ('5::10', [5, 15]), (':10', [0, 5, 10]), ('15:', [15, 20]),
    ('7:19:4', [15])])
def test_steps_are_chosen_by_their_number(text, expected):
  assert [*filter(follow.parse_steps(text), range(0, 21, 5))] == expected


@pytest.mark.parametrize('text', ['', '5', '5:2', '::0', '-1:', 'a:b', '1:2:3:4', '1,2'])
def test_invalid_ranges_of_steps(text):
  with pytest.raises(InputError, match='--steps='):
    follow.parse_steps(text)


@pytest.mark.slow
def test_without_polling_saved_steps_are_evaluated(job, tmp_path):
  assert tuple(follow.score_steps(job, selected=follow.parse_steps('3:')).metrics) == (4, 6)
  sweep = follow.score_steps(job, tmp_path / 'out', selected=follow.parse_steps('2::4'))
  assert tuple(sweep.metrics) == (2, 6) and sweep.complete
  assert (tmp_path / 'out' / '2' / 'results.json').exists()
  assert event_steps(tmp_path / 'out' / 'tensorboard', 'eval/AP') == [2, 6]
  table = follow.format_steps(
      {2: {'AP': 0.5, 'AP50': 0.75, 'AP75': 0.25}, 1000: dict.fromkeys(('AP', 'AP50', 'AP75'), 0)})
  assert table.splitlines()[1:] == ['         2  0.500  0.750  0.250  best',
                                    '     1,000  0.000  0.000  0.000']


@pytest.mark.slow
def test_average_or_raw_weights(job):
  raw = dataclasses.replace(job, options=EvaluationOptions(ema=False))
  averaged = dataclasses.replace(job, options=EvaluationOptions(ema=True))
  kernels = [jax.tree.leaves(j.load(6)[1]['params'])[-1]
             for j in (EvaluationJob(**vars_of(j)) for j in (raw, averaged, job))]
  assert not np.array_equal(kernels[0], kernels[1])
  np.testing.assert_array_equal(kernels[1], kernels[2])
  # Training decides which checkpoints to keep by the average alone.
  assert raw.root.name == 'evaluation_raw' and averaged.root.name == 'evaluation'


@pytest.mark.slow
def test_evaluate_takes_a_workdir(followed, tmp_path, log_lines):
  job, outcome, _ = followed
  found = evaluate(str(job.run.workdir), step=4, output=str(tmp_path))
  assert found.metrics == outcome.metrics[4] and found.step == 4
  assert log_lines and (found.folder / 'scores.json').parent == tmp_path


def vars_of(job):
  return {f.name: getattr(job, f.name) for f in dataclasses.fields(EvaluationJob)}


@pytest.mark.slow
def test_no_average_to_choose(trained):
  config = trained.run.config.copy_and_resolve_references()
  config.optim.ema_decay = 0.0
  run = dataclasses.replace(trained.run, config=config.lock())
  with pytest.raises(InputError, match='keeps no moving average'):
    prepare_evaluation(run, EvaluationOptions(ema=True))


def checkpoints_of(**metrics):
  return [SimpleNamespace(step=int(name[1:]), metrics=None if ap is None else {'AP': ap})
          for name, ap in metrics.items()]


def rank(metrics):
  return -math.inf if metrics['AP'] is None else metrics['AP']


@pytest.mark.parametrize('metrics, records, keep, kept', [
    (dict(s1=0.5, s2=0.3, s3=None), {}, 1, [1]),
    (dict(s1=None, s2=None, s3=None), {}, 1, []),
    (dict(s1=None, s2=None, s3=None), {2: 0.1}, 1, [2]),
    (dict(s1=0.5, s2=None, s3=None), {2: 0.6, 3: 0.4}, 1, [2]),
    (dict(s1=0.5, s2=None, s3=None), {2: 0.6, 3: 0.4}, 2, [1, 2]),
    (dict(s1=0.5, s2=0.4), {1: 0.1}, 1, [2]),
    (dict(s1=0.5, s2=0.5), {}, 1, [2]),
    (dict(s1=0.0, s2=None), {2: None}, 1, [1]),
    (dict(s1=0.0), {2: -1, 1: -1}, 1, []),  # As versions before this one wrote it.
    (dict(s1=0.5), {1: 0.5}, 0, [])])
@pytest.mark.usefixtures('nothing_logged')
def test_which_checkpoints_are_best(tmp_path, metrics, records, keep, kept):
  for step, ap in records.items():
    write_record(tmp_path, step, ap, checkpoint=f'values {step}')
  checkpoints, readers = checkpoints_of(**metrics), tmp_path / 'readers'
  policy = retention.BestCheckpoints(keep, rank, tmp_path, readers,
                                lambda step: Stamp(f'values {step}', 0.0))
  assert chosen(policy, checkpoints) == kept
  one, other = (Reader(readers) for _ in range(2))
  one.hold(1)
  assert chosen(policy, checkpoints) == sorted({1, *kept})
  other.hold(1)
  one.close()
  assert chosen(policy, checkpoints) == sorted({1, *kept}), 'the other still reads it'
  other.close()
  assert chosen(policy, checkpoints) == kept and not [*readers.iterdir()]


def chosen(policy, checkpoints):
  flags = policy.should_preserve(checkpoints, context=None)
  return [c.step for c, flag in zip(checkpoints, flags, strict=True) if flag]


def write_record(folder, step, ap, **scored):
  path = folder / str(step) / 'scores.json'
  storage.write_text(path, json.dumps({'figures': {'AP': ap}, 'scored': scored}))
  return path


@pytest.mark.parametrize('scored, written, kept', [
    (dict(checkpoint='new'), 0, [1]), (dict(checkpoint='old'), 9000, [2]),
    ({}, 1500, [1]), ({}, 500, [2])])
def test_scores_of_another_checkpoint_keep_nothing(tmp_path, scored, written, kept):
  path = write_record(tmp_path, 1, 0.9, **scored)
  os.utime(path, (written, written))
  policy = retention.BestCheckpoints(1, rank, tmp_path, stamp=lambda step: Stamp('new', 1000.0))
  assert chosen(policy, checkpoints_of(s1=0.1, s2=0.2)) == kept
  unknown = retention.BestCheckpoints(1, rank, tmp_path)
  assert chosen(unknown, checkpoints_of(s1=0.1, s2=0.2)) == [2]


def test_nothing_is_deleted_while_records_cannot_be_read(tmp_path, monkeypatch):
  write_record(tmp_path, 1, 0.9)
  monkeypatch.setattr(storage, 'RETRY_SECONDS', ())

  def fail(*_, **__):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(pathlib.Path, 'read_text', fail)
  policy = retention.BestCheckpoints(1, rank, tmp_path)
  assert chosen(policy, checkpoints_of(s1=0.1, s2=0.2, s3=0.3)) == [1, 2, 3]


def test_dead_readers_protect_nothing(tmp_path):
  this, now = Process.this(), time.time()
  readers = {
      'here': (this, now - 9000), 'killed': (this._replace(pid=2**22 + 1), now),
      'elsewhere': (this._replace(host='another'), now - 100),
      'long gone': (this._replace(host='another'), now - 3600)}
  for step, (name, (process, beat)) in enumerate(readers.items()):
    storage.write_text(tmp_path / f'{name}.json', process.as_json(step=step, beat=beat))
  (tmp_path / 'rubbish.json').write_text('[')
  assert retention.steps_being_read(tmp_path) == {0, 2}
  retention.remove_dead_readers(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['elsewhere.json', 'here.json']


@pytest.mark.usefixtures('nothing_logged')
def test_a_reader_updates_its_heartbeat(tmp_path, monkeypatch):
  monkeypatch.setattr(retention, 'HEARTBEAT_SECONDS', 0.01)
  reader = Reader(tmp_path)
  reader.hold(3)
  path, = tmp_path.iterdir()
  first, deadline = json.loads(path.read_text())['beat'], time.monotonic() + HANG_SECONDS
  while json.loads(path.read_text())['beat'] == first and time.monotonic() < deadline:
    time.sleep(0.01)
  assert json.loads(path.read_text())['beat'] > first
  reader.close()


def test_a_read_only_workdir_can_be_evaluated(tmp_path, log_lines):
  (tmp_path / 'readers').write_text('a file')
  reader = Reader(tmp_path / 'readers')
  for step in (1, 2):
    reader.hold(step)
  reader.close()
  assert len(log_lines) == 1 and 'so a training may delete checkpoints while' in log_lines[0]


@pytest.mark.slow
def test_wherever_a_follower_writes_its_step_is_protected(job, tmp_path):
  seen = []
  job.notes.disturb = lambda step: seen.append(retention.steps_being_read(job.run.readers))
  raw = job_for(job, job.run.workdir, options=EvaluationOptions(ema=False))
  raw.notes.disturb = job.notes.disturb
  follow.score_steps(raw, selected=follow.parse_steps('4:4'))
  follow.score_steps(job, tmp_path / 'out', selected=follow.parse_steps('4:4'))
  job.score(4, tmp_path / 'one')
  assert seen == [{4}] * 3 and not retention.steps_being_read(job.run.readers)


@pytest.mark.slow
def test_two_followers_of_one_folder(job, monkeypatch):
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.05)
  with Ownership(job.root, 'evaluation'):
    with pytest.raises(InputError, match='in use by another evaluation'):
      follow.score_steps(job)
  assert not job.notes.evaluated


def resave(job, step):
  """Saves other values under the number of a step, as another attempt of training does."""
  shutil.rmtree(checkpoint(job, step))
  shutil.copytree(checkpoint(job, 2), checkpoint(job, step))


@pytest.mark.slow
def test_scores_of_an_earlier_attempt_are_not_reused(job):
  first = follow.score_steps(job).metrics
  job.notes.evaluated.clear()
  resave(job, 4)
  resave(job, 6)
  assert [line['step'] for line in job.run.metrics() if 'eval/AP' in line] == [2]
  second = follow.score_steps(job).metrics
  assert job.notes.evaluated == [4, 6] and tuple(second) == STEPS
  assert any('recorded scores of step 4 are of another' in line for line in job.notes.messages)
  assert second[4] == second[6] == second[2] == first[2]
  curve = {line['step']: line['eval/AP'] for line in job.run.metrics() if 'eval/AP' in line}
  assert curve == {step: metrics['AP'] for step, metrics in second.items()}
  assert follow.score_steps(job).metrics == second and job.notes.evaluated == [4, 6]


@pytest.mark.slow
def test_a_checkpoint_that_is_replaced_while_it_is_followed_is_scored_again(job):
  clock = FakeTime(lambda: resave(job, 2 + 2))
  config = job.run.workdir / 'config.json'
  text = config.read_text()
  config.write_text(text.replace('"steps": 6', '"steps": 8'))
  clock.events.append(lambda: config.write_text(text))
  outcome = follow.score_steps(job, polling=clock.polling())
  assert job.notes.evaluated == [2, 4, 6, 4]
  assert outcome.metrics[4] == outcome.metrics[2]


@pytest.mark.slow
def test_scores_of_other_weights_or_data_are_not_reused(job, tmp_path):
  root = tmp_path / 'out'
  follow.score_steps(job, root, selected=follow.parse_steps('6:6'))
  raw = job_for(job, job.run.workdir, options=EvaluationOptions(ema=False))
  follow.score_steps(raw, root, selected=follow.parse_steps('6:6'))
  assert raw.notes.evaluated == [6]


@pytest.mark.slow
def test_records_of_earlier_versions_count_if_they_are_younger_than_the_checkpoint(job):
  follow.score_steps(job)
  for step in (4, 6):
    path = job.root / str(step) / 'scores.json'
    found = json.loads(path.read_text())
    del found['scored']
    path.write_text(json.dumps(found))
  os.utime(path, (1000, 1000))
  job.notes.evaluated.clear()
  follow.score_steps(job)
  assert job.notes.evaluated == [6]


@pytest.mark.slow
def test_curves_of_steps_not_reached_yet_are_dropped(job):
  follow.score_steps(job)
  for step in (4, 6):
    shutil.rmtree(checkpoint(job, step))
  assert [line['step'] for line in job.run.metrics() if 'eval/AP' in line] == [2]
  follow.score_steps(job)
  assert [line['step'] for line in lines(job.root / 'metrics.jsonl')] == [2]
  shutil.rmtree(checkpoint(job, 2))
  assert [line['step'] for line in job.run.metrics() if 'eval/AP' in line] == [2], 'all are gone'


def test_table_of_steps_without_metrics():
  metrics = {step: dict.fromkeys(('AP', 'AP50', 'AP75'), ap) for step, ap in ((1, None), (2, 0.5))}
  assert follow.format_steps(metrics).splitlines()[1:] == [
      '         1      -      -      -', '         2  0.500  0.500  0.500  best']
  assert 'best' not in follow.format_steps({1: metrics[1]})


@pytest.mark.parametrize('rubbish', ['', '[]', '{"figures": 3}', '{"figures"', '{"figures": {}}'])
def test_invalid_records_are_ignored(tmp_path, rubbish):
  (tmp_path / '2').mkdir()
  (tmp_path / '2' / 'scores.json').write_text(rubbish)
  (tmp_path / 'reader.json').write_text(rubbish)
  policy = retention.BestCheckpoints(1, rank, tmp_path, tmp_path, lambda step: Stamp('same', 0.0))
  assert chosen(policy, checkpoints_of(s1=0.5, s2=None)) == [1]


@pytest.mark.usefixtures('nothing_logged')
def test_training_keeps_the_checkpoint_that_a_job_scored_best(tmp_path):
  state = jax.tree.map(jnp.asarray, TrainState(
      np.int32(1), {'params': {'kernel': np.ones(3)}, 'batch_stats': {}}, (), {}))
  records, readers = tmp_path / 'evaluation', tmp_path / 'readers'
  reader = Reader(readers)
  with Checkpoints(tmp_path / 'c', keep_last=1, keep_best=1, evaluations=records,
                   readers=readers) as checkpoints:
    for step, ap in ((1, 0.2), (2, 0.6), (3, 0.4), (4, None)):
      checkpoints.save(step, state)
      checkpoints.wait()
      if ap is not None:
        write_record(records, step, ap, checkpoint=checkpoints.stamp(step).checkpoint)
    assert checkpoints.steps() == [2, 4]
    reader.hold(4)
    checkpoints.save(5, state)
    checkpoints.save(6, state)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    reader.close()
    checkpoints.save(7, state)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 7]
