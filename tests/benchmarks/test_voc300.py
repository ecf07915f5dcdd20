"""Comparison on voc300: work over several calls, metrics and errors."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import html_page
import numpy as np
import pytest
from detections import random_problem, to_rows
from time_limits import HANG_SECONDS, wait_until

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks'))

from voc300 import comparison, page, recipes, report, run  # noqa: E402
from voc300.pieces import Diverged, Folder, Piece, RunKey, pack, work  # noqa: E402

from ppn_jax.data.transforms.basic import build_transforms  # noqa: E402
from ppn_jax.device_data.transforms import build_augmentation  # noqa: E402
from ppn_jax.errors import InputError  # noqa: E402
from ppn_jax.metrics import calibration, coco, error_analysis, matching  # noqa: E402
from ppn_jax.metrics.voc import voc_ap50  # noqa: E402
from ppn_jax.run import build_detector  # noqa: E402


class Clock:
  """Clock that a test advances."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


# Metrics over seeds and images.


def test_over_seeds_is_students():
  found = comparison.over_seeds([0.1, 0.2, 0.3])
  # Student's 97.5% of two degrees of freedom is 4.3027.
  assert found['mean'] == pytest.approx(0.2) and found['deviation'] == pytest.approx(0.1)
  assert found['interval'] == pytest.approx([0.2 - 4.3027 * 0.1 / 3**0.5,
                                             0.2 + 4.3027 * 0.1 / 3**0.5], abs=1e-5)
  assert comparison.over_seeds([0.1])['interval'] is None
  assert comparison.over_seeds([0.1, None])['mean'] is None


def _made_run(model, seed, figures, shift, recipe='shipped'):
  names = comparison.METRICS
  return {'model': model, 'recipe': recipe, 'seed': seed,
          'figures': dict.fromkeys(names, figures),
          'without_groups': {n: [figures + s for s in shift] for n in names}}


def test_differences_are_paired_by_seed_and_by_image():
  shift = np.linspace(-0.02, 0.02, 20)
  ppn = [_made_run('ppn', s, 0.3 + 0.05 * s, shift) for s in (0, 1, 2)]
  ssd = [_made_run('ssd', s, 0.2 + 0.05 * s, shift) for s in (2, 1, 0, 3)]
  found = comparison.differences(ppn, ssd, 'AP')
  assert found['seeds'] == [0, 1, 2] and found['mean'] == pytest.approx(0.1)
  # Seeds and images that affect both models alike do not make the difference uncertain.
  assert found['interval'] == pytest.approx([0.1, 0.1])
  assert found['images'] == pytest.approx([0.1, 0.1])
  alone = comparison.summarize(ppn, 'AP')
  assert alone['images'][0] < 0.3 < alone['images'][1]
  assert np.ptp(alone['interval']) > 0.1


def test_metrics_without_groups_equal_those_of_fewer_images():
  truth, rows = random_problem(0)
  parts = comparison.without_groups(truth, rows, num_levels=3, floor=0.05)
  assert {len(p) for p in parts.values()} == {20} and parts['cost_AP'] == [None] * 20
  place = np.random.default_rng(0).permutation(40)
  kept = set(np.flatnonzero(place % 20 != 7).tolist())
  part = truth | {'images': [m for m in truth['images'] if m['id'] in kept],
                  'annotations': [a for a in truth['annotations'] if a['image_id'] in kept]}
  mine = [r for r in rows if r['image_id'] in kept]
  assert len(kept) == 38
  assert parts['AP'][7] == coco.score(part, mine).metrics['AP']
  assert parts['VOC_AP50'][7] == voc_ap50(part, mine)[0]
  whole = comparison.accuracy(truth, rows)
  assert min(parts['AP']) < whole['AP'] < max(parts['AP'])


def _difference(values, interval, images):
  return {'values': values, 'interval': interval, 'images': images}


@pytest.mark.parametrize('difference, limit, below, verdict', [
    (_difference([.01] * 3, [.005, .02], [-.004, .02]), -0.005, False, 'confirmed'),
    (_difference([.01] * 3, [.005, .02], [-.006, .02]), -0.005, False, 'undecided'),
    (_difference([-.1] * 3, [-.2, -.01], [-.3, -.02]), -0.005, False, 'refuted'),
    (_difference([-.1] * 3, [-.2, -.01], [-.3, -.02]), 0, True, 'confirmed'),
    (_difference([.1] * 3, [.01, .2], [.02, .3]), 0, True, 'refuted'),
    (_difference([.1], None, [.02, .3]), 0, True, 'refuted'),
    (_difference([.1, None], None, None), 0, True, 'undecided')])
def test_a_claim_needs_both_intervals(difference, limit, below, verdict):
  assert report._verdict(difference, limit, below=below) == verdict


def test_speed_and_waiting_over_pieces():
  from voc300.runs import times
  lines = [{'step': 10, 'train/images_per_second': 20.0, 'train/data_wait': 0.5},
           {'step': 10, 'eval/AP': 0.1},
           {'step': 40, 'train/images_per_second': 60.0, 'train/data_wait': 0.0}]
  found = times(lines, 4)  # 2 seconds for 10 steps, 2 for 30.
  assert found['hours'] == pytest.approx(4 / 3600)
  assert found['data_wait'] == pytest.approx(0.25)
  assert found['images_per_second'] == 40 and found['slowest'] == 20
  assert times([], 4)['hours'] is None


# Work over several calls.

KEYS = [RunKey(model, 'shipped', seed) for seed in (0, 1) for model in ('ppn', 'ssd')]


class Worker:
  """Worker whose runs take 100 seconds and resume; detection takes 20 seconds, scoring 40."""

  def __init__(self, clock, piece, done):
    self.clock, self.piece, self.done = clock, piece, done

  def train(self, key):
    steps = self.done.setdefault(('train', key), 0)
    while steps < 100:
      if not self.piece.has(0):
        return False
      steps += 1
      self.done['train', key] = steps
      self.clock.now += 1
    return True

  def detect(self, key):
    self.clock.now += 20
    self.done['detect', key] = self.done.get(('detect', key), 0) + 1
    return {'step': 100}, to_rows([(key.seed, [0, 0, 9, 9], 0.5)])

  def score(self, key, rows):
    assert rows == to_rows([(key.seed, [0, 0, 9, 9], 0.5)])
    assert all(self.done['train', k] == 100 for k in KEYS)
    self.clock.now += 40
    self.done['score', key] = self.done.get(('score', key), 0) + 1
    return {'figures': {'AP': 0.5}}


def one_piece(folder, clock, done, minutes=4, **changes):
  piece = Piece(minutes, clock)
  worker = Worker(clock, piece, done)
  steps = {name: changes.get(name, getattr(worker, name)) for name in ('train', 'detect', 'score')}
  return work(KEYS, folder, piece, clock=clock, say=lambda text: None, **steps)


def test_pieces_do_every_part_once_and_end_in_time(tmp_path):
  clock, done, pieces, complete = Clock(), {}, 0, False
  while not complete:
    started = clock.now
    complete = one_piece(Folder(tmp_path), clock, done)
    assert clock.now - started <= 4 * 60
    clock.now += 1000  # Between two pieces.
    pieces += 1
  assert pieces == 3  # 640 seconds of work; work that would not fit was not started.
  assert done == {('train', k): 100 for k in KEYS} | {
      (part, k): 1 for k in KEYS for part in ('detect', 'score')}
  found = [Folder(tmp_path).read_scored(key) for key in KEYS]
  assert [(r['model'], r['seed'], r['step']) for r in found] == [
      ('ppn', 0, 100), ('ssd', 0, 100), ('ppn', 1, 100), ('ssd', 1, 100)]


def test_scoring_may_be_left_to_another_machine(tmp_path):
  clock, done = Clock(), {}
  assert one_piece(Folder(tmp_path / 'a'), clock, done, 0, score=None)
  assert not any(part == 'score' for part, _ in done)
  shutil.copytree(tmp_path / 'a' / 'trained', tmp_path / 'b' / 'trained')
  before = dict(done)
  assert one_piece(Folder(tmp_path / 'b'), clock, done, 0)
  assert {k: v for k, v in done.items() if k[0] != 'score'} == before
  assert all(done['score', k] == 1 for k in KEYS)


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path):
  clock, done = Clock(), {('train', k): 100 for k in KEYS}
  trained = []

  def train(key):
    trained.append(key)
    if key.model == 'ppn':
      raise Diverged('loss is nan at step 7')
    return True

  for _ in range(2):
    assert one_piece(Folder(tmp_path), clock, done, 0, train=train)
    # As if killed after the record and before the checkpoints were removed.
    (tmp_path / 'runs' / KEYS[1].name).mkdir(parents=True, exist_ok=True)
  assert one_piece(Folder(tmp_path), clock, done, 0, train=train)
  assert not list((tmp_path / 'runs').iterdir())
  assert trained == KEYS
  assert Folder(tmp_path).read_scored(KEYS[0])['stopped'] == 'loss is nan at step 7'
  assert 'figures' in Folder(tmp_path).read_scored(KEYS[1])


@pytest.mark.parametrize('minutes', [0, 0.002])
def test_sigterm_ends_a_piece_and_so_does_its_time(minutes):
  before, heard = signal.getsignal(signal.SIGTERM), []
  with Piece(minutes, interval=0.02) as piece:
    if not minutes:
      os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: piece.stopping)
    assert not piece.has(0)
    # A handler that is installed only now, as by training, also gets the signal.
    ours = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    wait_until(lambda: heard)
    signal.signal(signal.SIGTERM, ours)
  assert signal.getsignal(signal.SIGTERM) is before


def test_files_left_by_a_kill_are_not_results(tmp_path):
  folder, key = Folder(tmp_path), KEYS[0]
  rows = to_rows([(5, [1.5, 2, 3, 4], 0.25), (6, [0, 0, 0.5, 1], 0.125)])
  (folder.run(key) / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'trained').mkdir()
  (tmp_path / 'trained' / f'{key.name}.npz').write_bytes(pack(rows))
  assert not folder.is_trained(key)
  folder.keep_trained(key, {'step': 7}, rows)
  assert folder.is_trained(key) and not folder.is_scored(key) and not folder.run(key).exists()
  record, found = folder.read_trained(key)
  assert found == rows
  assert record == {'model': 'ppn', 'recipe': 'shipped', 'seed': 0, 'step': 7}
  for damaged in ('.npz', '.json'):
    (tmp_path / 'trained' / f'{key.name}{damaged}').write_text('{"mod')
    with pytest.raises(InputError, match=r'cannot be read.*remove it'):
      folder.read_trained(key)


def test_a_workdir_has_one_setting(tmp_path):
  folder = Folder(tmp_path / 'new')
  folder.check_setting({'epochs': 3, 'recipes': {'a': 'x'}})
  folder.check_setting({'epochs': 3, 'recipes': {'b': 'y'}})
  folder.check_setting({'epochs': 3, 'recipes': {'a': 'x', 'b': 'y'}})
  for setting, message in (
      ({'epochs': 4, 'recipes': {'a': 'x'}}, 'epochs is 3 there and 4 here'),
      ({'epochs': 3, 'recipes': {'a': 'z'}}, "recipes.a is 'x' there and 'z' here"),
      ({'epochs': 3, 'recipes': {}, 'more': 1}, 'more is None there and 1 here')):
    with pytest.raises(InputError, match=message):
      folder.check_setting(setting)
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'thesis.tex').touch()
  with pytest.raises(InputError, match='holds something else'):
    Folder(tmp_path / 'other').check_setting({'epochs': 3})


# Configs.


@pytest.mark.parametrize('profile', recipes.PROFILES)
def test_models_differ_in_the_model_alone(profile, tmp_path):
  made = recipes.PROFILES[profile]
  for recipe, phase in itertools.product(recipes.RECIPES.values(), range(len(made.phases))):
    configs = {}
    for model in recipes.MODELS:
      configs[model] = recipes.make_config(
          tmp_path, made, model, recipe, seed=1, images=3200, epochs=made.epochs,
          batch_size=made.batch_size, phase=phase).to_dict()
    for config in configs.values():
      assert {k: v for k, v in config.items() if k != 'model'} == {
          k: v for k, v in configs['ppn'].items() if k != 'model'}
    data, size = configs['ppn']['data'], configs['ppn']['model']['image_size']
    build_transforms(data['transforms'])
    if recipe.resident:
      build_augmentation(data['transforms'], image_size=size, resize=data['resize'])


@pytest.mark.slow
def test_models_have_the_same_levels(tmp_path):
  for profile in ('gpu', 'imagenet', 'cpu'):
    shapes = []
    for model in recipes.MODELS:
      config = recipes.make_config(
          tmp_path, recipes.PROFILES[profile], model, recipes.RECIPES['shipped'], seed=0,
          images=3200, epochs=1, batch_size=4).unlock()
      config.model.num_classes = 20
      shapes.append(build_detector(config).num_levels)
    assert len(set(shapes)) == 1, shapes


@pytest.mark.slow
@pytest.mark.parametrize('model', recipes.MODELS)
def test_the_detector_of_every_phase_can_be_built(tmp_path, model):
  for profile in (recipes.PROFILES['imagenet'], recipes.PROFILES['coco']):
    for i in range(len(profile.phases)):
      config = recipes.make_config(tmp_path, profile, model, recipes.RECIPES['average'], seed=0,
                                   images=3200, epochs=40, batch_size=16, phase=i).unlock()
      config.model.num_classes = 20
      assert build_detector(config).num_levels == (6 if model == 'ssd' or i == 2 else 5)


def test_phases_differ_in_size_and_rate_alone(tmp_path):
  profile, recipe = recipes.PROFILES['imagenet'], recipes.RECIPES['average']
  for model in recipes.MODELS:
    phases = [recipes.make_config(tmp_path, profile, model, recipe, seed=0, images=3200, epochs=40,
                                  batch_size=16, phase=i, weights='w' * i) for i in range(3)]
    assert [c.model.image_size for c in phases] == [160, 224, 300]
    assert [c.train.steps for c in phases] == [4600, 1800, 1600]
    rates = [c.optim.learning_rate / phases[0].optim.learning_rate for c in phases]
    assert rates == pytest.approx([1, 0.5, 0.5])
    assert [c.init.weights for c in phases] == ['', 'w', 'ww']


def test_tuning_sees_nothing_of_val(tmp_path):
  config = recipes.make_config(tmp_path, recipes.PROFILES['imagenet'].for_tuning(), 'ppn',
                               recipes.RECIPES['average'], seed=100, images=3200, epochs=1,
                               batch_size=16, tune=True)
  assert config.data.eval_fraction == 0.125 and not config.data.eval.images
  assert config.train.steps == 2800 // 16


def test_schedule():
  found = recipes.schedule(3200, 400, 64, evaluations=5)
  assert found['steps'] == 20_000 and found['evaluate_every'] == 4000
  assert recipes.schedule(3, 1, 64, evaluations=5)['steps'] == 1


# The command.


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Writes a tiny voc300 of synthetic shapes."""
  from PIL import Image

  from ppn_jax.data.source import build_source
  folder = tmp_path_factory.mktemp('voc')
  for split, name, count in (('train', 'train', 16), ('val', 'eval', 8)):
    source = build_source(dict(name='synthetic_shapes', num_images=count, image_size=64,
                               split=name))
    truth = source.ground_truth()
    (folder / split).mkdir()
    for i, image in enumerate(truth['images']):
      image['file_name'] = f'{i}.jpg'
      Image.fromarray(source[i].image).save(folder / split / f'{i}.jpg')
    (folder / f'instances_{split}.json').write_text(json.dumps(truth))
  return folder


@pytest.mark.parametrize('flags, message', [
    (['--profile=gpus'], "unknown --profile=gpus; did you mean 'gpu'?"),
    (['--recipe=shiped'], "unknown --recipe=shiped; did you mean 'shipped'?"),
    (['--recipe=shipped,decay'], 'give one at a time, or several with --tune'),
    (['--models=ppn,yolo'], 'unknown --models=yolo'),
    (['--seeds=a'], '--seeds=a must be whole numbers'),
    (['--seeds=0,100'], '100 is the seed on which recipes are compared'),
    (['--seeds=-1'], '--seeds=-1 must be'),
    (['--epochs=many'], "invalid int value: 'many'"),
    (['--epoch=3'], 'unrecognized arguments: --epoch=3'),
    (['--epochs=-1'], '--epochs=-1 must be at least 0'),
    (['--data=nowhere'], '--data=nowhere has no instances_train.json')])
def test_a_mistake_is_one_line(data, tmp_path, capsys, flags, message):
  flags = [f'--data={data}', f'--workdir={tmp_path / "w"}', '--profile=smoke', *flags]
  assert run.main(flags) == 2
  line = capsys.readouterr().err
  assert line.count('\n') == 1 and message in line and line.startswith('voc300: error: ')
  assert not (tmp_path / 'w').exists()


def test_a_workdir_with_other_settings_is_rejected(data, tmp_path, capsys):
  Folder(tmp_path).check_setting({'profile': 'gpu'})
  assert run.main([f'--data={data}', f'--workdir={tmp_path}', '--profile=smoke']) == 2
  assert "profile is 'gpu' there and 'smoke' here" in capsys.readouterr().err


def test_malformed_ground_truth(data, tmp_path, capsys):
  for name in ('train', 'val'):
    (tmp_path / name).mkdir()
    (tmp_path / f'instances_{name}.json').write_text('[1')
  assert run.main([f'--data={tmp_path}', f'--workdir={tmp_path / "w"}']) == 2
  assert "not JSON in COCO's instances format" in capsys.readouterr().err


SETTING = {'profile': 'gpu', 'image_size': 300, 'epochs': 2, 'batch_size': 4, 'tune': False,
           'data': '', 'train_images': 16, 'val_images': 40, 'recipe': 'decay'}


def test_a_report_without_finished_runs(tmp_path):
  found = report.write(Folder(tmp_path), KEYS, SETTING, 'REDUCED.')
  assert not found['complete'] and found['runs_finished'] == 0
  assert '0 of 4 runs are finished' in (tmp_path / 'table.md').read_text()
  assert page.show({'mean': 0.25, 'deviation': 0.5}, '+.2f') == '+0.25 ± 0.50'


@functools.cache
def _scored_run(model, seed, recipe='decay'):
  """Returns a run as from `runs.score`, with random detections."""
  truth, rows = random_problem(seed + 10 * len(model + recipe))
  measured = calibration.measure(matching.match_detections(truth, rows), num_images=40,
                                 num_levels=3, class_names=['cat', 'dog'])
  cost = {'cost': {'AP': 0.01, 'AP50': 0.02}, 'cost_interval': {'AP': [0, 0.02], 'AP50': None}}
  made = measured | {'recalibration': cost}
  figures = comparison.accuracy(truth, rows) | comparison.calibration_metrics(made)
  return {
      'model': model, 'recipe': recipe, 'seed': seed, 'step': 8, 'calibration': made,
      'figures': figures, 'voc_ap50_by_class': voc_ap50(truth, rows)[1], 'num_images': 40,
      'error_costs': error_analysis.costs(truth, rows),
      'without_groups': comparison.without_groups(truth, rows, num_levels=3, floor=0.05),
      'training': {'images_per_second': 900.0 + seed, 'slowest': 1.0, 'fastest': 2.0,
                   'hours': 0.5, 'data_wait': 0.01},
      'parameters': 1234567, 'flops': 7654321, 'config': {}, 'curve': [
          {'step': 4, 'train/loss': 2.0}, {'step': 8, 'train/loss': 1.0, 'eval/AP': 0.1,
                                           'eval/AP50': 0.2}],
      'hardware': {'device': 'gpu', 'backend': 'gpu', 'cpu_cores': 16, 'cpu': 'x', 'jax': '1',
                   'commit': 'abc', 'load_average': float(seed)}}


@pytest.mark.slow
def test_a_report_of_three_seeds(tmp_path):
  folder = Folder(tmp_path)
  keys = [RunKey(model, 'decay', seed) for seed in range(3) for model in ('ppn', 'ssd')]
  for key in keys:
    folder.keep_scored(key, _scored_run(key.model, key.seed))
  found = report.write(folder, keys, SETTING, '')
  assert found['complete'] and list(found['variants']) == ['PPN', 'SSD']
  assert list(found['differences']) == ['PPN - SSD']
  ppn = found['variants']['PPN']
  by_hand = [_scored_run('ppn', s)['figures']['AP'] for s in range(3)]
  assert ppn['AP']['mean'] == pytest.approx(np.mean(by_hand), abs=1e-6)
  assert ppn['AP']['deviation'] == pytest.approx(np.std(by_hand, ddof=1), abs=1e-6)
  assert ppn['images_per_second']['values'] == [900, 901, 902] and len(found['hardware']) == 1
  assert len(found['claims']) == 5 and len(ppn['calibration_by_level']) == 3
  assert json.loads((tmp_path / 'report.json').read_text()) == found
  tree, pictures = html_page.parse((tmp_path / 'report.html').read_text())
  html_page.check_self_contained(tree)
  assert len(pictures) == 3  # Curves, and the reliability of each model.
  text = ' '.join(tree.itertext())
  for wanted in ('1,234,567', '901 ± 1', 'poorly placed', "PPN's AP is at most 0.005 below SSD's",
                 'commit abc'):
    assert wanted in text
  assert 'REDUCED' not in text and f'{ppn["AP"]["mean"]:.4f} ± ' in text


@pytest.mark.slow
def test_tuning_compares_recipes_and_makes_no_claims(tmp_path):
  folder = Folder(tmp_path)
  keys = [RunKey(model, recipe, 100) for recipe in ('zoom', 'decay') for model in ('ppn', 'ssd')]
  for key in keys[:3]:
    folder.keep_scored(key, _scored_run(*key[::2], recipe=key.recipe))
  folder.keep_scored(keys[3], {**keys[3]._asdict(), 'stopped': 'loss is nan'})
  found = report.write(folder, keys, SETTING | {'tune': True}, 'REDUCED.')
  assert [row['recipe'] for row in found['tuning']] == ['zoom', 'decay']
  assert found['tuning'][0]['mean'] == pytest.approx(
      np.mean([_scored_run(m, 100, 'zoom')['figures']['AP'] for m in ('ppn', 'ssd')]), abs=1e-6)
  assert found['tuning'][1]['mean'] is None and found['stopped'][0]['stopped'] == 'loss is nan'
  assert 'claims' not in found and list(found['differences']) == ['PPN zoom - SSD zoom']
  assert (tmp_path / 'table.md').read_text().startswith('REDUCED. ')


@pytest.mark.slow
def test_a_killed_comparison_ends_like_an_undisturbed_one(data, tmp_path):
  """Real runs are killed in the first, stopped in the second and killed before scoring."""
  flags = [sys.executable, str(ROOT / 'benchmarks/voc300/run.py'), f'--data={data}',
           '--profile=smoke', '--epochs=60', '--json']
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  whole = subprocess.run([*flags, f'--workdir={tmp_path / "whole"}'], env=env, text=True,
                         capture_output=True, check=False)
  assert whole.returncode == 0, whole.stderr[-2000:]
  killed, codes = tmp_path / 'killed', []
  for pattern, signal_sent in (('runs/ppn_*/phase_1/checkpoints/?*', signal.SIGKILL),
                               ('runs/ssd_*/*/checkpoints/?*', signal.SIGTERM),
                               ('trained/ssd_*.json', signal.SIGKILL)):
    process = subprocess.Popen([*flags, f'--workdir={killed}'], env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob(pattern)):
      time.sleep(0.05)
    process.send_signal(signal_sent)
    codes.append(process.wait(timeout=HANG_SECONDS))
    assert not list((killed / 'results').glob('*'))
  assert codes == [-signal.SIGKILL, run.INCOMPLETE, -signal.SIGKILL]
  last = subprocess.run([*flags, f'--workdir={killed}'], env=env, capture_output=True, text=True,
                        check=False)
  assert last.returncode == 0, last.stderr[-2000:]
  wanted, found = (json.loads(r.stdout.splitlines()[-1]) for r in (whole, last))
  assert found == json.loads((killed / 'report.json').read_text()) and found['complete']
  for a, b in zip(wanted['runs'], found['runs'], strict=True):
    assert a['figures'] == b['figures']
    assert a['evaluated'] == b['evaluated']
  assert wanted['differences'] == found['differences']
  assert (killed / 'report.html').stat().st_size > 10_000
  assert not list((killed / 'runs').iterdir())
