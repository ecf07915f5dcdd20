"""Evaluates a traced function with the operations of another library.

`jax.make_jaxpr` turns any function into primitives, of which there are about a hundred, with nested
functions. A table such as `tensorflow_ops` has an operation of the other library for each
primitive. The graph of another runtime is thus built from the code that runs here.
"""

from typing import Any

import jax
import jax.extend
import numpy as np

from ppn_jax.errors import InputError

# Primitives that only call a nested function, and the parameter that holds it.
_CALLS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr', 'core_call': 'call_jaxpr',
          'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr',
          'remat': 'jaxpr', 'checkpoint': 'jaxpr'}
# Primitives that are not evaluated in advance. Folding a broadcast would store an array of copies.
_NEVER_FOLDED = frozenset({'broadcast_in_dim', 'while', 'dim_as_value'})


def evaluate(closed: Any, inputs: list, operations: Any, output_format: str) -> list:
  """Returns the outputs of a closed jaxpr, computed by `operations`.

  Values that depend only on constants are computed by JAX as NumPy arrays. A broadcast may be left
  to the operation that uses it, so values can have a side of 1 where the jaxpr has a larger one.

  Args:
    closed: a closed jaxpr, as from `jax.make_jaxpr`.
    inputs: values of the other library, or NumPy arrays.
    operations: has a method `NAME(equation, *inputs)` for each primitive; `and`, `or`, `not`
      and `while` end in an underscore.
    output_format: the export format, for messages.

  Raises:
    InputError: If `operations` lacks a primitive.
  """
  jaxpr, values = closed.jaxpr, {}

  def read(variable):
    if hasattr(variable, 'val'):  # A literal.
      return np.asarray(variable.val, variable.aval.dtype)
    return values[variable]

  values |= zip(jaxpr.constvars, map(np.asarray, closed.consts), strict=True)
  values |= zip(jaxpr.invars, inputs, strict=True)
  for equation in jaxpr.eqns:
    given = [read(v) for v in equation.invars]
    name = equation.primitive.name
    if name in _CALLS:
      found = evaluate(_closed(equation.params[_CALLS[name]]), given, operations, output_format)
    elif _foldable(equation, given):
      found = _fold(equation, given)
    else:
      operation = getattr(operations, name + '_' * (name in ('and', 'or', 'not', 'while')), None)
      if operation is None:
        raise InputError(f'this model has an operation that format {output_format} cannot '
                         f'express: {name}; --format=stablehlo can')
      found = operation(equation, *given)
    if not isinstance(found, (list, tuple)):
      found = [found]
    values |= zip(equation.outvars, found, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _closed(jaxpr: Any) -> Any:
  return jaxpr if hasattr(jaxpr, 'consts') else jax.extend.core.ClosedJaxpr(jaxpr, ())


def is_static(aval: Any) -> bool:
  """Returns whether every side of a shape is a number."""
  return all(isinstance(d, (int, np.integer)) for d in aval.shape)


def _foldable(equation: Any, given: list) -> bool:
  """Returns whether JAX can compute an equation in advance: all its inputs are constants."""
  return (equation.primitive.name not in _NEVER_FOLDED
          and all(isinstance(x, (np.ndarray, np.generic)) for x in given)
          and all(is_static(v.aval) for v in (*equation.invars, *equation.outvars)))


def _fold(equation: Any, given: list) -> list:
  whole = [np.broadcast_to(x, v.aval.shape) for x, v in zip(given, equation.invars, strict=True)]
  with jax.ensure_compile_time_eval():
    found = equation.primitive.bind(*whole, **equation.params)
  return list(map(np.asarray, found if equation.primitive.multiple_results else [found]))
