"""Tests launch/notebooks/inspect.ipynb, executed as by Jupyter."""

import base64
import io
import json
import os
import pathlib
import sys
import types

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


def test_it_installs_from_the_repository_and_opens_in_colab():
  text = NOTEBOOK.read_text('utf-8')
  assert 'colab-badge.svg' in text and 'blob/main/launch/notebooks/inspect.ipynb' in text
  notebook = nbformat.read(NOTEBOOK, 4)
  code = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
  assert 'git clone' in code[0] and "sys.path.insert(0, 'launch/notebooks')" in code[0]
  assert (NOTEBOOK.parent / 'install.py').is_file() and 'install.prepare()' in code[0]
  # The address is asked for in one place.
  assert sum('github.com' in cell for cell in code) == 1 and "'/OWNER/' not in" in code[0]
  assert all(len(cell.splitlines()) <= 4 for cell in code[1:])
