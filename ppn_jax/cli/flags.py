"""Flags that several commands have: config entries, models, and processes that work together."""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from ppn_jax import zoo
from ppn_jax.errors import InputError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from ppn_jax.trained_model import TrainedModel

CONFIG_HELP = ('--config.KEY=VALUE changes an entry of the config, such as\n'
               '--config.train.steps=1000; nested keys are joined by dots. docs/configs.md lists\n'
               'all keys, and how tuples and blocks are written.')


def add_model_flags(parser: argparse.ArgumentParser, *, model: str) -> None:
  """Adds the flags of a command that takes a run or a file; for `open_model`.

  Args:
    parser: of the command.
    model: help of --model.
  """
  of = parser.add_mutually_exclusive_group(required=True)
  of.add_argument('--workdir', metavar='DIR', help='folder of a run')
  of.add_argument('--model', metavar='FILE', type=zoo.find,
                  help=f'{model}; or {", ".join(zoo.names())}, which come with the package')
  add_allow_flag(parser)


def add_allow_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of commands that open a run or a weights file; for `open_model`."""
  parser.add_argument('--allow', action='append', default=[], metavar='MODULE',
                      help='a package or module of your own that the run or file may import, for '
                           'components that its config names by a dotted path; may be '
                           'given several times')


def add_matmul_dtype_flag(parser: argparse.ArgumentParser) -> None:
  """Adds --matmul_dtype, which changes `config.model.layers.matmul_dtype` of a trained model."""
  # MATMUL_DTYPES, since models are not imported for --help.
  parser.add_argument('--matmul_dtype', choices=('same', 'bfloat16', 'auto'),
                      help='bfloat16 rounds the numbers that large matrix products multiply, which '
                           'is faster on CPUs with instructions for it (avx512_bf16, amx_bf16); '
                           'auto does so on those alone, same never (default: as in training)')


def open_model(args: argparse.Namespace, *, data: str | None = None) -> 'TrainedModel':
  """Opens the run of --workdir or the file of --model, with the command line's config entries.

  Components from outside the package may be used if --allow or an entry names them.

  Args:
    args: values of the flags that `add_model_flags` adds.
    data: config file whose blocks `data` and `eval` are used, as for `load_config`.

  Raises:
    InputError: See `run.open_model` and `config_files.override`.
  """
  import dataclasses

  from ppn_jax.config_files import override
  from ppn_jax.export.weights_file import is_weights_file
  from ppn_jax.run import open_model, open_run
  if args.model is None and is_weights_file(args.workdir):
    raise InputError(f'--workdir={args.workdir} is not the folder of a run; a weights file is '
                     f'given by --model={args.workdir}')
  model = (open_run(args.workdir, allow=allowed(args)) if args.model is None
           else open_model(args.model, allow=allowed(args)))
  if model.unknown_keys:
    where = f'{args.workdir}/config.json' if args.model is None else args.model
    print(f'ppn: {where} has keys that this version does not know and ignores: '
          f'{", ".join(model.unknown_keys)}', file=sys.stderr)
  config = override(_with_data(model.config, data), args.overrides)
  _check_held_out(model.config, config)
  return dataclasses.replace(model, config=config)  # pyright: ignore


def _with_data(config: 'ConfigDict', name: str | None) -> 'ConfigDict':
  """Returns a config with the data of a config file; images are resized as before."""
  from ppn_jax.config import complete, plain
  from ppn_jax.config_files import load_config
  if name is None:
    return config
  values, given = plain(config), plain(load_config(name))
  kept = {key: values['data'][key] for key in ('resize', 'resize_mode', 'reduced_decoding')}
  return complete(values | {'data': given['data'] | kept, 'eval': given['eval']})


def _check_held_out(recorded: 'ConfigDict', config: 'ConfigDict') -> None:
  """Raises InputError if images that a run was trained on would be evaluated as held out."""
  here, there = ({'data.eval_fraction': c.data.eval_fraction, 'seed': c.seed}
                 for c in (config, recorded))
  if config.data.eval_fraction and here != there:
    key = next(key for key in here if here[key] != there[key])
    raise InputError(f'--config.{key}={here[key]}: which images are held out for evaluation was '
                     f'decided when training began ({key}={there[key]}); leave it out, or give '
                     'data to evaluate on, such as --config.data.eval.images=...')


def allowed(args: argparse.Namespace) -> tuple[str, ...]:
  """Returns what the run or file may import: everything that the command line names."""
  from ppn_jax.config_files import named_components
  return (*args.allow, *named_components(args.overrides))


def add_process_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a command that can run as several processes; for `join_processes`."""
  group = parser.add_argument_group(
      'several hosts', 'The same command on each, with a workdir that all of them see.')
  group.add_argument('--distributed', choices=('auto',), default='',
                     help='on every host of a TPU slice, GKE or Slurm: takes the next three from '
                          'it')
  group.add_argument('--coordinator', metavar='HOST:PORT',
                     help='host of process 0 and a free port there')
  group.add_argument('--num_processes', type=int, metavar='N', help='number of processes')
  group.add_argument('--process_id', type=int, metavar='I', help='which one this is, from 0')
  group.add_argument('--local_devices', type=int, default=0, metavar='N',
                     help='rehearse on N virtual CPU devices in this process')
  group.add_argument('--join_timeout', type=int, default=300, metavar='SECONDS',
                     help='how long to wait for the other processes (default: %(default)s)')


def join_processes(args: argparse.Namespace, *, hear_sigterm: bool = True) -> None:
  """Joins the processes that the flags name; call it before anything touches a JAX backend.

  From then on the first process logs what concerns all of them.

  Args:
    args: The values of the flags that `add_process_flags` adds.
    hear_sigterm: See `sharding.join_processes`.
  """
  from ppn_jax.distributed import failures, sharding
  sharding.join_processes(
      distributed=args.distributed, coordinator=args.coordinator,
      num_processes=args.num_processes, process_id=args.process_id,
      local_devices=args.local_devices, timeout=args.join_timeout,
      hear_sigterm=hear_sigterm)
  if args.distributed or args.coordinator:
    failures.watch_peers()
    for handler in logging.getLogger('ppn_jax').handlers:
      handler.addFilter(_is_for_this_process)


def _is_for_this_process(record: logging.LogRecord) -> bool:
  """Returns whether to print a record: all of the first process, and of others on their images."""
  import jax
  return record.name.startswith(('ppn_jax.data.', 'ppn_jax.visualization.')) or (
      jax.process_index() == 0)


def keep_programs(workdir: str = '') -> None:
  """Keeps compiled programs between starts; call it after `join_processes`.

  Args:
    workdir: See `keep_compiled_programs`.
  """
  from ppn_jax.distributed.compile_cache import keep_compiled_programs
  keep_compiled_programs(workdir)
