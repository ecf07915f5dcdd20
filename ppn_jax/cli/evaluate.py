"""`ppn evaluate`."""

import argparse
import sys
from typing import TYPE_CHECKING

from ppn_jax.cli.flags import (
  CONFIG_HELP,
  add_matmul_dtype_flag,
  add_model_flags,
  add_process_flags,
  join_processes,
  keep_programs,
  open_model,
)
from ppn_jax.errors import InputError

if TYPE_CHECKING:
  from ppn_jax.jobs.evaluate import Evaluation
  from ppn_jax.jobs.follow import Outcome

HELP = f"""Score a checkpoint with COCO's metrics.

Prints COCO's twelve metrics, and by class AP, the best threshold and VOC's AP50;
writes results.json (COCO's results format), scores.json, thresholds.json,
confusion_matrix.csv and images.csv (most errors first) to WORKDIR/evaluation/STEP.
--calibration adds how far scores can be trusted, especially across pyramid levels.

--follow scores every checkpoint when training, here or on another machine, saves
it, until the last one; --steps scores existing ones. Both skip checkpoints that
are scored already and unchanged, so they can be stopped and restarted, and add
their curves to TensorBoard and WORKDIR/evaluation/metrics.jsonl. Only one command
at a time writes to a folder.
{CONFIG_HELP}
For example, --config.data.eval.images and .annotations, with --output, evaluate on other data.

A weights file names no data:
ppn evaluate --model=mine.safetensors --output=scores --config=own_data:coco_json \\
  --config.data.eval.images=photos --config.data.eval.annotations=boxes.json"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model_flags(parser, model='instead: a weights file; with --output and data')
  parser.add_argument('--config', metavar='FILE',
                      help='a config whose data to evaluate on, such as own_data:coco_json; with '
                           '--output')
  which = parser.add_mutually_exclusive_group()
  which.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  which.add_argument('--steps', metavar='A:B:C',
                     help='checkpoints of the steps A, A+C, A+2C, ... up to and including B; each '
                          'may be left out, and "all" scores all checkpoints')
  which.add_argument('--follow', action='store_true',
                     help='every checkpoint, as it appears, until the end of training; may be '
                          'started before training')
  parser.add_argument('--timeout', type=float, default=0, metavar='SECONDS',
                      help='with --follow: give up, with exit code 1, after this long without a '
                           'new checkpoint (default: never)')
  parser.add_argument('--poll', type=float, default=10, metavar='SECONDS',
                      help='with --follow: time between two looks (default: %(default)g)')
  parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                      help='use the moving average of the weights, or the weights themselves, '
                           'which --follow and --steps score in WORKDIR/evaluation_raw '
                           '(default: the average if the run keeps one)')
  add_matmul_dtype_flag(parser)
  parser.add_argument('--scorer', choices=('hotcoco', 'pycocotools'), default='hotcoco',
                      help='hotcoco gives the same results as pycocotools, faster '
                           '(default: %(default)s)')
  parser.add_argument('--output', metavar='DIR',
                      help='folder to write to (default: WORKDIR/evaluation/STEP); with --follow '
                           'and --steps, a folder in which each step gets one')
  parser.add_argument('--pictures', type=int, default=0, metavar='N',
                      help='draw ground truth (white) and detections of N images to pictures.png '
                           'there')
  parser.add_argument('--report', action='store_true',
                      help='write report.html there, one file for any browser: metrics, curves, '
                           'errors by kind, best and worst images, reliability of scores')
  parser.add_argument('--calibration', action='store_true',
                      help='compare scores with precision by level, size and class, and report '
                           'the cost of differences between levels: calibration.json and .png '
                           'there')
  parser.add_argument('--calibrate', default='', metavar='METHOD',
                      help='fit the scores to the share of correct detections, and keep the maps '
                           'with the step: `temperature` (one for all pyramid levels, which leaves '
                           "AP as it is) or `platt` (slope and intercept for each level); `ppn "
                           'detect` and ppn_jax.load then return calibrated scores')
  parser.add_argument('--calibration_floor', type=float, default=0.05, metavar='SCORE',
                      help='lowest score that enters this report (default: %(default)s)')
  parser.add_argument('--calibration_images', type=int, default=2000, metavar='N',
                      help='number of training images on which the positives of each level are '
                           'counted, at most one epoch; 0: none (default: %(default)s)')
  add_process_flags(parser)


def run(args: argparse.Namespace) -> int:
  import jax

  from ppn_jax.export.weights_file import is_weights_file
  from ppn_jax.jobs import calibration_report, follow
  from ppn_jax.jobs.evaluate import EvaluationOptions, prepare_evaluation
  from ppn_jax.storage import folder_path
  if args.pictures < 0:
    raise InputError(f'--pictures={args.pictures} must be at least 0')
  if (args.overrides or args.config or args.matmul_dtype) and not args.output:
    raise InputError('give --output=DIR with --config entries or --matmul_dtype, so that the '
                     "results of the run's own evaluation are not overwritten")
  if args.model is not None and (args.follow or args.steps is not None):
    raise InputError('--follow and --steps are for the checkpoints of a run; give its --workdir')
  if args.model is not None and is_weights_file(args.model) and not args.output:
    raise InputError(f'--model={args.model} is a weights file, so there is no workdir to write to; '
                     'give --output=DIR')
  calibration = calibration_report.CalibrationOptions(
      floor=args.calibration_floor, train_images=args.calibration_images)
  options = EvaluationOptions(scorer=args.scorer, ema=args.ema, pictures=args.pictures,
                              report=args.report, calibrate=args.calibrate,
                              matmul_dtype=args.matmul_dtype,
                              calibration=calibration if args.calibration else None)
  polling = follow.Polling(args.poll, args.timeout)
  selected = follow.parse_steps('all' if args.steps is None else args.steps)
  if not args.follow:
    # Mistakes are reported before waiting for other processes.
    opened = open_model(args, data=args.config)
  join_processes(args, hear_sigterm=False)  # Nothing here asks whether it came.
  # One follows a run of one's own; the folder of another's may hold any program.
  keep_programs(args.workdir if args.follow else '')
  if args.follow:
    follow.wait_for_run(args.workdir, polling)
    opened = open_model(args, data=args.config)
  job = prepare_evaluation(opened, options)
  output = folder_path(args.output, '--output') if args.output else None
  if args.follow or args.steps is not None:
    outcome = follow.score_steps(job, output, selected=selected,
                                 polling=polling if args.follow else None)
    return _conclude(args, outcome)
  evaluation = job.score(args.step, output)
  if jax.process_index() == 0:
    _print(evaluation, args.report)
  return 0


def _print(evaluation: 'Evaluation', report: bool) -> None:
  from ppn_jax.jobs import calibration_report, class_report
  from ppn_jax.metrics.coco import format_table
  print(format_table(evaluation.scores))
  if evaluation.classes:
    print(f'\n{class_report.format_table(evaluation.classes)}\n')
  if evaluation.calibration:
    print(f'\n{calibration_report.format_table(evaluation.calibration)}\n')
  print(f'{evaluation.scores.num_detections:,} detections on {evaluation.scores.num_images:,} '
        f'images in {evaluation.folder}')
  if report:
    print(f'report: {evaluation.folder / "report.html"}')


def _conclude(args: argparse.Namespace, outcome: 'Outcome') -> int:
  """Prints the scores of many steps; returns 1 if some that were asked for are missing."""
  import jax

  from ppn_jax.distributed import sharding
  from ppn_jax.jobs.follow import format_steps
  first = jax.process_index() == 0
  if first and outcome.metrics:
    print(format_steps(outcome.metrics))
  if first and not outcome.metrics and args.steps is not None:
    raise InputError(f'no checkpoint in {args.workdir} is among --steps={args.steps}')
  if first and not outcome.complete:
    print(f'no new checkpoint for --timeout={args.timeout:g} seconds, and training has not ended; '
          'giving up', file=sys.stderr)
  if first and outcome.unreadable:
    print(f'not scored, since they cannot be read: {", ".join(map(str, outcome.unreadable))}',
          file=sys.stderr)
  return 0 if sharding.value_of_first(outcome.complete and not outcome.unreadable) else 1
