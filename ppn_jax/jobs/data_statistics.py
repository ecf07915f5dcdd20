"""Collects statistics of a data set: boxes of augmented images, and the anchors assigned to them.

Nothing is trained. Images come from the same functions as in training, so the first ones are those
of a run with the same config. (With `data.resident` the devices draw their own, from the same
distributions.)
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ppn_jax.config import complete
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.checks import check_integer
from ppn_jax.data.loader import eval_batches, required_boxes, train_batches
from ppn_jax.data.report import Report, report
from ppn_jax.data.source import Source
from ppn_jax.data.splits import open_split
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.anchor_search import Change, search
from ppn_jax.detection.frame import ImageSize, check_image_size, sides_of
from ppn_jax.detection.structures import Anchors, Array, Batch, Category
from ppn_jax.detector import Detector, grid_sizes
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.run import build_detector, resolve_classes

SPLITS = ('train', 'eval')
SIDES = (0, 16, 32, 64, 128, 256)  # Bounds of box sizes in tables, pixels of the network's input.
_PERCENTS = (5, 25, 50, 75, 95)
_BATCH = 32
# Shares of boxes without a fitting anchor from which on changes are suggested: of all boxes, and of
# a class that has enough boxes to tell.
_MAX_UNFIT, _MAX_UNFIT_OF_CLASS, _MIN_BOXES = 0.1, 0.3, 20


class BoxStatistics(NamedTuple):
  """N ground-truth boxes and the anchors assigned to them, without ignored crowds; NumPy."""
  image: Array  # i64 [N], number of the sampled image, from 0.
  label: Array  # i32 [N].
  corners: Array  # f32 [N, 4], (ymin, xmin, ymax, xmax), 0 to 1 of the image.
  height: Array  # f32 [N], in pixels of the network's input.
  width: Array  # f32 [N].
  best_iou: Array  # f32 [N], with the anchor that overlaps it most.
  best_level: Array  # i32 [N], pyramid level of that anchor.
  anchors: Array  # i64 [N, L], number of positive anchors assigned to the box on each level.

  @property
  def side(self) -> np.ndarray:
    """Side of the square of the same area in pixels, f32 [N]."""
    return np.sqrt(self.height * self.width)

  @property
  def ratio(self) -> np.ndarray:
    """Width over height, f32 [N]."""
    return self.width / np.maximum(self.height, 1e-6)


class DataStatistics(NamedTuple):
  """Statistics of sampled images of a data set."""
  split: str
  image_size: ImageSize  # Of the network's input, in pixels.
  categories: tuple[Category, ...]
  anchors: Anchors
  matching: Mapping[str, Any]  # The block of the config.
  num_images: int  # Sampled.
  total_images: int  # Of the data set.
  num_crowds: int
  boxes: BoxStatistics
  examples: tuple[Batch, ...]  # The first images, as batches.
  file_names: Mapping[int, str]  # Of the images, by id.
  report: Report  # On all images of the data set, by their annotations.
  skipped: tuple[str, ...]  # Images that were skipped as the config allows, a line each.
  suggestions: tuple[Change, ...]  # Changes of the config that fit more boxes; () if enough fit.


def collect_statistics(config: ConfigDict, *, split: str = 'train', samples: int = 1000,
                       num_examples: int = 24) -> DataStatistics:
  """Samples images of the data of a config and measures their boxes and assigned anchors.

  Args:
    config: of a training run.
    split: 'train', with augmentation, or 'eval', without.
    samples: number of images to sample; each is used at most once.
    num_examples: number of sampled images to keep for pictures.

  Raises:
    InputError: If the data or config are bad, with the messages of training.
  """
  if split not in SPLITS:
    raise InputError(f'split={split}: {did_you_mean(split, SPLITS)}')
  check_integer('samples', samples, 1)
  config = complete(config)
  source = _open(config, split)
  config = resolve_classes(config, source.categories)
  detector, data = build_detector(config), config.data
  bad = BadExamples(f'data.{split}', len(source), data.on_bad_example, data.max_bad_share)
  bad.record_known(source)
  count, seen, crowds, parts, examples = min(samples, len(source)), 0, 0, [], []
  measure = _build_measure(detector, config.matching.to_dict())
  for batch in _batches(config, split, source, min(_BATCH, count), bad):
    chosen = batch.valid & (np.cumsum(batch.valid) <= count - seen)
    parts.append(measure(batch, chosen, seen))
    batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
    crowds += int((batch.ground_truth.valid & batch.ground_truth.crowd).sum())
    if seen < num_examples:
      examples.append(jax.tree.map(lambda x, room=num_examples - seen: x[:room], batch))
    seen += len(batch.valid)
    if seen >= count:
      break
  boxes = BoxStatistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))
  return DataStatistics(
      split=split, image_size=detector.image_size, categories=tuple(source.categories),
      anchors=detector.anchors, matching=config.matching.to_dict(), num_images=seen,
      total_images=len(source), num_crowds=crowds, boxes=boxes, examples=tuple(examples),
      file_names={image['id']: image['file_name'] for image in source.ground_truth()['images']
                  if 'file_name' in image},
      report=report(source, f'data.{split}', ignore_crowd=config.matching.ignore_crowd,
                    image_size=detector.image_size if split == 'train' else 0,
                    resize_mode=data.resize_mode),
      skipped=tuple(bad.new_reasons()), suggestions=_suggest_changes(config, detector, boxes))


def _suggest_changes(config: ConfigDict, detector: Detector, boxes: BoxStatistics
                     ) -> tuple[Change, ...]:
  """Returns changes of the config if many boxes, or many of one class, fit no anchor."""
  matched_iou, model = config.matching.matched_iou, config.model.to_dict()
  unfit = boxes.best_iou < matched_iou
  count = np.bincount(boxes.label, minlength=1)
  by_class = np.bincount(boxes.label, unfit, len(count)) / np.maximum(count, 1)
  if not len(unfit) or (unfit.mean() < _MAX_UNFIT and not (
      by_class[count >= _MIN_BOXES] >= _MAX_UNFIT_OF_CLASS).any()):
    return ()
  height, width = sides_of(detector.image_size)
  sizes = {check_image_size('model.image_size', (height * k // 2, width * k // 2))
           for k in (2, 3, 4)}
  return tuple(search(
      boxes.corners, boxes.label, model['anchors'],
      {size: grid_sizes(detector.network, size) for size in sizes}, detector.image_size,
      matched_iou, shared_head=model['head'].get('name') != 'per_level_box_predictor'))


def _open(config: ConfigDict, split: str) -> Source:
  """Opens the source of a split; evaluation data get the classes of training data if known."""
  categories = None
  if split == 'eval':
    with contextlib.suppress(InputError):
      categories = open_split(config, 'train').categories
  return open_split(config, split, categories=categories)


def _batches(config: ConfigDict, split: str, source: Source, batch_size: int, bad: BadExamples
             ) -> Iterator[Batch]:
  """Yields batches as training or evaluation reads them."""
  data, size = config.data, config.model.image_size
  options = {'image_size': size, 'batch_size': batch_size, 'threads': data.threads,
             'resize': data.resize, 'resize_mode': data.resize_mode,
             'reduced_decoding': data.reduced_decoding, 'bad': bad}
  if split == 'eval':
    return eval_batches(source, max_boxes=required_boxes(source), **options)
  transforms = build_transforms(data.transforms, data.resize_mode)
  return train_batches(source, transforms=transforms, seed=config.seed,
                       max_boxes=required_boxes(source, data.max_boxes, transforms), **options)


def _build_measure(detector: Detector, matching: Mapping[str, Any]
                   ) -> Callable[..., BoxStatistics]:
  """Returns a function (batch, mask of its images, number of the first of these) -> statistics."""
  # With box numbers in place of labels, the targets show which box each anchor is assigned to.
  numbered = lambda truth: truth._replace(
      labels=jnp.broadcast_to(jnp.arange(truth.labels.shape[1]), truth.labels.shape))
  assign = jax.jit(lambda truth: detector.assign_targets(detector.anchors, numbered(truth)))
  level, num_levels = detector.anchors.level, detector.num_levels

  def measure(batch: Batch, chosen: Array, first: int) -> BoxStatistics:
    truth = batch.ground_truth
    targets = jax.device_get(assign(truth))
    counted = truth.valid & chosen[:, None]
    if matching['ignore_crowd']:
      counted &= ~truth.crowd
    image, anchor = np.nonzero(targets.positive)
    place = np.ravel_multi_index((image, targets.labels[image, anchor], level[anchor]),
                                 (*counted.shape, num_levels))
    assigned = np.bincount(place, minlength=counted.size * num_levels)
    overlap = box_ops.iou(truth.boxes[counted], detector.anchors.boxes)
    best = overlap.argmax(axis=1)
    size = box_sides(truth.boxes[counted], detector.image_size)
    return BoxStatistics(
        first + (np.cumsum(chosen) - 1)[np.nonzero(counted)[0]], truth.labels[counted],
        truth.boxes[counted], *size.T,
        overlap[np.arange(len(best)), best], level[best],
        assigned.reshape(*counted.shape, num_levels)[counted])

  return measure


def box_sides(boxes: Array, image_size: ImageSize) -> np.ndarray:
  """Returns height and width of boxes in pixels of the network's input: [N, 4] -> [N, 2]."""
  return (boxes[:, 2:] - boxes[:, :2]) * np.float32(sides_of(image_size))


def summarize(found: DataStatistics) -> dict[str, Any]:
  """Summarizes statistics as plain data for JSON; values of groups without boxes are None.

  A box is 'unfit' if its IoU with every anchor is below `matched_iou`; with force-match it still
  gets its best anchor. It is 'without' if no anchor is assigned to it.
  """
  boxes, matched_iou = found.boxes, found.matching['matched_iou']
  unfit = boxes.best_iou < matched_iou
  per_image = np.bincount(boxes.image, minlength=found.num_images)
  groups = lambda names, index: [
      {'name': str(name), **_group(boxes, index == k, unfit)} for k, name in enumerate(names)]
  level = found.anchors.level
  sides = np.sqrt(box_sides(found.anchors.boxes, found.image_size).prod(axis=-1))
  return {
      'split': found.split, 'images': found.num_images, 'images_in_all': found.total_images,
      'image_size': found.image_size, 'matched_iou': matched_iou,
      'force_match': found.matching['force_match'],
      'images_without_boxes': int((per_image == 0).sum()), 'crowds': found.num_crowds,
      'boxes_an_image': {'mean': float(per_image.mean()), 'most': int(per_image.max())},
      'all': _group(boxes, np.ones(len(unfit), bool), unfit),
      'side': _percentiles(boxes.side), 'ratio': _percentiles(boxes.ratio),
      'by_class': groups([c.name for c in found.categories], boxes.label),
      'by_side': groups([f'{low} to {high}' for low, high in itertools.pairwise(SIDES)] +
                        [f'{SIDES[-1]} and more'], np.digitize(boxes.side, SIDES[1:])),
      'by_level': [
          group | {'anchors': int((level == k).sum()),
                   'anchor_sides': [float(sides[level == k].min()), float(sides[level == k].max())],
                   'positives_an_image': float(boxes.anchors[:, k].sum() / found.num_images)}
          for k, group in enumerate(groups(range(level[-1] + 1), boxes.best_level))],
      'changes': _summarize_changes(found, unfit)}


def _summarize_changes(found: DataStatistics, unfit: np.ndarray) -> list[dict[str, Any]]:
  """Summarizes the suggested changes, with their effect on the class with most unfit boxes."""
  if not found.suggestions:
    return []
  count = np.bincount(found.boxes.label, minlength=len(found.categories))
  by_class = np.bincount(found.boxes.label, unfit, len(count)) / np.maximum(count, 1)
  worst = int(np.where(count >= min(_MIN_BOXES, count.max()), by_class, -1).argmax())
  chosen = found.boxes.label == worst
  return [{'key': change.key, 'value': change.value, 'work': change.cost,
           'unfit': float((~change.matched).mean()), 'class': found.categories[worst].name,
           'unfit_of_class': float((~change.matched[chosen]).mean()),
           'unfit_of_class_now': float(by_class[worst])} for change in found.suggestions]


def _group(boxes: BoxStatistics, chosen: np.ndarray, unfit: np.ndarray) -> dict[str, Any]:
  count = int(chosen.sum())
  assigned = boxes.anchors[chosen].sum(axis=1)
  share = lambda mask: float(mask.mean()) if count else None
  return {'boxes': count, 'images': len(np.unique(boxes.image[chosen])),
          'median_side': float(np.median(boxes.side[chosen])) if count else None,
          'best_iou': share(boxes.best_iou[chosen]), 'anchors_a_box': share(assigned),
          'unfit': share(unfit[chosen]), 'without': share(assigned == 0)}


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
  if not len(values):
    return None
  return {f'{p}%': float(v) for p, v in zip(_PERCENTS, np.percentile(values, _PERCENTS),
                                            strict=True)}


def format_table(summary: Mapping[str, Any]) -> str:
  """Formats what `summarize` returns as aligned text."""
  every = summary['all']
  lines = [
      f'{summary["split"]}{", as augmented" * (summary["split"] == "train")}: '
      f'{summary["images"]:,} of {summary["images_in_all"]:,} images, '
      f'{every["boxes"]:,} boxes ({summary["boxes_an_image"]["mean"]:.1f} per image, at most '
      f'{summary["boxes_an_image"]["most"]}), {summary["images_without_boxes"]:,} images without '
      f'boxes, {summary["crowds"]:,} crowds']
  if summary['side']:
    for what, key, form in (('side, px', 'side', '.0f'), ('width / height', 'ratio', '.2f')):
      lines.append(f'{what:<15}' + '  '.join(f'{p} {v:{form}}' for p, v in summary[key].items()))
  for key, name in (('by_class', 'class'), ('by_side', 'side, px'), ('by_level', 'level')):
    lines += ['', *_format_groups(name, [g for g in summary[key]
                                         if g['boxes'] or key != 'by_side'], key == 'by_level')]
  return '\n'.join([*lines, '', describe_anchor_fit(summary)])


def describe_anchor_fit(summary: Mapping[str, Any]) -> str:
  """Describes in a sentence how well the anchors fit the boxes, and what to change."""
  every = summary['all']
  if not every['boxes']:
    return 'no boxes: there is nothing to learn from these images'
  consequence = ('force_match gives each its best anchor' if summary['force_match'] else
                 'they get none, since force_match is off')
  advice = _format_suggestions(summary['changes'], len(summary['by_class']) > 1)
  if not advice and every['unfit'] >= _MAX_UNFIT:
    advice = ('. No other scale or ratio of anchors, nor an image_size of up to twice as much, '
              'would help much')
  return (f'{every["unfit"]:.1%} of the boxes overlap no anchor by matched_iou='
          f'{summary["matched_iou"]:g} ({consequence}); {every["without"]:.1%} get no anchor at '
          f'all; {every["anchors_a_box"]:.1f} anchors per box{advice}')


def _format_suggestions(changes: Sequence[Mapping[str, Any]], several: bool) -> str:
  """Formats changes of the config, each of which comes on top of those before it.

  With `several` classes the worst of them is named.
  """
  if not changes:
    return ''
  parts = []
  for change in changes:
    value = str(change['value']).replace(' ', '')
    value = f"'{value}'" if isinstance(change['value'], (tuple, list)) else value
    work = f' at {change["work"]:.1f} times the work' if change['work'] > 1 else ''
    worst = f' (of {change["class"]!r} {change["unfit_of_class"]:.1%})' if several else ''
    parts.append(f'--config.{change["key"]}={value} would leave {change["unfit"]:.1%}{worst}{work}')
  first = changes[0]
  worst = f'Of {first["class"]!r} it is {first["unfit_of_class_now"]:.1%}. ' if several else ''
  return f'. {worst}{"; with that, ".join(parts)}'


def _format_groups(name: str, groups: Sequence[Mapping[str, Any]], levels: bool) -> list[str]:
  width = max(len(name), *(len(g['name']) for g in groups), 10)
  header = (f'{name:<{width}}  {"boxes":>9}  {"median side":>11}  {"best IoU":>8}  '
            f'{"anchors per box":>15}  {"no anchor fits":>14}')
  rows = [header + ('  positives per image   anchors of side, px' if levels else '')]
  for g in groups:
    cells = (f'{_show(g["median_side"], ".0f"):>11}  {_show(g["best_iou"], ".2f"):>8}  '
             f'{_show(g["anchors_a_box"], ".1f"):>15}  {_show(g["unfit"], ".1%"):>14}')
    row = f'{g["name"]:<{width}}  {g["boxes"]:>9,}  {cells}'
    if levels:
      low, high = g['anchor_sides']
      row += f'  {g["positives_an_image"]:>19.1f}   {g["anchors"]:,} of {low:.0f} to {high:.0f}'
    rows.append(row)
  return rows


def _show(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)
