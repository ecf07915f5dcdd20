"""Flags that commands share: configs, by `--config=FILE` and `--config.block.key=value`, and the
processes that work together."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ppn_jax.errors import InputError, did_you_mean

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from ppn_jax.run import Run

CONFIG_HELP = ('--config.KEY=VALUE changes an entry of the config, such as\n'
               '--config.train.steps=1000; nested keys are joined by dots. docs/configs.md has\n'
               'all keys, and how tuples and blocks are written.')


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
  """A locked, complete copy of `config` with '--config.key=value' entries applied.

  A component's options may be given whether or not the config spells them out. Another `name` of a
  component is applied before all else, and the options of the component before it are dropped.

  Raises:
    InputError: an unknown key, with the nearest one, or a value of another type.
  """
  from ppn_jax.config import complete, plain
  from ppn_jax.data.splits import check_data
  values = plain(complete(config))
  entries = [argument.removeprefix('--config.').partition('=')[::2] for argument in overrides]
  _check_rates([key for key, _ in entries])
  # Sorting is stable, so that of a key given twice the last value counts.
  for key, text in sorted(entries, key=lambda entry: not _names_component(entry[0])):
    _Override(key, text).apply(values)
  config = complete(values)
  check_data(config)
  return config


def named_components(overrides: Sequence[str]) -> list[str]:
  """Returns the components that '--config.BLOCK.name=...' entries name."""
  entries = [argument.removeprefix('--config.').partition('=') for argument in overrides]
  return [text for key, _, text in entries if _names_component(key)]


def _names_component(key: str) -> bool:
  from ppn_jax.config import COMPONENTS
  path, _, last = key.rpartition('.')
  return last == 'name' and (path in COMPONENTS or path.startswith('data.transforms.'))


def _check_rates(keys: Sequence[str]) -> None:
  if {'optim.warmup_factor', 'optim.warmup_learning_rate'} <= set(keys):
    raise InputError('--config.optim.warmup_learning_rate is --config.optim.warmup_factor times '
                     '--config.optim.learning_rate; give one of the two')


class _Override:
  """One entry of the command line, 'model.neck.depth' and the text of its value."""

  def __init__(self, key: str, text: str):
    self._key, self._text = key, text

  def apply(self, config: dict) -> None:
    """Changes the entry in a config of dicts and tuples."""
    *blocks, last = self._key.split('.')
    self._set(config, '', blocks, last)

  def _set(self, block: Any, path: str, blocks: Sequence[str], last: str) -> Any:
    """Returns `block`, which stands at `path`, with the entry `last` of its `blocks` changed."""
    key, *rest = (*blocks, last)
    inner = f'{path}.{key}' if path else key
    if isinstance(block, tuple):
      return self._set_in_tuple(block, path, key, rest)
    if not isinstance(block, dict):
      raise InputError(f'unknown config key config.{inner}; config.{path} is no block')
    kind = self._kind(block, path, key)
    if rest:
      block[key] = self._set(block.get(key), inner, rest[:-1], rest[-1])
    elif inner == f'{path}.name' and _names_component(inner):
      self._rename(block, path)
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

  def _rename(self, block: dict, path: str) -> None:
    """Makes a block that of another component; that before it took other options."""
    from ppn_jax.data.source import split_train_block
    if block.get('name') != self._text:
      kept = split_train_block(block)[1] if path == 'data.train' else {}
      block.clear()
      block.update(name=self._text, **kept)

  def _kind(self, block: dict, path: str, key: str) -> Any:
    """The type of an entry.

    Raises:
      InputError: the block has no such entry, and its component or function does not take it.
    """
    from ppn_jax import registry
    from ppn_jax.config import FUNCTIONS, GIVEN, component_table
    table = component_table(path)
    if table is not None:
      if not block.get('name') and key != 'name':
        known = ', '.join(sorted(registry.load(path, table)))
        raise InputError(f'config.{path} names no component that could take {key!r}; give '
                         f'--config.{path}.name=NAME too, one of {known}')
      if key == 'name' or (path == 'data.train' and key in _train_options()):
        return type(block.get(key, ''))
      component = registry.resolve(path, block['name'], registry.load(path, table))
      options = registry.options_of(component, given=GIVEN)
      if key not in options.types and not options.open and key not in block:
        raise InputError(f'unknown config key config.{path}.{key}; '
                         f'{did_you_mean(key, {*options.types, *block})}')
      return options.types.get(key, Any if block.get(key) is None else type(block[key]))
    if f'{path}.{key}' == 'optim.warmup_learning_rate':
      return float
    if key not in block:
      raise InputError(f'unknown config key config.{f"{path}." if path else ""}{key}; '
                       f'{did_you_mean(key, block)}')
    if isinstance(block[key], (tuple, type(None))) and path in FUNCTIONS:
      # The default does not say what may stand in its place.
      function = registry.load(path, FUNCTIONS[path])
      return registry.options_of(function).types.get(key, type(block[key]))
    return type(block[key])

  def _parse(self, kind: Any, path: str) -> Any:
    from ppn_jax.cli import values
    flag = f'--config.{path}={self._text}'
    try:
      if kind is not dict:
        value = values.parse(self._text, kind)
        if path == 'data.transforms':
          value = _transform_blocks(value)
        return value
      block = values.literal(self._text)
    except ValueError as e:
      if kind is not dict:
        raise InputError(f'{flag}: it {e}') from e
      block = None
    if not isinstance(block, dict):
      raise InputError(f'{flag}: it is a block; give one of its entries, '
                       f'--config.{path}.KEY=VALUE, or all of it, "dict(key=value, ...)"')
    return block


def _transform_blocks(value: Any) -> tuple:
  """Names alone stand for components with the defaults of their options."""
  blocks = (value,) if isinstance(value, dict) else value
  return tuple({'name': block} if isinstance(block, str) else block for block in blocks)


def _train_options() -> dict:
  from ppn_jax.data.source import split_train_block
  return split_train_block({})[1]


def add_allow_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of commands that open a workdir; for `open_workdir`."""
  parser.add_argument('--allow', action='append', default=[], metavar='MODULE',
                      help='a package or module of your own that the run may import, for '
                           'components of it that config.json names by a dotted path; may be '
                           'given several times')


def open_workdir(args: argparse.Namespace) -> 'Run':
  """Opens the run of --workdir, with the entries of the command line applied to its config.

  Its components from outside the package may be used if --allow or an entry names them.

  Raises:
    InputError: see `run.open_run` and `override`.
  """
  import dataclasses

  from ppn_jax.run import open_run
  run = open_run(args.workdir, allow=allowed(args))
  if run.unknown_keys:
    print(f'ppn: {run.workdir}/config.json has keys that this version does not know and leaves '
          f'aside: {", ".join(run.unknown_keys)}', file=sys.stderr)
  config = override(run.config, args.overrides)
  _check_kept_back(run, config)
  return dataclasses.replace(run, config=config)


def _check_kept_back(run: 'Run', config: 'ConfigDict') -> None:
  """Raises InputError if images that a run was trained on would be taken for those kept back."""
  here, there = ({'data.eval_fraction': c.data.eval_fraction, 'seed': c.seed}
                 for c in (config, run.config))
  if config.data.eval_fraction and here != there:
    key = next(key for key in here if here[key] != there[key])
    raise InputError(f'--config.{key}={here[key]}: which images are kept back for evaluation was '
                     f'decided when training began ({key}={there[key]}); leave it out, or give '
                     'data to evaluate on, such as --config.data.eval.images=...')


def allowed(args: argparse.Namespace) -> tuple[str, ...]:
  """Returns what the run of --workdir may import: all that the command line names."""
  return (*args.allow, *named_components(args.overrides))


def add_process_flags(parser: argparse.ArgumentParser) -> None:
  """Flags of a command that can run as several processes; for `join_processes`."""
  group = parser.add_argument_group(
      'several hosts', 'The same command on each, with a workdir that all of them see.')
  group.add_argument('--distributed', choices=('auto',), default='',
                     help='on every host of a TPU slice, GKE or Slurm: ask it for the next three')
  group.add_argument('--coordinator', metavar='HOST:PORT',
                     help='process 0 and a free port of its host')
  group.add_argument('--num_processes', type=int, metavar='N', help='how many there are')
  group.add_argument('--process_id', type=int, metavar='I', help='which one this is, from 0')
  group.add_argument('--local_devices', type=int, default=0, metavar='N',
                     help='rehearse on N virtual CPU devices in this process')
  group.add_argument('--join_timeout', type=int, default=300, metavar='SECONDS',
                     help='how long to wait for the other processes (default: %(default)s)')


def join_processes(args: argparse.Namespace, *, hear_sigterm: bool = True) -> None:
  """Joins the processes that the flags name; call it before anything touches a JAX backend.

  Args:
    hear_sigterm: see `sharding.join_processes`.
  """
  from ppn_jax.distributed import failures, sharding
  sharding.join_processes(
      distributed=args.distributed, coordinator=args.coordinator,
      num_processes=args.num_processes, process_id=args.process_id,
      local_devices=args.local_devices, timeout=args.join_timeout,
      hear_sigterm=hear_sigterm)
  if args.distributed or args.coordinator:
    failures.watch_peers()


def keep_programs() -> None:
  """Keeps compiled programs between starts; of several processes the first says what fails.

  Call it after `join_processes`.
  """
  import jax

  from ppn_jax.distributed.compile_cache import keep_compiled_programs

  def say(line: str) -> None:
    if jax.process_index() == 0:
      print(f'ppn: {line}', file=sys.stderr, flush=True)

  keep_compiled_programs(say)
