"""Runs that end before `train.steps`: no improvement of a metric, or no time left."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import time_budget, train_loop
from ppn_jax.jobs import train as train_job
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.run import open_run
from ppn_jax.training.input_pipeline import Prefetcher
from ppn_jax.training.train_step import abstract_state

# Step -> AP50, in place of that of a model that learns nothing in a few steps. Step 3 is the last
# that improves.
CURVE = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.25, 5: 0.3, 6: 0.29, 7: 0.1, 8: 0.9}


def follow_curve(monkeypatch):
  """Makes the AP50 of step s `CURVE[s]`; returns a list of the steps that are evaluated."""
  score, evaluate = Evaluator.score, train_loop.TrainLoop.evaluate
  at = []

  def evaluate_at(self, step, state):
    at.append(step)
    return evaluate(self, step, state)

  def replaced(self, rows):
    scores = score(self, rows)
    return scores._replace(metrics=scores.metrics | {'AP50': CURVE[at[-1]]})

  monkeypatch.setattr(train_loop.TrainLoop, 'evaluate', evaluate_at)
  monkeypatch.setattr(Evaluator, 'score', replaced)
  return at


@pytest.fixture
def curve(monkeypatch):
  return follow_curve(monkeypatch)


def small_config(**train):
  config = tiny_config(**dict(steps=8, evaluate_every=1, checkpoint_every=1, log_every=1,
                              keep_last=9, stop_metric='AP50') | train)
  with config.unlocked():
    config.model.backbone.last_block = 3
    config.model.neck.update(stride=4, num_levels=2)
    config.data.eval.num_images = 2
    config.eval.batch_size = 2
    config.optim.ema_decay = 0.9
  return config


def saved_state(workdir, step):
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(like, step))


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def steps_of(workdir):
  return sorted(open_run(workdir).saved_steps())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Trains with a patience of 3, which ends at step 6."""
  workdir = tmp_path_factory.mktemp('patient')
  with pytest.MonkeyPatch.context() as patch:
    follow_curve(patch)
    train_job.train(small_config(patience=3), workdir)
  return workdir


@pytest.fixture
def patient(trained, curve, tmp_path):
  """Returns a copy of that run."""
  return shutil.copytree(trained, tmp_path / 'patient')


@pytest.mark.slow
def test_ends_when_a_metric_does_not_improve(patient, curve, log_lines):
  assert steps_of(patient) == [1, 2, 3, 4, 5, 6]
  ending = open_run(patient).ending()
  assert ending.step == 6 and ending.reason == (
      'AP50 has not improved for 3 evaluations (train.patience=3); step 5 was best, AP50 0.3000')
  # The same command does nothing.
  before = {p: p.stat().st_mtime_ns for p in patient.rglob('*') if p.is_file()}
  assert train_job.train(small_config(patience=3), patient) is None
  assert log_lines[-1].startswith(f'nothing to do: {patient} ended at step 6, since AP50 has not')
  assert {p: p.stat().st_mtime_ns for p in patient.rglob('*') if p.is_file()} == before


@pytest.mark.slow
def test_the_end_says_which_step_was_best(curve, tmp_path, log_lines):
  train_job.train(small_config(patience=3, keep_last=1), tmp_path)
  assert log_lines[-1] == (
      'ended at step 6 of 8: AP50 has not improved for 3 evaluations (train.patience=3); step 5 '
      'was best, AP50 0.3000, but its checkpoint is deleted: train.keep_best keeps those of '
      'highest AP')


class Killed(BaseException):
  """Raised in place of a signal."""


@pytest.mark.slow
@pytest.mark.parametrize('where, step', [
    ('write', 6), ('marker', 6), ('save', 3), ('evaluate', 5), ('save', 6)])
def test_a_killed_run_ends_at_the_same_step_with_the_same_bits(patient, curve, tmp_path,
                                                               monkeypatch, where, step):
  """Killed before a save, before an evaluation, after its metrics are written, or at the end."""
  workdir = tmp_path / 'killed'
  name = {'save': '_save', 'evaluate': 'evaluate', 'write': '_start_save'}.get(where)
  with monkeypatch.context() as patch:
    if name:
      method = getattr(train_loop.TrainLoop, name)

      def kill(self, at, *rest):
        if at == step:
          raise Killed
        return method(self, at, *rest)

      patch.setattr(train_loop.TrainLoop, name, kill)
    else:
      note = train_job.Run.note_ending

      def kill(self, ending):
        if ending:
          raise Killed
        note(self, ending)

      patch.setattr(train_job.Run, 'note_ending', kill)
    with pytest.raises(Killed):
      train_job.train(small_config(patience=3), workdir)
  assert not (workdir / 'ended.json').exists()
  train_job.train(small_config(patience=3), workdir)
  assert steps_of(workdir) == steps_of(patient)
  assert_same_bits(saved_state(workdir, 6), saved_state(patient, 6))
  assert open_run(workdir).ending() == open_run(patient).ending()


@pytest.mark.slow
def test_an_evaluation_that_is_missing_is_made_up_for(patient, curve, log_lines):
  """As after a preemption at the step that would have ended the run."""
  path = patient / 'metrics.jsonl'
  lines = [line for line in path.read_text().splitlines(keepends=True)
           if not ('eval/AP' in line and json.loads(line)['step'] == 6)]
  path.write_text(''.join(lines))
  (patient / 'ended.json').unlink()
  del curve[:]
  train_job.train(small_config(patience=3), patient)
  assert curve == [6] and steps_of(patient)[-1] == 6
  assert log_lines[-1].startswith('ended at step 6 of 8: AP50 has not improved for 3')
  assert open_run(patient).ending().step == 6


@pytest.mark.slow
def test_more_patience_continues(patient, curve, tmp_path, log_lines):
  train_job.train(small_config(patience=5), patient)
  assert steps_of(patient)[-1] == 8 and open_run(patient).ending() is None
  assert not any('nothing to do' in line for line in log_lines)
  whole = tmp_path / 'whole'
  train_job.train(small_config(), whole)
  assert_same_bits(saved_state(patient, 8), saved_state(whole, 8))


@pytest.mark.slow
def test_later_evaluations_do_not_count_after_a_step_back(patient, curve):
  """The newest checkpoints are lost; their evaluations are of steps that are taken again."""
  run = open_run(patient)
  before = saved_state(patient, 6)
  for step in (4, 5, 6):
    shutil.rmtree(patient / 'checkpoints' / str(step))
  del curve[:]
  train_job.train(small_config(patience=3), patient)
  assert curve == [4, 5, 6] and run.ending().step == 6
  assert_same_bits(saved_state(patient, 6), before)


@pytest.mark.parametrize('train, message', [
    (dict(stop_metric='mAP'), r"train.stop_metric='mAP' is unknown; legal: AP, AP50, AP75, AP_"),
    (dict(patience=-1), r'train.patience=-1 must be at least 0'),
    (dict(min_improvement=-0.1), r'train.min_improvement=-0.1 must be at least 0'),
    (dict(patience=2, evaluate_every=0), r'train.patience=2 needs evaluations, but train.eval'),
    (dict(patience=2, stop_metric='AP_large'), r"train.stop_metric='AP_large' does not exist on "
     r'data.eval, which have no such objects \(above 96\^2 px\); use one of AP, AP50,'),
    (dict(minutes=-1.0), r'train.minutes=-1.0 must be at least 0'),
    (dict(steps=0), r'train.steps=0 must be at least 1'),
])
def test_refused_before_anything_is_written(tmp_path, train, message):
  with pytest.raises(InputError, match=message):
    train_job.train(small_config(**train), tmp_path)
  assert not list(tmp_path.iterdir())


class FakeTime:
  """Clock in which waiting for a batch takes a step's time and an evaluation its own."""

  def __init__(self, monkeypatch, step=1.0, evaluation=5.0):
    self.seconds, self.step, self.evaluation = 0.0, step, evaluation
    monkeypatch.setattr(time_budget, 'RESERVE', 0.03)  # That the examples are made for.
    monkeypatch.setattr(time_budget, 'now', lambda: self.seconds)
    self._advance(monkeypatch, Prefetcher, '__next__', 'step')
    self._advance(monkeypatch, Evaluator, 'rows', 'evaluation')

  def _advance(self, monkeypatch, owner, name, duration):
    method = getattr(owner, name)

    @functools.wraps(method)
    def timed(*args, **kwargs):
      self.seconds += getattr(self, duration)
      return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, timed)


@pytest.fixture
def clock(monkeypatch):
  return FakeTime(monkeypatch)


def timed_config(**train):
  # 30 s, of which 29.1 are planned: 14 steps of a second and 3 evaluations of 5 s.
  return small_config(**dict(steps=0, minutes=0.5, evaluate_every=6, checkpoint_every=4,
                             log_every=3) | train)


def notes(workdir, step):
  with open_run(workdir).checkpoints(read_only=True) as checkpoints:
    return checkpoints.notes(step)


@pytest.mark.slow
def test_takes_the_steps_that_fit(clock, tmp_path, log_lines):
  scores = train_job.train(timed_config(), tmp_path / 'timed')
  assert scores is not None and steps_of(tmp_path / 'timed')[-1] == 14
  assert open_run(tmp_path / 'timed').config.train.steps == 14
  assert ('train.minutes=0.5: 14 steps fit, 1 s each, 5 s for an evaluation; the learning rate '
          'is planned for them') in log_lines
  assert log_lines[-1] == 'took 29s of train.minutes=0.5'
  assert notes(tmp_path / 'timed', 14) == {'training_seconds': 29.0}
  assert notes(tmp_path / 'timed', 4) == {'training_seconds': 4.0}
  # It is the run of 14 steps: what was measured has left no trace.
  train_job.train(timed_config(steps=14, minutes=0.0), tmp_path / 'plain')
  assert_same_bits(saved_state(tmp_path / 'timed', 14), saved_state(tmp_path / 'plain', 14))
  assert train_job.train(timed_config(), tmp_path / 'timed') is None
  assert 'is trained to step 14 already' in log_lines[-1]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan_and_the_time_of_its_steps(clock, tmp_path, monkeypatch,
                                                                log_lines):
  train_job.train(timed_config(), tmp_path / 'whole')
  report = train_loop.TrainLoop._report

  def kill(self, step):
    report(self, step)
    if step == 9:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(train_loop.TrainLoop, '_report', kill)
    with pytest.raises(Killed):
      train_job.train(timed_config(), tmp_path / 'killed')
  clock.step = 1.01  # On a slower machine; still the same plan.
  train_job.train(timed_config(), tmp_path / 'killed')
  assert any(line.endswith('the learning rate is planned for them; 13s are spent')
             for line in log_lines)  # Of step 8: the ninth is lost.
  assert notes(tmp_path / 'killed', 14)['training_seconds'] == pytest.approx(29 + 6 * 0.01)
  assert_same_bits(saved_state(tmp_path / 'killed', 14), saved_state(tmp_path / 'whole', 14))


@pytest.mark.slow
def test_a_run_that_is_slower_than_planned_ends_in_time(clock, tmp_path, monkeypatch, log_lines):
  make = time_budget.make_plan

  def slower(*args):
    plan = make(*args)
    clock.step = 3.0
    return plan

  monkeypatch.setattr(time_budget, 'make_plan', slower)
  train_job.train(timed_config(), tmp_path)
  # Step 6 is evaluated after 18 s; 7, 8 and 9 end after 26, 29 and 32 s; 9 is evaluated too.
  assert steps_of(tmp_path) == [4, 6, 8, 9]
  assert log_lines[-1].startswith('ended at step 9 of 14: 37s are spent (train.minutes=0.5); step')
  assert open_run(tmp_path).ending().step == 9
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'eval/AP' in line] == [6, 9]
  assert train_job.train(timed_config(), tmp_path) is None
  assert f'nothing to do: {tmp_path} ended at step 9, since 37s are spent' in log_lines[-1]
  # The evaluation of the last step is made up for.
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines
                          if line['step'] < 9 or 'eval/AP' not in line))
  assert train_job.train(timed_config(), tmp_path) is not None
  assert steps_of(tmp_path)[-1] == 9 and log_lines[-1].startswith('ended at step 9 of 14')


@pytest.mark.slow
def test_more_minutes_continue_with_a_new_plan(clock, tmp_path, log_lines):
  train_job.train(timed_config(), tmp_path)
  train_job.train(timed_config(minutes=1.0), tmp_path)
  # 31 s are left, 30.07 of them planned: steps 15 to 29 and evaluations of 18, 24 and 29.
  assert open_run(tmp_path).config.train.steps == 29 and steps_of(tmp_path)[-1] == 29
  assert log_lines[-1] == 'took 59s of train.minutes=1'


@pytest.mark.slow
def test_steps_are_an_upper_bound_of_a_budget(clock, tmp_path, log_lines):
  train_job.train(timed_config(steps=5), tmp_path)
  assert steps_of(tmp_path)[-1] == 5
  assert any(line.endswith('train.steps=5 ends the run before') for line in log_lines)


@pytest.mark.slow
def test_a_budget_without_a_step_is_refused(clock, tmp_path):
  with pytest.raises(InputError, match=r'train.minutes=0.05 is too short: 3 s are left, and a step '
                     r'with evaluation and save takes 6 s; give at least 0.11'):
    train_job.train(timed_config(minutes=0.05), tmp_path)
  assert not (tmp_path / 'config.json').exists()


@pytest.mark.slow
def test_a_save_is_measured_while_steps_are_taken_and_leaves_no_trace(clock, tmp_path, monkeypatch,
                                                                      log_lines):
  """A save that delays the steps by 2 s: 11 steps, 4 saves and 2 evaluations fit into 29.1 s."""
  save = time_budget.Checkpoints.save

  def slow(self, *args):
    save(self, *args)
    clock.seconds += 2.0

  monkeypatch.setattr(time_budget.Checkpoints, 'save', slow)
  (tmp_path / time_budget.SCRATCH / '1').mkdir(parents=True)  # As a kill may leave it.
  train_job.train(timed_config(), tmp_path)
  assert any(', 5 s for an evaluation, 2 s for a save;' in line for line in log_lines)
  assert steps_of(tmp_path) == [4, 6, 8, 11] and open_run(tmp_path).ending() is None
  assert log_lines[-1] == 'took 29s of train.minutes=0.5'
  assert not (tmp_path / time_budget.SCRATCH).exists()


@pytest.mark.slow
@pytest.mark.parametrize('text', [
    '{', '[]', '{"minutes": 0.5}', *(json.dumps(dict(
        minutes=0.5, steps=8, step_seconds=1.0, evaluation_seconds=0.0) | wrong) for wrong in [
            {'steps': '8'}, {'steps': -1}, {'steps': 8.5}, {'step_seconds': math.nan},
            {'evaluation_seconds': None}, {'steps': True}])])
def test_a_damaged_plan_is_named(patient, text):
  (patient / time_budget.FILE).write_text(text)
  with pytest.raises(InputError, match=r'time_budget\.json cannot be read: .*; delete it to plan'):
    train_job.train(small_config(minutes=0.5), patient)


@pytest.mark.slow
@pytest.mark.parametrize('text', ['', '[]', '{"step": "6", "reason": "x"}', '{"step": 6}',
                                  '{"step": 6, "reason": null}'])
def test_a_damaged_end_is_written_again(patient, curve, text):
  whole = (patient / 'ended.json').read_text()
  (patient / 'ended.json').write_text(text)
  assert open_run(patient).ending() is None
  train_job.train(small_config(patience=3), patient)
  assert (patient / 'ended.json').read_text() == whole
