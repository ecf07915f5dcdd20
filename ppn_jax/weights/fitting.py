"""Fits weights of another model to a detector: by path and shape, class columns by class name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.weights.names import Path

_SHOWN = 6  # How many names a line on the screen shows; the record has all.

# A column's name where it is the background's, which no class can have: class names are texts.
_BACKGROUND = None

# {path: (which of the last axis's entries, their values)}
Columns = Mapping[Path, tuple[np.ndarray, np.ndarray]]


class Weights(NamedTuple):
  """Weights to start from, under our paths.

  Fields:
    origin: where they are from, for messages.
    description: what they are of.
    values: path -> NumPy array, such as ('params', 'backbone', 'conv2d_0', 'kernel').
    categories: class of each label, without a background; () where they are not known.
    unnamed: why they are not known, or not for certain, and what helps; '' where they are.
    unused: what else was there, which no detector of ours has, by what it is.
  """
  origin: str
  description: str
  values: Mapping[Path, np.ndarray]
  categories: tuple[Category, ...] = ()
  unnamed: str = ''
  unused: Mapping[str, Sequence[str]] = {}


class FitReport(NamedTuple):
  """What was taken of some weights, what was not, and what is fresh.

  Fields:
    origin, description: of `Weights`.
    taken: how many variables were taken, at least in part.
    in_part: how many of them in part.
    total: how many the detector has.
    classes: on class columns, '' where there are none.
    fresh: names of variables, or of whole layers, that keep their random values.
    mismatch: the first that is of another shape, with both shapes; '' if there is none.
    unused: names of what was not taken.
  """
  origin: str
  description: str
  taken: int
  in_part: int
  total: int
  classes: str
  fresh: tuple[str, ...]
  mismatch: str
  unused: tuple[str, ...]

  def recorded(self) -> tuple[str, ...]:
    """Returns the report in at most five lines, with all names."""
    return self._lines(None)

  def __str__(self) -> str:
    """Returns the report in at most five lines, of which only the first is not indented."""
    first, *others = self._lines(_SHOWN)
    return '\n  '.join([first, *others])

  def _lines(self, shown: int | None) -> tuple[str, ...]:
    lines = [f'{self.origin}: {self.description}',
             f'taken: {self.taken} of {self.total} variables'
             + (f', {self.in_part} of them in part' if self.in_part else '')]
    if self.classes:
      lines.append(f'class columns: {self.classes}')
    if self.fresh:
      lines.append(f'fresh: {_some(self.fresh, shown)}'
                   + (f' ({self.mismatch})' if self.mismatch else ''))
    if self.unused:
      lines.append(f'unused: {_some(self.unused, shown)}')
    return tuple(lines)


class Fitted(NamedTuple):
  """What a detector starts from.

  Fields:
    variables: {'params': ..., 'batch_stats': ...}, NumPy; a part of the detector's tree.
    columns: parts of further variables, along their last axis.
    report: what was taken and what was not.
  """
  variables: Mapping[str, Any]
  columns: Columns
  report: FitReport


def fit(weights: Weights, like: Mapping[str, Any], categories: Sequence[Category], *,
        part: str = '') -> Fitted:
  """Takes all variables that a detector has too, in the same shape.

  Class columns are carried over by the name of their class, the background's by its role, whatever
  their order and number; those of other classes stay fresh. They are looked for where heads have
  them: variables `class_*`, beside a `box_bias`. In a head of the user's own that has no such pair,
  variables `class_*` are taken if both have the same classes in the same order.

  Args:
    weights: to take from.
    like: the detector's variables, or their shapes.
    categories: the detector's classes, in order of label.
    part: take only this part of the network, such as 'backbone'; '' takes all.

  Raises:
    InputError: No kernel fits, or a value that would be taken is not finite.
  """
  wanted = {path: tuple(leaf.shape) for path, leaf in flatten_dict(like).items()}
  theirs = {path: value for path, value in weights.values.items() if part in ('', path[1])}
  values, columns, carried = {}, {}, None
  for path, shape in wanted.items():
    if path not in theirs:
      continue
    if _is_of_classes(path):
      pair = _carried(path, wanted, categories, weights)
      if pair is not None:
        to, of, carried = pair
        if len(to) == shape[-1] and list(to) == list(of) == list(range(theirs[path].shape[-1])):
          values[path] = theirs[path]
        elif len(to):
          columns[path] = to, theirs[path][..., of]
    elif theirs[path].shape == shape:
      values[path] = theirs[path]
  for path in (*values, *columns):
    _check_value(weights.origin, path, theirs[path])
  taken = values.keys() | columns.keys()
  mismatch = _mismatch(wanted, theirs, taken)
  if not any('kernel' in path[-1] for path in taken):
    what = f'the {part}' if part else 'the model'
    raise InputError(f'nothing in {weights.origin} ({weights.description}) fits {what} of this '
                     f'config' + (f': {mismatch}' if mismatch else ', which has other layers'))
  return Fitted(unflatten_dict(values), columns, FitReport(
      weights.origin, weights.description, len(taken), len(columns), len(wanted),
      _describe_classes(weights, categories, carried) if any(map(_is_of_classes, theirs)) else '',
      _outermost(wanted.keys() - taken, wanted), mismatch,
      (*_outermost(weights.values.keys() - taken, weights.values),
       *(f'{len(group)} of {what}' for what, group in weights.unused.items()))))


def _is_of_classes(path: Path) -> bool:
  return path[1] == 'head' and path[-1].startswith('class')


def _carried(path: Path, wanted: Mapping[Path, tuple[int, ...]], categories: Sequence[Category],
             weights: Weights) -> tuple[np.ndarray, np.ndarray, set[str | None]] | None:
  """(entries of our last axis, those of theirs, names of the columns) of a variable of classes.

  A head lays the columns of a cell's anchors side by side: entry a * columns + c is anchor a's
  column c. None if the variables have other shapes than those of their classes.
  """
  theirs = weights.values[path].shape
  boxes = (*path[:-1], 'box_bias')
  names = {'here': [c.name for c in categories], 'there': [c.name for c in weights.categories]}
  if boxes not in wanted or boxes not in weights.values:
    if theirs != wanted[path] or names['here'] != names['there']:
      return None
    return (*[np.arange(theirs[-1])] * 2, set(names['here']))
  anchors = wanted[boxes][0] // 4
  if (theirs[:-1] != wanted[path][:-1] or weights.values[boxes].shape != wanted[boxes]
      or theirs[-1] % anchors):
    return None
  here = _column_names(names['here'], wanted[path][-1] // anchors)
  # Of classes that are not named only the background is known, the first in TensorFlow's.
  there = (_column_names(names['there'], theirs[-1] // anchors) if names['there']
           else [_BACKGROUND])
  if here is None or there is None:
    return None
  pairs = [(column, there.index(name)) for column, name in enumerate(here) if name in there]
  to, of = (np.array([anchor * count + pair[side] for anchor in range(anchors) for pair in pairs],
                     np.int64)
            for side, count in enumerate((wanted[path][-1] // anchors, theirs[-1] // anchors)))
  return to, of, {here[column] for column, _ in pairs}


def _column_names(classes: list[str], count: int) -> list[str | None] | None:
  """What each of `count` columns is of; None if they are not those of the classes."""
  background = count - len(classes)
  return [*[_BACKGROUND] * background, *classes] if background in (0, 1) else None


def _describe_classes(weights: Weights, categories: Sequence[Category],
                      carried: set[str | None] | None) -> str:
  """One line on which columns are carried over, or why none is."""
  if carried is None:
    return 'all fresh, since the heads differ'
  taken = [c.name for c in categories if c.name in carried]
  fresh = [c.name for c in categories if c.name not in carried]
  left = [c.name for c in weights.categories if c.name not in carried]
  said = [f'{len(taken)} of {len(categories)} by name' + (f' ({_some(taken, _SHOWN)})'
                                                          if taken else '')]
  said += ['the background'] if _BACKGROUND in carried else []
  said += [f'fresh: {_some(fresh, _SHOWN)}'] if fresh else []
  said += [f'unused: {_some(left, _SHOWN)}'] if left else []
  return '; '.join([*said, *([weights.unnamed] if weights.unnamed else [])])


def _mismatch(wanted: Mapping[Path, tuple[int, ...]], theirs: Mapping[Path, np.ndarray],
              taken: Iterable[Path]) -> str:
  """One variable that both have, in different shapes; kernels come first."""
  for path in sorted(wanted, key=lambda p: ('kernel' not in p[-1], p[-1].startswith('class'))):
    if path in theirs and path not in taken and theirs[path].shape != wanted[path]:
      return (f'{"/".join(path[1:])} is {list(theirs[path].shape)} there and {list(wanted[path])} '
              'here')
  return ''


def _outermost(chosen: Iterable[Path], every: Iterable[Path]) -> tuple[str, ...]:
  """Names of layers all of whose variables are chosen, else of variables; as few as will do."""
  chosen, every = {p[1:] for p in chosen}, {p[1:] for p in every}
  others = every - chosen
  whole = {next(path[:n] for n in range(1, len(path) + 1)
                if not any(other[:n] == path[:n] for other in others)) for path in chosen}
  return tuple('/'.join(name) for name in sorted(whole, key=_naturally))


def _naturally(name: Sequence[str]) -> list[tuple[str, int]]:
  """Sorts conv2d_9 before conv2d_10."""
  parts = [layer.rpartition('_') for layer in name]
  return [(stem, int(number)) if number.isdecimal() else (f'{stem}_{number}', 0)
          for stem, _, number in parts]


def _check_value(origin: str, path: Path, value: np.ndarray) -> None:
  if not np.isfinite(value).all():
    raise InputError(f'{origin}: {"/".join(path[1:])} has values that are not finite; take '
                     'another step, or another file')


def _some(group: Sequence[str], shown: int | None) -> str:
  left = 0 if shown is None else len(group) - shown
  return ', '.join(group[:shown]) + (f' and {left} more' if left > 0 else '')
