"""Schedule, optimizer, weight decay and moving average, as docs/reference.md specifies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.training.optimizer import build_optimizer, update_average, weight_penalty

PARAMS = {'conv': {'kernel': jnp.full((2, 2), 3.0)}, 'norm': {'scale': jnp.full((2,), 5.0),
                                                               'bias': jnp.full((2,), 7.0)}}


def test_rates_scale_with_the_batch():
  make = lambda batch: build_optimizer(steps=100, batch_size=batch, learning_rate=.4,
                                       rate_batch_size=32)
  assert make(32).schedule(4) == pytest.approx(.4)
  assert make(8).schedule(4) == pytest.approx(.1)
  assert build_optimizer(steps=100, batch_size=8, learning_rate=.4, rate_batch_size=0).schedule(
      4) == pytest.approx(.4)


def test_adams_rate_follows_the_root_of_the_batch_size():
  make = lambda batch_size: build_optimizer(
      steps=100, batch_size=batch_size, learning_rate=.4, rate_batch_size=32,
      rate_batch_exponent=.5)
  assert make(32).schedule(4) == pytest.approx(.4)
  assert make(8).schedule(4) == pytest.approx(.2)
  assert make(128).schedule(4) == pytest.approx(.8)


def test_momentum_is_not_nesterovs_and_follows_the_schedule():
  optimizer = build_optimizer(steps=10, batch_size=1, learning_rate=.1, warmup_fraction=0)
  w, state = jnp.float32(1.0), optimizer.transform.init(jnp.float32(1.0))
  a, expected = 0.0, 1.0
  for step, g in enumerate([1.0, -2.0, 0.5]):
    updates, state = optimizer.transform.update(jnp.float32(g), state, w)
    w = w + updates
    a = .9 * a + g
    expected -= float(optimizer.schedule(step)) * a
    assert w == pytest.approx(expected, rel=1e-6)


def test_weight_decay_counts_kernels_only():
  assert weight_penalty(PARAMS, 0.1) == pytest.approx(0.5 * 0.1 * 4 * 9)
  gradient = jax.grad(weight_penalty)(PARAMS, 0.1)
  np.testing.assert_allclose(gradient['conv']['kernel'], 0.1 * PARAMS['conv']['kernel'])
  assert not np.any(gradient['norm']['scale']) and not np.any(gradient['norm']['bias'])


def test_clipping_shortens_long_gradients_only():
  optimizer = build_optimizer(steps=10, batch_size=1, learning_rate=1.0, warmup_fraction=0,
                              rate_batch_size=0, clip_norm=1.0)
  state = optimizer.transform.init(jnp.zeros(2))
  long, _ = optimizer.transform.update(jnp.float32([30, 40]), state)
  np.testing.assert_allclose(long, [-.6, -.8], rtol=1e-6)
  short, _ = optimizer.transform.update(jnp.float32([.3, .4]), state)
  np.testing.assert_allclose(short, [-.3, -.4], rtol=1e-6)


def test_average_starts_quickly_and_then_has_the_decay():
  average = {'w': jnp.float32(0)}
  early = update_average(average, {'w': jnp.float32(1)}, decay=.99, step=0)
  assert early['w'] == pytest.approx(.9)
  late = update_average(average, {'w': jnp.float32(1)}, decay=.99, step=10_000)
  assert late['w'] == pytest.approx(.01)


@pytest.mark.parametrize('option, value', [
    ('learning_rate', -1.0), ('freeze', 'backbone'), ('weight_decay', -1e-3), ('clip_norm', -1.0),
    ('ema_decay', 1.0), ('warmup_fraction', 1.0), ('learning_rate', float('nan'))])
def test_values_out_of_range_are_named(option, value):
  with pytest.raises(InputError, match=f'optim.{option}'):
    build_optimizer(**{'steps': 10, 'batch_size': 1, 'learning_rate': .1, option: value})


def test_decays_by_itself_or_by_the_penalty():
  decay = lambda name: build_optimizer(steps=10, batch_size=1, weight_decay=.1,
                                       optimizer={'name': name}).weight_decay
  assert (decay('sgd'), decay('rmsprop'), decay('optax:adam')) == (.1, .1, .1)
  assert (decay('adamw'), decay('lars'), decay('optax:lion')) == (0, 0, 0)


def test_factors_of_rates_multiply_the_updates():
  gradient = jax.tree.map(jnp.ones_like, PARAMS)
  for block in ({'name': 'sgd'}, {'name': 'rmsprop'}, {'name': 'adamw'}):
    steps = {}
    for name, factors in (('plain', {}), ('scaled', {'norm': .5, '*/bias': .1})):
      optimizer = build_optimizer(steps=10, batch_size=1, optimizer=block, rate_scale=factors)
      state = optimizer.init(PARAMS)
      for _ in range(3):
        updates, state = optimizer.transform.update(gradient, state, PARAMS)
      steps[name] = updates, jax.tree.structure(state)
    (plain, structure), (scaled, same) = steps['plain'], steps['scaled']
    assert structure == same  # So that factors may change within a run.
    np.testing.assert_array_equal(scaled['conv']['kernel'], plain['conv']['kernel'])
    np.testing.assert_allclose(scaled['norm']['scale'], .5 * plain['norm']['scale'], rtol=1e-6)
    np.testing.assert_allclose(scaled['norm']['bias'], .05 * plain['norm']['bias'], rtol=1e-6)


@pytest.mark.parametrize('factors, message', [
    ({'cnv': .1}, "optim.rate_scale: 'cnv' matches no parameter .*; near it: conv"),
    ({'conv': 0.0}, r"optim.rate_scale\['conv'\]=0.0 must be above 0")])
def test_factors_of_nothing_and_of_zero_are_refused(factors, message):
  with pytest.raises(InputError, match=message):
    build_optimizer(steps=10, batch_size=1, rate_scale=factors).init(PARAMS)
