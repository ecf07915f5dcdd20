"""Tests calibration on detections of known calibration, and matching against pycocotools."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit
from test_coco_scores import random_problem
from tiny import tiny_config

from ppn_jax.data.loader import required_boxes, train_batches
from ppn_jax.data.source import build_source
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.errors import InputError
from ppn_jax.jobs import calibration_report
from ppn_jax.metrics import calibration, coco, matching, platt, recalibration
from ppn_jax.run import build_detector, resolve_classes

CLASSES = ('a', 'b', 'c')
LEVELS = 4  # The last one reports nothing.


def draw(seed=0, images=240, shift=None):
  """Draws ground truth and detections with calibrated scores, in cells that do not overlap.

  Args:
    shift: {level: value added to the logit of its scores}; which are correct does not change.
  """
  rng = np.random.default_rng(seed)
  truth = {'images': [{'id': 7 * i + 3} for i in range(images)], 'annotations': [],
           'categories': [{'id': 10 * (k + 1), 'name': name} for k, name in enumerate(CLASSES)]}
  rows = []
  for image in truth['images']:
    for cell in rng.permutation(64)[:16].tolist():
      side = float(rng.choice([20, 60, 120]))
      of = {'image_id': image['id'], 'category_id': int(rng.choice([10, 20])),
            'bbox': [200.0 * (cell % 8), 200.0 * (cell // 8), side, side]}
      level = int(rng.choice(3, p=[0.6, 0.3, 0.1]))
      chance = 0.02 + 0.96 * rng.beta(0.6, 1.2)
      if rng.random() < chance:
        truth['annotations'].append(of)
      score = float(expit(logit(chance) + (shift or {}).get(level, 0)))
      rows.append({**of, 'score': score, 'level': level})
  return truth, rows


def measure(truth, rows, **options):
  return calibration.measure(
      matching.match_detections(truth, rows), num_images=len(truth['images']), num_levels=LEVELS,
      class_names=CLASSES, **options)


def cost(truth, rows, **options):
  return recalibration.cost(truth, rows, matching.match_detections(truth, rows), num_levels=LEVELS,
                            floor=0.05, **options)


def reference_match(truth, rows):
  """Returns (correct, ignored) of each row by pycocotools' evaluateImg at IoU 0.5, all sizes."""
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval
  dataset = coco._minimal(truth)
  dataset['annotations'] = [a | {'ignore': 0} for a in dataset['annotations']]
  indices = []
  for annotations in (dataset['annotations'], [
      {**r, 'id': i, 'area': r['bbox'][2] * r['bbox'][3], 'iscrowd': 0}
      for i, r in enumerate(rows, start=1)]):
    indices.append(coco._index(COCO, dataset | {'annotations': annotations}))
  job = COCOeval(*indices, 'bbox')
  job.params.iouThrs, job.params.maxDets = np.array([0.5]), [100]
  job.params.areaRng, job.params.areaRngLbl = [[0, 1e10]], ['all']
  job.evaluate()
  correct, ignored = np.zeros((2, len(rows)), bool)
  for e in filter(None, job.evalImgs):
    at = np.array(e['dtIds'], int) - 1
    ignored[at] = e['dtIgnore'][0]
    correct[at] = (e['dtMatches'][0] > 0) & ~e['dtIgnore'][0].astype(bool)
  return correct, ignored


@pytest.mark.parametrize('seed', range(8))
def test_matching_is_that_of_pycocotools(seed, capsys):
  truth, rows = random_problem(seed)
  # Repeated boxes, ties of IoU and boxes without area, where the order could differ.
  truth['annotations'] += [dict(a) for a in truth['annotations'][::5]]
  rows += [dict(r) for r in rows[::7]]
  rows += [{**a, 'score': 0.5, 'bbox': [*a['bbox'][:3], 0.0]} for a in truth['annotations'][:3]]
  matched, ignored = matching.match(truth, rows)
  correct, expected = reference_match(truth, rows)
  np.testing.assert_array_equal(matched >= 0, correct)
  np.testing.assert_array_equal(ignored, expected)
  assert 10 < correct.sum() < len(rows) and ignored.any()


def test_detections_in_a_crowd_are_ignored_however_many():
  truth = {'images': [{'id': 1}], 'categories': [{'id': 1, 'name': 'a'}], 'annotations': [
      {'image_id': 1, 'category_id': 1, 'bbox': [100, 100, 300, 300], 'iscrowd': 1},
      {'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 50, 50], 'iscrowd': 0}]}
  row = lambda *box: {'image_id': 1, 'category_id': 1, 'bbox': list(map(float, box)), 'score': 0.9,
                      'level': 0}
  rows = [row(150, 150, 60, 60), row(200, 200, 60, 60), row(0, 0, 50, 50), row(0, 0, 50, 45),
          row(60, 100, 60, 60)]
  matched = matching.match_detections(truth, rows)
  assert matched.ignored.tolist() == [True, True, False, False, False]
  assert matched.correct.tolist() == [False, False, True, False, False]
  assert len(matched.at_least(0.5).score) == 3


def test_detections_after_the_first_hundred_are_ignored():
  truth = {'images': [{'id': 1}], 'categories': [{'id': 1, 'name': 'a'}], 'annotations': []}
  rows = [{'image_id': 1, 'category_id': 1, 'bbox': [0., 0., 9., 9.], 'score': 1 - i / 200}
          for i in range(120)]
  assert matching.match(truth, rows)[1].tolist() == [False] * 100 + [True] * 20


def test_calibrated_scores_have_no_calibration_error():
  truth, rows = draw()
  found = measure(truth, rows)
  for group in (found['all'], *found['by_level'][:3], *found['by_size'], *found['by_class'][:2]):
    assert group['ece'] < 2 * group['ece_by_chance'] and group['ece_interval'][0] < 0.005
    assert sum(b['detections'] for b in group['bins']) == group['detections']
  assert found['all']['ece'] < 0.03
  assert found['spread']['gap'] < 0.04 and found['spread']['at_equal_score_interval'][0] == 0
  costs = cost(truth, rows)
  assert abs(costs['cost']['AP']) < 0.002 and abs(costs['one_map']['AP'] - costs['as_is']['AP']
                                                   ) < 0.002
  low, high = costs['cost_interval']['AP']
  assert low < costs['cost']['AP'] < high


@pytest.mark.slow
def test_intervals_have_their_coverage():
  covered, excluded = [], []
  for seed in range(25):
    found = measure(*draw(seed, images=60))
    groups = [found['all'], *found['by_level'][:3]]
    covered += [g['gap_interval'][0] <= 0 <= g['gap_interval'][1] for g in groups]
    excluded += [*(g['ece_interval'][0] > 0 for g in groups),
                 found['spread']['gap_interval'][0] > 0,
                 found['spread']['at_equal_score_interval'][0] > 0]
  assert 0.88 < np.mean(covered) < 1 and np.mean(excluded) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize('shift', [2.0, -2.0])
def test_a_miscalibrated_level_is_detected_and_its_cost_recovered(shift):
  straight, (truth, rows) = draw(), draw(shift={1: shift})
  found = measure(truth, rows)
  gaps = [g['gap'] for g in found['by_level']]
  assert gaps[3] is None and abs(gaps[0]) < 0.03 and abs(gaps[2]) < 0.06
  assert gaps[1] * np.sign(shift) > 0.15
  assert found['by_level'][1]['ece_interval'][0] > 0.08 > found['by_level'][0]['ece']
  assert found['spread']['gap_interval'][0] > 0.1
  assert found['spread']['at_equal_score_interval'][0] > 0.05
  costs, without = cost(truth, rows), coco.score(*straight).metrics
  for name in ('AP', 'AP50'):
    assert costs['as_is'][name] == coco.score(truth, rows).metrics[name] < without[name] - 0.01
    assert costs['one_map'][name] == pytest.approx(costs['as_is'][name], abs=0.002)
    assert costs['map_per_level'][name] == pytest.approx(without[name], abs=0.004)
    assert costs['cost_interval'][name][0] > 0
  maps = recalibration.maps(matching.match_detections(truth, rows), 0.05, LEVELS)
  assert maps[0]['score_at_half'] == pytest.approx(0.5, abs=0.05)
  assert maps[1]['score_at_half'] == pytest.approx(expit(shift), abs=0.05)
  assert maps[3]['score_at_half'] is None


def test_a_level_below_the_floor_has_a_cost():
  straight, (truth, rows) = coco.score(*draw()).metrics, draw(shift={1: -9.0})
  found = measure(truth, rows)
  assert found['by_level'][1]['detections'] == 0 and found['spread']['levels'] == [0, 2]
  costs = cost(truth, rows, intervals=False)
  assert costs['as_is']['AP'] < straight['AP'] - 0.03
  assert costs['map_per_level']['AP'] == pytest.approx(straight['AP'], abs=0.005)


def test_scores_wrong_in_the_same_way_on_every_level_cost_nothing():
  truth, rows = draw(shift=dict.fromkeys(range(3), 2.0))
  found = measure(truth, rows)
  assert found['all']['gap'] > 0.15 and found['all']['ece_interval'][0] > 0.1
  assert found['spread']['at_equal_score_interval'][0] < 0.01
  assert abs(cost(truth, rows, intervals=False)['cost']['AP']) < 0.002


def test_the_spread_at_equal_score_does_not_depend_on_the_floor():
  truth, rows = draw(shift={1: 2.0})
  rows += [{**r, 'score': 0.001 * r['score'], 'bbox': [9000.0, 0.0, 50.0, 50.0]} for r in rows]
  spreads = [measure(truth, rows, floor=f)['spread']['at_equal_score'] for f in (1e-6, 0.02, 0.2)]
  assert max(spreads) - min(spreads) < 0.03 < min(spreads)


def test_ece_by_hand():
  truth = {'images': [{'id': 1}, {'id': 2}], 'categories': [{'id': 1, 'name': 'a'}],
           'annotations': []}
  rows = []
  for i in range(100):  # 50 of score 0.8, of which 25 are correct, and 50 of 0.3, of which 20 are.
    box = [30.0 * i, 0.0, 20.0, 20.0]
    rows.append({'image_id': 1 + i % 2, 'category_id': 1, 'bbox': box, 'level': 0,
                 'score': 0.8 if i < 50 else 0.3})
    if i < 25 or 50 <= i < 70:
      truth['annotations'].append({k: rows[-1][k] for k in ('image_id', 'category_id', 'bbox')})
  group = calibration.measure(matching.match_detections(truth, rows), num_images=2, num_levels=1,
                              class_names=['a'])['all']
  assert group['ece'] == pytest.approx((0.3 + 0.1) / 2)
  assert group['gap'] == pytest.approx((0.3 - 0.1) / 2)
  assert group['precision'] == 0.45 and [b['precision'] for b in group['bins']] == [0.4, 0.5]
  assert group['bins'][1]['precision_interval'] == pytest.approx([0.366, 0.634], abs=1e-3)
  assert sum(group['histogram']['counts']) == 100


@pytest.mark.parametrize('scores', [
    np.random.default_rng(0).beta(0.3, 2, 3000), np.full(80, 0.5), np.linspace(0, 1, 26),
    np.array([0.1, 0.9]), np.append(np.full(40, 0.97), 0.1), np.ones(30)])
def test_bins_have_enough_detections_and_keep_the_order(scores):
  bins = calibration.score_bins(scores)
  counts = np.bincount(bins)
  assert counts.min() >= min(calibration.MIN_BIN, len(scores))
  order = np.argsort(scores)
  assert (np.diff(bins[order]) >= 0).all() and bins.min() == 0


def test_maps_keep_the_order_of_a_level_and_are_fitted_to_the_other_half():
  truth, rows = draw(images=40)
  matched = matching.match_detections(truth, rows)
  matched.score[:6], matched.level[:6] = [0, 1, 1, 0, 1e-30, 1 - 1e-16], 0
  half = np.arange(40) % 2 == 0
  _, by_level = recalibration.recalibrate(matched, 0.05, LEVELS, half)
  assert np.isfinite(by_level).all() and by_level.min() >= 0 and by_level.max() <= 1
  for level in range(3):
    for which in (half, ~half):
      mine = which[matched.image] & (matched.level == level)
      order = np.argsort(matched.score[mine])
      assert (np.diff(by_level[mine][order]) >= 0).all()
  mine = half[matched.image]
  flipped = matched._replace(correct=np.where(mine, ~matched.correct, matched.correct))
  changed = recalibration.recalibrate(flipped, 0.05, LEVELS, half)[1] != by_level
  assert not changed[mine].any() and changed[~mine].any()


def test_uninformative_scores_do_not_reverse_a_level():
  rng = np.random.default_rng(0)
  score = rng.random(4000)
  zeros = np.zeros(4000, int)
  matched = matching.MatchedDetections(zeros, zeros, zeros, score, score, rng.random(4000) > score,
                                      np.zeros(4000, bool))
  whole, levels = platt.fit_levels(matched, 2)
  for fitted in (whole, *levels):
    assert (np.diff(fitted(np.linspace(0.01, 0.99, 50))) >= 0).all()


def run_report(truth, rows, train_images=0, **train):
  config = tiny_config()
  with config.unlocked():
    config.data.train.update(train)
  categories = build_source(tiny_config().data.eval.to_dict()).categories[:len(CLASSES)]
  config = resolve_classes(config, categories)
  detector = build_detector(config)
  options = calibration_report.CalibrationOptions(train_images=train_images)
  return calibration_report.build_report(config, detector, categories, truth, rows, options)


@pytest.mark.slow
@pytest.mark.parametrize('problem', ['nothing', 'no rows', 'no truth', 'one image', 'one row',
                                     'low scores', 'two images'])
def test_reports_on_few_or_no_detections(problem, tmp_path):
  truth, rows = draw(images={'one image': 1, 'two images': 2}.get(problem, 12))
  if problem in ('nothing', 'no truth'):
    truth['annotations'] = []
  rows = {'nothing': [], 'no rows': [], 'one row': rows[:1],
          'low scores': [r | {'score': 0.01} for r in rows]}.get(problem, rows)
  for row in rows:
    row['level'] %= 3
  found = run_report(truth, rows)
  calibration_report.write_report(tmp_path, found, problem)
  assert json.loads((tmp_path / 'calibration.json').read_text()) == found
  assert Image.open(tmp_path / 'calibration.png').size[0] > 1000
  table = calibration_report.format_table(found)
  assert 'level 2' in table and 'nan' not in table and 'None' not in table
  if problem in ('nothing', 'no rows', 'low scores'):
    assert found['all']['detections'] == 0 and found['all']['ece'] is None
    assert found['spread']['at_equal_score'] is None
  assert (found['recalibration']['cost']['AP'] is None) == (not truth['annotations'])


@pytest.mark.slow
def test_names_that_look_like_formulas_are_drawn(tmp_path, recwarn):
  found = run_report(*draw(images=4))
  for group, name in zip(found['by_class'], ('$\\frac{', '猫$', '_' * 200), strict=True):
    group['name'] = name
  found['training'] = {'absent': '$x_{ ' * 90}
  calibration_report.write_report(tmp_path, found, '$run^$')
  with Image.open(tmp_path / 'calibration.png') as picture:
    assert picture.size[0] > 1000
  # Matplotlib 3.10 uses functions that later versions of pyparsing deprecate.
  assert not [str(w.message) for w in recwarn.list
              if not issubclass(w.category, DeprecationWarning)]


@pytest.mark.slow
def test_positives_are_those_of_the_batches_of_training():
  config = tiny_config()
  source = build_source(config.data.train.to_dict())
  config = resolve_classes(config, source.categories)
  detector = build_detector(config)
  batches = train_batches(
      source, transforms=build_transforms(config.data.transforms), image_size=64, batch_size=4,
      seed=config.seed, max_boxes=required_boxes(source), resize=config.data.resize)
  positives, boxes = np.zeros((2, 3), int)
  for number, batch in zip(range(3), batches, strict=False):
    rows = 4 if number < 2 else 2  # Ten images are an epoch.
    targets = detector.assign_targets(detector.anchors, batch.ground_truth)
    for level in range(3):
      positives[level] += int(targets.positive[:rows, detector.anchors.level == level].sum())
    boxes_seen = int(batch.ground_truth.valid[:rows].sum())
    boxes[0] += boxes_seen
  found = calibration_report.count_training_positives(config, detector, 2000)
  assert found['images'] == 10
  assert [level['positives'] for level in found['by_level']] == positives.tolist()
  assert sum(level['boxes'] for level in found['by_level']) == boxes[0]
  assert sum(level['anchors'] for level in found['by_level']) == len(detector.anchors.boxes)
  fewer = calibration_report.count_training_positives(config, detector, 3)
  assert fewer['images'] == 3 and 0 < fewer['by_level'][0]['positives'] < positives[0]


def test_missing_training_data_are_reported():
  found = run_report(*draw(images=4), train_images=100, num_images=-1)
  assert 'num_images' in found['training']['absent'] and '\n' not in found['training']['absent']
  assert found['all']['detections'] and 'num_images' in calibration_report.format_table(found)


@pytest.mark.parametrize('options, message', [
    ({'floor': 0.0}, 'floor=0.0'), ({'floor': 1.0}, 'floor=1.0'), ({'floor': float('nan')}, 'nan'),
    ({'train_images': -1}, 'train_images')])
def test_options_out_of_range(options, message):
  with pytest.raises(InputError, match=message):
    calibration_report.CalibrationOptions(**options)
