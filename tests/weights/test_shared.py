"""Starting from a weights file."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import tiny_config, untrained_run

from ppn_jax.cli.main import main
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import build_detector, resolve_classes
from ppn_jax.weights.initial import initial_weights

SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')


@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
  """Returns a run with three classes, two of them in the tiny config, and its weights file."""
  run = untrained_run(tmp_path_factory.mktemp('earlier') / 'run', (6,), ema_decay=0.9,
                      categories=[Category(i, name) for i, name in enumerate(
                          ('star', 'moon', 'circle'))])
  file = run.parent / 'a file.safetensors'
  assert main(['export', f'--workdir={run}', '--format=weights', f'--output={file}']) == 0
  return run, file


def started(weights, part='weights', config=None):
  config = resolve_classes(config or tiny_config(), range(5))
  detector = build_detector(config)
  like = jax.eval_shape(lambda: detector.init(jax.random.key(0)))
  return initial_weights(like, tuple(Category(i, name) for i, name in enumerate(SHAPES)),
                         **{part: str(weights)})


@pytest.mark.slow
@pytest.mark.parametrize('part', ['weights', 'backbone'])
def test_the_same_as_from_its_run(earlier, part):
  file = earlier[1]
  from_run, from_file = (started(path, part) for path in earlier)
  jax.tree.map(np.testing.assert_array_equal, from_file.variables, from_run.variables)
  for path, (indices, values) in from_run.partial.items():
    np.testing.assert_array_equal(from_file.partial[path][0], indices)
    np.testing.assert_array_equal(from_file.partial[path][1], values)
  assert from_file.report.lines()[0] == f'{file}: a weights file of 3 classes, step 6'
  assert from_file.report.lines()[1:] == from_run.report.lines()[1:]


def test_half_precision_becomes_float32(earlier, tmp_path):
  file = earlier[1]
  half = tmp_path / 'half.safetensors'
  assert main(['export', f'--model={file}', '--format=weights', '--precision=float16',
               f'--output={half}']) == 0
  found = started(half)
  assert {leaf.dtype for leaf in jax.tree.leaves(found.variables)} == {np.dtype(np.float32)}
  assert found.report.lines()[0].endswith('step 6, float16')


def test_training_starts_from_it_and_its_file_says_so(earlier, tmp_path, steps_not_taken):
  run, file = earlier
  config = tiny_config().copy_and_resolve_references().unlock()
  states = []
  for number, path in enumerate((run, file)):
    config.init.weights = str(path)
    train_job.train(config.copy_and_resolve_references().lock(), tmp_path / f'run{number}')
    states.append(steps_not_taken.pop())
  jax.tree.map(np.testing.assert_array_equal, *states)
  init = json.loads((tmp_path / 'run1/config.json').read_text())['init']
  assert init['report'][0] == f'{file}: a weights file of 3 classes, step 6'
  assert 'circle, star' in init['report'][2] and len(init['report']) <= 5


def test_custom_components_are_not_imported(earlier, tmp_path, import_from):
  """Only names and shapes of the variables count, not what the file's config names."""
  from ppn_jax.export.weights_file import read_weights_file, write_weights_file
  (tmp_path / 'planted.py').write_text('raise AssertionError("imported")')
  import_from(tmp_path)
  file = read_weights_file(earlier[1])
  config = json.loads(json.dumps(file.header['config']))
  config['model']['backbone']['name'] = 'planted:Net'
  write_weights_file(tmp_path / 'a.safetensors', file.values, precision='float32', step=6,
                     categories=file.categories, config=config)
  assert started(tmp_path / 'a.safetensors').report.transferred == started(
      earlier[1]).report.transferred


@pytest.mark.parametrize('part', ['weights', 'backbone'])
@pytest.mark.parametrize('name, message', [
    ('missing.safetensors', r'no file .*missing\.safetensors; give a file of `ppn export'),
    ('a file.safetensors@2000', 'a weights file holds one step; leave out @2000'),
    ('cut.safetensors', 'cut.safetensors: damaged'),
    ('other.safetensors', 'a safetensors file of another program'),
    ('x.onnx', 'is a program in the format onnx, whose weights cannot be taken out'),
    ('x.stablehlo', 'is a program in the format stablehlo, whose weights cannot be taken out'),
    ('run/checkpoints/6/default/x', 'is inside the workdir of a run; give .*run@6'),
    ('run/metrics.jsonl', 'is inside the workdir of a run; give .*run')])
def test_mistakes(earlier, tmp_path, part, name, message):
  run, file = earlier
  (tmp_path / 'cut.safetensors').write_bytes(file.read_bytes()[:-9])
  (tmp_path / 'other.safetensors').write_bytes(safetensors.numpy.save({'w': np.ones(3)}))
  (tmp_path / 'x.onnx').write_bytes(b'\x08\x08')
  (tmp_path / 'x.stablehlo').write_bytes(b'any')
  (tmp_path / 'x.stablehlo.json').write_text(json.dumps(
      {'format': 'stablehlo', 'step': 1, 'input': {}, 'labels': [], 'category_ids': []}))
  here = pathlib.Path(run.parent if name.startswith(('a file', 'run')) else tmp_path)
  config = tiny_config().copy_and_resolve_references().unlock()
  config.init[part] = str(here / name)
  with pytest.raises(InputError, match=message) as error:
    train_job.train(config.lock(), tmp_path / 'new')
  assert '\n' not in str(error.value) and not (tmp_path / 'new').exists()


@pytest.mark.parametrize('spelling', ['run/', './run', '~/run', '~/run/@6', 'run@6',
                                      '~/a file.safetensors', './a file.safetensors'])
def test_spellings(earlier, monkeypatch, spelling):
  home = earlier[0].parent
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.chdir(home)
  assert started(spelling).report.origin in map(str, earlier)
