"""`ppn train`."""

import argparse
import sys

from ppn_jax.cli.flags import CONFIG_HELP, load_config

HELP = f"""Train a detector, or go on with a run that was stopped.

A workdir that holds a run of the same model is resumed from its newest checkpoint.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='a config file, such as configs/quickstart.py')
  parser.add_argument('--workdir', required=True, metavar='DIR',
                      help='folder of the run, new or to be resumed')


def run(args: argparse.Namespace) -> int:
  config = load_config(args.config, args.overrides)
  from ppn_jax.training.loop import TrainingDiverged, train
  try:
    train(config, args.workdir)
  except TrainingDiverged as e:
    print(f'ppn: training stopped: {e}', file=sys.stderr)
    return 1
  return 0
