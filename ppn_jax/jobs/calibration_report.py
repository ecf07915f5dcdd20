"""Builds, writes and formats the calibration report of an evaluated step."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ppn_jax import storage
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.checks import check_integer
from ppn_jax.data.loader import required_boxes, train_batches
from ppn_jax.data.splits import open_split
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.structures import Batch, Category
from ppn_jax.detector import Detector
from ppn_jax.errors import InputError
from ppn_jax.metrics import calibration, matching, recalibration
from ppn_jax.visualization import calibration_plot

FLOORS = (0.02, 0.05, 0.1, 0.2, 0.3)  # The main results are repeated at these.


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
  """Options of the calibration report.

  Attributes:
    floor: least score of a detection that counts, above 0 and below 1. Focal loss leaves
      background near its prior, 0.01; five times that removes the many such boxes that fill up the
      100 of an image, and keeps those that are worth ranking.
    train_images: number of training images to count positives on, at most one epoch; 0 for none.
  """
  floor: float = 0.05
  train_images: int = 2000

  def __post_init__(self):
    if not 0 < self.floor < 1:
      raise InputError(f'calibration: floor={self.floor} must be above 0 and below 1')
    check_integer('calibration: train_images', self.train_images, 0)


def build_report(config: ConfigDict, detector: Detector, categories: Sequence[Category],
                 ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
                 options: CalibrationOptions, *, scorer: str = 'hotcoco') -> dict[str, Any]:
  """Measures a detector's calibration and the cost of differences between levels.

  Args:
    config: of the run; the training data are built from it.
    detector: of the run.
    categories: in order of label.
    ground_truth: COCO instances dict of the evaluation data.
    rows: detections on these data, see `coco.to_rows`.
    options: see there.
    scorer: see `coco.score`.

  Returns:
    Plain data for JSON: floor, min_iou, num_images; the entries of `calibration.measure`;
    'recalibration', see `recalibration.cost`, with 'maps' by level; 'floors', the main results at
    each of `FLOORS`; 'training', see `count_training_positives`.
  """
  num_levels = int(np.max(detector.anchors.level)) + 1
  matched = matching.match_detections(ground_truth, rows)
  measure = functools.partial(
      calibration.measure, matched, num_images=len(ground_truth['images']),
      num_levels=num_levels, class_names=[c.name for c in categories])
  cost = functools.partial(recalibration.cost, ground_truth, rows, matched,
                           num_levels=num_levels, scorer=scorer)
  return {
      'floor': options.floor, 'min_iou': 0.5, 'num_images': len(ground_truth['images']),
      **measure(floor=options.floor),
      'recalibration': cost(floor=options.floor) | {
          'maps': recalibration.maps(matched, options.floor, num_levels)},
      'floors': [_at_floor(floor, measure(floor=floor), cost(floor=floor, intervals=False))
                 for floor in FLOORS],
      'training': count_training_positives(config, detector, options.train_images)}


def _at_floor(floor: float, measured: Mapping[str, Any], cost: Mapping[str, Any]
              ) -> dict[str, Any]:
  """Returns the main results at one floor."""
  spread = measured['spread']
  return {'floor': floor, **{k: measured['all'][k] for k in ('detections', 'gap', 'ece')},
          'ece_by_level': [g['ece'] for g in measured['by_level']],
          'gap_spread': spread['gap'], 'at_equal_score': spread['at_equal_score'],
          'cost': cost['cost']}


def count_training_positives(config: ConfigDict, detector: Detector, num_images: int
                             ) -> dict[str, Any]:
  """Counts positive anchors and boxes of each level on the first images that training uses.

  Args:
    config: of the run.
    detector: of the run.
    num_images: number of images, at most one epoch; 0 for none.

  Returns:
    'images', their number; 'by_level', with 'anchors' of an image, 'positives' (anchors assigned
    to a ground-truth box) and 'boxes' (ground-truth boxes whose best anchor is on that level,
    without crowds) over all images. Or 'absent', the reason why there are no counts, such as data
    that are not on this machine.
  """
  if not num_images:
    return {'absent': 'not requested'}
  try:
    source = open_split(config, 'train')
    count = min(num_images, len(source))
    data = config.data
    transforms = build_transforms(data.transforms, data.resize_mode)
    bad = BadExamples('data.train', len(source), data.on_bad_example, data.max_bad_share)
    batches = train_batches(
        source, transforms=transforms, resize=data.resize, resize_mode=data.resize_mode,
        image_size=config.model.image_size, batch_size=config.train.batch_size, seed=config.seed,
        threads=data.threads, bad=bad,
        max_boxes=required_boxes(source, data.max_boxes, transforms))
    return _count_positives(detector, batches, count)
  except (InputError, OSError) as e:
    return {'absent': ' '.join(str(e).split())}


def _count_positives(detector: Detector, batches: Iterator[Batch], count: int) -> dict[str, Any]:
  """Counts over the first `count` images of the batches; see `count_training_positives`."""
  level = np.asarray(detector.anchors.level)
  positives, boxes = np.zeros((2, level.max() + 1), np.int64)
  assign = jax.jit(lambda truth: detector.assign_targets(detector.anchors, truth).positive)
  seen = 0
  while seen < count:
    truth = next(batches).ground_truth
    kept = slice(count - seen)  # The last batch may reach into the next epoch.
    positive = np.asarray(assign(truth))[kept]
    positives += np.bincount(np.broadcast_to(level, positive.shape)[positive],
                             minlength=len(positives))
    counted = (truth.valid & ~truth.crowd)[kept]
    overlap = box_ops.iou(truth.boxes[kept][counted], np.asarray(detector.anchors.boxes))
    boxes += np.bincount(level[overlap.argmax(axis=-1)], minlength=len(boxes))
    seen += len(positive)
  batches.close()
  return {'images': seen, 'by_level': [
      {'name': str(k), 'anchors': int(np.sum(level == k)), 'positives': int(positives[k]),
       'boxes': int(boxes[k])} for k in range(len(positives))]}


def write_report(folder: storage.Path, report: Mapping[str, Any], title: str) -> None:
  """Writes `calibration.json` and `calibration.png`."""
  storage.write_text(folder / 'calibration.json',
                     json.dumps(report, indent=2, allow_nan=False) + '\n')
  calibration_plot.save(folder / 'calibration.png', report, title)


def format_table(report: Mapping[str, Any]) -> str:
  """Formats the report by level and size as aligned text; '-' for values that do not exist."""
  lines = [f'calibration of {report["all"]["detections"]:,} detections of score '
           f'{report["floor"]:g} and more, correct at IoU 0.5', '',
           f'{"":<8}  detections  score  right     gap    ECE  95% interval   half at  trained on']
  trained = {g['name']: g for g in report['training'].get('by_level', ())}
  images = report['training'].get('images', 1)
  for group, platt in zip(report['by_level'], report['recalibration']['maps'], strict=True):
    given = trained.get(group['name'])
    lines.append(_group_row('level ' + group['name'], group) +
                 f'  {_show(platt["score_at_half"], "7.3f")}' +
                 (f'  {given["positives"] / images:.2f} positives per image' if given else ''))
  lines += [_group_row(group['name'], group) for group in (*report['by_size'], report['all'])]
  if 'absent' in report['training']:
    lines.append(f'positives in training: none counted, {report["training"]["absent"]}')
  spread, costs = report['spread'], report['recalibration']
  compared = ', '.join(map(str, spread['levels']))
  if len(spread['levels']) < len(report['by_level']):
    lines += ['', f'levels with enough detections to compare: {compared or "none"}']
  lines += ['', f'spread of the gap between levels      {_show(spread["gap"])}  '
            f'{_interval(spread["gap_interval"])}',
            f'spread of precision at equal score    {_show(spread["at_equal_score"])}  '
            f'{_interval(spread["at_equal_score_interval"])}']
  for name in recalibration.METRICS:
    lines.append(
        f'{name:<4} {_show(costs["as_is"][name])} as is, one map '
        f'{_show(costs["one_map"][name])}, a map per level '
        f'{_show(costs["map_per_level"][name])}; cost {_show(costs["cost"][name], "+.4f")}  '
        f'{_interval(costs["cost_interval"][name], "+.4f")}')
  return '\n'.join(line.rstrip() for line in lines)


def _group_row(name: str, group: Mapping[str, Any]) -> str:
  return (f'{name:<8}  {group["detections"]:>10,}  {_show(group["mean_score"])}  '
          f'{_show(group["precision"])}  {_show(group["gap"], "+6.3f")}  {_show(group["ece"])}  '
          f'{_interval(group["ece_interval"]):<16}')


def _show(value: float | None, form: str = '5.3f') -> str:
  if value is None:
    width = form.lstrip('+').partition('.')[0]
    return '-'.rjust(int(width or 1))
  return format(value, form)


def _interval(interval: Sequence[float] | None, form: str = '.3f') -> str:
  return '' if interval is None else '({})'.format(' to '.join(format(x, form) for x in interval))
