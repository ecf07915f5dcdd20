"""Reports on data sets in a few lines: what there is to learn from, and what is wrong."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.contents import ALL_LEFT_OUT, NO_BOXES, SHOWN, Contents, Tally, counted
from ppn_jax.data.source import Source, contents_of
from ppn_jax.detection.frame import ImageSize, InputFrame, show_size
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

_WIDTH = 80
_FEW = 6  # Up to this many classes are listed one by one.
_FEW_IMAGES = 30  # Fewer images to evaluate on are spoken of.


class Report(NamedTuple):
  """Report on a data set.

  Attributes:
    facts: Its images, boxes and classes, in a line or two.
    warnings: Changes to boxes and problems, one line each, with an example.
    nothing: The reason why there is nothing to learn from it; '' if there is something.
  """
  facts: tuple[str, ...]
  warnings: tuple[str, ...]
  nothing: str

  @property
  def lines(self) -> tuple[str, ...]:
    """All lines."""
    return (*self.facts, *self.warnings, *((self.nothing,) if self.nothing else ()))


def report(source: Source, key: str, *, image_size: ImageSize = 0, resize_mode: str = 'stretch',
           ignore_crowd: bool = True) -> Report:
  """Reports on a data set from its annotations, without reading an image.

  Args:
    source: The data set.
    key: Its name in the report, such as 'data.train'.
    image_size: Size of the network's input in pixels for training data. 0 for evaluation data, in
      which classes may lack boxes and there may be no boxes at all.
    resize_mode: The config's `data.resize_mode`.
    ignore_crowd: Whether crowds are ignored in training, the config's `matching.ignore_crowd`.

  Raises:
    InputError: If the source's `ground_truth` is not what `Source` describes.
  """
  contents = contents_of(source)
  if contents is None:
    return Report((f'{key}: {len(source):,} images',), (), '')
  objects = ~contents.crowd if ignore_crowd else np.ones(len(contents.crowd), bool)
  counts = np.bincount(contents.labels[objects], minlength=len(source.categories))
  facts = [counted(len(source), 'image'), *_without_boxes(contents, objects, len(source)),
           counted(int(objects.sum()), 'box')]
  if not objects.all():
    facts.append(counted(int((~objects).sum()), 'crowd'))
  if not image_size and len(source) < _FEW_IMAGES:
    facts.append('so few that metrics depend on chance')
  if image_size and objects.any():
    shares = contents.shares[objects]
    sizes = np.maximum(contents.sides[objects], 1e-9) / np.maximum(shares, 1e-9)
    filled = InputFrame.of(image_size, resize_mode).content(sizes)
    sides = np.sqrt((shares * filled).prod(axis=-1))
    facts += [_classes(source.categories, counts),
              f'median side {np.median(sides):,.3g} px at {show_size(image_size)} px']
  warnings = _warnings(contents)
  if image_size and objects.any() and (counts == 0).any():
    absent = [c.name for c, n in zip(source.categories, counts, strict=True) if not n]
    warnings.append(f'no box of {counted(len(absent), "class")}, which cannot be learned: '
                    f'{_some(absent)}')
  return Report(_wrap(key, facts), tuple(f'{key}: {line}' for line in warnings),
                _nothing(key, contents, objects) if image_size else '')


def check_learnable(found: Report) -> None:
  """Checks that there is something to learn from the data set of a report.

  Raises:
    InputError: If there is not, with the reason.
  """
  if found.nothing:
    raise InputError(found.nothing)


def _wrap(key: str, facts: Sequence[str]) -> tuple[str, ...]:
  """Joins facts to lines for a terminal, with line breaks between short facts only."""
  whole = [fact.replace(' ', '\0') if len(fact) < _WIDTH // 2 else fact for fact in facts]
  lines = textwrap.wrap(f'{key}: ' + ', '.join(whole), _WIDTH, subsequent_indent='  ',
                        break_long_words=False, break_on_hyphens=False)
  return tuple(line.replace('\0', ' ') for line in lines)


def _without_boxes(contents: Contents, objects: np.ndarray, total: int) -> list[str]:
  """Counts the images without anything to learn, for each reason."""
  any_box = np.bincount(contents.owners, minlength=total) > 0
  with_objects = np.bincount(contents.owners[objects], minlength=total) > 0
  counts = np.bincount(contents.no_boxes[~any_box], minlength=len(NO_BOXES))
  facts = [f'{n:,} {NO_BOXES[k]}' for k, n in enumerate(counts.tolist()) if n]
  crowds = int((any_box & ~with_objects).sum())
  return facts + ([f'{crowds:,} with crowds only'] if crowds else [])


def _classes(categories: Sequence[Category], counts: np.ndarray) -> str:
  present = np.argsort(-counts, kind='stable')
  present = present[counts[present] > 0]
  show = [f'{categories[k].name} {counts[k]:,}' for k in present.tolist()]
  which = ', '.join(show) if len(show) <= _FEW else f'from {show[0]} to {show[-1]}'
  return f'{counted(len(categories), "class")} ({which})'


def _warnings(contents: Contents) -> list[str]:
  lines = [str(contents.left_out)] if contents.left_out else []
  for tally, what in (
      (contents.clipped, '{} cut at the edge of the image'),
      (contents.merged, '{} repeated and counted once'),
      (Tally(len(contents.unreadable), tuple(why for _, why in contents.unreadable[:SHOWN])), '')):
    if tally:
      what = (what.format(counted(tally.count, 'box')) if what else
              f'{counted(tally.count, "image")} cannot be read and skipped')
      lines.append(f'{what}, such as: {tally.first[0]}')
  return [*lines, *contents.notes]


def _nothing(key: str, contents: Contents, objects: np.ndarray) -> str:
  total = len(contents.no_boxes)
  if not len(objects):
    reasons = _without_boxes(contents, objects, total)
    left_out = (contents.no_boxes == ALL_LEFT_OUT).any()
    return (f'{key}: nothing to learn from: no box in {counted(total, "image")} '
            f'({", ".join(reasons)})' + ('; see the boxes that were left out' if left_out else ''))
  if not objects.any():
    return (f'{key}: nothing to learn from: all {counted(len(objects), "box")} are crowds or '
            'difficult, which training ignores; correct iscrowd, or in Pascal VOC set '
            'difficult_as_crowd=False')
  if (contents.sides[objects] < 1).all():
    return (f'{key}: nothing to learn from: every box is smaller than a pixel of its image, at '
            f'most {contents.sides[objects].max():.3g} px; correct their units')
  return ''


def _some(names: Sequence[str]) -> str:
  return ', '.join(map(repr, names[:SHOWN])) + (', ...' if len(names) > SHOWN else '')
