"""Scores exported files in their own runtimes on voc300, against JAX: AP, time and operators.

  python benchmarks/runtimes.py --json
  python benchmarks/runtimes.py --json mine.tflite mine.onnx --model=mine.safetensors

Files of `ppn export` are given, or the model is exported in all kinds that are installed, with 100
photographs of the training split for calibration. Each is run on the 800 images of val (--data: the
folder of voc300; by default data/voc300 in the folder PPN_SHARED), and files for MediaPipe in its
runtime too, if it is installed. Milliseconds are the median of a call with one image, decoding and
NMS included, on --threads threads. With --json the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hardware
import jax
import numpy as np
from voc300.comparison import accuracy

from ppn_jax.data.source import build_source
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Category, Detections
from ppn_jax.errors import InputError
from ppn_jax.export.formats import ExportOptions
from ppn_jax.export.runtimes import open_export
from ppn_jax.export.tflite_operations import operations
from ppn_jax.jobs import mediapipe_file
from ppn_jax.jobs.export import export
from ppn_jax.metrics import coco
from ppn_jax.predictor import load_predictor
from ppn_jax.run import open_model
from ppn_jax.trained_model import TrainedModel

KINDS = (('onnx', 'float32', 'detections'),
         *(('tflite', precision, layout)
           for layout in ('detections', 'mediapipe', 'detection_postprocess')
           for precision in ('float32', 'float16', 'int8')))
CALIBRATION_IMAGES = 100


class Images(NamedTuple):
  """Images at the size of the network, and what is in them.

  Fields:
    pixels: u8 [N, S, S, 3].
    ids: image ids, N.
    sizes: (height, width) of the originals, N.
    truth: COCO instances dict of these images.
  """
  pixels: np.ndarray
  ids: list[int]
  sizes: list[tuple[int, int]]
  truth: dict[str, Any]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('files', nargs='*', type=pathlib.Path, help='of `ppn export` (default: all)')
  parser.add_argument('--model', default='ppn_voc', help='a name or weights file to compare with')
  parser.add_argument('--data', type=pathlib.Path, metavar='FOLDER')
  parser.add_argument('--images', type=int, default=0, help='to evaluate on; 0: all of val')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  data = args.data or pathlib.Path(os.environ.get(
      'PPN_SHARED', pathlib.Path(__file__).resolve().parents[2] / 'shared')) / 'data' / 'voc300'
  model = open_model(args.model)
  predictor = load_predictor(model)
  images = load_images(data, predictor.resize, args.images)
  rows = [{'runtime': 'jax', 'precision': 'float32',
           **measure(predictor.detect, images, model.categories)}]
  print(json.dumps(rows[0]), flush=True)
  left_out: list[str] = []
  with tempfile.TemporaryDirectory() as temporary:
    files = args.files or exported(model, pathlib.Path(temporary), data, left_out)
    for path in files:
      try:
        for row in rows_of(path, images, args.threads, left_out):
          rows.append(row | {'AP_lost': round(rows[0]['AP'] - row['AP'], 4)})
          print(json.dumps(rows[-1]), flush=True)
      except InputError as e:
        left_out.append(f'{path.name}: {e}')
  print('\n'.join(left_out))
  if args.json:
    print(json.dumps({'benchmark': 'runtimes', 'model': args.model, 'images': len(images.ids),
                      'threads': args.threads, 'rows': rows, 'left_out': left_out,
                      **hardware.describe()}))


def load_images(data: pathlib.Path, resize: Resize, count: int) -> Images:
  """Loads the first images of voc300's val, all if `count` is 0."""
  source = build_source(dict(name='coco_json', images=str(data / 'val'),
                             annotations=str(data / 'instances_val.json')))
  examples = [source[i] for i in range(count or len(source))]
  truth, ids = source.ground_truth(), [int(e.image_id) for e in examples]
  seen = set(ids)
  return Images(
      np.stack([resize(e).image for e in examples]), ids, [tuple(e.size) for e in examples],
      {**truth, 'images': [m for m in truth['images'] if m['id'] in seen],
       'annotations': [a for a in truth['annotations'] if a['image_id'] in seen]})


def exported(model: TrainedModel, folder: pathlib.Path, data: pathlib.Path, left_out: list[str]
             ) -> Iterator[pathlib.Path]:
  """Exports a model in each kind; those that cannot be written are added to `left_out`."""
  photographs, used = sorted((data / 'train').iterdir()), folder / 'images'
  used.mkdir()
  for photograph in photographs[::max(len(photographs) // CALIBRATION_IMAGES, 1)]:
    (used / photograph.name).symlink_to(photograph.resolve())
  for output_format, precision, layout in KINDS:
    path = folder / f'{layout}_{precision}.{output_format}'
    try:
      export(model, path, ExportOptions(output_format, 1, precision, CALIBRATION_IMAGES, layout),
             folder=used)
      yield path
    except InputError as e:
      left_out.append(f'{path.name}: {e}')


def rows_of(path: pathlib.Path, images: Images, threads: int, left_out: list[str]
            ) -> Iterator[dict[str, Any]]:
  """Measures a file in its runtime, and a file for MediaPipe also there."""
  opened = open_export(path, threads=threads)
  metadata = opened.metadata
  categories = tuple(map(Category, metadata['category_ids'], metadata['labels']))
  row = {'runtime': 'onnxruntime' if metadata['format'] == 'onnx' else 'litert',
         'precision': metadata['precision'], 'layout': metadata['layout'],
         'megabytes': round(path.stat().st_size / 1e6, 2), 'step': metadata['step'],
         **operators(path, metadata['format'])}
  yield row | measure(opened, images, categories)
  if metadata['layout'] == 'mediapipe':
    try:
      start = time.perf_counter()
      found = mediapipe_file.detect(path, images.pixels)
      seconds = time.perf_counter() - start
      yield row | {'runtime': 'mediapipe', 'ms_mean': round(1e3 * seconds / len(images.ids), 1),
                   **score(found, images, categories)}
    except InputError as e:
      left_out.append(f'{path.name} in MediaPipe: {e}')


def operators(path: pathlib.Path, output_format: str) -> dict[str, Any]:
  """Counts the operators of a file, and of a tflite file those that take or return floats."""
  if output_format == 'onnx':
    import onnx
    return {'operators': dict(Counter(node.op_type for node in onnx.load(path).graph.node))}
  if output_format != 'tflite':
    return {}
  found = operations(path)
  return {'operators': dict(Counter(op.name for op in found)),
          'float_operators': dict(Counter(op.name for op in found if op.has_floats))}


def measure(detect: Callable[[np.ndarray], Detections], images: Images,
            categories: tuple[Category, ...]) -> dict[str, Any]:
  """Returns the metrics of a detector and the median milliseconds of a call."""
  found, seconds = [], []
  jax.device_get(detect(images.pixels[:1]))  # Compiles.
  for i in range(len(images.ids)):
    start = time.perf_counter()
    found.append(jax.device_get(detect(images.pixels[i:i + 1])))
    seconds.append(time.perf_counter() - start)
  joined = Detections(*map(np.concatenate, zip(*found, strict=True)))
  return {'ms': round(1e3 * float(np.median(seconds)), 1), **score(joined, images, categories)}


def score(found: Detections, images: Images, categories: tuple[Category, ...]) -> dict[str, Any]:
  """Returns AP and AP50 of detections."""
  ids = {c['name']: c['id'] for c in images.truth['categories']}
  there = [c._replace(id=ids[c.name]) for c in categories]
  rows = coco.to_rows(found, np.array(images.ids), np.array(images.sizes),
                      np.ones(len(images.ids), bool), there)
  metrics = accuracy(images.truth, rows)
  return {name: round(metrics[name], 4) for name in ('AP', 'AP50')}


if __name__ == '__main__':
  main()
