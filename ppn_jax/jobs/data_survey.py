"""A data set as a network would meet it: boxes of augmented images, and the anchors they get.

Nothing is trained. Images come from the same functions as in training, so the first of a survey are
the first of a run with the same config. (With `data.train.resident` the devices draw their own,
from the same distributions.)
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
from ppn_jax.detection.structures import Anchors, Array, Batch, Category
from ppn_jax.detector import Detector, grid_sizes
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.run import build_detector, resolve_classes

SPLITS = ('train', 'eval')
SIDES = (0, 16, 32, 64, 128, 256)  # Bounds of sizes of boxes in tables, pixels of the network.
_PERCENTS = (5, 25, 50, 75, 95)
_BATCH = 32
# Shares of boxes that no anchor fits from which advice is given: of all, and of a class that has
# boxes enough to tell.
_MUCH_UNFIT, _MUCH_OF_A_CLASS, _FEW_BOXES = 0.1, 0.3, 20


class Boxes(NamedTuple):
  """N truth boxes in pixels of the network's input, NumPy; those that ask for anchors."""
  image: Array  # i64 [N], 0 the first image of the survey.
  label: Array  # i32 [N].
  corners: Array  # f32 [N, 4], of the image: what `height` and `width` are in pixels.
  height: Array  # f32 [N].
  width: Array  # f32 [N].
  best_iou: Array  # f32 [N], with the anchor that fits best.
  best_level: Array  # i32 [N], its pyramid level.
  anchors: Array  # i64 [N, L], positive anchors that the box was assigned on each level.

  @property
  def side(self) -> np.ndarray:
    """f32 [N], of the square of the same area, pixels."""
    return np.sqrt(self.height * self.width)

  @property
  def ratio(self) -> np.ndarray:
    """f32 [N], width over height."""
    return self.width / np.maximum(self.height, 1e-6)


class Survey(NamedTuple):
  """What was found."""
  split: str
  image_size: int  # S, in pixels.
  categories: tuple[Category, ...]
  anchors: Anchors
  matching: Mapping[str, Any]  # The config's.
  num_images: int  # Looked at.
  total_images: int  # Of the data set.
  num_crowds: int  # Boxes that ask for no anchor.
  boxes: Boxes
  shown: tuple[Batch, ...]  # The first images, as batches.
  report: Report  # On all images of the data set, by their annotations.
  left_out: tuple[str, ...]  # Images that options let be left out, a line each.
  changes: tuple[Change, ...]  # Of the config, by which more boxes would fit; () if enough do.


def survey(config: ConfigDict, *, split: str = 'train', samples: int = 1000,
           shown: int = 24) -> Survey:
  """Looks at the data of a config.

  Args:
    config: of a run to be.
    split: 'train', with augmentation, or 'eval', without.
    samples: how many images to look at; at most all of them, once.
    shown: how many of them to keep for pictures.

  Raises:
    InputError: bad data or a bad config, as training would say.
  """
  if split not in SPLITS:
    raise InputError(f'split={split}: {did_you_mean(split, SPLITS)}')
  check_integer('samples', samples, 1)
  config = complete(config)
  source = _open(config, split)
  config = resolve_classes(config, source.categories)
  detector, data = build_detector(config), config.data
  bad = BadExamples(f'data.{split}', len(source), data.on_bad_example, data.max_bad_share)
  bad.note_known(source)
  count, seen, crowds, parts, kept = min(samples, len(source)), 0, 0, [], []
  measure = _measurer(detector, config.matching.to_dict())
  for batch in _batches(config, split, source, min(_BATCH, count), bad):
    chosen = batch.valid & (np.cumsum(batch.valid) <= count - seen)
    parts.append(measure(batch, chosen, seen))
    batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
    crowds += int((batch.ground_truth.valid & batch.ground_truth.crowd).sum())
    if seen < shown:
      kept.append(jax.tree.map(lambda x, room=shown - seen: x[:room], batch))
    seen += len(batch.valid)
    if seen >= count:
      break
  boxes = Boxes(*(np.concatenate(column) for column in zip(*parts, strict=True)))
  said = report(source, f'data.{split}', ignore_crowd=config.matching.ignore_crowd,
                image_size=detector.image_size if split == 'train' else 0)
  return Survey(split, detector.image_size, tuple(source.categories), detector.anchors,
                config.matching.to_dict(), seen, len(source), crowds, boxes, tuple(kept),
                said, tuple(bad.news()), _changes(config, detector, boxes))


def _changes(config: ConfigDict, detector: Detector, boxes: Boxes) -> tuple[Change, ...]:
  """What to change where many boxes, or many of a class, overlap no anchor by enough."""
  matched_iou, model = config.matching.matched_iou, config.model.to_dict()
  unfit = boxes.best_iou < matched_iou
  count = np.bincount(boxes.label, minlength=1)
  by_class = np.bincount(boxes.label, unfit, len(count)) / np.maximum(count, 1)
  if not len(unfit) or (unfit.mean() < _MUCH_UNFIT and not (
      by_class[count >= _FEW_BOXES] >= _MUCH_OF_A_CLASS).any()):
    return ()
  sizes = {detector.image_size * k // 2 for k in (2, 3, 4)}
  return tuple(search(
      boxes.corners, boxes.label, model['anchors'],
      {size: grid_sizes(detector.network, size) for size in sizes}, detector.image_size,
      matched_iou, shared_head=model['head'].get('name') != 'per_level_box_predictor'))


def _open(config: ConfigDict, split: str) -> Source:
  """The source of a split. That of evaluation has the classes of training, where they are known."""
  categories = None
  if split == 'eval':
    with contextlib.suppress(InputError):
      categories = open_split(config, 'train').categories
  return open_split(config, split, categories=categories)


def _batches(config: ConfigDict, split: str, source: Source, batch_size: int, bad: BadExamples
             ) -> Iterator[Batch]:
  data, size = config.data, config.model.image_size
  options = {'image_size': size, 'batch_size': batch_size, 'threads': data.threads,
             'resize': data.resize, 'reduced_decoding': data.reduced_decoding, 'bad': bad}
  if split == 'eval':
    return eval_batches(source, max_boxes=required_boxes(source), **options)
  transforms = build_transforms(data.transforms)
  return train_batches(source, transforms=transforms, seed=config.seed,
                       max_boxes=required_boxes(source, data.max_boxes, transforms), **options)


def _measurer(detector: Detector, matching: Mapping[str, Any]) -> Callable[..., Boxes]:
  """(batch, which of its images, number of the first of these) -> their boxes."""
  # With numbers of boxes in place of labels, targets tell which box each anchor is for.
  numbered = lambda truth: truth._replace(
      labels=jnp.broadcast_to(jnp.arange(truth.labels.shape[1]), truth.labels.shape))
  assign = jax.jit(lambda truth: detector.assign_targets(detector.anchors, numbered(truth)))
  level, num_levels = detector.anchors.level, detector.num_levels

  def measure(batch: Batch, chosen: Array, first: int) -> Boxes:
    truth = batch.ground_truth
    targets = jax.device_get(assign(truth))
    wanted = truth.valid & chosen[:, None]
    if matching['ignore_crowd']:
      wanted &= ~truth.crowd
    image, anchor = np.nonzero(targets.positive)
    place = np.ravel_multi_index((image, targets.labels[image, anchor], level[anchor]),
                                 (*wanted.shape, num_levels))
    assigned = np.bincount(place, minlength=wanted.size * num_levels)
    overlap = box_ops.iou(truth.boxes[wanted], detector.anchors.boxes)
    best = overlap.argmax(axis=1)
    size = (truth.boxes[wanted][:, 2:] - truth.boxes[wanted][:, :2]) * detector.image_size
    return Boxes(
        first + (np.cumsum(chosen) - 1)[np.nonzero(wanted)[0]], truth.labels[wanted],
        truth.boxes[wanted], *size.T,
        overlap[np.arange(len(best)), best], level[best],
        assigned.reshape(*wanted.shape, num_levels)[wanted])

  return measure


def figures(found: Survey) -> dict[str, Any]:
  """The survey in numbers, as plain data for JSON; those of no boxes are None.

  A box is 'unfit' if it overlaps no anchor by `matched_iou`: force-match, if it is on, gives it its
  best one all the same. It is 'without' anchors if even so it gets none.
  """
  boxes, matched_iou = found.boxes, found.matching['matched_iou']
  unfit = boxes.best_iou < matched_iou
  per_image = np.bincount(boxes.image, minlength=found.num_images)
  groups = lambda names, index: [
      {'name': str(name), **_group(boxes, index == k, unfit)} for k, name in enumerate(names)]
  level = found.anchors.level
  sides = np.sqrt(box_ops.area(found.anchors.boxes)) * found.image_size
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
      'changes': _changed(found, unfit)}


def _changed(found: Survey, unfit: np.ndarray) -> list[dict[str, Any]]:
  """`Survey.changes` in numbers, with what becomes of the class that no anchor fits most often."""
  if not found.changes:
    return []
  count = np.bincount(found.boxes.label, minlength=len(found.categories))
  by_class = np.bincount(found.boxes.label, unfit, len(count)) / np.maximum(count, 1)
  worst = int(np.where(count >= min(_FEW_BOXES, count.max()), by_class, -1).argmax())
  chosen = found.boxes.label == worst
  return [{'key': change.key, 'value': change.value, 'work': change.cost,
           'unfit': float((~change.matched).mean()), 'class': found.categories[worst].name,
           'unfit_of_class': float((~change.matched[chosen]).mean()),
           'unfit_of_class_now': float(by_class[worst])} for change in found.changes]


def _group(boxes: Boxes, chosen: np.ndarray, unfit: np.ndarray) -> dict[str, Any]:
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


def format_table(numbers: Mapping[str, Any]) -> str:
  """`figures` as aligned plain text."""
  every = numbers['all']
  lines = [
      f'{numbers["split"]}: {numbers["images"]:,} of {numbers["images_in_all"]:,} images, '
      f'{every["boxes"]:,} boxes ({numbers["boxes_an_image"]["mean"]:.1f} an image, at most '
      f'{numbers["boxes_an_image"]["most"]}), {numbers["images_without_boxes"]:,} images without '
      f'boxes, {numbers["crowds"]:,} crowds']
  if numbers['side']:
    for what, key, form in (('side, px', 'side', '.0f'), ('width / height', 'ratio', '.2f')):
      lines.append(f'{what:<15}' + '  '.join(f'{p} {v:{form}}' for p, v in numbers[key].items()))
  for key, name in (('by_class', 'class'), ('by_side', 'side, px'), ('by_level', 'level')):
    lines += ['', *_format_groups(name, [g for g in numbers[key]
                                         if g['boxes'] or key != 'by_side'], key == 'by_level')]
  return '\n'.join([*lines, '', verdict(numbers)])


def verdict(numbers: Mapping[str, Any]) -> str:
  """Whether the anchors suit the boxes, in a sentence."""
  every = numbers['all']
  if not every['boxes']:
    return 'no boxes: there is nothing to learn from these images'
  served = ('force_match gives each the best there is' if numbers['force_match'] else
            'they get none, since force_match is off')
  advice = _advice(numbers['changes'], len(numbers['by_class']) > 1)
  if not advice and every['unfit'] >= _MUCH_UNFIT:
    advice = ('. No other scale or ratio of anchors, nor an image_size of up to twice as much, '
              'would help by much')
  return (f'{every["unfit"]:.1%} of the boxes overlap no anchor by matched_iou='
          f'{numbers["matched_iou"]:g} ({served}); {every["without"]:.1%} get no anchor at all; '
          f'{every["anchors_a_box"]:.1f} anchors a box{advice}')


def _advice(changes: Sequence[Mapping[str, Any]], several: bool) -> str:
  """What to set so that more boxes fit; each change comes on top of those before it.

  With `several` classes the worst of them is named.
  """
  if not changes:
    return ''
  told = []
  for change in changes:
    value = str(change['value']).replace(' ', '')
    value = f"'{value}'" if isinstance(change['value'], (tuple, list)) else value
    work = f' at {change["work"]:.1f} times the work' if change['work'] > 1 else ''
    worst = f' (of {change["class"]!r} {change["unfit_of_class"]:.1%})' if several else ''
    told.append(f'--config.{change["key"]}={value} would leave {change["unfit"]:.1%}{worst}{work}')
  first = changes[0]
  worst = f'Of {first["class"]!r} it is {first["unfit_of_class_now"]:.1%}. ' if several else ''
  return f'. {worst}{"; with that, ".join(told)}'


def _format_groups(name: str, groups: Sequence[Mapping[str, Any]], levels: bool) -> list[str]:
  width = max(len(name), *(len(g['name']) for g in groups), 10)
  header = (f'{name:<{width}}  {"boxes":>9}  {"median side":>11}  {"best IoU":>8}  '
            f'{"anchors a box":>13}  {"no anchor fits":>14}')
  rows = [header + ('  positives an image   anchors of side, px' if levels else '')]
  for g in groups:
    cells = (f'{_show(g["median_side"], ".0f"):>11}  {_show(g["best_iou"], ".2f"):>8}  '
             f'{_show(g["anchors_a_box"], ".1f"):>13}  {_show(g["unfit"], ".1%"):>14}')
    row = f'{g["name"]:<{width}}  {g["boxes"]:>9,}  {cells}'
    if levels:
      low, high = g['anchor_sides']
      row += f'  {g["positives_an_image"]:>18.1f}   {g["anchors"]:,} of {low:.0f} to {high:.0f}'
    rows.append(row)
  return rows


def _show(value: float | None, form: str) -> str:
  return '-' if value is None else format(value, form)
