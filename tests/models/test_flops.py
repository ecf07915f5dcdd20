"""Arithmetic counted from jaxprs, against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ppn_jax.errors import InputError
from ppn_jax.models.flops import operations, used_arguments

X = jnp.ones((1, 5, 7, 4))


def total(function, *arguments):
  """Returns (multiply-adds, FLOPs, other operations)."""
  ops = list(operations(jax.make_jaxpr(function)(*arguments).jaxpr))
  return tuple(sum(getattr(op, f) for op in ops) for f in ('multiply_adds', 'flops', 'other_ops'))


def convolve(x, kernel, **options):
  return lax.conv_general_dilated(x, kernel, (2, 2), 'SAME',
                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options)


@pytest.mark.parametrize('function, arguments, expected', [
    # 3 x 4 outputs, each of 9 taps on 4 channels, padding counted as any tap.
    (convolve, (X, jnp.ones((3, 3, 4, 6))), (3 * 4 * 6 * 36, 2 * 3 * 4 * 6 * 36, 0)),
    (lambda x, k: convolve(x, k, feature_group_count=4), (X, jnp.ones((3, 3, 1, 4))),
     (3 * 4 * 4 * 9, 2 * 3 * 4 * 4 * 9, 0)),
    (lambda x, k: convolve(x, k, feature_group_count=2), (X, jnp.ones((3, 3, 2, 8))),
     (3 * 4 * 8 * 18, 2 * 3 * 4 * 8 * 18, 0)),
    (lambda a, b: jnp.einsum('bik,bkj->bij', a, b), (jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7))),
     (2 * 3 * 7 * 5, 2 * 2 * 3 * 7 * 5, 0)),
    (lambda x: nn.max_pool(x, (2, 2), (2, 2), 'SAME'), (X,), (0, 4 * 3 * 4 * 4, 0)),
    (lambda x: nn.avg_pool(x, (5, 7)), (X,), (0, 35 * 4 + 4, 0)),
    (lambda x: x.mean((1, 2)), (X,), (0, 35 * 4 - 4 + 4, 0)),
    (lambda x: x + jnp.arange(4.0), (X,), (0, 140, 0)),
    (lambda x: lax.rsqrt(x), (X,), (0, 280, 0)),
    (lambda x: jnp.maximum(x, 2 * x), (X,), (0, 280, 0)),
    (nn.relu6, (X,), (0, 0, 280)),
    (nn.sigmoid, (X,), (0, 0, 140)),
    (lambda i: i + 1, (jnp.arange(9),), (0, 0, 0)),
    (lambda x: x.reshape(-1)[::2], (X,), (0, 0, 0)),
])
def test_one_operation(function, arguments, expected):
  assert total(function, *arguments) == expected


@pytest.mark.parametrize('wrap', [jax.jit, jax.checkpoint])
def test_calls_are_counted(wrap):
  assert total(wrap(lambda x: x * x), X) == (0, 140, 0)


def test_custom_gradients_are_left_out():
  @jax.custom_jvp
  def square(x):
    return x * x

  square.defjvps(lambda g, y, x: 2 * x * g)
  assert total(square, X) == (0, 140, 0)

  @jax.custom_vjp
  def cube(x):
    return x * x * x

  cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x * x * g,))
  assert total(cube, X) == (0, 280, 0)


def test_loops_of_known_length_count_each_iteration():
  assert total(lambda x: lax.scan(lambda c, _: (c * x, None), x, None, length=6)[0], X) == (
      0, 6 * 140, 0)
  assert total(lambda x: lax.fori_loop(0, 3, lambda _, c: c + x, x), X) == (0, 3 * 140, 0)


def test_the_costliest_branch_counts():
  def function(x, i):
    return lax.switch(i, [lambda x: x, lambda x: x * x + x, lambda x: -x], x)
  assert total(function, X, 1) == (0, 280, 0)


def test_a_loop_of_unknown_length_is_rejected():
  def function(x, n):
    return lax.fori_loop(0, n, lambda _, c: c + x, x)
  with pytest.raises(InputError, match='loop whose length is known at run time only'):
    total(function, X, 3)


def test_equations_that_no_output_needs_are_left_out():
  def function(x, unused, y):
    _ = unused * 3
    return x + y
  jaxpr = jax.make_jaxpr(function)(X, X, X).jaxpr
  assert used_arguments(jaxpr) == {0, 2}
  assert sum(op.flops for op in operations(jaxpr)) == 140


def test_scopes_and_arguments_reach_into_calls():
  @jax.jit
  def inner(x, bias):
    with jax.named_scope('inside'):
      return x + bias.astype(x.dtype)

  def function(x, bias):
    with jax.named_scope('outside'):
      return inner(-x, bias)

  ops = operations(jax.make_jaxpr(function)(X, jnp.ones(4, jnp.bfloat16)).jaxpr)
  add = next(op for op in ops if op.primitive == 'add')
  assert add.scope == ('outside', 'inside') and add.arguments == (1,)
