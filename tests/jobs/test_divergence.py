"""Runs whose loss explodes without ever being infinite."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.distributed.preemption import Preempted
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.jobs import resuming
from ppn_jax.jobs.train_loop import DIVERGED_STEPS, TrainingDiverged, TrainLoop
from ppn_jax.telemetry.metrics import FIRST_LOSS, MetricsWriter
from ppn_jax.training.train_step import StepMetrics


class Saved:
  """Stands in for checkpoints; records which steps were saved."""

  def __init__(self):
    self.steps = []

  def save(self, step, state, metrics=None, notes=None):
    self.steps.append(step)

  def latest(self):
    return max(self.steps, default=None)

  def wait(self):
    pass


class Trace(contextlib.nullcontext):
  def step(self, step, pending):
    return contextlib.nullcontext()


class Pipeline:
  """Stands in for an input pipeline, without input."""
  bad = BadExamples('data.train', 1, 'raise', 0.0)

  @contextlib.contextmanager
  def open(self, start, progress):
    yield self

  def ready(self):
    return True

  def __next__(self):
    return ()


def run_through(tmp_path, monkeypatch, losses, *, start=0, end_at=None, first_loss=None,
                **train):
  """Runs a step for each loss; returns which steps were saved, and what ended the run."""
  monkeypatch.setattr(TrainLoop, '_compile', lambda self, train_step, state, pipeline: train_step)
  at = iter(losses)

  def train_step(state):
    values = dict.fromkeys(StepMetrics._fields, np.float32(1)) | {'loss': np.float32(next(at))}
    return state, StepMetrics(**values)

  steps = start + len(losses)
  config = tiny_config(**dict(steps=steps, log_every=5, checkpoint_every=10) | train)
  steps = itertools.count(start + 1)  # It is asked after each.
  notice = SimpleNamespace(given=lambda: False, reached=lambda: next(steps) == end_at,
                           end=lambda what: Preempted(what))
  progress = SimpleNamespace(advance=lambda *_: None, report=lambda *_: None)
  saved = Saved()
  with MetricsWriter(tmp_path, start) as writer:
    loop = TrainLoop(SimpleNamespace(config=config, workdir=tmp_path), data_mesh(), saved,
                     progress, writer, None, notice, Trace(), first_loss=first_loss)
    try:
      loop.run_steps(None, start, train_step, Pipeline())
    except (TrainingDiverged, Preempted) as e:
      return saved.steps, e
  return saved.steps, None


def test_an_exploded_loss_stops_the_run_before_it_is_saved(tmp_path, monkeypatch, log_lines):
  saved, error = run_through(tmp_path, monkeypatch, [3.0] * 17 + [4e3] * 83)
  assert saved == [10] and isinstance(error, TrainingDiverged)
  assert str(error) == (
      f'loss is 4000 at step 27, more than 1,000 times the first, 3, since step 18; the last good '
      f'checkpoint is step 10 in {tmp_path}. A lower optim.learning_rate or optim.clip_norm=10 may '
      'help')
  assert log_lines == ['step 20 is not saved: its loss is more than 1,000 times the first, 3']


@pytest.mark.parametrize('losses', [
    [3.0] * 15 + [4e3] * (DIVERGED_STEPS - 1) + [3.0] * 16,  # A spike that passes.
    [3.0] * 15 + [2.9e3] * 25,
    [1e-6] * 15 + [0.9] * 25,  # From perfect weights.
    [1e-6] * 15 + [900.0] * 25,
    [5e5] * 40])
def test_a_run_that_has_not_diverged_continues(tmp_path, monkeypatch, losses):
  saved, error = run_through(tmp_path, monkeypatch, losses)
  assert error is None and saved[-1] == 40


def test_divergence_before_the_first_report(tmp_path, monkeypatch):
  saved, error = run_through(tmp_path, monkeypatch, [3.0, 40.0] + [1e5] * 38, log_every=40,
                             checkpoint_every=40)
  assert saved == [] and 'there is no checkpoint before it' in str(error)


def test_an_exploded_last_step_is_not_saved(tmp_path, monkeypatch):
  saved, error = run_through(tmp_path, monkeypatch, [3.0] * 38 + [1e5] * 2)
  assert saved == [10, 20, 30] and 'at step 40' in str(error)


def test_preemption_does_not_save_an_exploded_step(tmp_path, monkeypatch):
  saved, error = run_through(tmp_path, monkeypatch, [3.0] * 13 + [1e5] * 20, end_at=15)
  assert saved == [10] and isinstance(error, Preempted)
  assert 'step 15 is not saved; start again to resume from step 10' in str(error)


def test_the_first_loss_is_that_of_the_run_not_of_the_restart(tmp_path, monkeypatch):
  run_through(tmp_path, monkeypatch, [3.0] * 20)
  run = SimpleNamespace(workdir=tmp_path)
  assert resuming.first_loss(run, 0) is None and resuming.first_loss(run, 20) == 3.0
  losses = [2e3] * 5 + [4e3] * 35
  saved, error = run_through(tmp_path, monkeypatch, losses, start=20, first_loss=3.0)
  assert isinstance(error, TrainingDiverged) and saved == []
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [FIRST_LOSS in line for line in lines] == [True] + [False] * (len(lines) - 1)
