"""`ppn export`."""

import argparse
import pathlib

from ppn_jax.cli.flags import add_allow_flag, open_workdir
from ppn_jax.errors import InputError

HELP = """Export a run's detector as a file that runs without this package.

It takes pixels u8 [B, S, S, 3] and returns boxes, scores, labels, level and valid, with NMS
included. The file is run by its own runtime on real images and kept only if it agrees with JAX.

  stablehlo    one file for CPU, TPU and CUDA, read by jax.export; the weights also as .npz
  saved_model  TensorFlow
  tflite       LiteRT (TensorFlow Lite), built-in operations only
  onnx         onnxruntime and others"""

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of a run')
  add_allow_flag(parser)
  parser.add_argument('--format', required=True, metavar='FORMAT',
                      help='stablehlo, saved_model, tflite or onnx')
  parser.add_argument('--output', required=True, metavar='FILE',
                      help='new file to write; for saved_model a folder')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                      help="use the weights' moving average (default: if the run keeps one)")
  parser.add_argument('--batch_size', default='1', metavar='N',
                      help='images at a time, or `free` for any number, not for tflite '
                           '(default: %(default)s)')
  parser.add_argument('--precision', default='float32', metavar='TYPE',
                      help='float32; tflite also float16 (weights) and int8 (default: %(default)s)')
  parser.add_argument('--calibration_images', type=int, default=100, metavar='N',
                      help='number of training images from which int8 takes its ranges '
                           '(default: %(default)s)')
  parser.add_argument('--images', metavar='FOLDER',
                      help="pictures to calibrate on and check with (default: the run's data)")


def run(args: argparse.Namespace) -> int:
  from ppn_jax.export.formats import ExportOptions
  options = ExportOptions(args.format, _batch_size(args.batch_size), args.precision,
                          args.calibration_images)
  folder = pathlib.Path(args.images) if args.images is not None else None
  if folder is not None and not folder.is_dir():
    raise InputError(f'--images: no folder {folder}')
  from ppn_jax.jobs.export import check_new, export
  check_new(args.output, options)
  output = pathlib.Path(args.output)
  made = export(open_workdir(args), output, options, step=args.step, ema=args.ema,
                folder=folder)
  difference = made.difference
  print(f'{output}: {made.size / 1e6:.1f} MB, step {made.step:,}')
  if options.format == 'stablehlo':
    print(f'{output}.json, with class names and preprocessing, belongs to it; the weights are also '
          f'in {output}.npz')
  print(f'largest difference from JAX on {made.images} images: boxes {difference.boxes:.2g} of '
        f'the side, scores {difference.scores:.2g}; {difference.missing} of '
        f'{difference.detections} detections without a counterpart')
  print(f'{options.batch_size or 1} images per call: {made.latency * 1e3:.1f} ms, with JAX '
        f'{made.jax_latency * 1e3:.1f} ms')
  return 0


def _batch_size(text: str) -> int | None:
  if text == 'free':
    return None
  try:
    return int(text)
  except ValueError:
    raise InputError(f'--batch_size={text} must be a number or `free`') from None
