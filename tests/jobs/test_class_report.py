"""Thresholds and calibration of an evaluation, and that a run, its files and `load` use them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from detections import random_problem
from tiny import tiny_config, untrained_run

import ppn_jax
from ppn_jax.checkpoints.retention import Stamp
from ppn_jax.cli.main import main
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.jobs import class_report
from ppn_jax.jobs.evaluate import EvaluationOptions, evaluate
from ppn_jax.jobs.train import train
from ppn_jax.metrics import voc
from ppn_jax.metrics.operating_point import OperatingPoint
from ppn_jax.run import create_run, open_model, open_run

CATEGORIES = (Category(3, 'cat'), Category(7, 'dog'))


def test_report_and_its_files(tmp_path):
  truth, rows = random_problem(3)
  plain = class_report.build_report(truth, rows, CATEGORIES, num_levels=3)
  assert plain.point == class_report.find_operating_point(truth, rows, CATEGORIES)
  assert plain.voc_ap50 == voc.voc_ap50(truth, rows)[0] and plain.held_out is None
  for method in ('temperature', 'platt'):
    made = class_report.build_report(truth, rows, CATEGORIES, num_levels=3, method=method)
    before, after = made.held_out['before'], made.held_out['after']
    assert after['ece'] < before['ece'] and made.point.method == method
    if method == 'temperature':  # One map for all levels: only its two halves differ.
      assert after['AP'] == pytest.approx(before['AP'], abs=0.005)
      assert made.analysis.every.f1 == plain.analysis.every.f1
  class_report.write_report(tmp_path, made, {'checkpoint': 'x'})
  written = json.loads((tmp_path / 'thresholds.json').read_text())
  assert written['classes'][-1]['name'] == 'all' and written['VOC_AP50'] == made.voc_ap50
  assert [t['threshold'] for t in written['thresholds']] == list(made.point.thresholds)
  images = list(csv.DictReader((tmp_path / 'images.csv').open()))
  assert len(images) == 40 and int(images[0]['errors']) >= int(images[-1]['errors'])
  matrix = list(csv.reader((tmp_path / 'confusion_matrix.csv').open()))
  assert matrix[0] == ['object', 'cat', 'dog', '(nothing)'] and len(matrix) == 4
  assert 'before' in class_report.format_table(made)


@pytest.mark.parametrize('rows', [[], [{'image_id': 0, 'category_id': 7, 'bbox': [0, 0, 1, 1],
                                        'score': 0.9, 'level': 0}]])
def test_nothing_correct(tmp_path, rows):
  truth, _ = random_problem(3)
  made = class_report.build_report(truth, rows, CATEGORIES, num_levels=3, method='platt')
  assert made.point is None and made.held_out is None
  assert made.matrix[0, -1] == made.matrix.sum()
  class_report.write_report(tmp_path, made, {})
  assert json.loads((tmp_path / 'thresholds.json').read_text())['thresholds'] == []


def test_an_unknown_calibration_is_named():
  with pytest.raises(InputError, match=r"unknown calibration 'plat'; did you mean 'platt'"):
    EvaluationOptions(calibrate='plat')


def test_thresholds_belong_to_one_checkpoint(tmp_path, monkeypatch):
  run = create_run(tmp_path / 'run', tiny_config(), [
      Category(k, name) for k, name in enumerate(('circle', 'square', 'star'))])
  stamps = {'6': Stamp('six', 0.0)}
  monkeypatch.setattr('ppn_jax.run.read_stamp', lambda folder: stamps.get(folder.name))
  monkeypatch.setattr('ppn_jax.run.read_notes', lambda folder: {})
  names = tuple(c.name for c in run.categories)
  point = OperatingPoint(names, (0.1, 0.2, 0.3))
  noted = point._replace(thresholds=(0.4, 0.5, 0.6))
  assert run.operating_point(6) is None
  monkeypatch.setattr('ppn_jax.run.read_notes', lambda folder: {
      'operating_point': noted.describe()})
  assert run.operating_point(6) == noted and run.operating_point(7) is None
  folder = tmp_path / 'run' / 'evaluation' / '6'
  class_report.write_operating_point(folder, point, {'checkpoint': run.stamp(6).checkpoint})
  assert run.operating_point(6) == point
  class_report.write_operating_point(folder, point, {'checkpoint': 'another'})
  assert run.operating_point(6) == noted
  # An evaluation of this checkpoint that found nothing correct.
  class_report.write_operating_point(folder, None, {'checkpoint': run.stamp(6).checkpoint})
  assert run.operating_point(6) is None
  (folder / 'thresholds.json').write_text('{"scored": 3}')
  with pytest.raises(InputError, match=r'thresholds.json is damaged .*evaluate the step again'):
    run.operating_point(6)


@pytest.mark.slow
def test_an_evaluated_run_and_its_files_keep_their_thresholds(tmp_path, capsys):
  names = ('circle', 'square', 'triangle', 'star', 'cross')
  path = untrained_run(tmp_path / 'run', categories=[Category(*c) for c in enumerate(names)])
  image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
  before = ppn_jax.load(path)
  everything = before(image)
  assert before.thresholds is None and len(everything.scores) == 100
  made = evaluate(path, options=EvaluationOptions(calibrate='platt'))
  point = open_run(path).operating_point(6)
  assert point.thresholds == made.classes.point.thresholds and len(point.maps) == 3
  detector = ppn_jax.load(path)
  assert detector.thresholds == dict(zip(point.names, point.thresholds, strict=True))
  found, every = detector(image), detector(image, threshold=0)
  assert len(every.scores) == 100 and (np.diff(every.scores) <= 0).all()
  assert sorted(every.boxes[:, 0]) == sorted(everything.boxes[:, 0])
  assert (every.scores != everything.scores).any()
  kept = every.scores >= np.float32(point.thresholds)[every.labels]
  np.testing.assert_array_equal(found.scores, every.scores[kept])
  for name, options in (('a.safetensors', ['--format=weights']),
                        ('b', ['--format=stablehlo', f'--images={_pictures(tmp_path)}'])):
    assert main(['export', f'--workdir={path}', f'--output={tmp_path / name}', *options]) == 0
    loaded = ppn_jax.load(tmp_path / name)
    assert loaded.thresholds == detector.thresholds
    np.testing.assert_allclose(loaded(image, threshold=0).scores, every.scores, atol=1e-5)
  model = open_model(tmp_path / 'a.safetensors')
  assert model.operating_point(6).method == 'platt'
  assert dataclasses.replace(model, point=None).operating_point(6) is None


def _pictures(folder):
  from PIL import Image
  (folder / 'pictures').mkdir()
  Image.new('RGB', (64, 64), 'red').save(folder / 'pictures' / 'a.png')
  return folder / 'pictures'


@pytest.mark.slow
def test_training_keeps_thresholds_with_its_checkpoints(tmp_path):
  config = tiny_config(steps=4, checkpoint_every=2, evaluate_every=4).copy_and_resolve_references()
  train(config, tmp_path / 'run')
  run = open_run(tmp_path / 'run')
  assert run.operating_point(2) is None
  point = run.operating_point(4)
  made = evaluate(tmp_path / 'run')
  assert made.classes.point == point or made.classes.point.thresholds == point.thresholds
