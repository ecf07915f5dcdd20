"""Components by name or by dotted path, so that users extend the system from outside it."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ppn_jax.errors import InputError, did_you_mean


def resolve(kind: str, name: str, known: Mapping[str, str]) -> Callable[..., Any]:
  """Finds the component called `name`.

  Args:
    kind: what is being looked for, for the error message: 'backbone', 'source', ...
    name: a key of `known`, or a dotted path 'package.module:Attribute'.
    known: short names -> dotted paths. Nothing is imported before it is asked for.

  Raises:
    InputError: the name is not known, or the dotted path leads nowhere.
  """
  if not isinstance(name, str) or not name:
    raise InputError(f"{kind}: name {name!r} is not a name; legal: {', '.join(sorted(known))}")
  path = known.get(name, name)
  if ':' not in path:
    raise InputError(
        f'unknown {kind} {name!r}; {did_you_mean(name, known)} '
        "(or a dotted path 'package.module:Name')")
  module, _, attribute = path.partition(':')
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError, TypeError) as e:  # The last two: a bad path.
    raise InputError(f'{kind} {name!r} cannot be loaded: {e}') from e


def build(kind: str, block: Mapping[str, Any], known: Mapping[str, str], **given: Any) -> Any:
  """Calls the component that a config block names with the block's other entries.

  A block is `{'name': ..., **options}`; `given` adds arguments that the system supplies
  itself, which are not the user's to set.

  Raises:
    InputError: no such component, or an option that it does not take.
  """
  return select(kind, block, known, given=given)(**given)


def select(kind: str, block: Mapping[str, Any], known: Mapping[str, str], *,
           given: Iterable[str] = ()) -> Callable[..., Any]:
  """As `build`, but leaves the call to the caller, who passes the arguments `given`."""
  if not isinstance(block, Mapping):
    raise InputError(f"{kind} {block!r} is no block; write {{'name': ..., option: value}}")
  options = dict(block)
  name = options.pop('name', None)
  component = resolve(kind, name, known)
  return bind(f'{kind} {name!r}', component, options, given=('name', *given))


def bind(what: str, function: Callable[..., Any], options: Mapping[str, Any], *,
         given: Iterable[str] = ()) -> Callable[..., Any]:
  """`function` with a config block's options filled in; the caller passes the arguments `given`.

  Raises:
    InputError: an option that `function` does not take, with the nearest that it does, or one
      that it needs and is not given.
  """
  parameters = inspect.signature(function).parameters
  if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    # Flax modules also take `parent`.
    legal = set(parameters) - set(given) - {'parent'}
    for option in options:
      if option not in legal:
        raise InputError(f'{what} has no option {option!r}; {did_you_mean(option, legal)}')
  required = {n for n, p in parameters.items()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  for missing in sorted(required - set(given) - set(options)):
    raise InputError(f'{what} needs the option {missing!r}')
  return functools.partial(function, **options)
