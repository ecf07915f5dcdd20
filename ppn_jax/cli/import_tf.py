"""`ppn import-tf`."""

import argparse
import sys

from ppn_jax.cli.flags import CONFIG_HELP, load_config

HELP = f"""Make a run of TensorFlow's or Keras' weights.

The run can be evaluated, used and trained further like any other. Checkpoints of
the TF Object Detection API have a background column and were trained on images
resized in their own way; the configs that end in _reference say so.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--checkpoint', required=True, metavar='PREFIX',
                      help='PREFIX of PREFIX.index, its folder, a frozen graph (.pb) or a Keras '
                           'MobileNet (.h5, .keras)')
  parser.add_argument('--config', required=True, metavar='FILE', help='config of the same model')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the run, new')
  parser.add_argument('--kind', choices=('auto', 'detector', 'backbone'), default='auto',
                      help='import a whole detector, or the backbone and leave the rest fresh '
                           '(default: whichever the file holds)')
  parser.add_argument('--label_map', metavar='FILE',
                      help="names of the classes: a .pbtxt, or a COCO .json (default: COCO's if "
                           'there are 90)')
  parser.add_argument('--average', action='store_true',
                      help="take the weights' moving averages that the checkpoint has beside them")


def run(args: argparse.Namespace) -> int:
  config = load_config(args.config, args.overrides)
  from ppn_jax.checkpoints.manager import SaveFailed
  from ppn_jax.jobs.import_tf import import_run
  try:
    imported = import_run(args.checkpoint, config, args.workdir, kind=args.kind,
                          label_map=args.label_map, average=args.average)
  except SaveFailed as e:
    print(f'ppn: not imported: {e}', file=sys.stderr)
    return 1
  print(f'a run at step 0 in {imported.workdir}')
  return 0
