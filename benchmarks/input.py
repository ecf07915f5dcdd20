"""Measures images/s of the host input pipeline by stage, beside the bare decoder and tf.data.

  python benchmarks/input.py --images=COCO/train2017 --annotations=COCO/instances.json --json

Each measurement is one process on one or two cores, which reads JPEGs and makes batches of uint8
[B, 300, 300, 3] with SSD's crop and a flip. All use the same files and take turns; results are
medians over the rounds. `decoder` is simplejpeg alone at full scale, the lower limit. `cache` has
its images in memory, as from the second epoch on. tf.data runs in a separate environment: create
one with tensorflow-cpu and give its Python as --tensorflow_python, otherwise it is skipped. With
--json the last line is JSON.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

# Images/s that a TPU v5e chip consumes, by the compiler's estimate, and the cores of a host with
# four chips.
CHIP_RATE, HOST_CORES = 2_000, 112
SHARED = pathlib.Path(os.environ.get('PPN_SHARED', '../shared')) / 'data' / 'coco100'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--images', default=str(SHARED / 'train2017'))
  parser.add_argument('--annotations',
                      default=str(SHARED / 'annotations' / 'instances_train2017.json'))
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=4.0, help='duration of each measurement')
  parser.add_argument('--tensorflow_python', metavar='FILE',
                      help='python of an environment that has tensorflow-cpu')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  if args.worker:
    print(WORKERS[args.worker](args))
    return
  stages = [*WORKERS, *(['tf_data'] if args.tensorflow_python else [])]
  rates = {(stage, cores): [] for stage in stages for cores in (1, 2)}
  for _ in range(args.rounds):
    for stage, cores in rates:
      rates[stage, cores].append(_measure(args, stage, cores))
  report(args, {key: {'median': round(statistics.median(values), 1),
                      'least': round(min(values), 1), 'most': round(max(values), 1)}
                for key, values in rates.items()})


def _measure(args: argparse.Namespace, stage: str, cores: int) -> float:
  """Measures images per second of a stage in a new process on the first `cores` cores."""
  if stage == 'tf_data':
    script = pathlib.Path(__file__).with_name('tf_data_input.py')
    command = [args.tensorflow_python, str(script), args.images, args.annotations,
               str(args.batch), str(args.image_size), str(cores), str(args.seconds)]
  else:
    command = [sys.executable, __file__, f'--worker={stage}', f'--images={args.images}',
               f'--annotations={args.annotations}', f'--batch={args.batch}',
               f'--image_size={args.image_size}', f'--seconds={args.seconds}']
  allowed = sorted(os.sched_getaffinity(0))[:cores]
  process = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
                           preexec_fn=lambda: os.sched_setaffinity(0, allowed))
  return float(process.stdout.split()[-1])


def report(args: argparse.Namespace, rates: dict) -> None:
  import hardware
  for (stage, cores), rate in rates.items():
    print(f'{stage:18} {cores} core{"s" if cores > 1 else " "} {rate["median"]:9,.0f} images/s   '
          f'({rate["least"]:,.0f} to {rate["most"]:,.0f})')
  median = lambda stage, cores: rates[stage, cores]['median']
  results = {
      'ratio_to_decoder': round(median('pipeline', 1) / median('decoder', 1), 3),
      'ratio_to_decoder_2_cores': round(median('pipeline', 2) / median('decoder', 2), 3),
      'ratio_to_tf_data': None, 'ratio_to_tf_data_2_cores': None,
      'scaling_1_to_2_cores': round(median('pipeline', 2) / median('pipeline', 1), 3),
      'cache_images_per_s_per_core': median('cache', 1),
      'v5e_chips_fed_by_a_112_core_host': round(
          HOST_CORES * median('pipeline', 2) / 2 / CHIP_RATE, 1)}
  if args.tensorflow_python:
    results['ratio_to_tf_data'] = round(median('pipeline', 1) / median('tf_data', 1), 3)
    results['ratio_to_tf_data_2_cores'] = round(median('pipeline', 2) / median('tf_data', 2), 3)
  for name, value in results.items():
    print(f'{name:34} {value}')
  if args.json:
    print(json.dumps({
        'benchmark': 'input', 'batch': args.batch, 'image_size': args.image_size,
        'rounds': args.rounds, **results,
        'images_per_s': {f'{stage}_{cores}': rate for (stage, cores), rate in rates.items()},
        'chip_rate': CHIP_RATE, **hardware.describe()}))


def _rate(step, seconds: float, warm_up: int = 1) -> float:
  """Returns images per second of a function that returns the number of images that it made."""
  for _ in range(warm_up):
    step()
  count, started = 0, time.perf_counter()
  while time.perf_counter() - started < seconds:
    count += step()
  return count / (time.perf_counter() - started)


def decoder(args: argparse.Namespace) -> float:
  """Decodes with simplejpeg at full scale, in a thread per core, from files in memory."""
  import simplejpeg
  files = [p.read_bytes() for p in sorted(pathlib.Path(args.images).glob('*.jpg'))]
  with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    decode = lambda data: simplejpeg.decode_jpeg(data, colorspace='RGB').shape[0] > 0
    return _rate(lambda: sum(pool.map(decode, files)), args.seconds)


def _source(args: argparse.Namespace):
  from ppn_jax.data.sources.coco import CocoJson
  return CocoJson(args.images, args.annotations)


def _batches(args: argparse.Namespace, source, transforms=None, resize: str = 'supersample',
             workers: str = 'threads'):
  from ppn_jax.data.loader import required_boxes, train_batches
  from ppn_jax.data.transforms.basic import HorizontalFlip
  from ppn_jax.data.transforms.random_crop import SsdRandomCrop
  from ppn_jax.telemetry.host_memory import keep_freed_memory
  ops = (SsdRandomCrop(), HorizontalFlip()) if transforms is None else transforms
  keep_freed_memory()  # As training does.
  batches = train_batches(source, transforms=ops, image_size=args.image_size,
                          max_boxes=required_boxes(source), batch_size=args.batch, seed=0,
                          resize=resize, workers=workers)
  return _rate(lambda: len(next(batches).images), args.seconds, warm_up=3)


def pipeline(args: argparse.Namespace) -> float:
  """Reads as `ppn train` does by default."""
  return _batches(args, _source(args))


def pipeline_processes(args: argparse.Namespace) -> float:
  """Reads with `data.workers='processes'`."""
  return _batches(args, _source(args), workers='processes')


def pipeline_bilinear(args: argparse.Namespace) -> float:
  """Reads without antialiasing."""
  return _batches(args, _source(args), resize='bilinear')


def no_augmentation(args: argparse.Namespace) -> float:
  """Decodes, resizes and batches."""
  return _batches(args, _source(args), transforms=())


def cache(args: argparse.Namespace) -> float:
  """Crops, flips, resizes and batches images that are already decoded."""
  from ppn_jax.data.cache import MEMORY, CachedSource
  source = CachedSource(_source(args), MEMORY, args.image_size)
  for index in range(len(source)):
    source[index]
  return _batches(args, source)


WORKERS = {f.__name__: f for f in (
    decoder, pipeline, pipeline_processes, pipeline_bilinear, no_augmentation, cache)}

if __name__ == '__main__':
  main()
