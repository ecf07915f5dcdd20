"""The checkpoint service keeps, restores and refuses checkpoints."""

import errno
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.checkpoints import integrity
from ppn_jax.checkpoints.manager import Checkpoints, SaveFailed
from ppn_jax.errors import InputError
from ppn_jax.training.state import TrainState


def make_state(value=1.0, width=3):
  params = {'head': {'kernel': jnp.full((2, width), value)}}
  return TrainState(step=jnp.int32(value), variables={'params': params, 'batch_stats': {}},
                    opt_state=(jnp.full((2, width), value / 3),), average={})


def abstract(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def test_restores_every_bit_and_the_structure(tmp_path):
  state = make_state(1 / 3)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(7, state)
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.latest() == 7
    restored = checkpoints.restore(abstract(state), 7)
  assert isinstance(restored, TrainState)
  jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_the_last_and_the_best_are_kept_also_after_a_restart(tmp_path):
  nan = float('nan')
  metrics = {1: {}, 2: {'AP': 0.5}, 3: {'AP': 0.3}, 4: {'AP': None}, 5: {}, 6: {'AP': nan}, 7: {}}
  for steps in ((1, 2, 3, 4), (5, 6, 7)):
    with Checkpoints(tmp_path / 'c', keep_last=2, keep_best=1) as checkpoints:
      for step in steps:
        checkpoints.save(step, make_state(step), metrics[step] or None)
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]


@pytest.mark.parametrize('missing', [None, float('nan'), -1.0])  # The last as of earlier versions.
def test_a_missing_metric_is_never_best(tmp_path, missing):
  with Checkpoints(tmp_path / 'c', keep_last=1, keep_best=1) as checkpoints:
    for step, metrics in enumerate([{'AP': missing, 'AP50': 0.5}, None], start=1):
      checkpoints.save(step, make_state(step), metrics)
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.steps() == [2]


def test_an_incomplete_folder_is_not_a_checkpoint(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, make_state())
  (tmp_path / 'c' / '2.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    assert checkpoints.latest() == 1
    checkpoints.save(2, make_state(2))
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.steps() == [1, 2]


def test_saving_copies_before_the_step_reuses_the_memory(tmp_path):
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  state = make_state(3.0, width=200_000)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, state)
    jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    restored = checkpoints.restore(abstract(make_state(3.0, width=200_000)), 1)
  assert np.all(restored.variables['params']['head']['kernel'] == 3.0)


def test_training_continues_while_a_thread_writes(tmp_path, monkeypatch):
  go_on, checksums = threading.Event(), integrity.checksums

  def held_up(state):
    assert go_on.wait(HANG_SECONDS)
    return checksums(state)

  monkeypatch.setattr(integrity, 'checksums', held_up)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, make_state())
    assert checkpoints.steps() == [1] and not (tmp_path / 'c' / '1').exists()
    go_on.set()
    checkpoints.wait()
    assert (tmp_path / 'c' / '1').exists() and checkpoints.steps() == [1]


def test_wait_raises_errors_of_the_thread_and_the_next_save_succeeds(tmp_path, monkeypatch):
  def fail(state):
    raise OSError(errno.EIO, 'Input/output error', 'file')

  with Checkpoints(tmp_path / 'c') as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(integrity, 'checksums', fail)
      checkpoints.save(1, make_state())
      with pytest.raises(SaveFailed, match=r'step 1 could not be saved: Input/output error; the '
                         r'newest checkpoint in \S+ is none'):
        checkpoints.wait()
    assert checkpoints.failures == 1 and checkpoints.steps() == []
    checkpoints.save(2, make_state())
    checkpoints.wait()
    assert checkpoints.failures == 0 and checkpoints.steps() == [2]


def test_another_model_is_refused_with_both_shapes(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, make_state())
    with pytest.raises(InputError, match=r'another model: \S*head/kernel is \(2, 3\) there and '
                       r'\(2, 4\)') as error:
      checkpoints.restore(abstract(make_state(width=4)), 1)
  assert '\n' not in str(error.value)


def test_a_missing_step(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(1, make_state())
    checkpoints.wait()
    with pytest.raises(InputError, match='no checkpoint of step 5; there are 1'):
      checkpoints.restore(abstract(make_state()), 5)


@pytest.mark.parametrize('options', [{'keep_last': 0}, {'keep_best': -1}])
def test_options_out_of_range(tmp_path, options):
  with pytest.raises(InputError, match=next(iter(options))):
    Checkpoints(tmp_path / 'c', **options)


def test_the_moving_average_cannot_be_turned_on_or_off_within_a_run(tmp_path):
  without = make_state()
  average = without._replace(average=without.variables)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, without)
    with pytest.raises(InputError, match=r'optim\.ema_decay cannot be turned on or off'):
      checkpoints.restore(abstract(average), 1)


TOGETHER = """
import pathlib, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from ppn_jax.distributed import sharding
from ppn_jax.checkpoints.manager import Checkpoints
from ppn_jax.training.state import TrainState

sharding.join_processes(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]),
                         local_devices=2)
def not_beside_the_step(name):
  raise AssertionError(f'a collective in a save: {name}')
multihost_utils.sync_global_devices = not_beside_the_step
mesh = sharding.data_mesh()
whole, rows = sharding.replicated(mesh), sharding.by_rows(mesh)
values = np.arange(80, dtype=np.float32).reshape(8, 10)
put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
def state(step):
  return TrainState(step=put(np.int32(step), whole), opt_state=(put(values * step, rows),),
                    average={}, variables={'params': {'kernel': put(values + step, whole)}})
shardings = jax.tree.map(lambda x: x.sharding, state(0))
train_step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.sum().astype(x.dtype), s),
                     donate_argnums=0, out_shardings=shardings)
with Checkpoints(pathlib.Path(sys.argv[3]), keep_last=2) as checkpoints:
  for step in (1, 2, 3):
    now = state(step)
    checkpoints.wait()
    checkpoints.save(step, now, {'AP': 1 / step})
    for _ in range(20):  # Collectives beside the save.
      now = train_step(now)
    jax.block_until_ready(now)
  checkpoints.wait()
  assert checkpoints.steps() == [1, 2, 3], checkpoints.steps()
  restored = checkpoints.restore(state(0), 3)
for found, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state(3))):
  assert found.sharding == saved.sharding
  np.testing.assert_array_equal(sharding.to_host(found), sharding.to_host(saved))
"""


@pytest.mark.slow
def test_saving_in_several_processes_uses_no_collective(tmp_path):
  with socket.socket() as probe:
    probe.bind(('', 0))
    port = probe.getsockname()[1]
  processes = [subprocess.Popen([sys.executable, '-c', TOGETHER, f'localhost:{port}', str(process),
                                 str(tmp_path / 'c')]) for process in range(2)]
  assert [process.wait(timeout=HANG_SECONDS) for process in processes] == [0, 0]
