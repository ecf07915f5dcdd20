"""`ppn train`."""

import argparse
import signal
import sys

from ppn_jax.cli.flags import (
  CONFIG_HELP,
  add_process_flags,
  join_processes,
  keep_programs,
  load_config,
)

HELP = f"""Train a detector, or go on with a run that was stopped.

A workdir that holds a run of the same model is resumed from its newest checkpoint that is whole.
One training at a time: a second one in the same workdir is refused, with who has it.
SIGTERM, and a TPU's notice of maintenance, make it save and end with exit code 75; the same
command then goes on from there. So does Ctrl-C, with exit code 130; a second one ends at once.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='a config file, such as configs/quickstart.py')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='folder of the run, new or to be resumed')
  parser.add_argument('--profile', default='', metavar='START:STOP',
                      help="trace these steps, STOP included, for TensorBoard's profile plugin "
                           'and XProf, to WORKDIR/tensorboard/plugins/profile')
  add_process_flags(parser)


def run(args: argparse.Namespace) -> int:
  config = load_config(args.config, args.overrides)
  join_processes(args)
  keep_programs()
  from ppn_jax.distributed import preemption
  from ppn_jax.jobs.train import train
  try:
    train(config, args.workdir, profile=args.profile)
  except preemption.Preempted as e:
    # It ends now; another one must not turn the exit code into that of a kill.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f'ppn: preempted: {e}', file=sys.stderr)
    return preemption.EXIT_CODE
  return 0
