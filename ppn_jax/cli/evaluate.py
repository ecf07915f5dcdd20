"""`ppn evaluate`."""

import argparse
import pathlib

from ppn_jax.cli.flags import CONFIG_HELP, add_process_flags, join_processes, override
from ppn_jax.errors import InputError

HELP = f"""Score a checkpoint with COCO's metrics.

Prints COCO's twelve figures and a table by class; writes results.json (COCO's
results format) and scores.json to WORKDIR/evaluation/STEP. --calibration adds
how far scores can be trusted, above all across pyramid levels.
{CONFIG_HELP}
So --config.data.eval.images and .annotations evaluate on other data, with --output."""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of a run')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--scorer', choices=('hotcoco', 'pycocotools'), default='hotcoco',
                      help='hotcoco gives the same figures as pycocotools, sooner '
                           '(default: %(default)s)')
  parser.add_argument('--output', metavar='DIR',
                      help='folder to write to (default: WORKDIR/evaluation/STEP)')
  parser.add_argument('--pictures', type=int, default=0, metavar='N',
                      help='draw truth (white) and detections of N images to pictures.png there')
  parser.add_argument('--calibration', action='store_true',
                      help='hold scores against precision by level, size and class, and report '
                           'what differences between levels cost: calibration.json and .png there')
  parser.add_argument('--calibration_floor', type=float, default=0.05, metavar='SCORE',
                      help='least score that enters this report (default: %(default)s)')
  parser.add_argument('--calibration_images', type=int, default=2000, metavar='N',
                      help='training images to count the positives of each level on, at most one '
                           'epoch; 0 for none (default: %(default)s)')
  add_process_flags(parser)


def run(args: argparse.Namespace) -> int:
  import dataclasses
  import sys

  import jax

  from ppn_jax.evaluation import calibration_job
  from ppn_jax.evaluation.coco import format_table
  from ppn_jax.evaluation.job import evaluate
  from ppn_jax.run import open_run
  if args.pictures < 0:
    raise InputError(f'--pictures={args.pictures} must be at least 0')
  if args.overrides and not args.output:
    raise InputError('give --output=DIR beside --config entries, so that the figures of the '
                     "run's own evaluation are not overwritten")
  calibration = calibration_job.CalibrationOptions(
      floor=args.calibration_floor, train_images=args.calibration_images)
  opened = open_run(args.workdir)
  opened = dataclasses.replace(opened, config=override(opened.config, args.overrides))
  join_processes(args)

  def say(line: str) -> None:
    if jax.process_index() == 0:
      print(line, file=sys.stderr)

  evaluation = evaluate(opened, step=args.step, scorer=args.scorer, pictures=args.pictures,
                        calibration=calibration if args.calibration else None,
                        output=pathlib.Path(args.output) if args.output else None,
                        say=say)
  if jax.process_index() != 0:
    return 0
  print(format_table(evaluation.scores))
  if evaluation.calibration:
    print(f'\n{calibration_job.format_table(evaluation.calibration)}\n')
  print(f'{evaluation.scores.num_detections:,} detections on {evaluation.scores.num_images:,} '
        f'images in {evaluation.folder}')
  return 0
