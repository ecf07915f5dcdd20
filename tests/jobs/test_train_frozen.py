"""Runs with frozen blocks and another optimizer: start lines, resuming, and what may not change."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.jobs import train_loop
from ppn_jax.run import load_variables, open_run


def config_of(**optim):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.resident.enabled = True
  config.optim.freeze, config.optim.optimizer = ('backbone/conv2d_[0-2]',), {'name': 'optax:lion'}
  config.optim.learning_rate = 1e-3
  for key, value in optim.items():
    config.optim[key] = value
  return config.lock()


def variables_of(workdir):
  # Without allow=('optax',): the optimizer is not needed to read the variables.
  run = open_run(workdir)
  return jax.device_get(load_variables(run, run.detector(), sharding.data_mesh())[1])


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed')
  train_job.train(config_of(), workdir)
  return workdir


def test_an_interrupted_run_with_resident_data_ends_with_the_same_bits(
    undisturbed, tmp_path, monkeypatch, log_lines):
  report = train_loop.TrainLoop._report

  def break_off(self, step):
    report(self, step)
    if step == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(train_loop.TrainLoop, '_report', break_off)
  with pytest.raises(KeyboardInterrupt):
    train_job.train(config_of(), tmp_path)
  monkeypatch.undo()
  text = '\n'.join(log_lines)
  assert ' trained), 5 classes' in text and 'freezes random values' in text
  train_job.train(config_of(), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, variables_of(undisturbed), variables_of(tmp_path))


@pytest.mark.parametrize('changes, message', [
    ({'optimizer': {'name': 'sgd'}}, "optim.optimizer.name='optax:lion', which cannot be changed"),
    ({'freeze': ('backbone/conv2d_0',)}, 'optim.freeze cannot be changed within a run'),
    ({'freeze': ('backbon',)}, "'backbon' matches no parameter")])
def test_what_may_not_change_is_refused_before_anything_is_written(undisturbed, changes, message):
  before = contents(undisturbed)
  with pytest.raises(InputError, match=message):
    train_job.train(config_of(**changes), undisturbed)
  assert contents(undisturbed) == before


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob('*')
          if path.is_file() and path.name != '.training.lock'}
