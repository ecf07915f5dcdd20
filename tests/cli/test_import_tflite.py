"""`ppn import-tf` of TFLite files, and training from them: batch norm is put back, once."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip('tflite')
from tflite_writer import write_classifier, write_ssd
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source
from ppn_jax.distributed import sharding
from ppn_jax.run import load_variables, open_run
from ppn_jax.weights.folded_norm import folded_layers

TESTS = pathlib.Path(__file__).resolve().parents[1]
STEPS = ['--config.train.steps=2', '--config.train.checkpoint_every=1',
         '--config.init.norm_images=8']


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny_file.py'
  path.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  return f'--config={path}'


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
  path = tmp_path_factory.mktemp('file') / 'mobilenet.tflite'
  write_classifier(path)
  return path


def variables_of(workdir, step=None):
  run = open_run(workdir)
  _, variables = load_variables(run, run.detector(), sharding.data_mesh(), step=step)
  return jax.device_get(variables)


def same(a, b):
  a, b = flatten_dict(a), flatten_dict(b)
  return all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.slow
def test_a_detector_brings_its_own_settings(tmp_path, capsys):
  write_ssd(tmp_path / 'x.tflite', classes=3, labels={'labels.txt': 'cat\n???\ndog\n'})
  command = ['import-tf', f'--checkpoint={tmp_path / "x.tflite"}']
  assert main([*command, f'--workdir={tmp_path / "run"}']) == 0
  printed = capsys.readouterr().out
  for part in ('set from the file: model.backbone.depth_multiplier=0.25 '
               'model.neck.depths=128,64,64,32', 'matched 199 of 199 variables, missing 0',
               '2 of 3 classes named by the metadata', 'batch norm of 35 layers is folded',
               'anchors differ: 1,917 of 1,917', 'score_threshold=1e-08 (there 0.25)'):
    assert part in printed
  run = open_run(tmp_path / 'run')
  assert [c.name for c in run.categories] == ['cat', 'N/A 2', 'dog']
  assert run.config.model.backbone.depth_multiplier == 0.25
  assert any('batch norm of 35 layers' in line for line in run.config.init.report)
  assert len(folded_layers(variables_of(tmp_path / 'run'))) == 35
  # Entries of the command line are kept, and named where they do not fit.
  assert main([*command, f'--workdir={tmp_path / "other"}',
               '--config.model.backbone.depth_multiplier=0.5']) == 2
  assert '; set model.backbone.depth_multiplier=0.25' in capsys.readouterr().err
  assert not (tmp_path / 'other').exists()


def test_a_backbone_needs_a_config(tmp_path, backbone, capsys):
  assert main(['import-tf', f'--checkpoint={backbone}', f'--workdir={tmp_path / "run"}']) == 2
  assert 'for which there is no config; give --config' in capsys.readouterr().err


@pytest.mark.slow
def test_training_puts_batch_norm_back(tmp_path, config, backbone, capsys):
  train = ['train', config, *STEPS, f'--config.init.backbone={backbone}']
  assert main([*train, f'--workdir={tmp_path / "a"}']) == 0
  line = 'batch norm of 11 layers was folded into their kernels: put back from 8 training images'
  assert line in capsys.readouterr().err
  written = json.loads((tmp_path / 'a/config.json').read_text())['init']['report']
  assert sum(line in entry for entry in written) == 1
  # Resuming puts nothing back, and the same command gives the same bits.
  assert main([*train, f'--workdir={tmp_path / "a"}', '--config.train.steps=3']) == 0
  assert 'folded' not in capsys.readouterr().err
  assert main([*train, f'--workdir={tmp_path / "c"}']) == 0
  assert same(variables_of(tmp_path / 'a', 2), variables_of(tmp_path / 'c', 2))
  assert main([*train, f'--workdir={tmp_path / "d"}', '--config.init.norm_images=0']) == 0
  assert 'with init.norm_images=0 batch statistics will rescale them' in capsys.readouterr().err
  assert not same(variables_of(tmp_path / 'a', 2), variables_of(tmp_path / 'd', 2))


@pytest.mark.slow
def test_an_imported_run_trains_on_with_its_batch_norm(tmp_path, config, backbone, capsys):
  (tmp_path / 'map.json').write_text(json.dumps({'categories': [
      category._asdict() for category in build_source(
          tiny_config().data.eval.to_dict()).categories]}))
  assert main(['import-tf', config, f'--checkpoint={backbone}', f'--workdir={tmp_path / "run"}',
               f'--label_map={tmp_path / "map.json"}']) == 0
  assert len(folded_layers(variables_of(tmp_path / 'run', 0))) == 11
  assert main(['train', config, f'--workdir={tmp_path / "run"}',
               '--config.init.norm_images=-1']) == 2
  assert 'init.norm_images=-1 must be a number of images' in capsys.readouterr().err
  for workdir, extra in (('new', [f'--config.init.weights={tmp_path / "run"}']), ('run', [])):
    assert main(['train', config, *STEPS, f'--workdir={tmp_path / workdir}', *extra]) == 0
    assert 'put back from 8 training images' in capsys.readouterr().err
    assert not folded_layers(variables_of(tmp_path / workdir, 1))
    report = json.loads((tmp_path / workdir / 'config.json').read_text())['init']['report']
    assert any('put back from 8 training images' in entry for entry in report)


@pytest.mark.parametrize('entry, message', [
    ('init.norm_images=-1', 'init.norm_images=-1 must be a number of images'),
    ('model.layers.norm_epsilon=0.01', 'model.layers.norm_epsilon=0.01; set it to 0.001'),
    ('model.layers.norm_epsilon=0.01 init.norm_images=0', 'norm_epsilon=0.01; set it to 0.001')])
def test_what_does_not_fit_is_refused(tmp_path, config, backbone, capsys, monkeypatch, entry,
                                      message):
  monkeypatch.setattr('ppn_jax.jobs.train.jit_init', None)  # Nothing is compiled before.
  assert main(['train', config, *STEPS, f'--config.init.backbone={backbone}',
               f'--workdir={tmp_path / "run"}', *(f'--config.{e}' for e in entry.split())]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run' / 'config.json').exists()
