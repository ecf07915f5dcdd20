"""`ppn import-tf` and `config.init.backbone`: the runs they create and what they reject."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign import write_bundle
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.run import build_detector, load_variables, open_run, resolve_classes
from ppn_jax.training.train_step import jit_init
from ppn_jax.weights import names
from ppn_jax.weights.initial import initial_weights

TESTS = pathlib.Path(__file__).resolve().parents[1]
STILL = ['--config.optim.learning_rate=0.0', '--config.optim.warmup_learning_rate=0.0',
         '--config.train.steps=2', '--config.train.checkpoint_every=1']


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny_file.py'
  path.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  return str(path)


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  """Writes a detector's checkpoint for the tiny config and a label map; returns its variables."""
  folder = tmp_path_factory.mktemp('foreign')
  config = tiny_config()
  categories = build_source(config.data.eval.to_dict()).categories
  detector = build_detector(resolve_classes(config, categories))
  rng = np.random.default_rng(5)
  variables = {path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) for path, leaf in
               flatten_dict(jax.eval_shape(lambda: detector.init(jax.random.key(0)))).items()}
  tensors = {names.detector_name(path): np.swapaxes(v, 2, 3) if 'depthwise' in path and v.ndim == 4
             else v for path, v in variables.items()}
  write_bundle(folder / 'model.ckpt', tensors)
  (folder / 'map.pbtxt').write_text(''.join(
      f'item {{ id: {c.id} name: "{c.name}" }}\n' for c in categories))
  return folder, variables


def variables_of(workdir, step):
  run = open_run(workdir)
  found, variables = load_variables(run, run.detector(), sharding.data_mesh(), step=step)
  assert found == step
  return flatten_dict(jax.device_get(variables))


def fresh(workdir, seed):
  run, mesh = open_run(workdir), sharding.data_mesh()
  state = jit_init(run.detector(), run.optimizer(), mesh)(seed)
  return flatten_dict(jax.device_get(state.variables))


def assert_same(found, expected, part=None):
  paths = [path for path in found if part in (None, path[1]) and path[0] == 'params']
  assert paths
  for path in paths:
    np.testing.assert_array_equal(found[path], expected[path], err_msg=str(path))


def assert_rejected(capsys, argv, *messages):
  capsys.readouterr()
  assert main([str(a) for a in argv]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith('ppn: error: ') and sum('ppn: error' in x for x in lines) == 1
  for text in messages:
    assert text in lines[-1]


def importing(foreign, config, workdir, *more):
  return ['import-tf', f'--checkpoint={foreign[0]}', f'--config={config}', f'--workdir={workdir}',
          '--config.model.num_classes=5', f'--label_map={foreign[0] / "map.pbtxt"}', *more]


@pytest.fixture(scope='module')
def imported(foreign, config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('imported') / 'run'
  assert main(importing(foreign, config, workdir)) == 0
  return workdir


@pytest.mark.slow
def test_imported_run_evaluates_and_trains_on(foreign, config, imported, tmp_path, capsys):
  assert_same(variables_of(imported, 0), foreign[1])
  assert open_run(imported).categories == build_source(
      tiny_config().data.eval.to_dict()).categories
  assert main(['evaluate', f'--workdir={imported}']) == 0
  assert (imported / 'evaluation/0/scores.json').is_file()
  shutil.copytree(imported, tmp_path / 'run')
  capsys.readouterr()
  assert main(['train', f'--config={config}', f'--workdir={tmp_path / "run"}', *STILL]) == 0
  assert 'from step 0' in capsys.readouterr().err
  assert_same(variables_of(tmp_path / 'run', 2), foreign[1])


@pytest.mark.slow
def test_it_accounts_for_every_name(foreign, config, tmp_path, capsys):
  assert main(importing(foreign, config, tmp_path / 'run')) == 0
  count = len(foreign[1])
  assert f'matched {count} of {count} variables, missing 0, unused 0' in capsys.readouterr().out


def test_moving_average_starts_from_the_import(foreign, config, tmp_path):
  assert main(importing(foreign, config, tmp_path / 'run', '--config.optim.ema_decay=0.9')) == 0
  assert_same(variables_of(tmp_path / 'run', 0), foreign[1])  # The average is loaded.


def test_backbone_only(foreign, config, tmp_path, capsys):
  workdir = tmp_path / 'run'
  assert main(importing(foreign, config, workdir, '--kind=backbone', '--config.seed=3')) == 0
  assert 'box predictor' in capsys.readouterr().out
  found = variables_of(workdir, 0)
  assert_same(found, foreign[1], 'backbone')
  assert_same(found, fresh(workdir, 3), 'head')


@pytest.mark.slow
def test_reference_checkpoint(shared, tmp_path, capsys):
  """Imports a PPN with 90 classes and reads COCO's file of 80, without a label map."""
  workdir, coco = tmp_path / 'run', shared / 'data/coco100'
  config = TESTS.parent / 'configs/ppn_mobilenet_v1_coco_reference.py'
  assert main(['import-tf', f'--checkpoint={shared / "golden/ckpt_ppn_s1"}', f'--config={config}',
               f'--workdir={workdir}']) == 0
  out = capsys.readouterr().out
  assert 'matched 144 of 144' in out and 'unused 20:' in out and len(out.splitlines()) < 9
  run = open_run(workdir)
  assert run.config.model.num_classes == 90 == len(run.categories)
  source = build_source({'name': 'coco_json', 'images': str(coco / 'val2017'), 'annotations': str(
      coco / 'annotations/instances_val2017.json')}, categories=run.categories)
  ground_truth = source.ground_truth()
  boxes = {i['id']: [] for i in ground_truth['images']}
  for a in ground_truth['annotations']:
    boxes[a['image_id']].append(a['category_id'])
  for i in range(5):
    example = source[i]
    assert sorted(run.categories[k].id for k in example.labels) == sorted(boxes[example.image_id])
  assert [c['id'] for c in ground_truth['categories']] == list(range(1, 91))


def test_nothing_is_written_over(foreign, config, imported, capsys):
  before = {p: p.stat().st_mtime_ns for p in imported.rglob('*')}
  assert_rejected(capsys, importing(foreign, config, imported), 'already holds a run')
  assert before == {p: p.stat().st_mtime_ns for p in imported.rglob('*')}


@pytest.mark.parametrize('more, message', [
    (['--checkpoint=/nowhere/x'], 'no checkpoint at /nowhere/x'),
    (['--config.model.num_classes=6'], 'or model.background_column=False'),
    (['--config.model.num_classes=9'], 'set model.num_classes to 0'),
    (['--config.model.num_classes=0'], 'has 5 class columns, the first of which is the background'),
    (['--config.model.backbone.depth_multiplier=0.5'], 'depth_multiplier'),
    (['--config.model.neck.num_levels=2'], 'no place for 4 of its variables'),
    (['--label_map=/nowhere.pbtxt'], 'no label map at /nowhere.pbtxt'),
    (['--config.init.backbone=x'], 'init.backbone=x is for new runs'),
    (['--config.init.weights=x'], 'init.weights=x is for new runs'),
    (['--kind=both'], "invalid choice: 'both'"), (['--average'], 'no moving averages')])
def test_mistakes_are_reported_and_nothing_is_written(foreign, config, tmp_path, capsys, more,
                                                      message):
  assert_rejected(capsys, importing(foreign, config, tmp_path / 'run', *more), message)
  assert not (tmp_path / 'run').exists()


def test_damaged_checkpoint(foreign, config, tmp_path, capsys):
  for name in ('model.ckpt.index', 'model.ckpt.data-00000-of-00001'):
    shutil.copy(foreign[0] / name, tmp_path)
  data = tmp_path / 'model.ckpt.data-00000-of-00001'
  raw = bytearray(data.read_bytes())
  raw[len(raw) // 2] ^= 4
  data.write_bytes(raw)
  assert_rejected(capsys, importing((tmp_path,), config, tmp_path / 'run'), 'the checksum of')
  assert not (tmp_path / 'run').exists()


def test_backbone_without_classes(foreign, config, tmp_path, capsys):
  argv = importing(foreign, config, tmp_path / 'run', '--kind=backbone')
  assert_rejected(capsys, [a for a in argv if not a.startswith('--label_map')],
          '--label_map', '--config.init.backbone=')


@pytest.mark.slow
def test_training_from_a_backbone(foreign, config, tmp_path, capsys):
  copy, workdir = tmp_path / 'weights', tmp_path / 'run'
  shutil.copytree(foreign[0], copy)
  argv = ['train', f'--config={config}', f'--workdir={workdir}', f'--config.init.backbone={copy}',
          *STILL]
  assert main(argv) == 0
  assert 'starting from' in capsys.readouterr().err
  found = variables_of(workdir, 2)
  assert_same(found, foreign[1], 'backbone')
  assert_same(found, fresh(workdir, 0), 'head')
  record = json.loads((workdir / 'config.json').read_text())['init']
  assert record['backbone'] == str(copy) and record['weights'] == ''
  assert f'{copy}/model.ckpt: a PPN detector' in record['report'][0]
  assert [line.split(':')[0] for line in record['report'][1:]] == ['used', 'random', 'unused']
  shutil.rmtree(copy)  # Resuming does not need it.
  shutil.rmtree(workdir / 'checkpoints/2')
  argv[3] = '--config.init.weights=/elsewhere'
  assert main(argv) == 0
  printed = capsys.readouterr().err
  assert 'resuming' in printed and 'init.weights=/elsewhere is ignored' in printed
  assert_same(variables_of(workdir, 2), found)
  assert json.loads((workdir / 'config.json').read_text())['init'] == record


@pytest.mark.parametrize('key', ['backbone', 'weights'])
@pytest.mark.parametrize('path, message', [
    ('/nowhere/x', 'no checkpoint at /nowhere/x'), (__file__, 'not a known format')])
def test_bad_paths_to_start_from(config, tmp_path, capsys, key, path, message):
  workdir = tmp_path / 'run'
  assert_rejected(capsys, ['train', f'--config={config}', f'--workdir={workdir}',
                   f'--config.init.{key}={path}'], message)
  assert not workdir.exists()


def test_a_run_needs_no_import(config, imported, tmp_path, capsys):
  assert_rejected(capsys, ['import-tf', f'--checkpoint={imported}', f'--config={config}',
                   f'--workdir={tmp_path / "run"}'], f'--config.init.weights={imported}')


@pytest.mark.parametrize('background', [True, False])
def test_all_that_fits_is_transferred_from_a_detectors_file(foreign, background):
  """Only the background column is transferred, since the file's classes have no names."""
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.background_column = background
  config.model.neck.num_levels = 2
  detector = build_detector(resolve_classes(config, range(4)))
  like = jax.eval_shape(lambda: detector.init(jax.random.key(0)))
  found = initial_weights(like, [Category(i, f'{i}') for i in range(4)], weights=str(foreign[0]))
  transferred = flatten_dict(found.variables)
  classes = {('params', 'head', leaf) for leaf in ('class_bias', 'class_kernel')}
  assert transferred.keys() == flatten_dict(like).keys() - classes
  for path, value in transferred.items():
    np.testing.assert_array_equal(value, foreign[1][path], err_msg=str(path))
  assert found.partial.keys() == (classes if background else set())
  assert 'the file does not name its classes' in str(found.report)
  assert '4 of box predictor' in str(found.report).splitlines()[-1]
