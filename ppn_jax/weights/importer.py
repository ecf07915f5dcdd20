"""Fills our variables with a file's tensors, and accounts for every one of both."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.errors import InputError
from ppn_jax.weights import labels, names
from ppn_jax.weights.fitting import Weights
from ppn_jax.weights.read import WeightFile

_MOST_COLUMNS = 100_000  # Classes, each of which gets a name; more are damage.
_SHOWN = 3  # How many names a message or a group of a report shows.
_LABELS = {'ppn': 'PPN', 'ssd': 'SSD', 'fpn': 'FPN'}
# What a whole detector may leave unused: blocks 12 and 13, which PPN does not read, and what is of
# training or of TensorFlow alone. Anything else would be another network.
_SPARE = ('block 12', 'block 13', 'moving averages', "the optimizer's", 'the global step',
          'other values', "the classifier's logits")


class Report(NamedTuple):
  """What became of the names.

  Fields:
    path: of the file.
    description: what it holds.
    matched: how many variables of ours were filled.
    unused: names of the file that were not, by what they are.
  """
  path: str
  description: str
  matched: int
  unused: dict[str, tuple[str, ...]]

  def __str__(self) -> str:
    """One line for what matched and one for each group that is unused."""
    count = sum(map(len, self.unused.values()))
    lines = [f'{self.path}: {self.description}',
             f'  matched {self.matched} of {self.matched} variables, missing 0, unused {count}'
             + (':' if count else '')]
    return '\n'.join(lines + [f'    {len(group)} of {what}: {_some(group)}'
                              for what, group in self.unused.items()])


class Imported(NamedTuple):
  """Values for some or all variables, and how they came about.

  Fields:
    variables: {'params': ..., 'batch_stats': ...}, NumPy float32; a part of a detector's tree.
    report: of the names.
  """
  variables: Mapping[str, Any]
  report: Report


def import_detector(file: WeightFile, like: Mapping[str, Any], *, average: bool = False
                    ) -> Imported:
  """All variables of a detector from a checkpoint of the TF Object Detection API.

  Args:
    file: what was read.
    like: the detector's variables, or their shapes.
    average: take the moving averages of the weights where the file has them.

  Raises:
    InputError: the file holds something else, lacks a variable, has one that the detector has
      no place for, or one of another shape or that is not finite.
  """
  contents, shapes = names.recognise(file.tensors), _shapes(like)
  kind = names.wanted_kind(shapes)
  if kind not in ('ppn', 'ssd'):
    raise InputError(f'whole detectors can be imported for PPN and SSD, not for '
                     f'{_LABELS.get(kind, "this model")}; import the backbone with --kind=backbone')
  if contents.kind != kind:
    hint = 'use --kind=backbone' if contents.kind in ('slim', 'keras') else (
        'use the config of that model' if contents.kind in _LABELS else 'give another file')
    raise InputError(f'{file.path} looks like {contents.description}, but the config is of '
                     f'a whole {_LABELS[kind]} detector; {hint}')
  imported = _fill(file, contents, shapes, names.detector_name, average)
  for what, group in imported.report.unused.items():
    if what not in _SPARE:
      raise InputError(f'{file.path} is of another {_LABELS[kind]} than the config describes: '
                       f'there is no place for {len(group)} of its variables: {_some(group)}')
  return imported


def import_backbone(file: WeightFile, like: Mapping[str, Any], *, average: bool = False
                    ) -> Imported:
  """The backbone's variables from a detector, a slim classifier or Keras' MobileNet.

  Args, Raises: as for `import_detector`; what the backbone has no place for is unused.
  """
  contents, shapes = names.recognise(file.tensors), _shapes(like)
  if contents.kind == 'unknown':
    raise InputError(_unknown(file, contents))
  shapes = {path: shape for path, shape in shapes.items() if path[1] == 'backbone'}
  return _fill(file, contents, shapes, _backbone_names(contents), average)


def _unknown(file: WeightFile, contents: names.Contents) -> str:
  return (f"{file.path} looks like {contents.description}; a backbone is read from slim's or "
          "Keras' MobileNet-v1, or from a detector with one")


def named_values(file: WeightFile, like: Mapping[str, Any]) -> Weights:
  """Everything in a file that the detector has a name for, whatever its shape, for `fitting.fit`.

  Classes are COCO's where there are 90; files name no others.

  Raises:
    InputError: the file holds no network that is known, or one without its batch norm.
  """
  contents, shapes = names.recognise(file.tensors), _shapes(like)
  if contents.kind == 'unknown':
    raise InputError(_unknown(file, contents))
  name_of = _backbone_names(contents)
  found = {path: names.find(contents.root + pattern, file.tensors)
           for path in shapes if (pattern := name_of(path))}
  missing = [contents.root + name_of(path) for path, name in found.items() if name is None]
  sources = {path: name for path, name in found.items() if name}
  if _is_folded(file, missing) and not any(path[-2] == 'norm' for path in sources):
    raise InputError(_missing(file, contents, missing, len(shapes)))
  values = {path: _value(file, name, path) for path, name in sources.items()}
  categories, unnamed = (), ''
  if contents.kind in ('ppn', 'ssd', 'fpn'):
    unnamed = ('the file does not name its classes: import it with a --label_map and start from '
               'that run')
    if any(path[-1] == 'class_bias' for path in sources) and (
        class_columns(file) == labels.COCO_CLASSES + 1):
      categories, _ = labels.detector_categories(labels.COCO_CLASSES, None)
      unnamed = "the 90 of the file are taken to be COCO's"
  return Weights(file.path, contents.description, values, categories, unnamed,
                 _unused(file, sources.values()))


def _backbone_names(contents: names.Contents) -> Callable[[names.Path], str | None]:
  """Our path -> the name of a variable in a file of this kind."""
  return {'keras': names.keras_name, 'slim': names.slim_name}.get(
      contents.kind, names.detector_name)


def class_columns(file: WeightFile) -> int:
  """Class columns for each anchor of a detector's head, a background's included.

  Raises:
    InputError: the file has no such head.
  """
  contents = names.recognise(file.tensors)
  head = ('head', 'level_0') if contents.kind == 'ssd' else ('head',)
  pair = [file.tensors.get(contents.root + names.detector_name(('params', *head, leaf)))
          for leaf in ('class_bias', 'box_bias')]
  if any(t is None or t.ndim != 1 or not t.size for t in pair):
    raise InputError(f'{file.path} looks like {contents.description}, without a class head of PPN '
                     'or SSD to count classes in' + (
                         '; use --kind=backbone' if contents.kind in ('slim', 'keras') else ''))
  columns, rest = divmod(4 * pair[0].size, pair[1].size)
  if rest or columns > _MOST_COLUMNS:
    raise InputError(f'{file.path}: {pair[0].size} class and {pair[1].size} box biases are of '
                     + ('different numbers of anchors' if rest else
                        f'{columns:,} classes, which is too many; is the file damaged?'))
  return columns


def _shapes(tree: Mapping[str, Any]) -> dict[names.Path, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree).items()}


def _fill(file: WeightFile, contents: names.Contents, shapes: Mapping[names.Path, tuple[int, ...]],
          name_of: Callable[[names.Path], str | None], average: bool) -> Imported:
  """A value for each path; raises InputError, naming the first that has none."""
  if average and not any(n.endswith(names.AVERAGE) for n in file.tensors):
    raise InputError(f'{file.path} has no moving averages of its weights; leave out --average')
  sources, missing = {}, []
  for path in shapes:
    pattern = name_of(path)
    if pattern is None:
      raise InputError(f'{"/".join(path)} has no counterpart in {contents.description}')
    found = names.find(contents.root + pattern, file.tensors)
    if found is None:
      missing.append(contents.root + pattern.replace('#', '{depth}'))
    elif average and found + names.AVERAGE in file.tensors:
      found += names.AVERAGE
    sources[path] = found
  if missing:
    raise InputError(_missing(file, contents, missing, len(shapes)))
  _check_shapes(file, sources, shapes)
  values = {path: _value(file, source, path) for path, source in sources.items()}
  # What an average stands in for has its place too.
  used = {*sources.values(), *(s.removesuffix(names.AVERAGE) for s in sources.values())}
  return Imported(unflatten_dict(values), Report(
      file.path, contents.description, len(values), _unused(file, used)))


def _unused(file: WeightFile, used: Iterable[str]) -> dict[str, tuple[str, ...]]:
  """Names of the other tensors, by what they are."""
  unused: dict[str, list[str]] = {}
  for name in sorted(set(file.tensors) - set(used)):
    unused.setdefault(names.group(name), []).append(name)
  return {what: tuple(unused[what]) for what in sorted(unused, key=_naturally)}


def _missing(file: WeightFile, contents: names.Contents, missing: Sequence[str], total: int) -> str:
  line = (f'{file.path}: {contents.description}, but {len(missing)} of the {total} variables '
          f'that the config asks for are missing: {_some(missing)}')
  if _is_folded(file, missing):
    line += '; batch norm seems to be folded into the convolutions, so import the checkpoint'
  elif all('/PredictionTower/conv2d_0/BatchNorm/' in name for name in missing):
    line += ('; in checkpoints each level of PPN has a norm of its own '
             '(model.head.norm_per_level=True)')
  return line


def _is_folded(file: WeightFile, missing: Sequence[str]) -> bool:
  """Whether a graph lacks batch norm alone, as after an optimisation for inference."""
  return (file.kind == 'frozen graph' and bool(missing)
          and all('/BatchNorm/' in name for name in missing))


def _check_shapes(file: WeightFile, sources: Mapping[names.Path, str],
                  shapes: Mapping[names.Path, tuple[int, ...]]) -> None:
  for path, source in sorted(sources.items(), key=_kernels_first):
    there, here = _arranged(file.tensors[source], path).shape, shapes[path]
    if there != here:
      line = (f'{file.path}: {source} is {list(file.tensors[source].shape)}, but '
              f'{"/".join(path)} of the config\'s model is {list(here)}')
      if path[1] == 'head' and path[-1].startswith('class'):
        line += _columns_hint(class_columns(file), path, shapes)
      elif path[1] == 'backbone' and there[:3] == here[:3]:
        line += '; is model.backbone.depth_multiplier that of the file?'
      raise InputError(line)


def _kernels_first(item: tuple[names.Path, str]) -> tuple[bool, int, bool]:
  """Sorts what says most about a network to the front: kernels, along the way of an image."""
  (collection, part, *_, leaf), _ = item
  return collection != 'params', ('backbone', 'neck', 'head').index(part), 'kernel' not in leaf


def _columns_hint(theirs: int, path: names.Path,
                  shapes: Mapping[names.Path, tuple[int, ...]]) -> str:
  """What to set for a class head of `theirs` columns to fit."""
  size = {what: shapes[(*path[:-1], f'{what}_bias')][0] for what in ('class', 'box')}
  ours = 4 * size['class'] // size['box']
  line = f', which are {theirs} and {ours} class columns for an anchor'
  if theirs == ours:
    return line + ', on different numbers of anchors'
  if theirs == ours + 1:
    return line + ': the file has a background column, so set model.background_column=True'
  if theirs == ours - 1:
    return (line + f': set model.num_classes={theirs - 1} if the first of theirs is the '
            'background, or model.background_column=False if they have none')
  return line + '; set model.num_classes to 0 to take theirs'


def _arranged(tensor: np.ndarray, path: names.Path) -> np.ndarray:
  """A tensor with its axes in our order: depthwise kernels are [3, 3, C, 1] elsewhere."""
  if path[-2:] == ('depthwise', 'kernel') and tensor.ndim == 4:
    return np.swapaxes(tensor, 2, 3)
  return tensor


def _value(file: WeightFile, source: str, path: names.Path) -> np.ndarray:
  tensor = file.tensors[source]
  if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != 'bfloat16':
    raise InputError(f'{file.path}: {source} is {tensor.dtype}, which is no type of weights')
  with np.errstate(over='ignore'):
    value = np.array(_arranged(tensor, path), np.float32, order='C')
  if not np.isfinite(value).all():
    raise InputError(f'{file.path}: {source} has values that are not finite')
  if path[-1] == 'var' and value.min(initial=0) < 0:
    raise InputError(f'{file.path}: {source} is a variance and has negative values')
  return value


def _some(group: Sequence[str]) -> str:
  return ', '.join(group[:_SHOWN]) + (', ...' if len(group) > _SHOWN else '')


def _naturally(what: str) -> tuple[str, int]:
  """Sorts 'block 9' before 'block 10'."""
  name, _, number = what.rpartition(' ')
  return (name, int(number)) if number.isdecimal() else (what, 0)
