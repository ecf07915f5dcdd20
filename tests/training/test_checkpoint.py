"""The checkpoint service: what it keeps, restores and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.training.checkpoint import Checkpoints
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


def test_keeps_the_last_and_the_best_also_after_a_restart(tmp_path):
  figures = {1: None, 2: 0.5, 3: 0.3, 4: -1.0, 5: None, 6: float('nan'), 7: None}
  for steps in ((1, 2, 3, 4), (5, 6, 7)):
    with Checkpoints(tmp_path / 'c', keep_last=2, keep_best=1) as checkpoints:
      for step in steps:
        checkpoints.save(step, make_state(step),
                         None if figures[step] is None else {'AP': figures[step]})
  with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]


def test_what_a_kill_leaves_half_written_is_not_a_checkpoint(tmp_path):
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


def test_another_model_is_refused_with_both_shapes(tmp_path):
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, make_state())
    with pytest.raises(InputError, match=r'another model: \S*head/kernel is \(2, 3\) there and '
                       r'\(2, 4\)') as error:
      checkpoints.restore(abstract(make_state(width=4)), 1)
  assert '\n' not in str(error.value)


def test_a_step_that_is_not_there(tmp_path):
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


def test_the_moving_average_cannot_come_or_go_in_a_run(tmp_path):
  without = make_state()
  average = without._replace(average=without.variables)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    checkpoints.save(1, without)
    with pytest.raises(InputError, match=r'optim\.ema_decay cannot be turned on or off'):
      checkpoints.restore(abstract(average), 1)
