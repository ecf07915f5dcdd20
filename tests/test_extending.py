"""Files and commands of docs/extending.md work as printed."""

import csv
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import ppn_jax
from ppn_jax import registry
from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source
from ppn_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'extending.md').read_text()
FILES = dict(re.findall(r'^`(\w+\.py)`:\n\n```python\n(.*?)^```$', PAGE, re.M | re.S))
SNIPPET, = re.findall(r'^```python\n(import ppn_jax\n.*?)^```$', PAGE, re.M | re.S)
COMMANDS = re.findall(r'^(PYTHONPATH=.*)$', PAGE, re.M)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Creates what a reader has: the page's files, images and a table of boxes."""
  folder = tmp_path_factory.mktemp('reader')
  for name, text in FILES.items():
    (folder / name).write_text(text)
  source = build_source({'name': 'synthetic_shapes', 'num_images': 6, 'image_size': (48, 64)})
  (folder / 'images').mkdir()
  with open(folder / 'boxes.csv', 'w', newline='') as file:
    table = csv.writer(file)
    table.writerow(['image', 'xmin', 'ymin', 'xmax', 'ymax', 'label'])
    for i in range(len(source)):
      example = source[i]
      Image.fromarray(example.image).save(folder / 'images' / f'{i}.png')
      for (ymin, xmin, ymax, xmax), label in zip(example.boxes.tolist(), example.labels,
                                                 strict=True):
        table.writerow([f'{i}.png', xmin * 64, ymin * 48, xmax * 64, ymax * 48,
                        source.categories[label].name])
  return folder


@pytest.fixture
def importable(folder, monkeypatch, import_from):
  monkeypatch.chdir(folder)
  import_from(folder)
  return folder


def test_the_page_has_the_files_and_commands():
  assert set(FILES) == {'my_nets.py', 'my_data.py', 'my_config.py'} and len(COMMANDS) == 2
  # There are no other blocks of code.
  assert len(re.findall(r'^```', PAGE, re.M)) == 2 * (len(FILES) + 3)


def test_source_is_a_source(importable):
  block = {'name': 'my_data:CsvBoxes', 'file': 'boxes.csv', 'folder': 'images'}
  source = build_source(block)
  original = build_source({'name': 'synthetic_shapes', 'num_images': 6, 'image_size': (48, 64)})
  assert len(source) == 6 and source.max_boxes == max(len(original[i].boxes) for i in range(6))
  for i in range(6):
    ours, theirs = source[i], original[i]
    assert (ours.image == theirs.image).all() and abs(ours.boxes - theirs.boxes).max() < 1e-6
    assert [source.categories[k].name for k in ours.labels] == [
        original.categories[k].name for k in theirs.labels]
  ground_truth = source.ground_truth()
  assert len(ground_truth['annotations']) == sum(len(original[i].boxes) for i in range(6))
  with pytest.raises(InputError, match="did you mean 'folder'"):
    build_source(block | {'foldr': '.'})
  (importable / 'bad.csv').write_text('image,xmin,ymin,xmax,ymax,label\n0.png,5,5,5,9,a\n')
  for file, message in [('nowhere.csv', 'nowhere.csv'), ('my_nets.py', 'no table'),
                     ('bad.csv', 'row 1')]:
    with pytest.raises(InputError, match=message):
      build_source(block | {'file': file})


def test_backbone_options_are_checked(importable):
  for options, message in [({'widht': 3}, "did you mean 'width'"), ({'blocks': 0}, 'blocks 0')]:
    with pytest.raises(InputError, match=message):
      registry.build('backbone', {'name': 'my_nets:SmallResNet', **options}, {})


@pytest.mark.slow
def test_the_commands_train_evaluate_and_detect(importable, capsys):
  command, evaluation = COMMANDS
  assignment, program, *arguments = shlex.split(command)
  name, _, value = assignment.partition('=')
  assert program == 'ppn'
  # -P: like an installed script, which does not search the current folder for modules.
  result = subprocess.run(
      [sys.executable, '-P', '-m', 'ppn_jax.cli.main', *arguments], text=True, capture_output=True,
      cwd=importable, env={**os.environ, name: f'{value}{os.pathsep}{ROOT}'})
  assert result.returncode == 0, result.stderr
  assert 'evaluated step 4' in result.stderr and 'SmallResNet' in result.stderr
  config = json.loads((importable / 'run' / 'config.json').read_text())
  assert config['model']['backbone'] == {'name': 'my_nets:SmallResNet', 'width': 4, 'blocks': 2}
  _, program, *arguments = shlex.split(evaluation)
  assert program == 'ppn' and main([*arguments, '--output=scores']) == 0
  # Opening a workdir runs none of its code.
  for name in list(FILES):
    sys.modules.pop(name.removesuffix('.py'), None)
  assert main(['evaluate', '--workdir=run', '--output=scores', '--allow=my_data']) == 2
  assert "backbone 'my_nets:SmallResNet' in run/config.json is code" in capsys.readouterr().err
  assert 'my_nets' not in sys.modules
  with pytest.raises(InputError, match=r"in Python allow=\('my_nets',\)"):
    ppn_jax.load('run')
  namespace = {}
  exec(SNIPPET, namespace)
  found, names = namespace['found'], {c.name for c in namespace['detector'].categories}
  assert found.boxes.shape == (len(found.scores), 4) and set(found.names) <= names
  assert (found.scores >= 0.01).all() and len(found.scores) > 0
