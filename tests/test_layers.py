"""Imports go down only. The table is that of docs/architecture.md; a new folder joins both."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = 'ppn_jax'
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE

# From the bottom up: folders, and modules that stand beside them.
LAYERS = (
    ('errors', 'registry', 'config', 'config_values', 'storage', 'processor'),
    ('telemetry', 'distributed', 'zoo'),
    ('detection',),
    ('models', 'metrics', 'export', 'data.images', 'tracking'),
    ('detector', 'data'),
    ('device_data', 'visualization'),
    ('training',),
    ('checkpoints',),
    ('run', 'trained_model', 'weights', 'config_files'),
    ('planning', 'predictor', 'image_detector'),
    ('jobs',),
    ('serving',),
    ('inspection', 'cli'),
)
PLACES = {place for row in LAYERS for place in row}


def place_of(module: str) -> str | None:
  """Returns the entry of the table that a module belongs to, None if there is none."""
  parts = module.split('.')
  names = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
  return next((name for name in names if name in PLACES), None)


def layer_of(place: str) -> int:
  """Returns how many rows stand below that of a place."""
  return next(height for height, row in enumerate(LAYERS) if place in row)


def modules_of(root: pathlib.Path) -> dict[str, str]:
  """Module name below the package -> source; a package goes by its own name."""
  found = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text('utf-8')
  return found


def imports_of(source: str, modules: set[str]) -> set[str]:
  """Returns everything that a module imports, at its top or inside functions.

  Names within the package lose its prefix; others, and relative ones, stay as written.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = '.' * node.level + (node.module or '')
      whole = {f'{base}.{alias.name}' for alias in node.names}
      found |= {name if name.removeprefix(f'{PACKAGE}.') in modules else base for name in whole}
  return {name.removeprefix(f'{PACKAGE}.') if name.startswith(f'{PACKAGE}.') else name
          for name in found if name.split('.')[0] in (PACKAGE, 'configs', 'tests', '')}


def may_import(place: str, target: str) -> bool:
  """Returns whether modules of `place` may import modules of `target`.

  Within a folder they may, and between single modules of a row, as long as there is no cycle.
  """
  if place == target:
    return True
  if layer_of(target) == layer_of(place):
    return not ((ROOT / place).is_dir() or (ROOT / target).is_dir())
  return layer_of(target) < layer_of(place)


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as e:
    return list(e.args[1])
  return []


def violations(modules: dict[str, str]) -> list[str]:
  """Returns what is wrong with the imports of a package, one line each."""
  wrong, graph = [], {}
  packages = {m.rpartition('.')[0] for m in modules}
  for module, source in modules.items():
    targets = imports_of(source, set(modules))
    if module in packages:
      wrong += [f'package {module or PACKAGE} imports {t}; an __init__ stays empty'
                for t in sorted(targets)]
      continue
    place = place_of(module)
    if place is None:
      wrong.append(f'{module} has no layer; enter it in LAYERS here and in docs/architecture.md')
      continue
    graph[module] = targets
    for target in sorted(targets):
      if target.startswith(('.', 'configs', 'tests')) or target == PACKAGE:
        wrong.append(f'{module} imports {target}; import modules of {PACKAGE} by full name')
      elif target in packages or place_of(target) is None:
        wrong.append(f'{module} imports {target}, which has no layer')
      elif not may_import(place, place_of(target)):
        where = 'beside' if layer_of(place_of(target)) == layer_of(place) else 'above'
        wrong.append(f'{module} imports {target}, which stands {where} it')
  if cycle := cycle_of(graph):
    wrong.append('cycle: ' + ' -> '.join(cycle))
  return wrong


def test_imports_go_down_only():
  modules = modules_of(ROOT)
  assert 'detection.boxes' in modules
  assert not violations(modules), '\n'.join(violations(modules))


def test_folders_have_no_cycle():
  modules = modules_of(ROOT)
  graph: dict[str, set[str]] = {}
  for module, source in modules.items():
    for target in imports_of(source, set(modules)):
      ours, theirs = (name.split('.')[0] for name in (module, target))
      if ours and theirs and ours != theirs:
        graph.setdefault(ours, set()).add(theirs)
  assert not cycle_of(graph)


def test_the_table_names_what_there_is():
  modules = modules_of(ROOT)
  assert {place for place in PLACES if place not in modules} == set()
  rows = [', '.join(f'`{place}`' for place in row) for row in LAYERS]
  page = (ROOT.parent / 'docs' / 'architecture.md').read_text('utf-8')
  assert '\n'.join(f'| {n} | {row} |' for n, row in reversed(list(enumerate(rows, 1)))) in page


GOOD = {
    '': '', 'detection': '', 'errors': 'import os', 'detection.structures': '',
    'detection.boxes': 'from ppn_jax.detection.structures import Array',
    'detection.anchors': 'from ppn_jax.detection import boxes\nimport ppn_jax.errors',
    'models.heads': '', 'jobs.train': '', 'detector': '', 'run': 'import ppn_jax.detector',
    'data.images.decoding': '', 'data.loader': 'from ppn_jax.data.images import decoding'}


def test_checker_passes_good_imports():
  assert not violations(GOOD)


@pytest.mark.parametrize('module, source, message', [
    ('detection.anchors', 'from ppn_jax.detector import Detector', 'which stands above it'),
    ('detection.anchors', 'def f():\n  import ppn_jax.jobs.train', 'which stands above it'),
    ('detection.anchors', 'from ppn_jax.gadgets import heads', 'which has no layer'),
    ('models.heads', 'from ppn_jax.data.images import decoding', 'which stands beside it'),
    ('data.images.decoding', 'from ppn_jax.data import loader', 'which stands above it'),
    ('detection.boxes', 'from . import structures', 'by full name'),
    ('detection.boxes', 'from configs.quickstart import get_config', 'by full name'),
    ('gadgets', '', 'gadgets has no layer'),
    ('detection', 'from ppn_jax.detection.boxes import iou', '__init__ stays empty'),
    ('detection.structures', 'import ppn_jax.detection.anchors', 'cycle: '),
])
def test_checker_finds_a_bad_import(module, source, message):
  found = violations(GOOD | {module: source})
  assert any(message in line for line in found), found


def test_input_workers_stay_free_of_jax():
  names = [name for name in modules_of(ROOT)
           if name.startswith('data.') and name != 'data.loader'] + ['detection.boxes']
  assert {'data.source', 'data.transforms.basic'} <= set(names)
  code = (f'import sys, {", ".join(f"{PACKAGE}.{name}" for name in names)}\n'
          'sys.exit(" ".join(m for m in ("jax", "flax", "tensorflow") if m in sys.modules) or 0)')
  process = subprocess.run([sys.executable, '-c', code], cwd=ROOT.parent, capture_output=True,
                           text=True, check=False)
  assert process.returncode == 0, process.stderr
