"""Measures size, difference from JAX, mAP and latency of exports by format and precision.

  python benchmarks/export.py --workdir=runs/ppn --workdir=runs/ssd --json

Each run is exported in each format, compared with JAX on 20 of its evaluation images, and evaluated
by its own runtime and by JAX on all of them (or --images). Without --workdir, a PPN and an SSD are
first trained by the recipe of benchmarks/overfit.py on the first images of coco100's training
split, and evaluated on the same images, because an mAP near zero could not show by how much an
export changes it. The JSON says which weights were used. Needs the extras export, tflite and onnx;
formats whose libraries are missing are skipped and listed. With --json the last line is JSON.
"""

import argparse
import json
import logging
import pathlib
import tempfile
from typing import Any

import hardware
import jax
import numpy as np
import overfit

from ppn_jax.config import ssd
from ppn_jax.data.loader import eval_batches, required_boxes
from ppn_jax.data.source import build_source
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export.comparison import latency
from ppn_jax.export.formats import ExportOptions
from ppn_jax.export.runtimes import open_export
from ppn_jax.jobs.export import export
from ppn_jax.jobs.train import train
from ppn_jax.metrics import coco
from ppn_jax.run import Run, load_variables, open_run

KINDS = (('stablehlo', 'float32'), ('saved_model', 'float32'), ('tflite', 'float32'),
         ('tflite', 'float16'), ('tflite', 'int8'), ('onnx', 'float32'))


def main() -> None:
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', action='append', help='a run (default: train two)')
  parser.add_argument('--images', type=int, default=0, help='to evaluate on; 0: all of data.eval')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--train_images', type=int, default=24)
  parser.add_argument('--steps', type=int, default=260)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    workdirs = args.workdir or train_both(folder, args)
    rows, left_out = [], set()
    for workdir in workdirs:
      run = open_run(workdir)
      for kind in KINDS:
        try:
          rows.append(measure(run, folder / '_'.join((run.workdir.name, *kind)), kind, args))
          print(json.dumps(rows[-1]), flush=True)
        except InputError as e:
          left_out.add(f'{run.workdir.name} {" ".join(kind)}: {e}')
    result = {'benchmark': 'export', 'threads': args.threads, 'rows': rows,
              'left_out': sorted(left_out), 'weights': [weights(open_run(w)) for w in workdirs],
              **hardware.describe()}
  print('\n'.join(sorted(left_out)))
  if args.json:
    print(json.dumps(result))


def train_both(folder: pathlib.Path, args: argparse.Namespace) -> list[pathlib.Path]:
  """Trains a PPN and an SSD on the same images; returns their workdirs."""
  annotations = overfit.write_subset(folder / 'subset.json', args.train_images)
  recipe = argparse.Namespace(learning_rate=0.1, steps=args.steps, batch=8)
  workdirs = [folder / 'ppn', folder / 'ssd']
  for workdir in workdirs:
    config = overfit.make_config(recipe, str(annotations))
    with config.unlocked():
      if workdir.name == 'ssd':
        ssd(config)
      config.train.evaluate_every = 0
    train(config, workdir)
  return workdirs


def measure(run: Run, path: pathlib.Path, kind: tuple[str, str], args: argparse.Namespace
            ) -> dict[str, Any]:
  """Exports and evaluates a run in one format; returns a row of the table."""
  options = ExportOptions(kind[0], 1, kind[1])
  made = export(run, path, options)
  exported = open_export(path, threads=args.threads)
  detector = run.detector()
  _, variables = load_variables(run, detector, sharding.data_mesh(jax.local_devices()[:1]),
                                step=made.step)
  detect = jax.jit(detector.detect)
  image = np.zeros((1, detector.image_size, detector.image_size, 3), np.uint8)
  in_jax = score(run, lambda x: jax.device_get(detect(variables, x)), args.images)
  there = score(run, exported, args.images)
  return {'run': run.workdir.name, 'format': kind[0], 'precision': kind[1],
          'megabytes': round(made.size / 1e6, 2), 'images': made.images,
          'max_difference_boxes': float(f'{made.difference.boxes:.2g}'),
          'max_difference_scores': float(f'{made.difference.scores:.2g}'),
          'without_counterpart': made.difference.missing,
          'compared_detections': made.difference.detections,
          'ap_jax': round(in_jax['AP'], 4), 'ap': round(there['AP'], 4),
          'ap50_jax': round(in_jax['AP50'], 4), 'ap50': round(there['AP50'], 4),
          'latency_ms': round(latency(exported, image, 20) * 1e3, 2),
          'latency_ms_jax': round(latency(
              lambda x: jax.block_until_ready(detect(variables, x)), image, 20) * 1e3, 2)}


def score(run: Run, detect, limit: int) -> dict[str, float]:
  """Evaluates a function of images on the run's evaluation data; returns COCO's metrics."""
  source, data = build_source(run.config.data.eval.to_dict(), categories=run.categories), \
      run.config.data
  rows, seen = [], []
  for batch in eval_batches(source, image_size=run.config.model.image_size, batch_size=1,
                            max_boxes=required_boxes(source), resize=data.resize,
                            reduced_decoding=data.reduced_decoding):
    rows += coco.to_rows(detect(batch.images), batch.image_id, batch.size, batch.valid,
                         run.categories)
    seen += list(map(int, batch.image_id))
    if len(seen) == limit:
      break
  truth = source.ground_truth()
  kept = set(seen)
  truth = {**truth, 'images': [i for i in truth['images'] if i['id'] in kept],
           'annotations': [a for a in truth['annotations'] if a['image_id'] in kept]}
  return coco.score(truth, rows).metrics


def weights(run: Run) -> dict[str, Any]:
  """Describes the data on which a run was trained and evaluated."""
  data, steps = run.config.data.to_dict(), run.config.train.steps
  return {'run': run.workdir.name, 'steps': steps, 'batch_size': run.config.train.batch_size,
          'trained_on': _data(data['train']), 'scored_on': _data(data['eval']),
          'scored_on_training_images': _data(data['train']) == _data(data['eval'])}


def _data(block: dict[str, Any]) -> str:
  where = block.get('annotations') or block.get('folder') or ''
  parts = (block['name'], *pathlib.Path(where).parts[-2:], block.get('split', ''))
  return ' '.join(p for p in parts if p)


if __name__ == '__main__':
  main()
