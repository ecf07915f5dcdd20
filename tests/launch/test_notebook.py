"""Tests the notebooks of launch/notebooks, executed as by Jupyter."""

import base64
import importlib.util
import io
import json
import os
import pathlib
import sys
import types
import zipfile

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image
from time_limits import HANG_SECONDS
from tiny import untrained_run

from ppn_jax.data.source import build_source
from ppn_jax.errors import InputError
from ppn_jax.inspection import Inspection
from ppn_jax.metrics import coco

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / 'launch' / 'notebooks' / 'inspect.ipynb'
OWN_DATA = NOTEBOOK.with_name('own_data.ipynb')


def load(name):
  """Imports a module beside the notebooks."""
  spec = importlib.util.spec_from_file_location(name, NOTEBOOK.with_name(f'{name}.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


own_data = load('own_data')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Returns a run with stored detections: for each box a correct, misnamed and misplaced one."""
  workdir = tmp_path_factory.mktemp('run')
  source = build_source({'name': 'synthetic_shapes', 'num_images': 6, 'image_size': 64,
                         'split': 'eval'})
  untrained_run(workdir, categories=source.categories)
  rows = [{'image_id': a['image_id'], 'category_id': category, 'bbox': [x + off, y, w, h],
           'score': score, 'level': k}
          for a in source.ground_truth()['annotations'] for x, y, w, h in [a['bbox']]
          for k, (category, off, score) in enumerate((
              (a['category_id'], 0, 0.9), (a['category_id'] % 5 + 1, 0, 0.6),
              (a['category_id'], w / 2, 0.4)))]
  coco.write_results(workdir / 'evaluation' / '6' / 'results.json', rows)
  (workdir / 'metrics.jsonl').write_text(
      ''.join(json.dumps({'step': s, 'train/loss': 3 / s}) + '\n' for s in (2, 4, 6)))
  return workdir


@pytest.mark.slow
def test_every_cell_runs_and_every_picture_is_there(workdir, monkeypatch):
  notebook = nbformat.read(NOTEBOOK, 4)
  nbformat.validate(notebook)
  assert not any(cell.get('outputs') for cell in notebook.cells), 'save it without outputs'
  given = [cell for cell in notebook.cells if cell.source.startswith("WORKDIR = 'runs/quickstart'")]
  assert len(given) == 1
  given[0].source = f'WORKDIR = {str(workdir)!r}'
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(
      [str(REPOSITORY), os.environ.get('PYTHONPATH', '')]))
  nbclient.NotebookClient(notebook, timeout=HANG_SECONDS, kernel_name='python3',
                          resources={'metadata': {'path': str(REPOSITORY)}}).execute()
  pictures = {}
  for cell in notebook.cells:
    if cell.cell_type == 'code' and 'run.' in cell.source and 'import' not in cell.source:
      for output in cell.outputs:
        if 'image/png' in output.get('data', {}):
          pixels = Image.open(io.BytesIO(base64.b64decode(output.data['image/png'])))
          pictures[cell.source] = np.asarray(pixels.convert('RGB'))
      if cell.source == 'run.table()':
        assert 'AP50' in cell.outputs[0].text and 'triangle' in cell.outputs[0].text
      else:
        assert cell.source in pictures, cell.source
  assert len(pictures) == 14
  for source, pixels in pictures.items():
    # No object is missed here, so the picture is a sentence.
    least = 1e3 if source == "run.mistakes('missed')" else 1e4
    assert pixels.size > least and len(np.unique(pixels)) > 20 and pixels.std() > 5, source


def test_colab_asks_for_an_upload(monkeypatch):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  png = io.BytesIO()
  Image.fromarray(pixels).save(png, 'PNG')
  colab = types.ModuleType('google.colab')
  colab.files = types.SimpleNamespace(upload=lambda: {'mine.png': png.getvalue()})
  monkeypatch.setitem(sys.modules, 'google.colab', colab)
  run = Inspection(None, 0, {}, [])
  np.testing.assert_array_equal(run.own_picture(), pixels)
  colab.files.upload = lambda: {'mine.txt': b'no picture'}
  with pytest.raises(InputError, match=r'mine\.txt'):
    run.own_picture()
  with pytest.raises(InputError, match='wrong clas'):
    run.mistakes('wrong clas')


@pytest.mark.slow
def test_own_data_are_trained_on_from_shipped_weights_and_exported(tmp_path, monkeypatch):
  """Checks all cells, with a zipped data set that is not the one the notebook draws."""
  own_data.draw_shapes(tmp_path / 'drawn', images=12)
  with zipfile.ZipFile(tmp_path / 'mine.zip', 'w') as archive:
    for file in sorted((tmp_path / 'drawn').iterdir()):
      archive.write(file, f'mine/{file.name}')
  (tmp_path / 'ppn').write_text(f'#!/bin/sh\nexec {sys.executable} -m ppn_jax.cli.main "$@"\n')
  (tmp_path / 'ppn').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  monkeypatch.setenv('PYTHONPATH', f'{REPOSITORY}:{NOTEBOOK.parent}')
  notebook = nbformat.read(OWN_DATA, 4)
  nbformat.validate(notebook)
  assert not any(cell.get('outputs') for cell in notebook.cells), 'save it without outputs'
  small = ('--config.train.minutes=0 --config.train.steps=2 --config.train.batch_size=4 '
           '--config.model.image_size=64 --config.train.evaluate_every=0')
  given = {"DATA = ''": "DATA = 'mine.zip'", "OPTIONS = ''": f'OPTIONS = {small!r}'}
  for before, after in given.items():
    (cell,) = (c for c in notebook.cells if before in c.source)
    cell.source = cell.source.replace(before, after)
  nbclient.NotebookClient(notebook, timeout=HANG_SECONDS, kernel_name='python3',
                          resources={'metadata': {'path': str(tmp_path)}}).execute()
  shown = ''.join(output.get('text', '') for cell in notebook.cells
                  for output in cell.get('outputs', ()))
  assert 'unpacked 13 files to own_data' in shown and 'starting from ' in shown, shown
  assert 'AP50' in shown and (tmp_path / 'mine.safetensors').is_file()
  pictures = [o for cell in notebook.cells for o in cell.get('outputs', ())
              if 'image/png' in o.get('data', {})]
  assert len(pictures) == 2


def test_the_data_that_a_notebook_names(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert own_data.prepare('') == 'own_data'
  truth = json.loads((tmp_path / 'own_data' / 'annotations.json').read_text())
  assert len(truth['images']) == 60 == len(list((tmp_path / 'own_data').glob('*.jpg')))
  assert own_data.prepare('own_data') == 'own_data'
  with pytest.raises(FileNotFoundError, match=r"there is no 'mine\.zip'; in Colab, drag"):
    own_data.prepare('mine.zip')


@pytest.mark.parametrize('path', [NOTEBOOK, OWN_DATA])
def test_it_installs_from_the_repository_and_opens_in_colab(path):
  text = path.read_text('utf-8')
  assert 'colab-badge.svg' in text and f'blob/main/launch/notebooks/{path.name}' in text
  notebook = nbformat.read(path, 4)
  code = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
  assert 'git clone' in code[0] and "sys.path.insert(0, 'launch/notebooks')" in code[0]
  assert (path.parent / 'install.py').is_file() and 'install.prepare()' in code[0]
  # The address is asked for in one place.
  assert sum('github.com' in cell for cell in code) == 1 and "'/OWNER/' not in" in code[0]
  assert all(len(cell.splitlines()) <= 4 for cell in code[1:])


def test_both_notebooks_install_alike():
  first = [nbformat.read(path, 4).cells[1].source for path in (NOTEBOOK, OWN_DATA)]
  assert first[0] == first[1]
