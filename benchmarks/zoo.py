"""Measures the models that come with the package: size, accuracy on voc300 and time per photograph.

  python benchmarks/zoo.py --json

Each model is loaded by name, as users do, and evaluated on the 800 images of val (--data: the
folder of voc300; by default data/voc300 in the folder PPN_SHARED). Models whose runtime is not
installed are skipped and listed. Milliseconds are of a call with one picture of the network's size,
with NMS, on the cores that this process may use. With --json the last line is JSON, which
docs/make_models.py makes a page of.
"""

import argparse
import json
import os
import pathlib
from typing import Any

import hardware
import numpy as np
from voc300.comparison import accuracy

import ppn_jax
from ppn_jax import zoo
from ppn_jax.data.source import Source, build_source
from ppn_jax.detection.frame import show_size, sides_of
from ppn_jax.errors import InputError
from ppn_jax.export.comparison import latency
from ppn_jax.image_detector import ImageDetector
from ppn_jax.jobs.summary import summarize
from ppn_jax.run import open_model


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--data', type=pathlib.Path, metavar='FOLDER')
  parser.add_argument('--models', default=','.join(zoo.names()), help='names, joined by commas')
  parser.add_argument('--images', type=int, default=0, help='to evaluate on; 0: all of val')
  parser.add_argument('--repeats', type=int, default=30, help='calls of which the median is taken')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  data = args.data or pathlib.Path(os.environ.get(
      'PPN_SHARED', pathlib.Path(__file__).resolve().parents[2] / 'shared')) / 'data' / 'voc300'
  source = build_source(dict(name='coco_json', images=str(data / 'val'),
                             annotations=str(data / 'instances_val.json')))
  rows, left_out = [], []
  for name in args.models.split(','):
    try:
      rows.append(measure(name, source, args.images or len(source), args.repeats))
      print(json.dumps(rows[-1]), flush=True)
    except InputError as e:
      left_out.append(f'{name}: {e}')
  print('\n'.join(left_out))
  if args.json:
    print(json.dumps({'benchmark': 'zoo', 'models': rows, 'left_out': left_out,
                      **hardware.describe()}))


def measure(name: str, source: Source, images: int, repeats: int) -> dict[str, Any]:
  """Evaluates and times a model; returns a row of the table."""
  path = pathlib.Path(zoo.find(name))
  detector = ppn_jax.load(name)
  size = detector.predictor.resize.size
  picture = np.random.default_rng(0).integers(0, 256, (*sides_of(size), 3), np.uint8)
  row = {'name': name, 'file': path.name, 'megabytes': round(path.stat().st_size / 1e6, 2),
         'image_size': show_size(size), 'images': images,
         'ms': round(1e3 * latency(lambda x: detector(x[0]), picture[None], repeats), 1)}
  if path.suffix == '.safetensors':
    model = open_model(name)
    totals = summarize(model.config).totals
    row |= {'parameters': totals.trainable, 'flops': totals.network_flops,
            'backbone': model.config.model.backbone.to_dict(),
            'neck': model.config.model.neck.name, 'step': detector.step}
  return row | accuracy(*detect(detector, source, images))


def detect(detector: ImageDetector, source: Source, images: int
           ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns the ground truth of the first images, and a model's detections on them."""
  truth, rows = source.ground_truth(), []
  ids = {c['name']: c['id'] for c in truth['categories']}
  for i in range(images):
    example = source[i]
    found = detector(np.asarray(example.image), threshold=0.0)
    for box, score, name, level in zip(found.boxes.tolist(), found.scores.tolist(), found.names,
                                       found.level.tolist(), strict=True):
      ymin, xmin, ymax, xmax = box
      rows.append({'image_id': int(example.image_id), 'category_id': ids[name], 'score': score,
                   'bbox': [xmin, ymin, xmax - xmin, ymax - ymin], 'level': level})
  seen = {int(source[i].image_id) for i in range(images)}
  return {**truth, 'images': [m for m in truth['images'] if m['id'] in seen],
          'annotations': [a for a in truth['annotations'] if a['image_id'] in seen]}, rows


if __name__ == '__main__':
  main()
