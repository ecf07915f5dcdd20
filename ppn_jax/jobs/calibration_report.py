"""The calibration report of an evaluated step: measures, costs, training's share, and its table."""

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

FLOORS = (0.02, 0.05, 0.1, 0.2, 0.3)  # Where the report is repeated, to show that it holds.


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
  """What to report on.

  Attributes:
    floor: least score of a detection that enters, above 0 and below 1. Focal loss leaves
      background near its prior, 0.01; five times that drops the crowd of such boxes which
      fill up an image's 100, and keeps what is worth ranking.
    train_images: how many training images to count positives on, at most one epoch; 0 is none.
  """
  floor: float = 0.05
  train_images: int = 2000

  def __post_init__(self):
    if not 0 < self.floor < 1:
      raise InputError(f'calibration: floor={self.floor} must be above 0 and below 1')
    check_integer('calibration: train_images', self.train_images, 0)


def report(config: ConfigDict, detector: Detector, categories: Sequence[Category],
           ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
           options: CalibrationOptions, *, scorer: str = 'hotcoco') -> dict[str, Any]:
  """All that is known of a detector's calibration, as plain data for JSON.

  Args:
    config: of the run; the training data is built from it.
    detector: of the run.
    categories: in order of label.
    ground_truth: COCO instances dict of the evaluation data.
    rows: detections of it, as of `coco.to_rows`.
    options: see there.
    scorer: see `coco.score`.

  Returns:
    floor, min_iou, num_images; what `calibration.measure` returns; 'recalibration', see
    `recalibration.cost`, with 'maps' by level; 'floors', the main figures at each of `FLOORS`;
    'training', see `positives_in_training`, or {'absent': why}.
  """
  num_levels = int(np.max(detector.anchors.level)) + 1
  judged = matching.judge(ground_truth, rows)
  measure = functools.partial(
      calibration.measure, judged, num_images=len(ground_truth['images']),
      num_levels=num_levels, class_names=[c.name for c in categories])
  cost = functools.partial(recalibration.cost, ground_truth, rows, judged, num_levels=num_levels,
                           scorer=scorer)
  return {
      'floor': options.floor, 'min_iou': 0.5, 'num_images': len(ground_truth['images']),
      **measure(floor=options.floor),
      'recalibration': cost(floor=options.floor) | {
          'maps': recalibration.maps(judged, options.floor, num_levels)},
      'floors': [_at_floor(floor, measure(floor=floor), cost(floor=floor, intervals=False))
                 for floor in FLOORS],
      'training': positives_in_training(config, detector, options.train_images)}


def _at_floor(floor: float, measured: Mapping[str, Any], cost: Mapping[str, Any]
              ) -> dict[str, Any]:
  spread = measured['spread']
  return {'floor': floor, **{k: measured['all'][k] for k in ('detections', 'gap', 'ece')},
          'ece_by_level': [g['ece'] for g in measured['by_level']],
          'gap_spread': spread['gap'], 'at_equal_score': spread['at_equal_score'],
          'cost': cost['cost']}


def positives_in_training(config: ConfigDict, detector: Detector, num_images: int
                          ) -> dict[str, Any]:
  """What each level is given to learn from, on the first images as training draws them.

  Returns:
    images: how many were drawn. 'by_level': 'anchors' of an image, 'positives' (anchors assigned
    to a truth box) and 'boxes' (truth boxes whose best anchor is on that level, crowds left out)
    over all images. Or 'absent': why there is none, such as data that is not on this machine.
  """
  if not num_images:
    return {'absent': 'not asked for'}
  try:
    source = open_split(config, 'train')
    count = min(num_images, len(source))
    transforms, data = build_transforms(config.data.transforms), config.data
    bad = BadExamples('data.train', len(source), data.on_bad_example, data.max_bad_share)
    batches = train_batches(
        source, transforms=transforms, resize=config.data.resize,
        image_size=config.model.image_size, batch_size=config.train.batch_size, seed=config.seed,
        threads=config.data.threads, bad=bad,
        max_boxes=required_boxes(source, config.data.max_boxes, transforms))
    return _count_positives(detector, batches, count)
  except (InputError, OSError) as e:
    return {'absent': ' '.join(str(e).split())}


def _count_positives(detector: Detector, batches: Iterator[Batch], count: int) -> dict[str, Any]:
  level = np.asarray(detector.anchors.level)
  positives, boxes = np.zeros((2, level.max() + 1), np.int64)
  assign = jax.jit(lambda truth: detector.assign_targets(detector.anchors, truth).positive)
  seen = 0
  while seen < count:
    truth = next(batches).ground_truth
    shown = slice(count - seen)  # The last batch may reach into another epoch.
    positive = np.asarray(assign(truth))[shown]
    positives += np.bincount(np.broadcast_to(level, positive.shape)[positive],
                             minlength=len(positives))
    wanted = (truth.valid & ~truth.crowd)[shown]
    overlap = box_ops.iou(truth.boxes[shown][wanted], np.asarray(detector.anchors.boxes))
    boxes += np.bincount(level[overlap.argmax(axis=-1)], minlength=len(boxes))
    seen += len(positive)
  batches.close()
  return {'images': seen, 'by_level': [
      {'name': str(k), 'anchors': int(np.sum(level == k)), 'positives': int(positives[k]),
       'boxes': int(boxes[k])} for k in range(len(positives))]}


def write(folder: storage.Path, found: Mapping[str, Any], title: str) -> None:
  """Writes `calibration.json` and `calibration.png`."""
  storage.write_text(folder / 'calibration.json',
                   json.dumps(found, indent=2, allow_nan=False) + '\n')
  calibration_plot.save(folder / 'calibration.png', found, title)


def format_table(found: Mapping[str, Any]) -> str:
  """The report by level and size as aligned plain text; '-' where there is nothing to tell."""
  lines = [f'calibration of {found["all"]["detections"]:,} detections of score {found["floor"]:g} '
           'and more, right at IoU 0.5', '',
           f'{"":<8}  detections  score  right     gap    ECE  95% interval   half at  trained on']
  learnt = {g['name']: g for g in found['training'].get('by_level', ())}
  images = found['training'].get('images', 1)
  for group, platt in zip(found['by_level'], found['recalibration']['maps'], strict=True):
    given = learnt.get(group['name'])
    lines.append(_group_row('level ' + group['name'], group) +
                 f'  {_show(platt["score_at_half"], "7.3f")}' +
                 (f'  {given["positives"] / images:.2f} positives an image' if given else ''))
  lines += [_group_row(group['name'], group) for group in (*found['by_size'], found['all'])]
  if 'absent' in found['training']:
    lines.append(f'positives in training: none counted, {found["training"]["absent"]}')
  spread, costs = found['spread'], found['recalibration']
  compared = ', '.join(map(str, spread['levels']))
  if len(spread['levels']) < len(found['by_level']):
    lines += ['', f'levels with enough detections to compare: {compared or "none"}']
  lines += ['', f'spread of the gap between levels      {_show(spread["gap"])}  '
            f'{_interval(spread["gap_interval"])}',
            f'spread of precision at equal score    {_show(spread["at_equal_score"])}  '
            f'{_interval(spread["at_equal_score_interval"])}']
  for figure in recalibration.FIGURES:
    lines.append(
        f'{figure:<4} {_show(costs["as_is"][figure])} as is, one map '
        f'{_show(costs["one_map"][figure])}, a map per level '
        f'{_show(costs["map_per_level"][figure])}; cost {_show(costs["cost"][figure], "+.4f")}  '
        f'{_interval(costs["cost_interval"][figure], "+.4f")}')
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
