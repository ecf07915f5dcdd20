"""Arithmetic of a traced function, counted operation by operation in its jaxpr.

FLOPs are counted as TensorFlow's profiler does, so that they can be compared with published
numbers: 2 for each multiply-add of a convolution or matrix product, a pooling window's size for
each of its outputs, 1 for each output of an addition, comparison or the like. Taps on padding count
as any other. Operations that the profiler does not count (sigmoid, exponential, clamping) are
counted separately, 1 for each output.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from ppn_jax.errors import InputError

# FLOPs for each output.
_ARITHMETIC = {'rsqrt': 2} | dict.fromkeys(
    ('add', 'sub', 'mul', 'div', 'neg', 'max', 'min', 'square', 'integer_pow', 'pow', 'log',
     'add_any', 'eq', 'ne', 'lt', 'le', 'gt', 'ge'), 1)
_OTHER = frozenset({
    'abs', 'ceil', 'clamp', 'cos', 'cosh', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1',
    'floor', 'log1p', 'logistic', 'rem', 'round', 'sign', 'sin', 'sinh', 'sqrt', 'tan', 'tanh'})
_POOLING = frozenset({'reduce_window_max', 'reduce_window_min', 'reduce_window_sum'})
# These have a scalar function as parameter that is not called with their operands.
_REDUCTIONS = frozenset({'reduce', 'reduce_window'})
# These pass on the values of their first operand, and with them the argument that they came from.
_VIEWS = frozenset({'broadcast_in_dim', 'convert_element_type', 'copy', 'copy_p', 'reshape',
                    'squeeze', 'stop_gradient', 'transpose', 'expand_dims', 'reduce_precision',
                    'optimization_barrier'})


class Operation(NamedTuple):
  """Arithmetic of one equation, over all its runs.

  Attributes:
    primitive: name of the primitive.
    scope: named scopes around it, outermost first.
    arguments: indices of the function's arguments that are operands, up to shape and dtype.
    multiply_adds: multiply-adds of convolutions and matrix products.
    flops: FLOPs as TensorFlow's profiler counts them.
    other_ops: outputs of operations that the profiler does not count.
  """
  primitive: str
  scope: tuple[str, ...]
  arguments: tuple[int, ...]
  multiply_adds: int
  flops: int
  other_ops: int


class _Cost(NamedTuple):
  """Arithmetic of one run; see `Operation`."""
  multiply_adds: int = 0
  flops: int = 0
  other_ops: int = 0


def operations(jaxpr: core.Jaxpr) -> Iterator[Operation]:
  """Yields the operations that the outputs of `jaxpr` depend on, in order, inside calls too.

  Of a conditional, only the costliest branch counts. Operations without cost are included.

  Raises:
    InputError: If there is arithmetic in a loop whose length is known at run time only.
  """
  return _walk(jaxpr, {v: i for i, v in enumerate(jaxpr.invars)}, (), 1)


def used_arguments(jaxpr: core.Jaxpr) -> frozenset[int]:
  """Returns indices of arguments that the outputs depend on; a call counts as using all of its."""
  needed = _variables(jaxpr.outvars) | {v for eqn in _needed_equations(jaxpr)
                                        for v in _variables(eqn.invars)}
  return frozenset(i for i, v in enumerate(jaxpr.invars) if v in needed)


def _walk(jaxpr: core.Jaxpr, origins: dict[core.Var, int], scope: tuple[str, ...],
          times: int) -> Iterator[Operation]:
  """Yields the operations of a jaxpr that runs `times` times.

  `origins` has the indices of arguments, by the variables that hold their values.
  """
  for eqn in _needed_equations(jaxpr):
    name = eqn.primitive.name
    stack = str(eqn.source_info.name_stack)
    inside = scope + tuple(stack.split('/') if stack else ())
    from_ = [origins.get(v) if isinstance(v, core.Var) else None for v in eqn.invars]
    if name in _VIEWS and from_[0] is not None:
      origins[eqn.outvars[0]] = from_[0]
    bodies = [_walk(body, known, inside, times * repeats)
              for body, known, repeats in _bodies(eqn, from_)]
    if name == 'while':
      _check_free(itertools.chain(*bodies), inside)
    elif name == 'cond':
      yield from max(map(list, bodies), key=lambda ops: sum(op.flops for op in ops))
    else:
      yield from itertools.chain(*bodies)
    arguments = tuple(i for i in from_ if i is not None)
    yield Operation(name, inside, arguments, *(times * n for n in _cost(eqn)))


def _needed_equations(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
  """Returns the equations that the outputs depend on, in order; XLA drops the others too."""
  needed, kept = _variables(jaxpr.outvars), []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or not needed.isdisjoint(eqn.outvars):
      kept.append(eqn)
      needed |= _variables(eqn.invars)
  return kept[::-1]


def _variables(atoms: Iterable[Any]) -> set[core.Var]:
  """Returns those atoms that are no literals."""
  return {a for a in atoms if isinstance(a, core.Var)}


def _bodies(eqn: core.JaxprEqn, origins: list[int | None]
            ) -> Iterator[tuple[core.Jaxpr, dict[core.Var, int], int]]:
  """Yields (body, origins of its arguments, number of runs) of a call, loop or conditional."""
  name = eqn.primitive.name
  if name in _REDUCTIONS:
    return
  operands = origins[1:] if name == 'cond' else origins
  for body in core.jaxprs_in_params(eqn.params):
    if name == 'while':
      yield body, {}, 1
    elif len(body.invars) == len(operands):  # Otherwise it is not a call, such as scatter's update.
      known = {v: i for v, i in zip(body.invars, operands, strict=True) if i is not None}
      yield body, known, eqn.params['length'] if name == 'scan' else 1


def _check_free(inside: Iterable[Operation], scope: tuple[str, ...]) -> None:
  """Raises InputError if the operations inside a loop of unknown length have a cost."""
  if any(op.flops or op.other_ops for op in inside):
    raise InputError(f'{"/".join(scope) or "the function"} has a loop whose length is known at run '
                     'time only, so its FLOPs cannot be counted; use lax.scan or fori_loop with '
                     'constant bounds')


def _cost(eqn: core.JaxprEqn) -> _Cost:
  """Returns the cost of one run of an equation, without the bodies of calls."""
  name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval if eqn.outvars else None
  if not any(jnp.issubdtype(getattr(v.aval, 'dtype', bool), jnp.inexact) for v in eqn.invars):
    return _Cost()  # Integer arithmetic, of indices.
  if name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval
    features = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
    return _product(out.size * (kernel.size // features))
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    return _product(out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted))
  if name in _POOLING:
    return _Cost(flops=out.size * math.prod(params['window_dimensions']))
  if name == 'reduce_sum':
    return _Cost(flops=eqn.invars[0].aval.size - out.size)
  # A maximum or minimum with a constant is part of an activation.
  if name in _OTHER or (name in ('max', 'min') and any(v.aval.size == 1 for v in eqn.invars)
                        and out.size > 1):
    return _Cost(other_ops=out.size)
  return _Cost(flops=out.size * _ARITHMETIC.get(name, 0))


def _product(multiply_adds: int) -> _Cost:
  return _Cost(multiply_adds, 2 * multiply_adds)
