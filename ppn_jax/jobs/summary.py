"""Counts the parameters and FLOPs of a model by layer and in total, without compiling it.

Everything is counted from the jaxpr of `Detector.detect` for one image, with every convolution
in its native form, since other forms compute the same with other operations. FLOPs are counted as
in TensorFlow's profiler (`models.flops`), which counts none for batch norm and activations.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax
from jax.extend import core
from ml_collections import ConfigDict

from ppn_jax.config import complete
from ppn_jax.data.splits import open_split
from ppn_jax.detection.frame import ImageSize, show_size
from ppn_jax.detector import Detector
from ppn_jax.errors import InputError
from ppn_jax.models.flops import Operation, operations, used_arguments
from ppn_jax.run import build_detector, resolve_classes, without_class_weights

Path = tuple[str, ...]
BEFORE, AFTER = 'preprocessing', 'scores and boxes'  # Rows of operations outside the network.
# Suppression begins with one of these. It is not counted, as its length depends on the image.
_SELECTIONS = frozenset({'top_k', 'approx_top_k', 'sort', 'while'})


class Layer(NamedTuple):
  """Row of the table; batch norm is part of the row of its convolution."""
  name: str
  parameters: int  # Trainable.
  statistics: int  # Batch norm's moving averages.
  multiply_adds: int
  flops: int
  other_ops: int  # Of batch norm, activations and others that the profiler leaves out.


class Totals(NamedTuple):
  """Totals by each counting in use, of the variables that the outputs depend on."""
  trainable: int
  variables: int  # Trainable ones and moving averages of batch norm.
  variables_without_scale: int  # As if batch norm had no scale (gamma).
  multiply_adds: int
  network_flops: int
  detection_flops: int  # From pixels to scored boxes, before suppression.
  unused: int  # Trainable, but no output depends on them; in none of the above.


class Summary(NamedTuple):
  """Parameters and FLOPs of a model; see `summarize`."""
  image_size: ImageSize
  num_classes: int  # Without the background.
  columns: int  # Of the class head, for one anchor.
  layers: tuple[Layer, ...]
  totals: Totals
  by_columns: dict[int, Totals]  # With C, 1 + C and 2 + C columns.


class PaperCount(NamedTuple):
  """Model counted by one of the conventions that reproduce the paper's Table 1."""
  columns: int
  counted_parameters: str  # Field of `Totals`.
  counted_flops: str
  parameters: str  # In millions and billions, rounded as in the paper.
  flops: str
  row: str | None  # Of the paper's table, if both values are the same there.


# Table 1: parameters and FLOPs of each model at 300 px.
PAPER = {'SSD': ('6.83M', '2.48B'), 'PPN': ('2.18M', '2.35B')}
# (columns in addition to the 90 classes, parameters, FLOPs) of all countings of `Totals` that give
# its four values. The paper does not say which one it uses.
PAPER_CONVENTIONS = (
    (2, 'trainable', 'network_flops'),
    (2, 'trainable', 'detection_flops'),
    (1, 'variables_without_scale', 'detection_flops'),
)


def summarize(config: ConfigDict) -> Summary:
  """Counts the model that a config describes, at batch 1.

  Args:
    config: with `model.num_classes` set, see `fill_in_classes`.

  Raises:
    InputError: If the config is invalid, see `detector.build`, or the network has a loop of unknown
      length.
  """
  detector = build_detector(_native(config))
  columns, classes = detector.class_spec.num_logits, detector.num_classes
  layers, totals = _count(detector)
  by_columns = {columns: totals}
  for count in range(classes, classes + 3):
    # Whether there is a background column stays as it is, since some losses need it.
    if count not in by_columns and count > columns - classes:
      variant = _native(config, num_classes=count - (columns - classes))
      by_columns[count] = _count(build_detector(variant))[1]
  return Summary(detector.image_size, classes, columns, layers, totals,
                 dict(sorted(by_columns.items())))


def paper_counts(summary: Summary) -> tuple[PaperCount, ...]:
  """Counts a model by each of `PAPER_CONVENTIONS`, if it has the paper's 300 px and 90 classes."""
  if (summary.image_size, summary.num_classes) != (300, 90):
    return ()

  def count(extra_columns: int, parameters: str, flops: str) -> PaperCount:
    totals = summary.by_columns[summary.num_classes + extra_columns]
    cells = (f'{getattr(totals, parameters) / 1e6:.2f}M', f'{getattr(totals, flops) / 1e9:.2f}B')
    row = next((name for name, values in PAPER.items() if values == cells), None)
    return PaperCount(summary.num_classes + extra_columns, parameters, flops, *cells, row)

  return tuple(count(*convention) for convention in PAPER_CONVENTIONS)


def fill_in_classes(config: ConfigDict) -> ConfigDict:
  """Returns a config whose `model.num_classes` is set, from the training data if it is 0.

  Raises:
    InputError: If the training data are needed and cannot be opened.
  """
  if config.model.num_classes:
    return config
  try:
    categories = open_split(complete(config), 'train').categories
  except InputError as e:
    raise InputError('model.num_classes is 0, so the number comes from the training data; give '
                     f'--config.model.num_classes=N, or fix this: {e}') from e
  return resolve_classes(config, categories)


def _native(config: ConfigDict, **model: Any) -> ConfigDict:
  """Returns a copy of a config with native convolutions and these entries of `model`."""
  config = without_class_weights(config).copy_and_resolve_references()
  with config.unlocked():
    config.model.layers.conv_form = 'native'
    config.model.update(model)
  return config


def _count(detector: Detector) -> tuple[tuple[Layer, ...], Totals]:
  """Counts by layer and in total for one image, from shapes alone."""
  variables = jax.eval_shape(detector.init, jax.random.key(0))
  images = jax.eval_shape(detector.blank_images)
  # Flax's scopes name the layer of an operation; users can turn them off.
  with flax.config.temp_flip_flag('profile', True):
    jaxpr = jax.make_jaxpr(detector.detect)(variables, images).jaxpr
  leaves = jax.tree.leaves_with_path(variables)
  sizes = {tuple(key.key for key in path): leaf.size for path, leaf in leaves}
  paths = list(sizes)  # In the order of the jaxpr's arguments, the images after them.
  norms = {path[1:-1] for path in paths if path[0] == 'batch_stats'}
  used = {paths[i]: sizes[paths[i]] for i in used_arguments(jaxpr) if i < len(paths)}
  located = list(_located(jaxpr, type(detector.network).__name__, paths, norms))
  layers = _layers(located, used, norms)
  return layers, _totals(layers, sizes, used, norms)


def _totals(layers: tuple[Layer, ...], sizes: Mapping[Path, int], used: Mapping[Path, int],
            norms: set[Path]) -> Totals:
  inside = [layer for layer in layers if layer.name not in (BEFORE, AFTER)]
  trainable = sum(n for path, n in used.items() if path[0] == 'params')
  scales = sum(n for path, n in used.items() if path[1:-1] in norms and path[-1] == 'scale')
  return Totals(
      trainable=trainable,
      variables=sum(used.values()),
      variables_without_scale=sum(used.values()) - scales,
      multiply_adds=sum(layer.multiply_adds for layer in inside),
      network_flops=sum(layer.flops for layer in inside),
      detection_flops=sum(layer.flops for layer in layers),
      unused=sum(n for path, n in sizes.items() if path[0] == 'params') - trainable)


def _located(jaxpr: core.Jaxpr, root: str, paths: list[Path], norms: set[Path]
             ) -> Iterator[tuple[str, Operation]]:
  """Yields (layer, operation) up to suppression, with FLOPs of batch norm as other operations."""
  for op in itertools.takewhile(lambda op: op.primitive not in _SELECTIONS, operations(jaxpr)):
    # Flax adds a scope for each module, and one with a dot for methods other than __call__.
    module = tuple(name for name in op.scope[1:] if '.' not in name)
    read = [paths[i] for i in op.arguments if i < len(paths) and paths[i][0] == 'params']
    if op.scope[:1] != (root,):
      yield AFTER, op
    elif module in norms:
      yield _layer_of(module), op._replace(flops=0, other_ops=op.flops + op.other_ops)
    elif read:
      yield _layer_of_variable(read[0], norms), op
    else:
      yield _layer_of(module) if module else BEFORE, op


def _layers(located: list[tuple[str, Operation]], used: Mapping[Path, int], norms: set[Path]
            ) -> tuple[Layer, ...]:
  """Returns a row for each layer with variables or operations, in order of the forward pass."""
  rows = {name: [0] * 5 for name, _ in located if name != AFTER}
  for path, size in used.items():
    row = rows.setdefault(_layer_of_variable(path, norms), [0] * 5)
    row[path[0] != 'params'] += size
  for name, op in located:
    row = rows.setdefault(name, [0] * 5)
    for column, value in enumerate((op.multiply_adds, op.flops, op.other_ops), start=2):
      row[column] += value
  return tuple(Layer(name, *row) for name, row in rows.items() if any(row))


def _layer_of(module: Path) -> str:
  return '/'.join(module[:-1] if module[-1:] == ('norm',) else module)


def _layer_of_variable(path: Path, norms: set[Path]) -> str:
  """Returns the layer: 'head/box' for 'params', 'head', 'box_kernel'; 'stem' for its 'kernel'."""
  _, *module, leaf = path
  if tuple(module) not in norms:
    part = leaf.rpartition('_')[0]
    module += [part] if part else []
  return _layer_of(tuple(module))


_LABELS = {
    'trainable': 'trainable parameters',
    'variables': 'all variables',
    'variables_without_scale': 'all variables, no norm scale',
    'multiply_adds': 'multiply-adds',
    'network_flops': 'FLOPs of the network',
    'detection_flops': 'FLOPs, image to detections',
}
_LEGEND = """\
FLOPs: 2 for each multiply-add, 1 for each output of other arithmetic, a pooling window's size for
each of its outputs, as TensorFlow's profiler counts. It has none for batch norm and activations;
their operations are the last column. Image to detections: includes scaling of the input, scores
and decoding of boxes, up to suppression, counted from the operations of this implementation, so
that the profiler's count of TensorFlow's graph is slightly different. Variables: includes moving
averages of batch norm; no norm scale: as if batch norm had no gamma."""


def format_summary(summary: Summary) -> str:
  """Formats layers, totals by every counting and, if it applies, the paper's Table 1 as text."""
  inside = [layer for layer in summary.layers if layer.name not in (BEFORE, AFTER)]
  sums = [(name, *(sum(column) for column in zip(*(layer[1:] for layer in rows), strict=True)))
          for name, rows in (('network', inside), ('image to detections', summary.layers))]
  titles = [f'{count}{" (this)" if count == summary.columns else ""}'
            for count in summary.by_columns]
  countings = [(label, *(getattr(totals, key) for totals in summary.by_columns.values()))
               for key, label in _LABELS.items()]
  parts = [
      f'{show_size(summary.image_size)} px, {summary.num_classes} classes in '
      f'{summary.columns} columns, batch 1',
      _table(('layer', 'parameters', 'statistics', 'multiply-adds', 'FLOPs', 'norm & act.'),
             [*summary.layers, *sums]),
      _table(('class columns', *titles), countings), _LEGEND]
  if summary.totals.unused:
    parts.insert(3, f'No output depends on {summary.totals.unused:,} further trainable '
                    'parameters; they are in none of these counts.')
  return '\n\n'.join(filter(None, [*parts, _paper_note(paper_counts(summary))]))


def _table(titles: tuple[str, ...], rows: list[tuple]) -> str:
  """Aligns names to the left and numbers to the right."""
  cells = [titles, *((row[0], *(f'{n:,}' for n in row[1:])) for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join('  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                   for row in cells)


def _paper_note(counts: tuple[PaperCount, ...]) -> str:
  if not counts:
    return ''
  rows = ' and '.join(f'{name} {" ".join(cells)}' for name, cells in PAPER.items())
  lines = [f"The paper's Table 1 has {rows}. Each of these countings gives all four",
           'values; which one the authors used is not known. This model by each of them:']
  for r in counts:
    lines.append(f'  {r.parameters} {r.flops}  {_LABELS[r.counted_parameters]}; '
                 f'{_LABELS[r.counted_flops]}; {r.columns - 1} + background '
                 f"({f'as {r.row} there' if r.row else 'neither row'})")
  return '\n'.join(lines)
