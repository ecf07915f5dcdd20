"""Trains, evaluates and describes one run of the comparison, as plain data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import hardware
import numpy as np
from ml_collections import ConfigDict
from voc300 import comparison
from voc300.pieces import Diverged, Plain, Rows

from ppn_jax.data.splits import open_split
from ppn_jax.distributed.preemption import Preempted
from ppn_jax.jobs import calibration_report
from ppn_jax.jobs.calibration_report import CalibrationOptions
from ppn_jax.jobs.evaluate import EvaluationOptions, prepare_evaluation
from ppn_jax.jobs.summary import summarize
from ppn_jax.jobs.train import train
from ppn_jax.jobs.train_loop import TrainingDiverged
from ppn_jax.metrics import error_analysis
from ppn_jax.metrics.voc import voc_ap50
from ppn_jax.run import build_detector, open_run, resolve_classes

_CURVES = ('step', 'train/loss', 'train/classification', 'train/localization', 'eval/AP',
           'eval/AP50')


def advance(configs: Sequence[ConfigDict], workdirs: Sequence[pathlib.Path]) -> bool:
  """Resumes training in the workdirs of a run's phases, in order.

  Returns:
    Whether all phases are trained; False if one was stopped early.

  Raises:
    Diverged: If a loss diverges.
  """
  for config, workdir in zip(configs, workdirs, strict=True):
    try:
      train(config, workdir)
    except Preempted as e:
      print(e, flush=True)
      return False
    except TrainingDiverged as e:
      raise Diverged(str(e)) from e
  return True


def detect(workdirs: Sequence[pathlib.Path]) -> tuple[Plain, Rows]:
  """Returns the record of a trained run, and its detections on the evaluation data.

  Args:
    workdirs: workdirs of the run's phases, in order. Steps are counted over all of them.
  """
  earlier, run = [open_run(workdir) for workdir in workdirs[:-1]], open_run(workdirs[-1])
  job = prepare_evaluation(run, EvaluationOptions())
  step, variables = job.load()
  metrics, data, before = [], run.config.data, 0
  for part in (*earlier, run):
    metrics += [line | {'step': line['step'] + before} for line in part.metrics()]
    before += part.config.train.steps
  step += before - run.config.train.steps
  blocks = ('seed', 'model', 'matching', 'loss', 'postprocess', 'optim', 'train')
  return {
      'step': step, 'training': times(metrics, run.config.train.batch_size),
      'curve': [{k: line[k] for k in _CURVES if k in line} for line in metrics],
      'config': {name: block for name, block in run.config.to_dict().items() if name in blocks}
                | {'transforms': data.transforms, 'resident': data.resident.enabled,
                   'phases': [part.config.to_dict()['model']['image_size']
                              for part in (*earlier, run)]},
      'hardware': hardware.describe()}, job.evaluator.rows(variables)


def score(config: ConfigDict, rows: Rows, *, train_images: int, floor: float = 0.05) -> Plain:
  """Computes the metrics of a run's detections, which needs no accelerator.

  Args:
    config: config of the run.
    rows: its detections.
    train_images: number of images on which to count the positives of each level.
    floor: lowest score that counts for calibration.
  """
  source = open_split(config, 'eval')
  config = resolve_classes(config, source.categories)
  detector, truth = build_detector(config), source.ground_truth()
  report = calibration_report.build_report(config, detector, source.categories, truth, rows,
                                         CalibrationOptions(floor=floor, train_images=train_images))
  counts = summarize(config).totals
  return {
      'figures': comparison.accuracy(truth, rows) | comparison.calibration_metrics(report),
      'without_groups': comparison.without_groups(truth, rows, num_levels=detector.num_levels,
                                                  floor=floor),
      'error_costs': error_analysis.costs(truth, rows),
      'voc_ap50_by_class': voc_ap50(truth, rows)[1], 'num_images': len(truth['images']),
      'calibration': report, 'parameters': counts.trainable, 'flops': counts.network_flops}


def times(metrics: Sequence[Mapping[str, Any]], batch_size: int) -> Plain:
  """Computes speed and time of training from a run's metrics, over all calls.

  Compiling, loading, evaluation and saving are not included.

  Returns:
    images_per_second: median of the reported rates, with slowest and fastest; hours of steps;
    data_wait, the share of that time spent waiting for data.
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
