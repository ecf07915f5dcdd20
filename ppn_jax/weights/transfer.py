"""Transfers weights of another model to a detector, class columns by class name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.weights.class_names import match_class_names
from ppn_jax.weights.names import Path

_SHOWN = 6  # Names that a line on the screen shows; config.json has all of them.

# Stands for the background in lists of column names. It differs from every class name, which is a
# string.
_BACKGROUND = None

# Path of a variable -> (indices along its last axis, values there).
PartialValues = Mapping[Path, tuple[np.ndarray, np.ndarray]]


class PretrainedWeights(NamedTuple):
  """Weights to start from, under this package's paths.

  Fields:
    origin: where they come from, for messages.
    description: the kind of model, for messages.
    values: NumPy arrays by path, such as ('params', 'backbone', 'conv2d_0', 'kernel').
    categories: classes in order of label, without a background; () if unknown.
    unnamed: why the classes are unknown or uncertain, and what to do about it; '' otherwise.
    unused: names of other tensors in the file, which no detector of this package has, by kind.
  """
  origin: str
  description: str
  values: Mapping[Path, np.ndarray]
  categories: tuple[Category, ...] = ()
  unnamed: str = ''
  unused: Mapping[str, Sequence[str]] = {}


class TransferReport(NamedTuple):
  """Report of which variables were transferred and which were not.

  Fields:
    origin, description: see `PretrainedWeights`.
    transferred: number of variables that were transferred, at least in part.
    partial: number of those that were transferred in part.
    total: number of variables that the detector has.
    classes: a line on class columns; '' if the weights have none.
    random: names of variables, or of whole layers, that keep their random values.
    mismatch: the first variable whose shapes differ, with both shapes; '' if there is none.
    unused: names of weights that were not transferred.
  """
  origin: str
  description: str
  transferred: int
  partial: int
  total: int
  classes: str
  random: tuple[str, ...]
  mismatch: str
  unused: tuple[str, ...]

  def lines(self, shown: int | None = None) -> tuple[str, ...]:
    """Returns the report in at most five lines, with at most `shown` names in each."""
    lines = [f'{self.origin}: {self.description}',
             f'used: {self.transferred} of {self.total} variables'
             + (f', {self.partial} of them in part' if self.partial else '')]
    if self.classes:
      lines.append(f'class columns: {self.classes}')
    if self.random:
      lines.append(f'random: {_abbreviated(self.random, shown)}'
                   + (f' ({self.mismatch})' if self.mismatch else ''))
    if self.unused:
      lines.append(f'unused: {_abbreviated(self.unused, shown)}')
    return tuple(lines)

  def __str__(self) -> str:
    """Returns the report for the screen, all lines but the first indented."""
    return '\n  '.join(self.lines(_SHOWN))


class TransferredWeights(NamedTuple):
  """Weights that fit a detector.

  Fields:
    variables: {'params': ..., 'batch_stats': ...}, NumPy; a subtree of the detector's variables.
    partial: entries of further variables.
    report: which variables were transferred and which were not.
  """
  variables: Mapping[str, Any]
  partial: PartialValues
  report: TransferReport


def transfer_weights(weights: PretrainedWeights, like: Mapping[str, Any],
                     categories: Sequence[Category], *, part: str = '',
                     class_names: Sequence[str] = ()) -> TransferredWeights:
  """Selects the variables that a detector has in the same shape.

  Class columns are transferred by class name, whatever their order and number, and the background
  column to the background column. Columns of other classes are left out. Class columns are found in
  variables `class_*` beside a `box_bias`, as in this package's heads. In a custom head without such
  a pair, variables `class_*` are transferred if both models have the same classes in the same
  order.

  Args:
    weights: the weights to transfer.
    like: the detector's variables, or their shapes.
    categories: the detector's classes, in order of label.
    part: only this part of the network, such as 'backbone'; '' is the whole network.
    class_names: see `match_class_names`.

  Raises:
    InputError: If no kernel fits, a selected value is not finite, or `class_names` are wrong.
  """
  matched = match_class_names([c.name for c in categories], [c.name for c in weights.categories],
                              class_names, origin=weights.origin)
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(like).items()}
  theirs = {path: value for path, value in weights.values.items() if part in ('', path[1])}
  values, partial, common = {}, {}, None
  for path, shape in shapes.items():
    if path not in theirs:
      continue
    if _is_class_variable(path):
      columns = _common_columns(path, shapes, categories, weights, matched)
      if columns is not None:
        to, source, common = columns
        if len(to) == shape[-1] and list(to) == list(source) == list(range(theirs[path].shape[-1])):
          values[path] = theirs[path]
        elif len(to):
          partial[path] = to, theirs[path][..., source]
    elif theirs[path].shape == shape:
      values[path] = theirs[path]
  for path in (*values, *partial):
    _check_value(weights.origin, path, theirs[path])
  transferred = values.keys() | partial.keys()
  mismatch = _mismatch(shapes, theirs, transferred)
  if not any('kernel' in path[-1] for path in transferred):
    what = f'the {part}' if part else 'the model'
    raise InputError(f'nothing in {weights.origin} ({weights.description}) fits {what} of this '
                     f'config' + (f': {mismatch}' if mismatch else ', which has other layers'))
  classes = ''
  if any(map(_is_class_variable, theirs)):
    classes = _describe_classes(weights, categories, common, matched)
  return TransferredWeights(unflatten_dict(values), partial, TransferReport(
      weights.origin, weights.description, len(transferred), len(partial), len(shapes), classes,
      _outermost(shapes.keys() - transferred, shapes), mismatch,
      (*_outermost(weights.values.keys() - transferred, weights.values),
       *(f'{len(group)} of {what}' for what, group in weights.unused.items()))))


def _is_class_variable(path: Path) -> bool:
  return path[1] == 'head' and path[-1].startswith('class')


def _common_columns(path: Path, shapes: Mapping[Path, tuple[int, ...]],
                    categories: Sequence[Category], weights: PretrainedWeights,
                    matched: Mapping[str | None, str | None]
                    ) -> tuple[np.ndarray, np.ndarray, set[str | None]] | None:
  """Finds the class columns that the detector and the weights have in common.

  A head lays the columns of a cell's anchors side by side: entry a * columns + c is anchor a's
  column c.

  Returns:
    Indices along the last axis of the detector's variable, the matching indices of the weights',
    and their names in the weights; None if a variable's shape does not match its classes.
  """
  theirs = weights.values[path].shape
  boxes = (*path[:-1], 'box_bias')
  matched = {_BACKGROUND: _BACKGROUND, **matched}
  names = {'here': [c.name for c in categories], 'there': [c.name for c in weights.categories]}
  if boxes not in shapes or boxes not in weights.values:
    if theirs != shapes[path] or [matched.get(n) for n in names['here']] != names['there']:
      return None
    return (*[np.arange(theirs[-1])] * 2, set(names['there']))
  anchors = shapes[boxes][0] // 4
  if (theirs[:-1] != shapes[path][:-1] or weights.values[boxes].shape != shapes[boxes]
      or theirs[-1] % anchors):
    return None
  here = _column_names(names['here'], shapes[path][-1] // anchors)
  # If the classes are unnamed, only the background column is known: TensorFlow's first.
  there = (_column_names(names['there'], theirs[-1] // anchors) if names['there']
           else [_BACKGROUND])
  if here is None or there is None:
    return None
  pairs = [(column, there.index(matched[name])) for column, name in enumerate(here)
           if name in matched and matched[name] in there]
  to, source = (
      np.array([anchor * count + pair[side] for anchor in range(anchors) for pair in pairs],
               np.int64)
      for side, count in enumerate((shapes[path][-1] // anchors, theirs[-1] // anchors)))
  return to, source, {there[column] for _, column in pairs}


def _column_names(classes: list[str], count: int) -> list[str | None] | None:
  """Returns the name of each of `count` class columns; None if they do not fit the classes."""
  background = count - len(classes)
  return [*[_BACKGROUND] * background, *classes] if background in (0, 1) else None


def _describe_classes(weights: PretrainedWeights, categories: Sequence[Category],
                      common: set[str | None] | None, matched: Mapping[str, str]) -> str:
  """Returns a line on which class columns were transferred, or why none were."""
  if common is None:
    return 'all random, since the heads differ'
  found = {c.name: matched[c.name] for c in categories
           if c.name in matched and matched[c.name] in common}
  transferred = [name if name == other else f'{name}={other}' for name, other in found.items()]
  random = [c.name for c in categories if c.name not in found]
  unused = [c.name for c in weights.categories if c.name not in common]
  parts = [f'{len(transferred)} of {len(categories)} by name'
           + (f' ({_abbreviated(transferred, _SHOWN)})' if transferred else '')]
  parts += ['the background'] if _BACKGROUND in common else []
  parts += [f'random: {_abbreviated(random, _SHOWN)}'] if random else []
  parts += [f'unused: {_abbreviated(unused, _SHOWN)}'] if unused else []
  return '; '.join([*parts, *([weights.unnamed] if weights.unnamed else [])])


def _mismatch(shapes: Mapping[Path, tuple[int, ...]], theirs: Mapping[Path, np.ndarray],
              transferred: Iterable[Path]) -> str:
  """Describes the first variable that both have in different shapes, kernels before others."""
  for path in sorted(shapes, key=lambda p: ('kernel' not in p[-1], p[-1].startswith('class'))):
    if path in theirs and path not in transferred and theirs[path].shape != shapes[path]:
      return (f'{"/".join(path[1:])} is {list(theirs[path].shape)} there and {list(shapes[path])} '
              'here')
  return ''


def _outermost(chosen: Iterable[Path], every: Iterable[Path]) -> tuple[str, ...]:
  """Returns the fewest names that cover the chosen variables: of whole layers where possible."""
  chosen, every = {p[1:] for p in chosen}, {p[1:] for p in every}
  others = every - chosen
  whole = {next(path[:n] for n in range(1, len(path) + 1)
                if not any(other[:n] == path[:n] for other in others)) for path in chosen}
  return tuple('/'.join(name) for name in sorted(whole, key=_naturally))


def _naturally(name: Sequence[str]) -> list[tuple[str, int]]:
  """Returns a sort key that puts conv2d_9 before conv2d_10."""
  parts = [layer.rpartition('_') for layer in name]
  return [(stem, int(number)) if number.isdecimal() else (f'{stem}_{number}', 0)
          for stem, _, number in parts]


def _check_value(origin: str, path: Path, value: np.ndarray) -> None:
  if not np.isfinite(value).all():
    raise InputError(f'{origin}: {"/".join(path[1:])} has values that are not finite; use '
                     'another step, or another file')


def _abbreviated(group: Sequence[str], shown: int | None) -> str:
  """Returns the first `shown` names of a group, all if None, and how many more there are."""
  left = 0 if shown is None else len(group) - shown
  return ', '.join(group[:shown]) + (f' and {left} more' if left > 0 else '')
