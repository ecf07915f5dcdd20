"""`ppn export`: the file that jax.export opens, and what is rejected or not kept."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, untrained_run

from ppn_jax.cli.main import main
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError, install_command
from ppn_jax.export.runtimes import open_export
from ppn_jax.jobs import export as export_job
from ppn_jax.run import load_variables, open_run

pytest.importorskip('flatbuffers', reason="pip install 'ppn_jax[export]'")


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return untrained_run(tmp_path_factory.mktemp('run'), steps=(3, 6), ema_decay=0.9)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Writes as many images as the tests below detect at a time, so that all compile one program."""
  folder = tmp_path_factory.mktemp('pictures')
  for i, pixels in enumerate(some_images(3, seed=2)):
    Image.fromarray(pixels[:40]).save(folder / f'{i}.png')
  return folder


@pytest.fixture(scope='module')
def exported(workdir, pictures, tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'model'
  assert main(['export', f'--workdir={workdir}', '--format=stablehlo', f'--output={path}',
               '--batch_size=free', '--step=3', f'--images={pictures}']) == 0
  return path


def in_jax(workdir, images, step, ema=None):
  run = open_run(workdir)
  detector = run.detector()
  _, variables = load_variables(run, detector, sharding.data_mesh(jax.local_devices()[:1]),
                                step=step, ema=ema)
  return jax.device_get(variables), jax.device_get(jax.jit(detector.detect)(variables, images))


def some_images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_pictures_of_a_folder(tmp_path, pictures, log_lines):
  """Other files and unreadable images are skipped and reported."""
  for file in pictures.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  (tmp_path / '0.png').write_bytes(b'junk')
  for name in ('._1.png', 'notes.txt', 'd.heic'):
    (tmp_path / name).write_bytes(b'junk')
  run = SimpleNamespace(config=tiny_config())
  images = export_job._Images(run, 64, tmp_path)
  assert images.load('eval', 20).shape == (2, 64, 64, 3)
  assert log_lines[0] == f'{tmp_path}: 2 files not looked at: .heic, .txt'
  assert len(log_lines) == 2
  assert log_lines[1].startswith(f'skipped: {tmp_path}/0.png: not an image')
  for file in tmp_path.glob('*.png'):
    file.write_bytes(b'junk')
  with pytest.raises(InputError, match=r'no readable images in'):
    export_job._Images(run, 64, tmp_path).load('eval', 20)


def test_a_run_without_evaluation_data_uses_training_images():
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.eval = {'name': 'coco_json'}
  images = export_job._Images(SimpleNamespace(config=config), 64, None)
  assert images.load('eval', 3).shape == (3, 64, 64, 3)


@pytest.mark.parametrize('policy', ['raise', 'skip'])
def test_bad_images_of_the_run_s_data(monkeypatch, policy, log_lines):
  source = Damaged(num_images=6, image_size=64)
  monkeypatch.setattr(export_job, 'open_split', lambda *_, **__: source)
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.on_bad_example, config.data.max_bad_share = policy, 0.2
  images = export_job._Images(SimpleNamespace(config=config), 64, None)
  if policy == 'raise':
    with pytest.raises(InputError, match=r'0\.jpg: damaged'):
      images.load('eval', 3)
  else:
    assert images.load('eval', 3).shape == (3, 64, 64, 3)
    assert log_lines == ['skipped: 0.jpg: damaged']


class Damaged(SyntheticShapes):
  """Source whose first image cannot be read."""

  def __getitem__(self, index):
    if index == 0:
      raise InputError('0.jpg: damaged')
    return super().__getitem__(index)


ALONE = """
import json, sys
import jax, numpy as np
from jax import export
call = export.deserialize(bytearray(open(sys.argv[1], 'rb').read())).call
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{k: np.asarray(v) for k, v in call(images).items()})
assert not [m for m in sys.modules if m.startswith(('ppn_jax', 'flax'))]
"""


@pytest.mark.slow
def test_stablehlo_runs_without_this_package(workdir, exported, tmp_path):
  images = some_images(3)
  np.save(tmp_path / 'images.npy', images)
  subprocess.run([sys.executable, '-c', ALONE, exported, tmp_path / 'images.npy',
                  tmp_path / 'found.npz'], cwd=tmp_path, check=True)
  variables, expected = in_jax(workdir, images, 3)
  with np.load(tmp_path / 'found.npz') as found:
    for name in expected._fields:
      np.testing.assert_allclose(found[name], getattr(expected, name), atol=1e-5)
  with np.load(f'{exported}.npz') as weights:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    assert len(weights.files) == len(leaves)
    for keys, value in leaves:
      np.testing.assert_array_equal(weights['/'.join(k.key for k in keys)], value)


@pytest.mark.slow
def test_metadata_says_how_to_use_it(exported):
  with open(f'{exported}.json') as file:
    metadata = json.load(file)
  assert metadata['labels'] == ['circle', 'square', 'star']
  assert metadata['category_ids'] == [0, 10, 20]
  assert metadata['input']['shape'] == ['any', 64, 64, 3]
  assert metadata['input']['resize'] == 'supersample' and metadata['step'] == 3
  assert 'ymin, xmin, ymax, xmax' in metadata['outputs']['boxes']
  assert metadata['model']['backbone']['name'] == 'mobilenet_v1'


@pytest.mark.slow
def test_opened_export_takes_any_number_of_images(workdir, exported):
  detect = open_export(exported)
  images = some_images(3, seed=1)
  _, expected = in_jax(workdir, images, 3)
  assert detect.batch_size is None and detect.image_size == 64
  np.testing.assert_allclose(detect(images).scores, expected.scores, atol=1e-5)
  with pytest.raises(ValueError, match=r'takes uint8 \[B, 64, 64, 3\]'):
    detect(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.slow
def test_a_file_with_wrong_detections_is_not_kept(workdir, pictures, tmp_path, monkeypatch,
                                            capsys):
  """Users of the reference got boxes with swapped coordinates from converted files."""
  def swapped(path):
    detect = open_export(path)
    return lambda images: (lambda d: d._replace(boxes=d.boxes[..., [1, 0, 3, 2]]))(detect(images))
  monkeypatch.setattr(export_job, 'open_export', swapped)
  assert main(['export', f'--workdir={workdir}', '--format=stablehlo', '--batch_size=free',
               '--step=3', f'--images={pictures}', f'--output={tmp_path}/model']) == 2
  assert 'is wrong and was not kept' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, message', [
    (['--format=tfjs'], "unknown format 'tfjs'"),
    (['--format=stablehl'], "did you mean 'stablehlo'"),
    (['--format=tflite', '--batch_size=free'], 'fixed batch size'),
    (['--format=stablehlo', '--batch_size=0'], 'batch_size=0 must be at least 1'),
    (['--format=stablehlo', '--batch_size=all'], '--batch_size=all must be a number'),
    (['--format=onnx', '--precision=int8'], 'precision int8 is for format tflite'),
    (['--format=tflite', '--precision=int4'], "did you mean 'int8'"),
    (['--format=tflite', '--precision=int8', '--calibration_images=0'], 'calibrated on images'),
    (['--format=stablehlo', '--images=nowhere'], 'no folder nowhere'),
    (['--format=stablehlo', '--step=4'], 'step'),
    (['--format=stablehlo', '--output=gs://b/x'], 'must be a local file'),
])
def test_bad_input_is_one_line(workdir, tmp_path, capsys, flags, message):
  out = [] if any(f.startswith('--output') for f in flags) else [f'--output={tmp_path}/model']
  assert main(['export', f'--workdir={workdir}', *flags, *out]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert message in lines[-1] and lines[-1].startswith('ppn: error:')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('there', ['model', 'model.json', 'model.npz'])
def test_nothing_is_overwritten(workdir, tmp_path, capsys, there):
  (tmp_path / there).write_text('mine')
  assert main(['export', f'--workdir={workdir}', '--format=stablehlo',
               f'--output={tmp_path}/model']) == 2
  assert f'{there} exists' in capsys.readouterr().err
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(there, 'mine')]


def test_missing_library_names_its_extra(workdir, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  for output_format in ('saved_model', 'tflite', 'onnx'):
    assert main(['export', f'--workdir={workdir}', f'--format={output_format}',
                 f'--output={tmp_path}/model']) == 2
    assert install_command(output_format) in capsys.readouterr().err


@pytest.mark.parametrize('content', [None, b'', b'junk', b'\x08junk'])
def test_other_files_are_rejected(tmp_path, content):
  path = tmp_path / 'model'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=r'no file|not a file of `ppn export`|needs onnxruntime'):
    open_export(path)


@pytest.mark.parametrize('format, given, written', [
    ('tflite', 'bfloat16', 'same'), ('stablehlo', 'auto', 'same'),
    ('stablehlo', 'bfloat16', 'bfloat16')])
def test_files_do_not_depend_on_the_processor(workdir, format, given, written):
  run = open_run(workdir)
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.layers.matmul_dtype = given
  run = dataclasses.replace(run, config=config.lock())
  options = SimpleNamespace(format=format)
  for detector in export_job._detectors(run, options):
    assert detector.network.policy.matmul_dtype == written
