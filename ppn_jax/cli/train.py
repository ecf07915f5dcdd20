"""`ppn train`."""

import argparse
import signal
import sys
from typing import TYPE_CHECKING

from ppn_jax.cli.flags import CONFIG_HELP, add_process_flags, join_processes, keep_programs
from ppn_jax.errors import InputError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

HELP = f"""Train a detector, or resume a run that was stopped.

A workdir that holds a run of the same model is resumed from its newest intact checkpoint.
A second training in the same workdir is refused, with the name of the process that has it.
On SIGTERM, or a TPU's maintenance notice, it saves and exits with code 75; the same command
then resumes. So does Ctrl-C, with exit code 130; a second Ctrl-C ends it at once.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='name or path of a config, such as quickstart')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='folder of the run, new or to resume')
  parser.add_argument('--profile', default='', metavar='START:STOP',
                      help="trace these steps, STOP included, for TensorBoard's profile plugin "
                           'and XProf, to WORKDIR/tensorboard/plugins/profile')
  parser.add_argument('--xla_option', action='append', default=[], metavar='NAME=VALUE',
                      help="option of XLA for the training step, recorded with the run as "
                           'train.xla_options; may be given several times')
  parser.add_argument('--check', type=int, metavar='DEVICES',
                      help='train nothing: check config, data and workdir for so many devices, '
                           'which need not be here, such as the 16 of a v5litepod-16')
  parser.add_argument('--slices', type=int, metavar='N',
                      help='with --check: the number of TPU slices that the devices are in')
  parser.add_argument('--without_data', action='store_true',
                      help='with --check: leave out the data, which are elsewhere')
  add_process_flags(parser)


def run(args: argparse.Namespace) -> int:
  from ppn_jax.config_files import load_config
  config = load_config(args.config, args.overrides)
  if args.xla_option:
    with config.unlocked():
      config.train.xla_options = (*config.train.xla_options, *args.xla_option)
  if args.check is not None:
    return _check(config, args)
  if args.without_data or args.slices is not None:
    flag = '--without_data is' if args.without_data else f'--slices={args.slices} is'
    raise InputError(f'{flag} for --check=DEVICES')
  join_processes(args)
  keep_programs(args.workdir)
  from ppn_jax.distributed import preemption
  from ppn_jax.jobs.train import train
  try:
    train(config, args.workdir, profile=args.profile, process_started=_process_started())
  except preemption.Preempted as e:
    # A second SIGTERM must not turn the exit code into that of a kill.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f'ppn: preempted: {e}', file=sys.stderr)
    return preemption.EXIT_CODE
  return 0


def _check(config: 'ConfigDict', args: argparse.Namespace) -> int:
  """Checks the input, and prints what was checked."""
  import jax
  jax.config.update('jax_platforms', 'cpu')  # The devices of this machine do not matter.
  from ppn_jax.jobs.train_check import check_training
  slices = 1 if args.slices is None else args.slices
  print(check_training(config, args.workdir, args.check, slices=slices,
                       with_data=not args.without_data))
  return 0


def _process_started() -> float:
  """Returns when this process started, in seconds since the epoch."""
  import psutil
  return psutil.Process().create_time()
