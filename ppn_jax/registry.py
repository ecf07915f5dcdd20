"""Components by name or by dotted path, so that users extend the system from outside it."""

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ppn_jax.errors import InputError, did_you_mean


class Barred(str):
  """A dotted path from a file of somebody else's making, which `resolve` refuses to import.

  Equal to the plain name in everything else. Made by `bar`.

  Attributes:
    origin: the file, for the error message.
  """
  origin: str = ''


def bar(config: Any, allow: Sequence[str], origin: str) -> Any:
  """Returns a config in which no component can be imported but those that its reader allows.

  A workdir is data that people send each other, and importing a module runs it. Dotted paths under
  any key `name` become `Barred`; names of components of this package stay as they are.

  Args:
    config: dicts, tuples and values, as of a config.json.
    allow: what may be imported: a package or module with all below it, 'my_pkg' or 'my_pkg.nets',
      or one component, 'my_pkg.nets:MyNet'.
    origin: where the config stands, for the error message.
  """
  if isinstance(config, Mapping):
    return {key: _bar_name(value, allow, origin) if key == 'name' else bar(value, allow, origin)
            for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return tuple(bar(value, allow, origin) for value in config)
  return config


def _bar_name(name: Any, allow: Sequence[str], origin: str) -> Any:
  if not isinstance(name, str):
    return bar(name, allow, origin)
  if ':' not in name or any(_is_within(name, allowed) for allowed in allow):
    return str(name)
  barred = Barred(name)
  barred.origin = origin
  return barred


def _is_within(name: str, allowed: str) -> bool:
  module = name.partition(':')[0]
  return bool(allowed) and (name == allowed or f'{module}.'.startswith(f'{allowed}.'))


def resolve(kind: str, name: str, known: Mapping[str, str]) -> Callable[..., Any]:
  """Finds the component called `name`.

  Args:
    kind: what is being looked for, for the error message: 'backbone', 'source', ...
    name: a key of `known`, or a dotted path 'package.module:Attribute'.
    known: short names -> dotted paths. Nothing is imported before it is asked for.

  Raises:
    InputError: the name is not known, the dotted path leads nowhere, or it is `Barred`.
  """
  if not isinstance(name, str) or not name:
    raise InputError(f"{kind}: name {name!r} is not a name; legal: {', '.join(sorted(known))}")
  path = known.get(name, name)
  if ':' not in path:
    raise InputError(
        f'unknown {kind} {name!r}; {did_you_mean(name, known)} '
        "(or a dotted path 'package.module:Name')")
  if isinstance(path, Barred):
    module = path.partition(':')[0]
    raise InputError(
        f'{kind} {str(name)!r} in {path.origin} is code from outside ppn_jax, which is only run '
        f'if you allow it: --allow={module}, in Python allow=({module!r},)')
  return load(f'{kind} {name!r}', path)


def load(what: str, path: str) -> Any:
  """Imports what a dotted path 'package.module:Attribute' leads to.

  Raises:
    InputError: it leads nowhere; the message begins with `what`.
  """
  module, _, attribute = path.partition(':')
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError, TypeError) as e:  # The last two: a bad path.
    raise InputError(f'{what} cannot be loaded: {e}') from e


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
  check_options(what, function, options, given=given)
  parameters = inspect.signature(function).parameters
  required = {n for n, p in parameters.items()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  for missing in sorted(required - set(given) - set(options)):
    raise InputError(f'{what} needs the option {missing!r}')
  return functools.partial(function, **options)


def check_options(what: str, function: Callable[..., Any], options: Iterable[str], *,
                  given: Iterable[str] = ()) -> None:
  """Raises InputError if `function` does not take one of `options`, with the nearest that it does.

  Args:
    what: `function`, for the message.
    given: arguments that are not the user's to set.
  """
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return
  legal = set(parameters) - set(given) - {'parent'}  # Flax modules also take `parent`.
  for option in options:
    if option not in legal:
      raise InputError(f'{what} has no option {option!r}; {did_you_mean(str(option), legal)}')


class Options(typing.NamedTuple):
  """What a component takes from its config block."""
  types: dict[str, Any]  # Option -> annotation, or the type of its default; Any if neither says.
  defaults: dict[str, Any]  # Option -> default, of those that have one.
  open: bool  # Whether it takes any other option too.


def options_of(function: Callable[..., Any], *, given: Iterable[str] = ()) -> Options:
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
  return Options(types, defaults,
                 any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
  """Returns annotations with those that are written as text looked up, where that is possible."""
  try:
    return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
  except Exception:  # Names that exist for type checkers only; whatever user code does.
    return {}
