"""Tests the commands as users type them: what they print, write and refuse."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import CONFIG_FILE, tiny_config, untrained_run

from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source

TESTS = pathlib.Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny_file.py'
  path.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  return str(path)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  shapes = build_source(tiny_config().data.train.to_dict()).categories
  return untrained_run(tmp_path_factory.mktemp('run'), steps=(3, 6), categories=shapes)


@pytest.fixture(scope='module')
def coco_folder(tmp_path_factory):
  """Writes images and a JSON file: ids with gaps, an image and a category without boxes."""
  folder = tmp_path_factory.mktemp('coco')
  source = build_source({'name': 'synthetic_shapes', 'num_images': 8, 'image_size': (48, 64)})
  ground_truth = source.ground_truth()
  for index, image in enumerate(ground_truth['images']):
    Image.fromarray(source[index].image).save(folder / image['file_name'], quality=95)
  Image.new('L', (64, 48), 99).save(folder / 'empty.png')
  ground_truth['images'].append({'id': 900, 'file_name': 'empty.png', 'width': 64, 'height': 48})
  for category in ground_truth['categories']:
    category['id'] *= 10
  for annotation in ground_truth['annotations']:
    annotation['category_id'] *= 10
  ground_truth['categories'].append({'id': 77, 'name': 'nothing'})
  (folder / 'truth.json').write_text(json.dumps(ground_truth))
  return folder


def data_flags(folder, annotations='truth.json'):
  return [f'--config.data.{split}.{key}={value}' for split in ('train', 'eval')
          for key, value in (('images', folder), ('annotations', folder / annotations))]


def refused(capsys, argv, *messages):
  """Runs a command that must exit with 2, and checks its one-line error."""
  capsys.readouterr()
  assert main([str(a) for a in argv]) == 2
  lines = capsys.readouterr().err.splitlines()
  errors = [line for line in lines if line.startswith('ppn: error: ')]
  assert len(errors) == 1 and lines[-1] == errors[0], lines
  for text in messages:
    assert str(text) in errors[0]


def test_help_answers_without_the_heavy_libraries():
  code = ("import sys; from ppn_jax.cli.main import main\ntry: main(['train', '--help'])\n"
          "except SystemExit as e: assert e.code == 0\n"
          "assert not {'jax', 'flax', 'orbax', 'grain', 'cv2'} & set(sys.modules)")
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=REPOSITORY, check=True)
  assert '--workdir' in result.stdout and 'resumed' in result.stdout


@pytest.mark.slow
def test_training_on_own_images_as_the_config_describes(coco_folder, tmp_path, capsys):
  small = ['--config.model.image_size=64', '--config.model.neck.num_levels=3',
           '--config.model.neck.stride=8', '--config.model.backbone.last_block=5',
           '--config.model.backbone.depth_multiplier=0.25', '--config.model.head.depth=16']
  argv = ['train', f'--config={REPOSITORY}/configs/coco_json.py', f'--workdir={tmp_path / "w"}',
          *data_flags(coco_folder), '--config.train.steps=4', '--config.train.batch_size=4',
          '--config.train.checkpoint_every=4', *small]
  assert main(argv) == 0
  assert json.loads((tmp_path / 'w' / 'config.json').read_text())['model']['num_classes'] == 6
  printed = capsys.readouterr().err
  assert 'evaluated step 4' in printed
  for line in ('data.train: 9 images, 1 without annotations, ', 'data.eval: 9 images, ',
               "data.train: no box of 1 class, which cannot be learned: 'nothing'"):
    assert printed.index(line) < printed.index('compiling')
  assert main(['evaluate', f'--workdir={tmp_path / "w"}', '--scorer=pycocotools']) == 0
  out = capsys.readouterr().out
  assert 'AP50' in out and 'triangle' in out and '9 images' in out
  rows = json.loads((tmp_path / 'w' / 'evaluation' / '4' / 'results.json').read_text())
  assert {r['image_id'] for r in rows} <= {*range(1, 9), 900}
  assert {r['category_id'] for r in rows} <= {10, 20, 30, 40, 50, 77}


@pytest.mark.slow
def test_evaluate_draws_and_takes_a_step(run, capsys):
  assert main(['evaluate', f'--workdir={run}', '--step=3', '--pictures=4']) == 0
  assert np.asarray(Image.open(run / 'evaluation' / '3' / 'pictures.png')).shape[-1] == 3


@pytest.mark.slow
def test_evaluate_reports_on_calibration(run, tmp_path, capsys):
  argv = ['evaluate', f'--workdir={run}', '--calibration', f'--output={tmp_path / "out"}',
          '--calibration_floor=0.001', '--calibration_images=5']
  assert main(argv) == 0
  out = capsys.readouterr().out
  assert out.index('AR_large') < out.index('level 0') < out.index('precision at equal score')
  found = json.loads((tmp_path / 'out' / 'calibration.json').read_text())
  rows = json.loads((tmp_path / 'out' / 'results.json').read_text())
  counted = [r for r in rows if r['score'] >= 0.001]
  assert found['floor'] == 0.001 and found['all']['detections'] == len(counted) > 0
  assert [g['detections'] for g in found['by_level']] == [
      sum(r['level'] == level for r in counted) for level in range(3)]
  assert [g['name'] for g in found['by_class']] == ['circle', 'square', 'triangle', 'star', 'cross']
  assert found['training']['images'] == 5
  scores = json.loads((tmp_path / 'out' / 'scores.json').read_text())
  assert found['recalibration']['as_is']['AP'] == scores['figures']['AP']
  assert Image.open(tmp_path / 'out' / 'calibration.png').size[0] > 1000


@pytest.mark.slow
def test_detect_writes_pictures_and_json(run, coco_folder, tmp_path, capsys):
  argv = ['detect', f'--workdir={run}', str(coco_folder), f'--output={tmp_path / "found"}',
          '--threshold=0']
  assert main(argv) == 0
  found = json.loads((tmp_path / 'found' / 'detections.json').read_text())
  assert len(found) == 9
  for entry in found:
    assert Image.open(entry['picture']).size == (entry['width'], entry['height']) == (64, 48)
    for detection in entry['detections']:
      x, y, w, h = detection['bbox']
      assert -1e-3 <= x and x + w <= 64.001 and -1e-3 <= y and y + h <= 48.001
      assert detection['category'] in ('circle', 'square', 'triangle', 'star', 'cross')


@pytest.mark.slow
def test_detect_skips_a_broken_file_and_reports_it(run, coco_folder, tmp_path, capsys):
  (tmp_path / 'in').mkdir()
  good = (coco_folder / '000000.jpg').read_bytes()
  (tmp_path / 'in' / 'good.jpg').write_bytes(good)
  (tmp_path / 'in' / 'cut.jpg').write_bytes(good[:len(good) // 2])
  refused(capsys, ['detect', f'--workdir={run}', tmp_path / 'in', f'--output={tmp_path / "out"}'],
          '1 of 2 files', 'cut.jpg')
  assert len(json.loads((tmp_path / 'out' / 'detections.json').read_text())) == 1


def test_detect_never_overwrites_its_input(run, tmp_path, capsys):
  Image.new('RGB', (64, 48)).save(tmp_path / 'a.png')
  before = (tmp_path / 'a.png').read_bytes()
  refused(capsys, ['detect', f'--workdir={run}', tmp_path / 'a.png', f'--output={tmp_path}'],
          'would overwrite')
  assert (tmp_path / 'a.png').read_bytes() == before


@pytest.mark.parametrize('argv, message', [
  (['trian'], "unknown command 'trian'; did you mean 'train'"),
  ([], 'COMMAND'),
  (['train', '--confg=x', '--workdir=w'], "unknown flag --confg; did you mean '--config'"),
  (['train', '--config=no.py', '--workdir=w'], "no file 'no.py'"),
  (['train', '--workdir=w'], '--config'),
  (['evaluate', '--workdir=nowhere'], 'workdir nowhere is not a run'),
  (['evaluate', '--workdir=w', '--step=three'], '--step'),
  (['evaluate', '--workdir=w', '--scorer=mine'], 'hotcoco'),
  (['detect', '--workdir=w', '--output=o'], 'IMAGE'),
  (['detect', '--workdir=w', '--output=o', 'a.jpg', '--config.x=1'], 'takes no config entries'),
  (['train', '--config=c.py', '--workdir=w', '--config.train.steps', '5'],
   'write --config.train.steps=VALUE'),
  (['train', '--config=c.py', '--workdir=w', '--config.a=5', 'extra'], "argument 'extra'"),
  (['evaluate', '--workdir=w', '--pictures=-1'], '--pictures=-1'),
  (['evaluate', '--workdir=w', '--calibration_floor=1'], 'floor=1.0'),
  (['evaluate', '--workdir=w', '--calibration_images=-1'], 'train_images'),
  (['evaluate', '--workdir=w', '--config.eval.batch_size=8'], '--output'),
  (['detect', '--workdir=w', '--output=o', 'nothing.jpg'], 'no file or folder nothing.jpg'),
])
def test_mistakes_on_the_command_line(capsys, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  refused(capsys, argv, message)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('override, message', [
  ('--config.train.stps=3', "did you mean 'steps'"),
  ('--config.train.steps=three', 'config.train.steps=three'),
  ('--config.train.steps=0', 'train.steps=0'),
  ('--config.train.batch_size=0', 'train.batch_size=0'),
  ('--config.data.train.name=coco_jsn', "data.train: unknown source 'coco_jsn'; did you mean"),
  ('--config.data.train.num_images=0', 'num_images'),
  ('--config.data.resize=nearest', 'nearest'),
  ('--config.data.transforms=({"name":"horizontal_flp"},)', 'horizontal_flip'),
  ('--config.data.max_boxes=1', 'max_boxes'),
  ('--config.model.neck.stride=13', 'stride 13'),
  ('--config.model.anchors.aspect_ratios=(1,"a")', 'aspect_ratios'),
  ('--config.seed=-1', 'seed=-1'),
  ('--config.seed=2147483648', 'seed=2147483648'),
  ('--config.data.threads=-1', 'threads'),
  ('--config.data.transforms=3', 'transform 3 is not a block'),
  ('--config.optim.rate_batch_size=-8', 'optim.rate_batch_size=-8'),
  ('--config.loss.alpha=1.5', 'alpha=1.5'),
  ('--config.matching.matched_iou=0', 'matched_iou'),
  ('--config.data.train.name=:X', "':X'"),
  ('--config.model.num_classes=4', 'model.num_classes=4'),
  ('--config.model.backbone.name=resnet', "unknown backbone 'resnet'"),
  ('--config.model.layers.dtype=float8', 'float8'),
  ('--config.loss.alpha=x', 'config.loss.alpha=x'),
  ('--config.optim.momentum=1.5', 'optim.optimizer.momentum=1.5'),
  ('--config.postprocess.iou_threshold=2', 'iou_threshold'),
  ('--config.train.keep_last=0', 'keep_last=0'),
  ('--config.eval.batch_size=0', 'eval.batch_size=0'),
])
def test_mistakes_in_a_config_touch_nothing(config, run, tmp_path, capsys, override, message):
  evaluating = ['--config.train.evaluate_every=3']
  argv = ['train', f'--config={config}', override, *evaluating]
  refused(capsys, [*argv, f'--workdir={tmp_path / "new"}'], message)
  before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
  refused(capsys, [*argv, f'--workdir={run}'])  # Or reports that the run is of another model.
  assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before


def write_changed(folder, change):
  """Writes changed.json, a copy of truth.json with a mistake."""
  ground_truth = json.loads((folder / 'truth.json').read_text())
  change(ground_truth)
  (folder / 'changed.json').write_text(json.dumps(ground_truth))


@pytest.mark.parametrize('change, message', [
  (lambda t: t['annotations'][0].update(image_id=12345), '12345'),
  (lambda t: t['annotations'][0].update(category_id=3), 'category'),
  (lambda t: t['annotations'][0].update(bbox=[5, 5, 0, 9]), "on_bad_box='drop'"),
  (lambda t: t['annotations'][0].update(bbox=[200, 5, 9, 9]), 'outside'),
  (lambda t: t['annotations'][0].update(bbox=[float('nan'), 5, 9, 9]), 'finite'),
  (lambda t: t['images'][0].update(file_name='../truth.json'), '../truth.json'),
  (lambda t: t['images'][0].update(file_name='lost.jpg'), 'lost.jpg'),
  (lambda t: t.pop('annotations'), 'annotations'),
  (lambda t: t.update(annotations=[]), 'nothing to learn from: no box in 9 images'),
  (lambda t: [a.update(iscrowd=1) for a in t['annotations']], 'nothing to learn from: all '),
])
def test_mistakes_in_a_json(coco_folder, tmp_path, capsys, change, message):
  write_changed(coco_folder, change)
  refused(capsys, ['train', '--config=own_data:coco_json', f'--workdir={tmp_path / "w"}',
                   *data_flags(coco_folder, 'changed.json')], message)
  assert not (tmp_path / 'w').exists()


def test_missing_data_flags(tmp_path, capsys):
  refused(capsys, ['train', f'--config={REPOSITORY}/configs/coco_json.py',
                   f'--workdir={tmp_path / "w"}'], 'images')


def test_workdirs_that_are_no_runs(run, config, tmp_path, capsys):
  refused(capsys, ['evaluate', f'--workdir={tmp_path}'], 'is not a run')
  (tmp_path / 'file').write_text('mine')
  refused(capsys, ['train', f'--config={config}', f'--workdir={tmp_path / "file"}'], 'is a file')
  assert (tmp_path / 'file').read_text() == 'mine'
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'config.json').write_text('{"model": ')
  refused(capsys, ['evaluate', f'--workdir={tmp_path / "broken"}'], 'cannot be read as a run')


def test_checkpoints_that_are_missing_or_of_another_model(run, config, tmp_path, capsys):
  refused(capsys, ['evaluate', f'--workdir={run}', '--step=5'], 'no checkpoint of step 5')
  refused(capsys, ['train', f'--config={config}', f'--workdir={run}',
                   '--config.model.head.depth=8'], 'another model', 'head.depth')
  other = tmp_path / 'other'
  other.mkdir()
  text = (run / 'config.json').read_text().replace('"depth": 16', '"depth": 8')
  (other / 'config.json').write_text(text)
  (other / 'categories.json').write_text((run / 'categories.json').read_text())
  os.symlink(run / 'checkpoints', other / 'checkpoints')
  refused(capsys, ['evaluate', f'--workdir={other}'], 'checkpoint of another model',
          '(16,) there and (8,)')


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_share(config, tmp_path):
  result = subprocess.run(
      [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={config}',
       f'--workdir={tmp_path / "w"}', '--config.train.batch_size=12'], text=True,
      capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu',
                                'JAX_NUM_CPU_DEVICES': '8'})
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1] == (
      'ppn: error: train.batch_size=12 cannot be split over 8 devices; use a multiple, such as 16')
