"""Learning-rate schedules, and the warm-up before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.schedules import build_schedule


def schedule_of(block, **changes):
  arguments = dict(base_rate=.5, steps=100, warmup_steps=10, warmup_rate=.1) | changes
  rate = build_schedule(block, **arguments)
  return lambda step: float(jax.jit(rate)(jnp.int32(step)))


@pytest.mark.parametrize('step, rate', [
    (0, .1333), (500, .274975), (1000, .41665), (1999, .699717), (2000, .7), (10000, .653109),
    (20000, .483939), (26000, .35), (49999, 0), (50000, 0), (60000, 0)])
def test_the_reference_schedule(step, rate):
  schedule = schedule_of({'name': 'cosine'}, base_rate=.7, steps=50_000, warmup_steps=2_000,
                         warmup_rate=.1333)
  assert schedule(step) == pytest.approx(rate, rel=2e-6, abs=1e-6)


def cosine_of_0_1(base_rate, *, steps, warmup_steps, warmup_rate):
  """The schedule as earlier versions computed it, whose runs must resume to the same bits."""
  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = warmup_rate + (base_rate - warmup_rate) * step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    cosine = 0.5 * base_rate * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, warmup, jnp.where(step > steps, 0.0, cosine))

  return rate


@pytest.mark.parametrize('batch', [8, 32, 512, 1000])
def test_the_default_has_the_bits_of_earlier_versions(batch):
  new = build_optimizer(steps=100, batch_size=batch).schedule
  old = cosine_of_0_1(batch / 512 * .7, steps=100, warmup_steps=4,
                      warmup_rate=batch / 512 * (.7 * (.1333 / .7)))
  steps = jnp.arange(104)
  np.testing.assert_array_equal(jax.jit(new)(steps), jax.jit(old)(steps))
  np.testing.assert_array_equal([new(step) for step in range(104)],
                                [old(step) for step in range(104)])


@pytest.mark.parametrize('block', [
    {'name': 'cosine'}, {'name': 'step'}, {'name': 'exponential', 'decay_steps': 20},
    {'name': 'constant'}, {'name': 'one_cycle'},
    {'name': 'optax:polynomial_schedule', 'init_value': 1.0, 'end_value': .1, 'power': 1,
     'transition_steps': 100, 'transition_begin': 10}])
def test_all_warm_up_to_the_learning_rate(block):
  rate = schedule_of(block)
  assert rate(0) == pytest.approx(.1) and rate(10) == pytest.approx(.5)
  assert .1 < rate(5) < .5 and max(rate(step) for step in range(0, 100, 7)) <= .5


def test_values_after_the_warm_up():
  step = schedule_of({'name': 'step', 'boundaries': (.5, 80), 'factor': .1})
  assert [step(at) for at in (49, 50, 79, 80, 99)] == pytest.approx([.5, .05, .05, .005, .005])
  # The TF Object Detection API's exponential_decay_with_burnin counts from the warm-up on.
  stairs = schedule_of({'name': 'exponential', 'decay_steps': 20, 'decay_factor': .5})
  assert [stairs(at) for at in (29, 30, 49, 50)] == pytest.approx([.5, .25, .25, .125])
  smooth = schedule_of({'name': 'exponential', 'decay_steps': 20, 'decay_factor': .25,
                        'staircase': False})
  assert smooth(20) == pytest.approx(.25) and smooth(30) == pytest.approx(.125)
  cycle = schedule_of({'name': 'one_cycle', 'final_factor': .01})
  assert cycle(5) == pytest.approx(.3) and cycle(55) == pytest.approx(.5 * 1.01 / 2)
  assert cycle(100) == pytest.approx(.005)
  floor = schedule_of({'name': 'cosine', 'final_factor': .2})
  assert floor(55) == pytest.approx(.3) and floor(100) == floor(150) == pytest.approx(.1)
  assert schedule_of({'name': 'constant'})(99) == .5


@pytest.mark.parametrize('block, message', [
    ({'name': 'cosine', 'final_factor': 2.0}, 'final_factor=2.0 .* must be 0 to 1'),
    ({'name': 'step', 'boundaries': (.5, 1.5)}, 'boundaries=.*whole numbers of steps'),
    ({'name': 'step', 'boundaries': (.5, 50)}, 'boundaries=.*different steps'),
    ({'name': 'step', 'boundaries': (.8, .5)}, r'ascending order.* the steps \[80, 50\]'),
    ({'name': 'step', 'factor': float('nan')}, 'factor is nan, legal: a finite number'),
    ({'name': 'cosine', 'final_factor': 'low'}, "final_factor is 'low', legal: a number"),
    ({'name': 'step', 'factor': 0.0}, 'factor=0.0 .* must be above 0'),
    ({'name': 'exponential', 'decay_steps': 0}, 'decay_steps=0 .* must be at least 1'),
    ({'name': 'cosine', 'steps': 3}, "no option 'steps'"),
    ({'name': 'optax:polynomial_schedule', 'init_value': 1.0}, "needs the option 'end_value'"),
    ({'name': 'optax:sgd', 'learning_rate': 1.0}, 'optim.schedule=')])
def test_wrong_options_are_named(block, message):
  with pytest.raises(InputError, match=message):
    schedule_of(block)


def test_one_cycle_needs_a_rise():
  with pytest.raises(InputError, match=r'set optim\.warmup_fraction=0\.3'):
    schedule_of({'name': 'one_cycle'}, warmup_steps=0)
