"""Imports go down only. The table is that of docs/architecture.md; a new module joins both."""

import ast
import fnmatch
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = 'ppn_jax'
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE

# From the ground up. A module belongs where its own name stands, else where a pattern fits.
LAYERS = (
    ('errors',),
    ('registry', 'files', 'config', 'groups', 'hlo', 'host_memory', 'interrupts',
     'compile_cache', 'evaluation.fonts', 'export.formats', 'export.jaxpr',
     'training.coordination', 'training.growing', 'training.maintenance'),
    ('detection.structures', 'data.jpeg_segments', 'data.lazy_image',
     'training.ownership', 'training.orbax_manager'),
    ('detection.boxes', 'detection.columns', 'models.layers', 'data.checks', 'data.contents',
     'data.images', 'data.instances', 'data.outlines', 'data.resizing', 'export.metadata',
     'export.tensorflow_ops', 'export.comparison'),
    ('data.annotations', 'data.folders', 'data.geometry', 'weights.dtypes', 'weights.limits',
     'weights.names', 'weights.protos', 'weights.sstable'),
    ('export.runtimes', 'export.stablehlo', 'export.tensorflow_files', 'data.image_ids',
     'data.tfds_records', 'data.voc_xml', 'data.yolo_yaml'),
    ('detection.*', 'models.*', 'data.*', 'weights.*',
     'training.optim', 'training.partition', 'training.metrics', 'training.retention',
     'training.background', 'training.profiling', 'training.peers',
     'training.prefetch', 'training.preemption', 'training.saved_step',
     'training.device_order', 'training.device_resize',
     'evaluation.coco', 'evaluation.drawing', 'evaluation.judging', 'evaluation.intervals'),
    ('detection.anchor_search', 'weights.files', 'pictures.plotting', 'evaluation.error_kinds'),
    ('models.network', 'data.loader', 'data.report', 'evaluation.calibration',
     'evaluation.recalibration', 'evaluation.calibration_picture', 'training.device_transforms'),
    ('detector', 'weights.importer', 'training.resident'),
    ('training.state', 'training.integrity', 'pictures.*'),
    ('training.step', 'training.checkpoint'),
    ('run', 'evaluation.calibration_job', 'training.feeds', 'pictures.report', 'weights.workdir'),
    ('evaluation.evaluator', 'evaluation.waiting', 'survey', 'weights.initial'),
    ('training.stepping',),
    ('planning', 'planning_report', 'planning_search', 'export.*', 'inference', 'summary',
     'evaluation.job', 'evaluation.follow', 'training.loop', 'weights.job',
     'pictures.survey_page'),
    ('serving', 'inspection'),
    ('cli.*',),
)

# Neighbours that may be imported all the same. Short on purpose.
BESIDE = {
    ('data.bad_examples', 'data.sources'), ('data.cache', 'data.sources'),
    ('data.coco', 'data.sources'), ('data.splits', 'data.sources'),
    ('data.tfds', 'data.coco'),
    ('data.prepare', 'data.sources'),
    ('data.reading', 'data.sources'), ('data.reading', 'data.transforms'),
    ('evaluation.follow', 'evaluation.job'),
    ('export.job', 'evaluation.job'),
    ('inference', 'evaluation.job'), ('planning_report', 'planning'),
    ('planning_search', 'planning'),
    ('cli.flags', 'cli.values'),
    *((f'cli.{command}', 'cli.flags') for command in ('train', 'evaluate', 'detect', 'data',
                                                  'summary', 'import_tf', 'prepare', 'plan',
                                                  'export')),
}


def layer_of(module: str) -> int | None:
  """How far above the ground a module stands, None if the table does not say."""
  for fits in (str.__eq__, fnmatch.fnmatchcase):
    for height, names in enumerate(LAYERS):
      if any(fits(module, name) for name in names):
        return height
  return None


def modules_of(root: pathlib.Path) -> dict[str, str]:
  """Module name below the package -> source; a package goes by its own name."""
  found = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text('utf-8')
  return found


def imports_of(source: str, modules: set[str]) -> set[str]:
  """Everything that a module imports, at its top or inside functions.

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


def violations(modules: dict[str, str]) -> list[str]:
  """What is wrong with the imports of a package, one line each."""
  wrong, graph = [], {}
  for module, source in modules.items():
    targets = imports_of(source, set(modules))
    packages = {m.rpartition('.')[0] for m in modules}
    if module in packages:
      wrong += [f'package {module or PACKAGE} imports {t}; an __init__ stays empty'
                for t in sorted(targets)]
      continue
    if layer_of(module) is None:
      wrong.append(f'{module} has no layer; enter it in LAYERS here and in docs/architecture.md')
      continue
    graph[module] = targets
    for target in sorted(targets):
      if target.startswith(('.', 'configs', 'tests')) or target == PACKAGE:
        wrong.append(f'{module} imports {target}; import modules of {PACKAGE} by full name')
      elif layer_of(target) is None:
        wrong.append(f'{module} imports {target}, which has no layer')
      elif layer_of(target) > layer_of(module):
        wrong.append(f'{module} imports {target}, which stands above it')
      elif layer_of(target) == layer_of(module) and (module, target) not in BESIDE:
        wrong.append(f'{module} imports {target} beside it; move what they share down, '
                     'or enter the pair in BESIDE')
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as e:
    wrong.append('cycle: ' + ' -> '.join(e.args[1]))
  return wrong


def test_imports_go_down_only():
  modules = modules_of(ROOT)
  assert 'detection.boxes' in modules
  assert not violations(modules), '\n'.join(violations(modules))


GOOD = {
    '': '', 'detection': '', 'errors': 'import os', 'detection.structures': '',
    'detection.boxes': 'from ppn_jax.detection.structures import Array',
    'detection.anchors': 'from ppn_jax.detection import boxes\nimport ppn_jax.errors'}


def test_checker_passes_good_imports():
  assert not violations(GOOD)


@pytest.mark.parametrize('module, source, message', [
    ('detection.anchors', 'from ppn_jax.detector import Detector', 'which stands above it'),
    ('detection.anchors', 'def f():\n  import ppn_jax.training.loop', 'which stands above it'),
    ('detection.anchors', 'from ppn_jax.models import heads', 'which has no layer'),
    ('detection.anchors', 'from ppn_jax.models.heads import X', 'beside it'),
    ('detection.boxes', 'from ppn_jax.detection import anchors', 'anchors, which stands above'),
    ('detection.boxes', 'from . import structures', 'by full name'),
    ('detection.boxes', 'from configs.quickstart import get_config', 'by full name'),
    ('gadgets', '', 'gadgets has no layer'),
    ('detection', 'from ppn_jax.detection.boxes import iou', '__init__ stays empty'),
    ('errors', 'import ppn_jax.detection.anchors', 'cycle: '),
])
def test_checker_finds_a_bad_import(module, source, message):
  found = violations(GOOD | {module: source})
  assert any(message in line for line in found), found


def test_input_workers_stay_free_of_jax():
  names = [name for name in modules_of(ROOT)
           if name.startswith('data.') and name != 'data.loader'] + ['detection.boxes']
  assert {'data.sources', 'data.transforms'} <= set(names)
  code = (f'import sys, {", ".join(f"{PACKAGE}.{name}" for name in names)}\n'
          'sys.exit(" ".join(m for m in ("jax", "flax", "tensorflow") if m in sys.modules) or 0)')
  process = subprocess.run([sys.executable, '-c', code], cwd=ROOT.parent, capture_output=True,
                           text=True, check=False)
  assert process.returncode == 0, process.stderr
