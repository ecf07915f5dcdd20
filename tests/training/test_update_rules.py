"""Optimizers by name: their equations, their weight decay, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.update_rules import build_update_rule

GRADIENTS = np.random.default_rng(0).normal(0, 2, (6, 5)).astype(np.float32)


def steps(block, params, gradients, *, rate=.1, weight_decay=0.0):
  """Returns the parameters after a step with each of the gradients."""
  rule, _ = build_update_rule(block, learning_rate=lambda step: rate / (1 + step),
                              weight_decay=weight_decay)
  state = rule.init(params)
  for gradient in gradients:
    updates, state = rule.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params


def rmsprop_of_tensorflow(w, gradients, *, decay, momentum, epsilon, rate=.1):
  """ApplyRMSProp of tensorflow/core/kernels/training_ops.cc, in float64."""
  w, square, moment = np.float64(w), np.ones(len(w)), np.zeros(len(w))
  for step, g in enumerate(np.float64(gradients)):
    square += (g * g - square) * (1 - decay)
    moment = momentum * moment + rate / (1 + step) * g / np.sqrt(square + epsilon)
    w = w - moment
  return w


@pytest.mark.parametrize('options', [
    {}, {'epsilon': 1e-3}, {'momentum': 0.0, 'decay': .5, 'epsilon': .1}])
def test_rmsprop_is_tensorflows(options):
  w = np.linspace(-1, 1, 5, dtype=np.float32)
  ours = steps({'name': 'rmsprop', **options}, {'w': jnp.asarray(w)}, [{'w': g} for g in GRADIENTS])
  expected = rmsprop_of_tensorflow(
      w, GRADIENTS, **{'decay': .9, 'momentum': .9, 'epsilon': 1.0, **options})
  np.testing.assert_allclose(ours['w'], expected, rtol=2e-6)


def test_the_equation_is_that_of_tensorflow_itself():
  tf = pytest.importorskip('tensorflow')
  w = np.linspace(-1, 1, 5, dtype=np.float32)
  with tf.Graph().as_default():
    variable = tf.compat.v1.get_variable('w', initializer=w)
    rate, g = (tf.compat.v1.placeholder(tf.float32, shape) for shape in ((), (5,)))
    step = tf.compat.v1.train.RMSPropOptimizer(
        rate, decay=.9, momentum=.9, epsilon=1.0).apply_gradients([(g, variable)])
    with tf.compat.v1.Session() as session:
      session.run(tf.compat.v1.global_variables_initializer())
      for i, gradient in enumerate(GRADIENTS):
        session.run(step, {rate: .1 / (1 + i), g: gradient})
      theirs = session.run(variable)
  expected = rmsprop_of_tensorflow(w, GRADIENTS, decay=.9, momentum=.9, epsilon=1.0)
  np.testing.assert_allclose(theirs, expected, rtol=2e-6)


def test_nesterovs_correction_looks_ahead():
  ours = steps({'name': 'sgd', 'nesterov': True}, jnp.float32(0), [jnp.float32(1)] * 2, rate=.1)
  # a = 1, then 1.9; the step is -rate (momentum a + g).
  assert float(ours) == pytest.approx(-.1 * 1.9 - .05 * (.9 * 1.9 + 1))


PARAMS = {'conv': {'kernel': jnp.full((2, 2), 3.0), 'bias': jnp.full((2,), 5.0)}}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize('name', ['adamw', 'optax:lion', 'optax:lamb'])
def test_decoupled_decay_is_of_kernels_only(name):
  after = steps({'name': name}, PARAMS, [ZERO], weight_decay=.01)['conv']
  assert np.all(np.asarray(after['kernel']) < 3)
  np.testing.assert_array_equal(after['bias'], PARAMS['conv']['bias'])
  if name == 'adamw':
    np.testing.assert_allclose(after['kernel'], 3 - .1 * .01 * 3, rtol=1e-6)


def test_lars_scales_kernels_only():
  g = {'conv': {'kernel': jnp.full((2, 2), 7.0), 'bias': jnp.full((2,), 7.0)}}
  after = steps({'name': 'lars', 'trust_coefficient': .01}, PARAMS, [g])['conv']
  # |w| / |g| = 3 / 7, so the step of each entry is rate * .01 * 3.
  np.testing.assert_allclose(after['kernel'], 3 - .1 * .01 * 3, rtol=1e-6)
  np.testing.assert_allclose(after['bias'], 5 - .1 * 7, rtol=1e-6)


@pytest.mark.parametrize('block, message', [
    ({'name': 'sdg'}, "unknown optim.optimizer 'sdg'; did you mean 'sgd'"),
    ({'name': 'sgd', 'momentum': 1.0}, 'optim.optimizer.momentum=1.0 must be'),
    ({'name': 'rmsprop', 'epsilon': 0.0}, 'optim.optimizer.epsilon=0.0 must be above 0'),
    ({'name': 'adamw', 'weight_decay': .1}, 'set optim.weight_decay'),
    ({'name': 'sgd', 'learning_rate': .1}, 'set optim.learning_rate'),
    ({'name': 'adamw', 'beta1': .1}, "no option 'beta1'"),
    ({'name': 'optax:lyon'}, 'cannot be loaded'),
    ({'name': 'optax:lbfgs'}, 'cannot be used'),
    ({'name': 'optax:scale_by_learning_rate', 'flip_sign': 'no', 'x': 1}, "no option 'x'"),
    ({'name': 'optax:cosine_decay_schedule', 'init_value': 1.0, 'decay_steps': 2},
     'cannot be used|no option')])
def test_what_cannot_be_used_is_refused(block, message):
  with pytest.raises(InputError, match=message):
    build_optimizer(steps=10, batch_size=1, optimizer=block)
