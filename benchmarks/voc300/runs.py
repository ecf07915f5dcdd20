"""One run of the comparison: trained, scored, and told in plain data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import hardware
import numpy as np
from ml_collections import ConfigDict
from voc300 import comparison
from voc300.pieces import Diverged, Plain, Rows
from voc300.voc_ap import voc_ap50

from ppn_jax.data.source import build_source
from ppn_jax.distributed.preemption import Preempted
from ppn_jax.jobs import calibration_report
from ppn_jax.jobs.calibration_report import CalibrationOptions
from ppn_jax.jobs.evaluate import EvaluationOptions, prepare_evaluation
from ppn_jax.jobs.summary import summarize
from ppn_jax.jobs.train import train
from ppn_jax.jobs.train_loop import TrainingDiverged
from ppn_jax.run import build_detector, open_run, resolve_classes

_CURVES = ('step', 'train/loss', 'train/classification', 'train/localization', 'eval/AP',
           'eval/AP50')


def advance(config: ConfigDict, workdir: pathlib.Path) -> bool:
  """Trains from where `workdir` stands; False if it was told to end first, or raises Diverged."""
  try:
    train(config, workdir)
  except Preempted as e:
    print(e, flush=True)
    return False
  except TrainingDiverged as e:
    raise Diverged(str(e)) from e
  return True


def detect(workdir: pathlib.Path) -> tuple[Plain, Rows]:
  """What a trained run finds on its evaluation data, and what is kept of it besides."""
  run = open_run(workdir)
  job = prepare_evaluation(run, EvaluationOptions())
  step, variables = job.load()
  metrics, data = run.metrics(), run.config.data
  blocks = ('seed', 'model', 'matching', 'loss', 'postprocess', 'optim', 'train')
  return {
      'step': step, 'training': times(metrics, run.config.train.batch_size),
      'curve': [{k: line[k] for k in _CURVES if k in line} for line in metrics],
      'config': {name: block for name, block in run.config.to_dict().items() if name in blocks}
                | {'transforms': data.transforms, 'resident': data.train.resident},
      'hardware': hardware.describe()}, job.evaluator.rows(variables)


def score(config: ConfigDict, rows: Rows, *, train_images: int, floor: float = 0.05) -> Plain:
  """The figures of a run's detections; needs no accelerator.

  Args:
    config: of the run.
    rows: its detections.
    train_images: how many to count the positives of each level on.
    floor: least score that enters calibration.
  """
  source = build_source(config.data.eval.to_dict(), key='data.eval')
  config = resolve_classes(config, source.categories)
  detector, truth = build_detector(config), source.ground_truth()
  report = calibration_report.build_report(config, detector, source.categories, truth, rows,
                                         CalibrationOptions(floor=floor, train_images=train_images))
  counts = summarize(config).totals
  return {
      'figures': comparison.accuracy(truth, rows) | comparison.calibration_figures(report),
      'without_groups': comparison.without_groups(truth, rows, num_levels=detector.num_levels,
                                                  floor=floor),
      'voc_ap50_by_class': voc_ap50(truth, rows)[1], 'num_images': len(truth['images']),
      'calibration': report, 'parameters': counts.trainable, 'flops': counts.network_flops}


def times(metrics: Sequence[Mapping[str, Any]], batch_size: int) -> Plain:
  """Speed and time of training, from a run's metrics, over all its pieces.

  Compiling, loading, evaluation and saving are not in it: `hours` is of steps alone.

  Returns:
    images_per_second: median of what was reported, with slowest and fastest; hours; data_wait,
    the share of that time spent waiting for data.
  """
  lines = [line for line in metrics if line.get('train/images_per_second')]
  if not lines:
    return dict.fromkeys(('images_per_second', 'slowest', 'fastest', 'hours', 'data_wait'))
  rates = np.array([line['train/images_per_second'] for line in lines])
  waits = np.array([line['train/data_wait'] for line in lines])
  seconds = np.diff([line['step'] for line in lines], prepend=0) * batch_size / rates
  return {'images_per_second': float(np.median(rates)), 'slowest': float(rates.min()),
          'fastest': float(rates.max()), 'hours': float(seconds.sum() / 3600),
          'data_wait': float((waits * seconds).sum() / seconds.sum())}
