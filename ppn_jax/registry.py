"""Components by name or by dotted path, so that users can add their own from outside."""

import functools
import importlib
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.errors import InputError, did_you_mean

# Types of options -> what their values must be, in Python and in words.
_SIMPLE_TYPES: dict[Any, tuple[Any, str]] = {
    float: (numbers.Real, 'a number'), int: (numbers.Real, 'a number'),
    bool: ((bool, np.bool_), 'True, False'), str: (str, 'text')}


class BlockedName(str):
  """Dotted path from an untrusted file, which `resolve` refuses to import.

  In all other respects it equals the plain name. Made by `block_imports`.

  Attributes:
    origin: the file, for the error message.
  """
  origin: str = ''


def block_imports(config: Any, allow: Sequence[str], origin: str) -> Any:
  """Returns a config whose components can only be imported if the user allows it.

  Workdirs are data that people exchange, and importing a module runs its code. Dotted paths under
  any key `name` become `BlockedName`; names of components of this package stay as they are.

  Args:
    config: dicts, tuples and values, as in a config.json.
    allow: what may be imported: a package or module with everything below it, 'my_pkg' or
      'my_pkg.nets', or one component, 'my_pkg.nets:MyNet'.
    origin: the config's file, for the error message.
  """
  if isinstance(config, Mapping):
    return {key: _block_name(value, allow, origin) if key == 'name'
            else block_imports(value, allow, origin)
            for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return tuple(block_imports(value, allow, origin) for value in config)
  return config


def _block_name(name: Any, allow: Sequence[str], origin: str) -> Any:
  """Returns the value of a key `name`, blocked if it is a dotted path that is not allowed."""
  if not isinstance(name, str):
    return block_imports(name, allow, origin)
  if ':' not in name or any(_is_within(name, allowed) for allowed in allow):
    return str(name)
  blocked = BlockedName(name)
  blocked.origin = origin
  return blocked


def _is_within(name: str, allowed: str) -> bool:
  """Returns whether a dotted path is an allowed component or in an allowed package or module."""
  module = name.partition(':')[0]
  return bool(allowed) and (name == allowed or f'{module}.'.startswith(f'{allowed}.'))


def resolve(kind: str, name: str, known: Mapping[str, str]) -> Callable[..., Any]:
  """Finds the component called `name`.

  Args:
    kind: kind of component, such as 'backbone' or 'source', for the error message.
    name: a key of `known`, or a dotted path 'package.module:Attribute'.
    known: maps short names to dotted paths; only the chosen one is imported.

  Raises:
    InputError: If the name is unknown, the dotted path cannot be imported, or it is a
      `BlockedName`.
  """
  if not isinstance(name, str) or not name:
    raise InputError(f"{kind}: name {name!r} is not a name; legal: {', '.join(sorted(known))}")
  path = known.get(name, name)
  if ':' not in path:
    raise InputError(
        f'unknown {kind} {name!r}; {did_you_mean(name, known)} '
        "(or a dotted path 'package.module:Name')")
  if isinstance(path, BlockedName):
    module = path.partition(':')[0]
    raise InputError(
        f'{kind} {str(name)!r} in {path.origin} is code from outside ppn_jax, which runs only '
        f'if you allow it: --allow={module}, in Python allow=({module!r},)')
  return load(f'{kind} {name!r}', path)


def load(what: str, path: str) -> Any:
  """Imports the object at a dotted path 'package.module:Attribute'.

  Raises:
    InputError: If it cannot be imported; the message begins with `what`.
  """
  module, _, attribute = path.partition(':')
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError, TypeError) as e:  # The last two: a bad path.
    raise InputError(f'{what} cannot be loaded: {e}') from e


def build(kind: str, block: Mapping[str, Any], known: Mapping[str, str], **given: Any) -> Any:
  """Calls the component that a config block names with the block's other entries.

  A block is `{'name': ..., **options}`; `given` adds arguments that the system supplies and the
  user cannot set.

  Raises:
    InputError: If there is no such component, or it does not have an option.
  """
  return select(kind, block, known, given=given)(**given)


def select(kind: str, block: Mapping[str, Any], known: Mapping[str, str], *,
           given: Iterable[str] = ()) -> Callable[..., Any]:
  """Returns the component of a config block with its options bound, to be called with `given`.

  Raises:
    InputError: If there is no such component, or it does not have an option.
  """
  if not isinstance(block, Mapping):
    raise InputError(f"{kind} {block!r} is not a block; write {{'name': ..., option: value}}")
  options = dict(block)
  name = options.pop('name', None)
  component = resolve(kind, name, known)
  return bind(f'{kind} {name!r}', component, options, given=('name', *given))


def bind(what: str, function: Callable[..., Any], options: Mapping[str, Any], *,
         given: Iterable[str] = ()) -> Callable[..., Any]:
  """Binds a config block's options to `function`; the caller passes the arguments `given`.

  Raises:
    InputError: If `function` does not have an option, with the nearest that it has, needs one that
      is missing, or an option has a value of another type.
  """
  check_options(what, function, options, given=given)
  check_values(what, function, options)
  parameters = inspect.signature(function).parameters
  required = {n for n, p in parameters.items()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  for missing in sorted(required - set(given) - set(options)):
    raise InputError(f'{what} needs the option {missing!r}')
  return functools.partial(function, **options)


def check_options(what: str, function: Callable[..., Any], options: Iterable[str], *,
                  given: Iterable[str] = ()) -> None:
  """Checks that `function` has all the options.

  Args:
    what: description of `function`, for the message.
    function: function or class.
    options: names of options.
    given: arguments that the user cannot set.

  Raises:
    InputError: If an option does not exist, with the nearest that does.
  """
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return
  legal = set(parameters) - set(given) - {'parent'}  # Flax modules also take `parent`.
  for option in options:
    if option not in legal:
      raise InputError(f'{what} has no option {option!r}; {did_you_mean(str(option), legal)}')


def check_values(what: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
  """Checks that options which are a number, truth value or text by their type have such a value.

  Raises:
    InputError: If one has not, or is not a finite number.
  """
  types = options_of(function).types
  for option, value in options.items():
    legal, words = _SIMPLE_TYPES.get(types.get(option), (object, ''))
    is_bool = isinstance(value, (bool, np.bool_))
    if not isinstance(value, legal) or (is_bool and legal is numbers.Real):
      raise InputError(f'{what}: {option} is {value!r}, legal: {words}')
    if isinstance(value, numbers.Real) and not math.isfinite(value):
      raise InputError(f'{what}: {option} is {value!r}, legal: a finite number')


class ComponentOptions(typing.NamedTuple):
  """Options of a component in its config block."""
  types: dict[str, Any]  # Option -> annotation, or the type of its default; Any if unknown.
  defaults: dict[str, Any]  # Option -> default, of those that have one.
  open: bool  # Whether it accepts any other option too.


def options_of(function: Callable[..., Any], *, given: Iterable[str] = ()) -> ComponentOptions:
  """Returns the options of a component, without those that the system supplies (`given`)."""
  parameters = inspect.signature(function).parameters
  hints = _hints(function)
  types, defaults = {}, {}
  for name, parameter in parameters.items():
    if name in (*given, 'parent') or parameter.kind in (
        parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    if parameter.default is not parameter.empty:
      defaults[name] = parameter.default
    annotation = hints.get(name, parameter.annotation)
    if annotation is parameter.empty or isinstance(annotation, str):
      default = defaults.get(name)
      annotation = Any if default is None else type(default)
    types[name] = annotation
  return ComponentOptions(types, defaults,
                          any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
  """Returns annotations, with those that are written as strings resolved where possible."""
  try:
    return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
  except Exception:  # Names that exist for type checkers only, or anything in user code.
    return {}
