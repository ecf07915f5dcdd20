"""Imports the tensors of other frameworks' files as variables, and accounts for every name."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.errors import InputError
from ppn_jax.models.mobilenet_v1 import MIN_DEPTH
from ppn_jax.weights import labels, names
from ppn_jax.weights.architecture import describe, model_settings
from ppn_jax.weights.read import WeightFile
from ppn_jax.weights.transfer import PretrainedWeights

_MOST_COLUMNS = 100_000  # Class columns; a larger number means a damaged file.
_SHOWN = 3  # Names that a message, or a group in a report, shows.
_LABELS = {'ppn': 'PPN', 'ssd': 'SSD', 'fpn': 'FPN'}
# Kinds whose necks and heads have other layers than ours, even if some have the same names.
_OTHER_LAYERS = ('fpn', 'ssdlite')
# Groups of names that may be unused when a whole detector is imported: blocks 12 and 13, which PPN
# does not have, and values for training or for TensorFlow only. Others mean a different network.
_MAY_BE_UNUSED = ('block 12', 'block 13', 'moving averages', "the optimizer's", 'the global step',
          'other values', "the classifier's logits")


class ImportReport(NamedTuple):
  """Report of which names were used.

  Fields:
    path: path of the file.
    description: the network in it.
    matched: number of variables that were filled.
    unused: names in the file that were not used, by kind.
  """
  path: str
  description: str
  matched: int
  unused: dict[str, tuple[str, ...]]

  def __str__(self) -> str:
    """Returns a line on the variables that matched, and one for each group of unused names."""
    count = sum(map(len, self.unused.values()))
    lines = [f'{self.path}: {self.description}',
             f'  matched {self.matched} of {self.matched} variables, missing 0, unused {count}'
             + (':' if count else '')]
    return '\n'.join(lines + [f'    {len(group)} of {what}: {_abbreviated(group)}'
                              for what, group in self.unused.items()])


class ImportedWeights(NamedTuple):
  """Values for some or all variables of a detector.

  Fields:
    variables: {'params': ..., 'batch_stats': ...}, NumPy float32; a subtree of the detector's
      variables.
    report: which names were used.
  """
  variables: Mapping[str, Any]
  report: ImportReport


def recognise(file: WeightFile) -> names.Contents:
  """Returns which known network a file holds."""
  contents = names.recognise(file.tensors)
  return contents._replace(description=file.description or contents.description)


def import_detector(file: WeightFile, like: Mapping[str, Any], *, average: bool = False
                    ) -> ImportedWeights:
  """Imports all variables of a detector from a checkpoint of the TF Object Detection API.

  Args:
    file: the tensors that were read.
    like: the detector's variables, or their shapes.
    average: whether to use the moving averages of the weights where the file has them.

  Raises:
    InputError: If the file holds a different network, lacks a variable, has one that the detector
      lacks, or one whose shape differs or whose values are not finite.
  """
  contents, shapes = recognise(file), _shapes(like)
  check_layers(file)
  kind = names.detector_kind(shapes)
  if kind not in ('ppn', 'ssd'):
    raise InputError(f'only PPN and SSD can be imported as whole detectors, not '
                     f'{_LABELS.get(kind, "this model")}; import the backbone with --kind=backbone')
  _check_network(file, contents, shapes)
  if contents.kind != kind:
    hint = 'use --kind=backbone' if contents.kind in ('slim', 'keras') else (
        'use the config of that model' if contents.kind in _LABELS else 'give another file')
    raise InputError(f'{file.path} looks like {contents.description}, but the config '
                     f'describes a whole {_LABELS[kind]} detector; {hint}')
  imported = _fill(file, contents, shapes, _backbone_names(contents), average)
  for what, group in imported.report.unused.items():
    if what not in _MAY_BE_UNUSED:
      raise InputError(f'{file.path} holds a {_LABELS[kind]} that differs from the config, which '
                       f'has no place for {len(group)} of its variables: {_abbreviated(group)}')
  return imported


def import_backbone(file: WeightFile, like: Mapping[str, Any], *, average: bool = False
                    ) -> ImportedWeights:
  """Imports the backbone's variables from a detector, a slim classifier or Keras' MobileNet.

  Args and errors are those of `import_detector`. Variables that the backbone lacks are unused.
  """
  contents, shapes = recognise(file), _shapes(like)
  if contents.kind == 'unknown':
    raise InputError(_unknown(file, contents))
  _check_network(file, contents, shapes)
  shapes = {path: shape for path, shape in shapes.items() if path[1] == 'backbone'}
  return _fill(file, contents, shapes, _backbone_names(contents), average)


def check_layers(file: WeightFile) -> None:
  """Raises InputError for a detector of other layers, whose backbone alone can be imported."""
  contents = recognise(file)
  if contents.kind not in _OTHER_LAYERS:
    return
  config = 'fpn_mobilenet_v1_coco' if contents.kind == 'fpn' else 'ssd_mobilenet_v1_coco'
  if contents.network != 'MobilenetV1':
    config += (f' --config.model.backbone.name={names.NETWORKS[contents.network][2]}'
               ' --config.model.backbone.last_stride=32')
    if contents.kind == 'fpn':
      config += ' --config.model.backbone.endpoint=output'
  raise InputError(
      f'{file.path} looks like {contents.description}, whose pyramid and predictor have other '
      f"layers than this package's {contents.kind[:3].upper()}; its backbone can be taken: `ppn "
      f'train --config={config} --config.init.backbone={file.path}`')


def _unknown(file: WeightFile, contents: names.Contents) -> str:
  """Returns the error message for a file with an unknown network."""
  return (f"{file.path} looks like {contents.description}; a backbone can be read from "
          "slim's or Keras' MobileNet, or from a detector with one")


def _check_network(file: WeightFile, contents: names.Contents,
                   shapes: Mapping[names.Path, tuple[int, ...]]) -> None:
  """Raises InputError if the backbone of the config is another version of MobileNet."""
  here = names.backbone_network(shapes)
  if here is not None and contents.kind != 'unknown' and here != contents.network:
    raise InputError(f'{file.path} looks like a {names.in_words(contents.network)}, but the '
                     f"config's backbone is a {names.in_words(here)}; set "
                     f'model.backbone.name={names.NETWORKS[contents.network][2]}'
                     + _last_stride_hint(contents.network, shapes))


def _last_stride_hint(network: str, shapes: Mapping[names.Path, tuple[int, ...]]) -> str:
  """Returns the option that another backbone needs if that of the config ends at stride 32."""
  last = ('params', 'backbone', 'conv2d_13', 'depthwise', 'kernel')
  return ' model.backbone.last_stride=32' if network != 'MobilenetV1' and last in shapes else ''


def import_matching(file: WeightFile, like: Mapping[str, Any]) -> PretrainedWeights:
  """Imports all tensors whose name the detector also has, whatever their shape.

  Files do not name their classes; 90 of them are taken to be COCO's. `transfer_weights` then
  selects the values that fit.

  Raises:
    InputError: If the file holds no known network, or one without its batch norm.
  """
  contents, shapes = recognise(file), _shapes(like)
  if contents.kind == 'unknown':
    raise InputError(_unknown(file, contents))
  _check_network(file, contents, shapes)
  if contents.kind in _OTHER_LAYERS:  # Layers of the same name mean something else.
    shapes = {path: shape for path, shape in shapes.items() if path[1] == 'backbone'}
  name_of = _backbone_names(contents)
  found = {path: names.find(contents.root + pattern, file.tensors)
           for path in shapes if (pattern := name_of(path))}
  missing = [contents.root + name_of(path) for path, name in found.items() if name is None]
  sources = {path: name for path, name in found.items() if name}
  if _is_folded(file, missing) and not any(path[-2] == 'norm' for path in sources):
    raise InputError(_missing(file, contents, missing, len(shapes)))
  values = {path: _value(file, name, path) for path, name in sources.items()}
  settings = _settings_that_differ(file, shapes)
  if any(key.startswith('model.backbone.') for key in settings):
    raise InputError(f'{file.path} ({contents.description}) does not fit the backbone of this '
                     f'config; set {describe(settings)}')
  categories, unnamed = (), ''
  if contents.kind in ('ppn', 'ssd', 'fpn'):
    unnamed = ('the file does not name its classes: import it with a --label_map and start from '
               'that run')
    if any(path[-1] == 'class_bias' for path in sources):
      columns = class_columns(file)
      if file.labels and columns - len(file.labels) in (0, 1):
        categories, _ = labels.detector_categories(len(file.labels), None, names=file.labels)
        unnamed = ''
      elif columns == labels.COCO_CLASSES + 1:
        categories, _ = labels.detector_categories(labels.COCO_CLASSES, None)
        unnamed = "the file's 90 classes are taken to be COCO's"
  description = contents.description + (f'; to use all of it set {describe(settings)}' if settings
                                        else '')
  return PretrainedWeights(file.path, description, values, categories, unnamed,
                           _unused(file, sources.values()))


def _settings_that_differ(file: WeightFile, shapes: Mapping[names.Path, tuple[int, ...]]
                          ) -> dict[str, Any]:
  """Returns the config entries of a file's model where those of the detector differ."""
  network = names.backbone_network(shapes) or 'MobilenetV1'
  known = {name.replace('#', '0'): shape for path, shape in shapes.items()
           if (name := names.detector_name(path, network)) is not None}
  here = {'model.backbone.min_depth': MIN_DEPTH}
  if ('params', 'backbone', 'conv_1', 'kernel') in shapes:
    here['model.backbone.last_depth'] = 0
  here |= model_settings(known)
  there = model_settings({name: tensor.shape for name, tensor in file.tensors.items()})
  return {key: value for key, value in there.items() if key in here and here[key] != value}


def _backbone_names(contents: names.Contents) -> Callable[[names.Path], str | None]:
  """Returns a function from a path to the name of that variable in a file of this kind."""
  return functools.partial({'keras': names.keras_name, 'slim': names.slim_name}.get(
      contents.kind, names.detector_name), network=contents.network)


def class_columns(file: WeightFile) -> int:
  """Returns the number of class columns per anchor in a detector's head, background included.

  Raises:
    InputError: If the file has no such head.
  """
  contents = recognise(file)
  head = ('head', 'level_0') if contents.kind == 'ssd' else ('head',)
  pair = [file.tensors.get(contents.root + names.detector_name(('params', *head, leaf)))
          for leaf in ('class_bias', 'box_bias')]
  if any(t is None or t.ndim != 1 or not t.size for t in pair):
    raise InputError(f'{file.path} looks like {contents.description}, without a class head of PPN '
                     'or SSD that would give the number of classes' + (
                         '; use --kind=backbone' if contents.kind in ('slim', 'keras') else ''))
  columns, rest = divmod(4 * pair[0].size, pair[1].size)
  if rest or columns > _MOST_COLUMNS:
    raise InputError(f'{file.path}: {pair[0].size} class and {pair[1].size} box biases imply '
                     + ('different numbers of anchors' if rest else
                        f'{columns:,} classes, which is too many; is the file damaged?'))
  return columns


def _shapes(tree: Mapping[str, Any]) -> dict[names.Path, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree).items()}


def _fill(file: WeightFile, contents: names.Contents, shapes: Mapping[names.Path, tuple[int, ...]],
          name_of: Callable[[names.Path], str | None], average: bool
          ) -> ImportedWeights:
  """Finds the value of each path; raises InputError if one has none."""
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
  # The weights that an average replaces count as used too.
  used = {*sources.values(), *(s.removesuffix(names.AVERAGE) for s in sources.values())}
  return ImportedWeights(unflatten_dict(values), ImportReport(
      file.path, contents.description, len(values), _unused(file, used)))


def _unused(file: WeightFile, used: Iterable[str]) -> dict[str, tuple[str, ...]]:
  """Returns the names of the unused tensors, by kind."""
  unused: dict[str, list[str]] = {}
  for name in sorted(set(file.tensors) - set(used)):
    unused.setdefault(names.group(name), []).append(name)
  return {what: tuple(unused[what]) for what in sorted(unused, key=_naturally)}


def _missing(file: WeightFile, contents: names.Contents, missing: Sequence[str], total: int) -> str:
  """Returns the error message for missing variables, with the likely reason."""
  line = (f'{file.path}: {contents.description}, but {len(missing)} of the {total} variables '
          f'that the config asks for are missing: {_abbreviated(missing)}')
  if _is_folded(file, missing):
    line += '; batch norm seems to be folded into the convolutions, so import the checkpoint'
  elif all('/PredictionTower/conv2d_0/BatchNorm/' in name for name in missing):
    line += ('; in checkpoints each level of PPN has a batch norm of its own '
             '(model.head.norm_per_level=True)')
  return line


def _is_folded(file: WeightFile, missing: Sequence[str]) -> bool:
  """Returns whether a graph lacks only batch norm, as after an optimisation for inference."""
  return (file.kind == 'frozen graph' and bool(missing)
          and all('/BatchNorm/' in name for name in missing))


def _check_shapes(file: WeightFile, sources: Mapping[names.Path, str],
                  shapes: Mapping[names.Path, tuple[int, ...]]) -> None:
  """Raises InputError for the first tensor whose shape differs, with the likely reason."""
  for path, source in sorted(sources.items(), key=_kernels_first):
    there, here = _arranged(file.tensors[source], path).shape, shapes[path]
    if there != here:
      line = (f'{file.path}: {source} is {list(file.tensors[source].shape)}, but '
              f'{"/".join(path)} of the config\'s model is {list(here)}')
      if path[1] == 'head' and path[-1].startswith('class'):
        line += _columns_hint(class_columns(file), path, shapes)
      elif settings := _settings_that_differ(file, shapes):
        line += f'; set {describe(settings)}'
      elif path[1] == 'head' and path[-1].startswith('box') and there[-1] != here[-1]:
        line += (f', for {there[-1] // 4} and {here[-1] // 4} anchors per cell; there is one for '
                 'each of model.anchors.aspect_ratios, and one more')
      raise InputError(line)


def _kernels_first(item: tuple[names.Path, str]) -> tuple[bool, int, bool]:
  """Returns a sort key that puts kernels first, from backbone to head: they tell networks apart."""
  (collection, part, *_, leaf), _ = item
  return collection != 'params', ('backbone', 'neck', 'head').index(part), 'kernel' not in leaf


def _columns_hint(theirs: int, path: names.Path,
                  shapes: Mapping[names.Path, tuple[int, ...]]) -> str:
  """Returns which config entries would make a class head of `theirs` columns fit."""
  size = {what: shapes[(*path[:-1], f'{what}_bias')][0] for what in ('class', 'box')}
  ours = 4 * size['class'] // size['box']
  line = f', which are {theirs} and {ours} class columns per anchor'
  if theirs == ours:
    return line + ', with different numbers of anchors'
  if theirs == ours + 1:
    return line + ': the file has a background column, so set model.background_column=True'
  if theirs == ours - 1:
    return (line + f': set model.num_classes={theirs - 1} if the first of theirs is the '
            'background, or model.background_column=False if they have none')
  return line + '; set model.num_classes to 0 to use the number in the file'


def _arranged(tensor: np.ndarray, path: names.Path) -> np.ndarray:
  """Returns a tensor with its axes in our order; depthwise kernels are [3, 3, C, 1] elsewhere."""
  if path[-2:] == ('depthwise', 'kernel') and tensor.ndim == 4:
    return np.swapaxes(tensor, 2, 3)
  return tensor


def _value(file: WeightFile, source: str, path: names.Path) -> np.ndarray:
  """Returns a tensor as float32 with its axes in our order, its values checked."""
  tensor = file.tensors[source]
  if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != 'bfloat16':
    raise InputError(f'{file.path}: {source} is {tensor.dtype}, which is not a type of weights')
  with np.errstate(over='ignore'):
    value = np.array(_arranged(tensor, path), np.float32, order='C')
  if not np.isfinite(value).all():
    raise InputError(f'{file.path}: {source} has values that are not finite')
  if path[-1] == 'var' and value.min(initial=0) < 0:
    raise InputError(f'{file.path}: {source} is a variance and has negative values')
  return value


def _abbreviated(group: Sequence[str]) -> str:
  return ', '.join(group[:_SHOWN]) + (', ...' if len(group) > _SHOWN else '')


def _naturally(what: str) -> tuple[str, int]:
  """Returns a sort key that puts 'block 9' before 'block 10'."""
  name, _, number = what.rpartition(' ')
  return (name, int(number)) if number.isdecimal() else (what, 0)
