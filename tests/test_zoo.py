"""Models that come with the package, by name."""

from importlib import resources

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import tiny_config, untrained_run

import ppn_jax
from ppn_jax import zoo
from ppn_jax.cli.main import main
from ppn_jax.errors import InputError
from ppn_jax.export.weights_file import read_weights_file
from ppn_jax.jobs import train as train_job
from ppn_jax.run import open_model


@pytest.fixture(scope='module')
def weights_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp('zoo')
  workdir = untrained_run(folder / 'run')
  assert main(['export', f'--workdir={workdir}', '--format=weights',
               f'--output={folder}/tiny_shapes.safetensors']) == 0
  return folder / 'tiny_shapes.safetensors'


def config_from(name):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.init.weights = name
  return config.lock()


@pytest.fixture(autouse=True)
def folder(weights_file, monkeypatch, tmp_path):
  monkeypatch.setattr(zoo, '_FOLDER', weights_file.parent)
  monkeypatch.chdir(tmp_path)


def test_the_models_of_the_package_can_be_used_and_are_described():
  folder = resources.files('ppn_jax') / 'zoo'
  files = {path.name for path in folder.iterdir()}
  models = {name.removesuffix('.safetensors') for name in files if name.endswith('.safetensors')}
  assert 'ppn_voc' in models
  for name in models:
    assert f'{name}.md' in files
    model = open_model(folder / f'{name}.safetensors')
    assert len(model.categories) == 20 and model.metrics() == []


def test_a_name_is_that_of_its_file(weights_file):
  assert zoo.names() == ('tiny_shapes',)
  assert zoo.find('tiny_shapes') == str(weights_file)
  assert zoo.find('tiny_shapes.safetensors') == 'tiny_shapes.safetensors'
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  by_name, by_path = ppn_jax.load('tiny_shapes')(image), ppn_jax.load(weights_file)(image)
  np.testing.assert_array_equal(by_name.scores, by_path.scores)
  assert open_model('tiny_shapes').name == 'tiny_shapes.safetensors'


def test_what_lies_in_the_working_directory_takes_precedence(tmp_path):
  (tmp_path / 'tiny_shapes').mkdir()
  assert zoo.find('tiny_shapes') == 'tiny_shapes'
  assert zoo.find(tmp_path / 'other') == str(tmp_path / 'other')


@pytest.mark.slow
def test_commands_take_a_name(tmp_path, capsys):
  assert main(['summary', '--model=tiny_shapes', '--json']) == 0
  output = tmp_path / 'copy.safetensors'
  assert main(['export', '--model=tiny_shapes', '--format=weights', f'--output={output}']) == 0
  assert output.exists()


@pytest.mark.parametrize(('name', 'said'), [
    ('tiny_shape', "did you mean 'tiny_shapes', a model that comes with the package?"),
    ('unknown', 'models that come with the package: tiny_shapes')])
def test_unknown_names_are_refused_with_those_there_are(tmp_path, capsys, name, said):
  with pytest.raises(InputError, match=said.rstrip('?')):
    ppn_jax.load(name)
  assert main(['detect', f'--model={name}', 'x.jpg', '--output=out']) == 2
  assert capsys.readouterr().err.count('\n') == 1
  with pytest.raises(InputError, match=said.rstrip('?')):
    train_job.train(config_from(name), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_paths_are_not_meant_as_names():
  assert zoo.suggestion('runs/tiny_shape') == zoo.suggestion('tiny_shape.tflite') == ''


def test_training_starts_from_a_name(tmp_path, steps_not_taken, weights_file):
  train_job.train(config_from('tiny_shapes'), tmp_path / 'run')
  state, = steps_not_taken
  params = flatten_dict(state.variables['params'])
  for path, value in read_weights_file(weights_file).values.items():
    if path[:2] == ('params', 'backbone'):
      np.testing.assert_array_equal(params[path[1:]], value)
