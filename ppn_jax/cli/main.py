"""The command `ppn`, its sub-commands and their exit codes.

  0    done
  1    failed, such as a loss that is not finite, or a bucket that cannot be reached
  2    a mistake in the input, reported in one line on stderr
  75   stopped by SIGTERM after saving; the same command resumes
  130  interrupted by Ctrl-C; training has saved its last step, a second Ctrl-C ends it at once

Processes that work together all exit with the code of the first one that fails.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from ppn_jax.cli.libraries import quiet_libraries
from ppn_jax.distributed import failures, interrupts
from ppn_jax.errors import InputError, did_you_mean, exit_status
from ppn_jax.storage import expand_home
from ppn_jax.telemetry.host_memory import expects_cpu, keep_freed_memory
from ppn_jax.telemetry.progress import LiveHandler

# Each is a module of ppn_jax.cli with `HELP`, `TAKES_CONFIG` (whether it takes --config.key=value),
# `add_arguments(parser)` and `run(args)`. They import the heavy libraries inside `run`, so that
# help and error messages appear at once.
COMMANDS = ('train', 'evaluate', 'detect', 'serve', 'data', 'summary', 'import-tf', 'prepare',
            'plan', 'export')

# Those that compute for long.
_COMPUTING = ('train', 'evaluate', 'detect', 'serve')

# Loggers of notes, such as on a truncated file, that any command may print between its lines.
_NOTES = ('ppn_jax.cli.', 'ppn_jax.data.', 'ppn_jax.distributed.compile_cache',
          'ppn_jax.visualization.')

DESCRIPTION = """\
Train, evaluate and use single-stage object detectors.

  ppn train --config=quickstart --workdir=runs/quickstart
  ppn evaluate --workdir=runs/quickstart
  ppn detect --workdir=runs/quickstart photo.jpg --output=found
"""


class _Parser(argparse.ArgumentParser):
  """Parser that raises mistakes as an InputError of one line, with the nearest legal flag."""

  def error(self, message: str):
    raise InputError(f'{self.prog}: {message}; see `{self.prog} --help`')

  def check_positions(self, arguments: Sequence[str]) -> None:
    """Raises InputError on an argument without a flag, if every argument of the command has one."""
    if any(not action.option_strings for action in self._actions):
      return
    value_of_flag = False
    for argument in arguments:
      if argument.startswith('-'):
        action = self._option_string_actions.get(argument)
        value_of_flag = (action.nargs is None if action
                         else argument.startswith('--config.') and '=' not in argument)
      elif value_of_flag:
        value_of_flag = False
      else:
        raise InputError(f'{self.prog}: unexpected argument {argument!r}'
                         f'{_meant(argument, self._option_string_actions, arguments)}')

  def check_flags(self, arguments: Sequence[str]) -> None:
    """Raises InputError on a flag that this parser does not have."""
    legal = list(self._option_string_actions)
    for argument in arguments:
      flag = argument.partition('=')[0]
      if flag.startswith('--') and flag not in legal and not flag.startswith('--config.'):
        raise InputError(f'{self.prog}: unknown flag {flag}; {did_you_mean(flag, legal)}')


def _meant(argument: str, flags: Iterable[str], arguments: Sequence[str]) -> str:
  """Returns the hint that ends an error about an argument without a flag."""
  missing = [flag for flag in ('--checkpoint', '--workdir', '--output')
             if flag in flags and not any(a.partition('=')[0] == flag for a in arguments)]
  key, equals, value = argument.partition('=')
  if argument.partition(':')[0].endswith('.py') and '--config' in flags:
    meant = f'--config={argument}'
  elif equals and f'--{key}' in flags:
    meant = f'--{argument}'
  elif equals and '--config' in flags:
    meant = f'--config.{key.removeprefix("config.")}={value}'
  elif '--config' in flags and argument.partition(':')[0] in _config_names():
    meant = f'--config={argument}'
  elif missing:
    meant = f'{missing[0]}={argument}'
  else:
    return ''
  return f'; did you mean {meant}?'


def _config_names() -> list[str]:
  from ppn_jax.config_files import config_names
  return config_names()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line, by default that of this process, and returns its exit code."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  if arguments[:1] and arguments[0] in _COMPUTING and expects_cpu():
    keep_freed_memory()  # Before there is a second thread.
  code = _main(arguments, as_program=argv is None)
  if argv is None and code == interrupts.EXIT_CODE:
    # JAX threads that are still running when the interpreter ends can crash it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _main(argv: list[str], *, as_program: bool) -> int:
  def on_interrupt(count: int) -> None:
    failures.fail(KeyboardInterrupt())  # Ends all processes that work together, at once.
    if count > 1 and as_program:
      interrupts.end_at_once()
    watch.raise_in_main_thread()

  watch = interrupts.InterruptWatch(on_interrupt)
  try:
    with watch, _log_on_stderr():
      return _run(argv)
  except (Exception, KeyboardInterrupt) as e:
    failures.fail(e)  # Processes that work together all end here.
    if isinstance(e, BrokenPipeError):  # `ppn ... | head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    code, line = exit_status(e)
    if line is None:
      raise
    print(line, file=sys.stderr)
    return code


class _Formatter(logging.Formatter):
  """Formats what the package logs; lines that are no part of a job's report begin with 'ppn: '."""

  def format(self, record: logging.LogRecord) -> str:
    return f'{"ppn: " * record.name.startswith(_NOTES)}{record.getMessage()}'


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
  """Sends the package's log to stderr, and not also to handlers that libraries install."""
  logger, handler = logging.getLogger('ppn_jax'), LiveHandler()
  before = logger.propagate, logger.level
  handler.setFormatter(_Formatter())
  logger.addHandler(handler)
  logger.propagate = False
  logger.setLevel(logging.DEBUG if sys.stderr.isatty() else logging.INFO)  # For the live line.
  try:
    yield
  finally:
    logger.removeHandler(handler)
    handler.close()
    logger.propagate, level = before
    logger.setLevel(level)


def _run(argv: list[str]) -> int:
  parser = _Parser(prog='ppn', description=DESCRIPTION, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--version', action='store_true',
                      help='print the versions of this package, JAX and Python')
  subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
  modules, parsers = {}, {}
  for name in COMMANDS:
    modules[name] = importlib.import_module(f'ppn_jax.cli.{name.replace("-", "_")}')
    summary, _, details = modules[name].HELP.partition('\n')
    parsers[name] = subparsers.add_parser(
        name, help=summary, description=f'{summary}\n{details}', allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    modules[name].add_arguments(parsers[name])
  if argv == ['--version']:
    print(_version())
    return 0
  if argv and not argv[0].startswith('-') and argv[0] not in COMMANDS:
    raise InputError(f'unknown command {argv[0]!r}; {did_you_mean(argv[0], COMMANDS)}')
  if argv and argv[0] in parsers:
    if not {'-h', '--help'} & set(argv[1:]):
      parsers[argv[0]].check_flags(argv[1:])
      parsers[argv[0]].check_positions(argv[1:])
  args, rest = parser.parse_known_args(argv)
  _check_rest(args.command, rest, modules[args.command].TAKES_CONFIG)
  # Shells do not expand `--output=~/x`.
  args = argparse.Namespace(**{name: expand_home(value) for name, value in vars(args).items()})
  args.overrides = rest
  quiet_libraries()
  return modules[args.command].run(args)


def _version() -> str:
  """Returns the versions that a bug report should name."""
  import platform
  from importlib import metadata
  versions = []
  for name in ('ppn_jax', 'jax', 'jaxlib', 'flax', 'libtpu'):
    try:
      versions.append(f'{name} {metadata.version(name)}')
    except metadata.PackageNotFoundError:
      versions += [f'{name} (not installed)'] if name == 'ppn_jax' else []
  return ', '.join([*versions, f'Python {platform.python_version()}', platform.platform()])


def _check_rest(command: str, rest: Sequence[str], takes_config: bool) -> None:
  """Raises InputError if what is left is not `--config.key=value`, or the command takes none."""
  for argument in rest:
    if not argument.startswith('--config.'):
      raise InputError(f'ppn {command}: unexpected argument {argument!r}')
    if not takes_config:
      raise InputError(f'ppn {command} takes no config entries, got {argument}')
    if '=' not in argument:
      raise InputError(f'ppn {command}: write {argument}=VALUE')


if __name__ == '__main__':
  sys.exit(main())
