"""`ppn export`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from ppn_jax.cli.flags import add_model_flags, open_model
from ppn_jax.errors import InputError

if TYPE_CHECKING:
  from ppn_jax.export.formats import ExportOptions

HELP = """Export a detector as a file that runs without this package, or as one to share.

A file of another runtime takes pixels u8 [B, S, S, 3] and returns boxes, scores, labels, level
and valid, with NMS included. It is run by its own runtime on real images and kept only if it
agrees with JAX.

  stablehlo    one file for CPU, TPU and CUDA, read by jax.export; the weights also as .npz
  saved_model  TensorFlow
  tflite       LiteRT (TensorFlow Lite), built-in operations only
  onnx         onnxruntime and others

  weights      a safetensors file with everything that rebuilds the detector, and no code: for
               ppn_jax.load, --model of detect, evaluate, summary and export, and init.weights"""

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_model_flags(parser, model='instead: a weights file')
  parser.add_argument('--format', required=True, metavar='FORMAT',
                      help='weights, stablehlo, saved_model, tflite or onnx')
  parser.add_argument('--output', required=True, metavar='FILE',
                      help='new file to write; for saved_model a folder')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                      help="use the weights' moving average (default: if the run keeps one)")
  parser.add_argument('--batch_size', metavar='N',
                      help='images at a time, or `free` for any number, not for tflite '
                           '(default: 1); not for weights')
  parser.add_argument('--precision', default='float32', metavar='TYPE',
                      help='float32; weights and tflite also float16, tflite also int8 '
                           '(default: %(default)s)')
  parser.add_argument('--layout', default='detections', metavar='LAYOUT',
                      help="of tflite: `detections`, `mediapipe` for MediaPipe's ObjectDetector, "
                           "or `detection_postprocess` with TensorFlow Lite's own operation; int8 "
                           'of the latter two computes the whole network in integers (default: '
                           '%(default)s)')
  parser.add_argument('--calibration_images', type=int, default=100, metavar='N',
                      help='number of training images from which int8 takes its ranges '
                           '(default: %(default)s)')
  parser.add_argument('--images', metavar='FOLDER',
                      help="pictures to calibrate on and check with (default: the run's data)")


def run(args: argparse.Namespace) -> int:
  from ppn_jax.export.formats import WEIGHTS, ExportOptions
  size = args.batch_size or ('free' if args.format == WEIGHTS else '1')
  options = ExportOptions(args.format, _batch_size(size), args.precision,
                          args.calibration_images, args.layout)
  if args.format == WEIGHTS and args.images is not None:
    raise InputError('--images is for files with a program in them, which are compared with JAX; '
                     'leave it out')
  folder = pathlib.Path(args.images) if args.images is not None else None
  if folder is not None and not folder.is_dir():
    raise InputError(f'--images: no folder {folder}')
  from ppn_jax.jobs.export import check_new, export
  check_new(args.output, options)
  output = pathlib.Path(args.output)
  if args.format == WEIGHTS:
    return _export_weights(args, output, options)
  made = export(open_model(args), output, options, step=args.step, ema=args.ema,
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


def _export_weights(args: argparse.Namespace, output: pathlib.Path, options: 'ExportOptions'
                    ) -> int:
  from ppn_jax.export.weights_file import SUFFIX
  from ppn_jax.jobs.export_weights import export_weights
  if output.suffix != SUFFIX:
    raise InputError(f'--output={output}: the name of a weights file must end in {SUFFIX}')
  made = export_weights(open_model(args), output, options, step=args.step, ema=args.ema)
  ap = made.provenance.get('metrics', {}).get('AP')
  print(f'{output}: {made.size / 1e6:.1f} MB, {made.parameters:,} values, step {made.step:,}'
        + (f', AP {ap:.3f}' if ap is not None else ', not evaluated'))
  if options.precision == 'float32':
    print('read back: equal to the weights bit for bit')
  else:
    print(f'read back: values changed by at most {made.rounding:.1g} of the largest of their array')
  return 0


def _batch_size(text: str) -> int | None:
  if text == 'free':
    return None
  try:
    return int(text)
  except ValueError:
    raise InputError(f'--batch_size={text} must be a number or `free`') from None
