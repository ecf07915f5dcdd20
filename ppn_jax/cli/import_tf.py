"""`ppn import-tf`."""

import argparse
import sys

from ppn_jax.cli.flags import CONFIG_HELP

HELP = f"""Make a run from TensorFlow's, TFLite's or Keras' weights.

The run can be evaluated, used and trained further like any other. Checkpoints of
the TF Object Detection API have a background class and were trained on images that
it resized in its own way; the configs that end in _reference are for them. Depths,
depth multiplier and number of classes are those of the file unless they are given.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--checkpoint', required=True, metavar='PREFIX',
                      help='PREFIX of PREFIX.index, its folder (also of the TF2 zoo), a '
                           'frozen graph (.pb), a TFLite file (.tflite) or a Keras MobileNet (.h5, '
                           '.keras)')
  parser.add_argument('--config', metavar='FILE',
                      help='a config of the same kind of model (default: {ppn,ssd}_mobilenet_v1_'
                           'coco_reference or ssd_mobilenet_v2_coco_reference, whichever the file '
                           'holds)')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of the new run')
  parser.add_argument('--kind', choices=('auto', 'detector', 'backbone'), default='auto',
                      help='import a whole detector, or the backbone and initialise the rest '
                           '(default: whichever the file holds)')
  parser.add_argument('--label_map', metavar='FILE',
                      help="names of the classes: a .pbtxt, or a COCO .json (default: those in a "
                           "TFLite file's metadata, or COCO's if there are 90)")
  parser.add_argument('--average', action='store_true',
                      help="import the moving averages of the weights, if the checkpoint has them")


def run(args: argparse.Namespace) -> int:
  from ppn_jax.config_files import load_config
  if args.config:
    load_config(args.config, args.overrides)  # Errors in it come first; it takes no time.
  from ppn_jax.checkpoints.manager import SaveFailed
  from ppn_jax.jobs.import_tf import config_of, fit_config, import_run, read_checkpoint
  file = read_checkpoint(args.checkpoint)
  config, line = fit_config(
      load_config(args.config or config_of(file), args.overrides), file,
      [entry.removeprefix('--config.').partition('=')[0] for entry in args.overrides])
  try:
    imported = import_run(file, config, args.workdir, kind=args.kind,
                          label_map=args.label_map, average=args.average)
  except SaveFailed as e:
    print(f'ppn: not imported: {e}', file=sys.stderr)
    return 1
  if line:
    print(line)
  print(imported.report)
  print(f'a run at step 0 in {imported.run.workdir}')
  return 0
