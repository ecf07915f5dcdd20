"""Runs with frozen blocks and another optimizer: start lines, resuming, and what may not change."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.data.splits import open_split
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import create_run, load_variables, open_run
from ppn_jax.training.train_step import jit_init


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


@pytest.mark.slow
def test_an_interrupted_run_with_resident_data_ends_with_the_same_bits(
    undisturbed, tmp_path, interrupted_after, log_lines):
  with interrupted_after(4):
    train_job.train(config_of(), tmp_path)
  text = '\n'.join(log_lines)
  assert ' trained), 5 classes' in text and 'freezes random values' in text
  train_job.train(config_of(), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, variables_of(undisturbed), variables_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize('changes, message', [
    ({'optimizer': {'name': 'sgd'}}, "optim.optimizer.name='optax:lion', which cannot be changed"),
    ({'freeze': ('backbone/conv2d_0',)}, 'optim.freeze cannot be changed within a run'),
    ({'freeze': ('backbon',)}, "'backbon' matches no parameter")])
def test_what_may_not_change_is_refused_before_anything_is_written(undisturbed, changes, message):
  before = contents(undisturbed)
  with pytest.raises(InputError, match=message):
    train_job.train(config_of(**changes), undisturbed)
  assert contents(undisturbed) == before


@pytest.mark.slow
def test_an_imported_run_takes_any_optimizer_and_frozen_blocks(tmp_path):
  """Nothing but its variables matters before the first step."""
  config = tiny_config()
  source = open_split(config, 'train')
  run = create_run(tmp_path, config, source.categories)
  state = jit_init(run.detector(), run.optimizer(), sharding.data_mesh())(3)
  with run.checkpoints(read_only=False) as checkpoints:
    checkpoints.save(0, state)
  run.save()
  before = variables_of(tmp_path)
  changed = config_of(ema_decay=0.9).copy_and_resolve_references().unlock()
  changed.train.steps = 2
  train_job.train(changed, tmp_path)
  after = variables_of(tmp_path)
  frozen = lambda tree: tree['params']['backbone']['conv2d_1']
  jax.tree.map(np.testing.assert_array_equal, frozen(before), frozen(after))
  kernels = [np.asarray(v['params']['head']['tower_kernel']) for v in (before, after)]
  assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob('*')
          if path.is_file() and path.name != '.training.lock'}
