"""Loads config files and overrides their entries.

  config = load_config('quickstart', ['train.steps=100', 'train.batch_size=8'])
  config = load_config('experiments/mine.py')

The configs of the repository's `configs/` folder come with the package and go by their names.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from typing import Any

from ml_collections import ConfigDict

from ppn_jax import config_values, registry
from ppn_jax.config import (
  COMPONENTS,
  FUNCTIONS,
  GIVEN,
  MAPPINGS,
  RENAMED,
  SIZES,
  complete,
  component_table,
  plain,
)
from ppn_jax.data.splits import check_data
from ppn_jax.errors import InputError, did_you_mean

_PACKAGE = pathlib.Path(__file__).resolve().parent
_MODULE_NAME = 'ppn_config_file'  # What a config file's module is called while it is loaded.


def load_config(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigDict:
  """Returns the locked config that a file's `get_config()` returns, with entries overridden.

  The file may import its neighbours, as a script may.

  Args:
    name: A path, or the name of a config that comes with the package, such as 'quickstart'.
      'NAME:ARGUMENT' passes an argument to `get_config`.
    overrides: 'block.key=value' each; a leading '--config.' is ignored.

  Raises:
    InputError: If there is no such file, if it fails, or if an entry has an unknown key or a value
      of another type.
  """
  name = os.fspath(name)
  file, colon, argument = name.partition(':')
  path = _find(file)
  _make_bundled_importable()
  try:
    with _importable(path.parent):
      config = _get_config(path, *([argument] if colon else []))
  except InputError as e:
    raise InputError(f'--config={name}: {e}') from e
  except Exception as e:  # Whatever the user's Python file raised.
    raise InputError(f'--config={name}: {path} cannot be loaded: {e}') from e
  if not isinstance(config, ConfigDict):
    raise InputError(f'--config={name}: {path} has no get_config() that returns a ConfigDict')
  return override(config, overrides)


def config_names() -> list[str]:
  """Returns the names of the configs that come with the package, in alphabetical order."""
  return sorted(path.stem for path in _bundled_folder().glob('[!_]*.py'))


def _find(file: str) -> pathlib.Path:
  """Returns the absolute path of a config that is given by a path or by a name."""
  if os.path.isfile(file):
    return pathlib.Path(os.path.abspath(file))
  names, stem = config_names(), pathlib.PurePath(file).stem
  if file in names:
    return _bundled_folder() / f'{file}.py'
  if file.endswith('.py') or os.path.basename(file) != file:
    hint = f'; --config={stem} is one that comes with the package' if stem in names else ''
    raise InputError(f'--config: no file {file!r}{hint}')
  raise InputError(f'--config: no config is named {file!r}; {did_you_mean(file, names)} '
                   '(the path of a file of your own ends in .py)')


def _bundled_folder() -> pathlib.Path:
  """Returns the folder of the package's configs: inside it in a wheel, beside it in a clone."""
  inside = _PACKAGE / 'configs'
  return inside if (inside / '__init__.py').is_file() else _PACKAGE.parent / 'configs'


def _make_bundled_importable() -> None:
  """Makes `ppn_jax.configs` importable in a clone, where that package is not inside `ppn_jax`.

  An editable install does so by itself; this is for a clone on PYTHONPATH.
  """
  init = _bundled_folder() / '__init__.py'
  name = 'ppn_jax.configs'
  if name not in sys.modules and init.is_file():
    spec = importlib.util.spec_from_file_location(
        name, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    sys.modules['ppn_jax'].configs = sys.modules[name]  # As an import would.  # pyright: ignore


def _get_config(path: pathlib.Path, *arguments: str) -> Any:
  """Returns what `get_config(*arguments)` of a file returns; None if it has no such function."""
  loader = SourceFileLoader(_MODULE_NAME, str(path))
  spec = importlib.util.spec_from_file_location(_MODULE_NAME, path, loader=loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  outer = sys.modules.get(_MODULE_NAME)  # A config file may load another one.
  sys.modules[_MODULE_NAME] = module  # Dataclasses of the file look for their module there.
  try:
    loader.exec_module(module)
    get_config = getattr(module, 'get_config', None)
    return get_config(*arguments) if callable(get_config) else None
  finally:
    del sys.modules[_MODULE_NAME]
    if outer is not None:
      sys.modules[_MODULE_NAME] = outer


@contextlib.contextmanager
def _importable(folder: pathlib.Path) -> Iterator[None]:
  """Makes the modules of `folder` importable, and removes them from `sys.modules` afterwards.

  Configs of another folder may have the same names.
  """
  before = set(sys.modules)
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
      if os.path.dirname(getattr(sys.modules[name], '__file__', None) or '') == str(folder):
        del sys.modules[name]


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """Returns a locked, complete copy of `config` with entries overridden.

  A component's options may be given whether or not the config lists them. Another `name` of a
  component is applied first, and the options of the previous component are dropped.

  Args:
    config: A config, complete or not.
    overrides: 'block.key=value' each; a leading '--config.' is ignored. If a key is given twice,
      the last value counts.

  Raises:
    InputError: If a key is unknown, with the nearest one, or a value has another type.
  """
  values = plain(complete(config))
  entries = _entries(overrides)
  _check_rates([key for key, _ in entries])
  # Sorting is stable, so that of a key given twice the last value counts.
  for key, text in sorted(entries, key=lambda entry: not _names_component(entry[0])):
    _Override(key, text).apply(values)
  config = complete(values)
  check_data(config)
  return config


def named_components(overrides: Sequence[str]) -> list[str]:
  """Returns the components that entries 'BLOCK.name=COMPONENT' name."""
  return [text for key, text in _entries(overrides) if _names_component(key)]


def _entries(overrides: Sequence[str]) -> list[tuple[str, str]]:
  parts = [argument.removeprefix('--config.').partition('=') for argument in overrides]
  return [(RENAMED.get(key, key), text) for key, _, text in parts]


def _names_component(key: str) -> bool:
  path, _, last = key.rpartition('.')
  return last == 'name' and (path in COMPONENTS or path.startswith('data.transforms.'))


def _check_rates(keys: Sequence[str]) -> None:
  if {'optim.warmup_factor', 'optim.warmup_learning_rate'} <= set(keys):
    raise InputError('--config.optim.warmup_learning_rate is --config.optim.warmup_factor times '
                     '--config.optim.learning_rate; give one of the two')


class _Override:
  """One entry of the command line: a key such as 'model.neck.depth' and its value as text."""

  def __init__(self, key: str, text: str):
    self._key, self._text = key, text

  def apply(self, config: dict) -> None:
    """Changes the entry in a config of dicts and tuples, in place."""
    *blocks, last = self._key.split('.')
    self._set(config, '', blocks, last)

  def _set(self, block: Any, path: str, blocks: Sequence[str], last: str) -> Any:
    """Returns the block at `path` with the entry `last` of its inner `blocks` changed."""
    key, *rest = (*blocks, last)
    inner = f'{path}.{key}' if path else key
    if isinstance(block, tuple):
      return self._set_in_tuple(block, path, key, rest)
    if not isinstance(block, dict):
      raise InputError(f'unknown config key config.{inner}; config.{path} is not a block')
    kind = self._kind(block, path, key)
    if rest:
      block[key] = self._set(block.get(key), inner, rest[:-1], rest[-1])
    elif inner == f'{path}.name' and _names_component(inner):
      self._rename(block)
    else:
      block[key] = self._parse(kind, inner)
    return block

  def _set_in_tuple(self, blocks: tuple, path: str, key: str, rest: Sequence[str]) -> tuple:
    if not key.isdecimal() or int(key) >= len(blocks):
      raise InputError(f'unknown config key config.{path}.{key}; config.{path} has '
                       f'{len(blocks)} entries, numbered from 0')
    at = int(key)
    changed = (self._set(blocks[at], f'{path}.{key}', rest[:-1], rest[-1]) if rest
               else self._parse(dict, f'{path}.{key}'))
    return (*blocks[:at], changed, *blocks[at + 1:])

  def _rename(self, block: dict) -> None:
    """Replaces the component of a block, and drops the options of the previous one."""
    if block.get('name') != self._text:
      block.clear()
      block['name'] = self._text

  def _kind(self, block: dict, path: str, key: str) -> Any:
    """Returns the type of an entry.

    Raises:
      InputError: If the block has no such entry and its component or function does not take it.
    """
    table = component_table(path)
    if table is not None:
      if not block.get('name') and key != 'name':
        known = ', '.join(sorted(registry.load(path, table)))
        raise InputError(f'config.{path} names no component that could take {key!r}; give '
                         f'--config.{path}.name=NAME too, one of {known}')
      if key == 'name':
        return type(block.get(key, ''))
      component = registry.resolve(path, block['name'], registry.load(path, table))
      options = registry.options_of(component, given=GIVEN)
      if key not in options.types and not options.open and key not in block:
        raise InputError(f'unknown config key config.{path}.{key}; '
                         f'{did_you_mean(key, {*options.types, *block})}')
      return options.types.get(key, Any if block.get(key) is None else type(block[key]))
    if f'{path}.{key}' == 'optim.warmup_learning_rate':
      return float
    if path in MAPPINGS:
      return type(MAPPINGS[path])
    if key not in block:
      raise InputError(f'unknown config key config.{f"{path}." if path else ""}{key}; '
                       f'{did_you_mean(key, block)}')
    if path in FUNCTIONS and (isinstance(block[key], (tuple, type(None)))
                              or f'{path}.{key}' in SIZES):
      # The default does not tell which other values are legal.
      function = registry.load(path, FUNCTIONS[path])
      return registry.options_of(function).types.get(key, type(block[key]))
    return type(block[key])

  def _parse(self, kind: Any, path: str) -> Any:
    flag = f'--config.{path}={self._text}'
    try:
      if kind is not dict:
        value = config_values.parse(self._text, kind)
        return _transform_blocks(value) if path == 'data.transforms' else value
      block = config_values.literal(self._text)
    except ValueError as e:
      if kind is not dict:
        raise InputError(f'{flag}: it {e}') from e
      block = None
    if not isinstance(block, dict):
      raise InputError(f'{flag}: it is a block; give one of its entries, '
                       f'--config.{path}.KEY=VALUE, or all of it, "dict(key=value, ...)"')
    return block


def _transform_blocks(value: Any) -> tuple:
  """Returns blocks of transforms; a name alone stands for one with the defaults of its options."""
  blocks = (value,) if isinstance(value, dict) else value
  return tuple({'name': block} if isinstance(block, str) else block for block in blocks)
