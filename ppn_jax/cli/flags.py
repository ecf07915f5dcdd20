"""Configs from the command line: `--config=FILE` and `--config.block.key=value`."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ppn_jax.errors import InputError, did_you_mean

if TYPE_CHECKING:
  from ml_collections import ConfigDict

CONFIG_HELP = ('--config.KEY=VALUE changes an entry of the config, such as\n'
               '--config.train.steps=1000; nested keys are joined by dots.')


def load_config(path: str, overrides: Sequence[str]) -> 'ConfigDict':
  """The locked config that a file's `get_config()` returns, with entries overridden.

  The file may import its neighbours, as a script may.

  Args:
    path: of a Python file; 'FILE:ARGUMENT' passes an argument to `get_config`.
    overrides: '--config.block.key=value' each, with the '='.

  Raises:
    InputError: no such file, a file that fails, an unknown key or a value of another type.
  """
  from absl import flags
  from ml_collections import ConfigDict, config_flags

  file = path.partition(':')[0]
  if not os.path.isfile(file):
    raise InputError(f'--config: no file {file!r}')
  # The library loads every config file into one module, where an earlier file's names linger.
  sys.modules.pop('config_config', None)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True,
                                  sys_argv=['ppn', f'--config={path}'])
  try:
    with _importable(os.path.dirname(os.path.abspath(file))):
      values(['ppn', f'--config={path}'])
      config = values.config
  except Exception as e:  # Whatever the user's Python file raised.
    raise InputError(f'--config: {file} cannot be loaded: {e}') from e
  if not isinstance(config, ConfigDict):
    raise InputError(f'--config: {file} has no get_config() that returns a ConfigDict')
  return override(config, overrides)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
  """Modules of `folder` can be imported, and are forgotten afterwards: another folder's configs
  may have the same names."""
  before = set(sys.modules)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
      if os.path.dirname(getattr(sys.modules[name], '__file__', None) or '') == folder:
        del sys.modules[name]


def override(config: 'ConfigDict', overrides: Sequence[str]) -> 'ConfigDict':
  """A locked copy of `config` with '--config.key=value' entries applied.

  Raises:
    InputError: an unknown key, with the nearest one, or a value of another type.
  """
  from absl import flags
  from ml_collections import config_flags

  for argument in overrides:
    _check_key(config, argument.removeprefix('--config.').partition('=')[0])
  argv = ['ppn', *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', config.copy_and_resolve_references(),
                                  flag_values=values, lock_config=True, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, TypeError, ValueError) as e:
    raise InputError(str(e).removeprefix('flag ')) from e
  return values.config


def _check_key(config: 'ConfigDict', key: str) -> None:
  block, walked = config, 'config'
  for name in key.split('.'):
    legal = list(block.keys()) if hasattr(block, 'keys') else []
    if name not in legal:
      raise InputError(f'unknown config key {walked}.{name}; {did_you_mean(name, legal)}')
    block, walked = block[name], f'{walked}.{name}'
