"""Parses the text of a flag as a value of the type that a config key has."""

import ast
import collections.abc
import os
import types
import typing
from typing import Any

_TRUE, _FALSE = ('true', 't', '1'), ('false', 'f', '0')
_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)


def parse(text: str, kind: Any) -> Any:
  """Returns a text as a value of a type.

  Several values are written 'a,b', or as a literal: "('a', 'b')". Blocks of a config are literals,
  "dict(name='conv_pyramid', depths=(64,))". For a key that takes one path or several, a text with a
  comma is one path if that path exists.

  Args:
    text: The text after the '=' of a flag.
    kind: The type of the value, an annotation such as `int`, `str | None` or `tuple[float, ...]`.
      `Any` evaluates a literal and keeps any other text as it is.

  Raises:
    ValueError: If the text has another type; the message is "must be a whole number" or the like.
  """
  alternatives = _alternatives(kind)
  for alternative in sorted(alternatives, key=_rank):
    try:
      return _parse_one(text, alternative, alone=len(alternatives) == 1)
    except ValueError:
      continue
  raise ValueError(f'must be {describe(kind)}')


def literal(text: str) -> Any:
  """Returns the value of a Python literal; lists become tuples, and dict(key=...) is allowed.

  Raises:
    ValueError: If the text is not a literal.
  """
  try:
    return _evaluate(ast.parse(text.strip(), mode='eval').body)
  except (SyntaxError, RecursionError, MemoryError) as e:
    raise ValueError('must be a literal') from e


def describe(kind: Any) -> str:
  """Returns a type in words, such as 'a whole number or None'."""
  words = [_describe_one(a) for a in sorted(_alternatives(kind), key=_rank, reverse=True)]
  return ' or '.join(dict.fromkeys(words))


def _alternatives(kind: Any) -> tuple[Any, ...]:
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return tuple(a for part in typing.get_args(kind) for a in _alternatives(part))
  if typing.get_origin(kind) is typing.Annotated:
    return _alternatives(typing.get_args(kind)[0])
  return (type(None) if kind is None else kind,)


def _rank(kind: Any) -> int:
  """Returns the position of a type in the order of trying: types of fewer texts come first."""
  origin = typing.get_origin(kind) or kind
  order = (type(None), typing.Literal, bool, int, float, *_MAPPINGS, *_SEQUENCES)
  return order.index(origin) if origin in order else len(order) + (origin is str)


def _parse_one(text: str, kind: Any, *, alone: bool) -> Any:
  origin = typing.get_origin(kind) or kind
  if origin is type(None):
    return _known(text, {'None': None, 'none': None})
  if origin is typing.Literal:
    return _known(text, {str(value): value for value in typing.get_args(kind)})
  if origin is bool:
    return _known(text.lower(), {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)})
  if origin in (int, float):
    return origin(text)
  if origin in _SEQUENCES:
    return _parse_sequence(text, kind, alone)
  if origin in _MAPPINGS:
    return _of_type(literal(text), kind)
  if origin is str or _is_path(origin):
    return text
  try:
    return literal(text)
  except ValueError:
    return text


def _known(text: str, values: dict[str, Any]) -> Any:
  if text not in values:
    raise ValueError(text)
  return values[text]


def _parse_sequence(text: str, kind: Any, alone: bool) -> tuple:
  """Returns a tuple; if not `alone`, a text without a comma is left to another type."""
  if text.lstrip()[:1] in ('(', '['):
    value = literal(text)
    if not isinstance(value, tuple):
      value = (value,)  # ('a') is no tuple in Python, but is meant as one.
    return _of_type(value, kind)
  if not alone and (',' not in text or os.path.exists(os.path.expanduser(text))):
    raise ValueError(text)
  parts = [part.strip() for part in text.split(',')]
  parts = parts[:-1] if parts[-1] == '' else parts  # 'a,' is one value, '' none.
  return tuple(parse(part, k) for part, k in zip(parts, _kinds(kind, len(parts)), strict=True))


def _of_type(value: Any, kind: Any) -> Any:
  """Returns the value of a literal as a value of a type.

  Raises:
    ValueError: If it has another type.
  """
  for alternative in sorted(_alternatives(kind), key=_rank):
    origin, arguments = typing.get_origin(alternative) or alternative, typing.get_args(alternative)
    if origin in _SEQUENCES and isinstance(value, tuple):
      return tuple(_of_type(v, k) for v, k in zip(value, _kinds(alternative, len(value)),
                                                   strict=True))
    if origin in _MAPPINGS and isinstance(value, dict):
      key_kind, value_kind = arguments or (Any, Any)
      return {_of_type(k, key_kind): _of_type(v, value_kind) for k, v in value.items()}
    if origin is typing.Literal and value in arguments:
      return value
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
    if origin in (bool, int, str, type(None)) and type(value) is origin:
      return value
    if origin not in (*_SEQUENCES, *_MAPPINGS, bool, int, float, str, type(None), typing.Literal):
      return value
  raise ValueError(f'{value!r} must be {describe(kind)}')


def _kinds(kind: Any, count: int) -> tuple[Any, ...]:
  """Returns the types of the `count` elements of a sequence."""
  arguments = typing.get_args(kind)
  if not arguments:
    return (Any,) * count
  if (typing.get_origin(kind) or kind) is not tuple or arguments[-1] is Ellipsis:
    return (arguments[0],) * count
  if len(arguments) != count:
    raise ValueError(f'{count} values')
  return arguments


def _evaluate(node: ast.expr) -> Any:
  match node:
    case ast.Constant(value=None | bool() | int() | float() | str() as value):
      return value
    case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
      return -value
    case ast.Tuple() | ast.List():
      return tuple(map(_evaluate, node.elts))
    case ast.Dict() if None not in node.keys:
      return {_hashable(_evaluate(k)): _evaluate(v)
              for k, v in zip(node.keys, node.values, strict=True)}
    case ast.Call(func=ast.Name(id='dict'), args=[]) if all(k.arg for k in node.keywords):
      return {k.arg: _evaluate(k.value) for k in node.keywords}
  raise ValueError('must be a literal')


def _hashable(key: Any) -> Any:
  if isinstance(key, (str, int)):
    return key
  raise ValueError('keys are names or numbers')


def _is_path(kind: Any) -> bool:
  return isinstance(kind, type) and issubclass(kind, os.PathLike)


def _describe_one(kind: Any) -> str:
  origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
  names = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text',
           type(None): 'None'}
  if origin in names:
    return names[origin]
  if origin is typing.Literal:
    return 'one of ' + ', '.join(map(repr, arguments))
  if origin in _SEQUENCES:
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
      return f'{len(arguments)} values (' + ', '.join(map(describe, arguments)) + ')'
    each = f', each {describe(arguments[0])}' if arguments and arguments[0] is not Any else ''
    return f"values joined by commas, or a literal such as (1, 2){each}"
  if origin in _MAPPINGS:
    return "a literal such as {0: 'cat', 1: 'dog'}"
  return 'a path' if _is_path(origin) else 'a literal'
