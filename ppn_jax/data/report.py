"""What a data set has to learn from, and what is wrong with it, in lines for people."""

import collections
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.contents import ALL_LEFT_OUT, SHOWN, WITHOUT, Contents, Tally
from ppn_jax.data.source import Source
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

_WIDTH = 80
_FEW = 6  # Classes that are listed one by one.


class Report(NamedTuple):
  """What a data set holds.

  Attributes:
    facts: its images, boxes and classes, in a line or two.
    warnings: what was done to boxes and what is wrong, a line each, with an example.
    nothing: why there is nothing to learn from it; '' if there is something.
  """
  facts: tuple[str, ...]
  warnings: tuple[str, ...]
  nothing: str

  @property
  def lines(self) -> tuple[str, ...]:
    """All of it."""
    return (*self.facts, *self.warnings, *((self.nothing,) if self.nothing else ()))


def report(source: Source, key: str, *, image_size: int = 0, ignore_crowd: bool = True) -> Report:
  """Reports on a data set by its annotations alone; no image is read.

  Args:
    source: the data set.
    key: what to call it, such as 'data.train'.
    image_size: side of the network's input in pixels, for a set that is trained on; 0 for one
      that is only evaluated on, in which classes may lack boxes and all boxes may be absent.
    ignore_crowd: whether crowds are neither trained on nor asked for; the config's
      `matching.ignore_crowd`.

  Raises:
    InputError: the source's `ground_truth` is not what `sources.Source` asks for.
  """
  contents = contents_of(source)
  if contents is None:
    return Report((f'{key}: {len(source):,} images',), (), '')
  asked = ~contents.crowd if ignore_crowd else np.ones(len(contents.crowd), bool)
  counts = np.bincount(contents.labels[asked], minlength=len(source.categories))
  facts = [_count(len(source), 'image'), *_without_boxes(contents, asked, len(source)),
           _count(int(asked.sum()), 'box')]
  if not asked.all():
    facts.append(_count(int((~asked).sum()), 'crowd'))
  if image_size and asked.any():
    sides = np.sqrt(contents.shares[asked].prod(axis=-1)) * image_size
    facts += [_classes(source.categories, counts),
              f'median side {np.median(sides):,.3g} px at {image_size} px']
  warnings = _warnings(contents)
  if image_size and asked.any() and (counts == 0).any():
    absent = [c.name for c, n in zip(source.categories, counts, strict=True) if not n]
    warnings.append(f'no box of {_count(len(absent), "class")}, which cannot be learned: '
                    f'{_some(absent)}')
  return Report(_wrap(key, facts), tuple(f'{key}: {line}' for line in warnings),
                _nothing(key, contents, asked) if image_size else '')


def check_learnable(found: Report) -> None:
  """Raises InputError if there is nothing to learn from the data set of a report."""
  if found.nothing:
    raise InputError(found.nothing)


def contents_of(source: Source) -> Contents | None:
  """The source's own account, or what its `ground_truth` tells; None if it has neither.

  Raises:
    InputError: see `report`.
  """
  if hasattr(source, 'contents'):
    return source.contents
  if not hasattr(source, 'ground_truth'):
    return None
  truth = source.ground_truth()
  try:
    place = {image['id']: i for i, image in enumerate(truth['images'])}
    label = {c.id: k for k, c in enumerate(source.categories)}
    sizes = np.array([(i['height'], i['width']) for i in truth['images']], np.float64)
    rows = truth['annotations']
    owners = np.array([place[a['image_id']] for a in rows], np.int64)
    labels = np.array([label[a['category_id']] for a in rows], np.int32)
    sides = np.array([a['bbox'][3:1:-1] for a in rows], np.float64).reshape(-1, 2)
    crowd = np.array([bool(a.get('iscrowd')) for a in rows], bool)
  except (KeyError, TypeError, ValueError, IndexError) as e:
    raise InputError(f'{type(source).__name__}.ground_truth() is no COCO instances dict: '
                     f'{type(e).__name__} {e}') from e
  if len(place) != len(source):
    raise InputError(f'{type(source).__name__}.ground_truth() lists {len(place)} images, but the '
                     f'source has {len(source)}')
  seen = collections.Counter((a['image_id'], a['category_id'], bool(a.get('iscrowd')),
                              *a['bbox']) for a in rows)
  again = [box for box, n in seen.items() if n > 1]
  notes = () if not again else (
      f'{_count(len(rows) - len(seen), "box")} listed again, such as {list(again[0][3:])} (x, y, '
      f'width, height) in image {again[0][0]}',)
  return Contents(np.zeros(len(place), np.int8), owners, labels, crowd,
                  sides / sizes.reshape(-1, 2)[owners], sides, notes=notes)


def _wrap(key: str, facts: Sequence[str]) -> tuple[str, ...]:
  """Facts in lines for a terminal; short ones are not torn apart."""
  whole = [fact.replace(' ', '\0') if len(fact) < _WIDTH // 2 else fact for fact in facts]
  lines = textwrap.wrap(f'{key}: ' + ', '.join(whole), _WIDTH, subsequent_indent='  ',
                        break_long_words=False, break_on_hyphens=False)
  return tuple(line.replace('\0', ' ') for line in lines)


def _without_boxes(contents: Contents, asked: np.ndarray, total: int) -> list[str]:
  """How many images have nothing to learn, for each reason."""
  any_box = np.bincount(contents.owners, minlength=total) > 0
  asked_for = np.bincount(contents.owners[asked], minlength=total) > 0
  counts = np.bincount(contents.without[~any_box], minlength=len(WITHOUT))
  facts = [f'{n:,} {WITHOUT[k]}' for k, n in enumerate(counts.tolist()) if n]
  crowds = int((any_box & ~asked_for).sum())
  return facts + ([f'{crowds:,} with crowds only'] if crowds else [])


def _classes(categories: Sequence[Category], counts: np.ndarray) -> str:
  there = np.argsort(-counts, kind='stable')
  there = there[counts[there] > 0]
  show = [f'{categories[k].name} {counts[k]:,}' for k in there.tolist()]
  which = ', '.join(show) if len(show) <= _FEW else f'from {show[0]} to {show[-1]}'
  return f'{_count(len(categories), "class")} ({which})'


def _warnings(contents: Contents) -> list[str]:
  lines = [str(contents.left_out)] if contents.left_out else []
  for tally, what in (
      (contents.clipped, '{} over the edge cut there'),
      (contents.merged, '{} listed again and counted once'),
      (Tally(len(contents.unreadable), tuple(why for _, why in contents.unreadable[:SHOWN])), '')):
    if tally:
      what = (what.format(_count(tally.count, 'box')) if what else
              f'{_count(tally.count, "image")} cannot be read and skipped')
      lines.append(f'{what}, such as: {tally.first[0]}')
  return [*lines, *contents.notes]


def _nothing(key: str, contents: Contents, asked: np.ndarray) -> str:
  total = len(contents.without)
  if not len(asked):
    reasons = _without_boxes(contents, asked, total)
    left_out = (contents.without == ALL_LEFT_OUT).any()
    return (f'{key}: nothing to learn from: no box in {_count(total, "image")} '
            f'({", ".join(reasons)})' + ('; see the boxes that were left out' if left_out else ''))
  if not asked.any():
    return (f'{key}: nothing to learn from: all {_count(len(asked), "box")} are crowds or '
            'difficult, which are passed over in training; correct iscrowd, or in Pascal VOC set '
            'difficult_as_crowd=False')
  if (contents.sides[asked] < 1).all():
    return (f'{key}: nothing to learn from: every box is smaller than a pixel of its image, at '
            f'most {contents.sides[asked].max():.3g} px; correct their units')
  return ''


def _count(n: int, what: str) -> str:
  plural = {'box': 'boxes', 'class': 'classes'}.get(what, f'{what}s')
  return f'{n:,} {what if n == 1 else plural}'


def _some(names: Sequence[str]) -> str:
  return ', '.join(map(repr, names[:SHOWN])) + (', ...' if len(names) > SHOWN else '')
