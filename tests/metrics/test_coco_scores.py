"""Tests rows and metrics by hand, with perfect detections, and one scorer against the other."""

import copy
import json

import numpy as np
import pytest

from ppn_jax.detection.structures import Category, Detections
from ppn_jax.errors import InputError
from ppn_jax.metrics import coco

METRICS = ['AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
           'AR1', 'AR10', 'AR100', 'AR_small', 'AR_medium', 'AR_large']


def random_problem(seed):
  """Returns ground truth with crowds, empty images and classes, and rows with tied scores."""
  rng = np.random.default_rng(seed)
  images = [{'id': int(i), 'height': 480, 'width': 640} for i in rng.permutation(40)[:12] + 1]
  categories = [{'id': i, 'name': f'class {i}'} for i in (7, 2, 90, 31)]
  annotations, rows = [], []
  for i in range(60):
    box = [*rng.uniform(0, 300, 2).tolist(), *np.exp(rng.uniform(1, 5.5, 2)).tolist()]
    of = {'image_id': images[rng.integers(9)]['id'],
          'category_id': categories[rng.integers(3)]['id']}
    annotations.append({**of, 'id': i, 'bbox': box, 'area': box[2] * box[3] * rng.uniform(0.4, 1),
                        'iscrowd': int(rng.random() < 0.15)})
    for _ in range(rng.integers(0, 5)):
      moved = (np.array(box) + rng.normal(0, 0.1, 4) * [*box[2:], *box[2:]]).clip(0.5)
      rows.append({**of, 'bbox': moved.tolist(), 'score': round(float(rng.random()), 1)})
  rows += [{'image_id': images[int(rng.integers(12))]['id'], 'category_id': 2,
            'bbox': [1.0, 2.0, 30.0, 40.0], 'score': float(rng.random())} for _ in range(20)]
  return {'images': images, 'categories': categories, 'annotations': annotations}, rows


def perfect_rows(truth):
  return [{'image_id': a['image_id'], 'category_id': a['category_id'], 'bbox': a['bbox'],
           'score': 1.0} for a in truth['annotations'] if not a['iscrowd']]


def reference_stats(truth, rows, tmp_path):
  """Returns the metrics of pycocotools, used as in its documentation."""
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval
  path = tmp_path / 'truth.json'
  path.write_text(json.dumps({'info': {}, **truth}))  # pycocotools 2.0.10 needs 'info'.
  index = COCO(str(path))
  job = COCOeval(index, index.loadRes(copy.deepcopy(rows)), 'bbox')
  job.evaluate()
  job.accumulate()
  job.summarize()
  return job.stats.tolist()


def test_rows_have_pixels_of_the_original_and_ids_of_the_data_set():
  detections = Detections(
      boxes=np.array([[[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1], [0, 0, 0, 0]]] * 2, np.float32),
      scores=np.array([[0.75, 0.5, 0]] * 2, np.float32),
      labels=np.array([[1, 0, 0]] * 2, np.int32), level=np.array([[2, 0, 0]] * 2, np.int32),
      valid=np.array([[True, True, False]] * 2))
  rows = coco.to_rows(detections, np.array([2**40, 5]), np.array([[100, 200], [10, 10]]),
                      np.array([True, False]), [Category(3, 'cat'), Category(17, 'dog')])
  assert rows == [
      {'image_id': 2**40, 'category_id': 17, 'bbox': [100, 25, 100, 50], 'score': 0.75,
       'level': 2},
      {'image_id': 2**40, 'category_id': 3, 'bbox': [0, 0, 200, 100], 'score': 0.5,
       'level': 0}]
  assert json.loads(json.dumps(rows)) == rows
  for row in rows:
    assert all(type(row[key]) is int for key in ('image_id', 'category_id', 'level'))
    assert all(type(x) is float for x in [*row['bbox'], row['score']])


@pytest.mark.parametrize('scorer', coco.SCORERS)
def test_a_case_worked_by_hand(scorer):
  # Of two boxes of 100x100, one is detected exactly, after a wrong detection of a better score.
  # Precision is 1/2 up to recall 1/2, which are 51 of the 101 points.
  truth = {'images': [{'id': 1}], 'categories': [{'id': 5, 'name': 'thing'}],
           'annotations': [{'image_id': 1, 'category_id': 5, 'bbox': [x, 0, 100, 100]}
                           for x in (0, 200)]}
  rows = [{'image_id': 1, 'category_id': 5, 'bbox': [500, 500, 100, 100], 'score': 0.9},
          {'image_id': 1, 'category_id': 5, 'bbox': [0, 0, 100, 100], 'score': 0.8}]
  scores = coco.score(truth, rows, scorer=scorer)
  assert list(scores.metrics) == METRICS
  for name in ('AP', 'AP50', 'AP75', 'AP_large'):
    assert scores.metrics[name] == pytest.approx(0.5 * 51 / 101)
  assert scores.metrics['AR1'] == 0 and scores.metrics['AR10'] == scores.metrics['AR100'] == 0.5
  assert scores.metrics['AP_small'] is scores.metrics['AR_medium'] is None
  assert scores.per_class == (('thing', scores.metrics['AP'], scores.metrics['AP50'], 2),)
  assert (scores.num_images, scores.num_detections) == (1, 2)


@pytest.mark.parametrize('seed', range(6))
def test_scorers_are_equal_bit_for_bit(seed, tmp_path):
  truth, rows = random_problem(seed)
  before = copy.deepcopy((truth, rows))
  fast, slow = (coco.score(truth, rows, scorer=s) for s in ('hotcoco', 'pycocotools'))
  assert fast == slow
  assert (truth, rows) == before
  assert 0 < fast.metrics['AP'] < 1
  # pycocotools takes an annotation of id 0 for no match, so ids begin at 1 here.
  for a in truth['annotations']:
    a['id'] += 1
  assert list(fast.metrics.values()) == reference_stats(truth, rows, tmp_path)


def test_scorers_are_equal_on_real_annotations(shared, tmp_path):
  path = shared / 'data' / 'coco100' / 'annotations' / 'instances_val2017.json'
  truth = json.loads(path.read_text())
  rng = np.random.default_rng(0)
  rows = [{'image_id': a['image_id'], 'category_id': a['category_id'],
           'bbox': (np.array(a['bbox']) * rng.uniform(0.85, 1.15, 4)).tolist(),
           'score': float(np.float32(rng.random()))}
          for a in truth['annotations'] for _ in range(2)]
  fast, slow = (coco.score(truth, rows, scorer=s) for s in ('hotcoco', 'pycocotools'))
  assert fast == slow
  assert list(fast.metrics.values()) == reference_stats(truth, rows, tmp_path)
  perfect = coco.score(truth, perfect_rows(truth))
  assert all(perfect.metrics[name] == 1 for name in METRICS if name.startswith('AP'))


@pytest.mark.parametrize('scorer', coco.SCORERS)
def test_perfect_detections_score_one(scorer):
  truth, _ = random_problem(0)
  scores = coco.score(truth, perfect_rows(truth), scorer=scorer)
  assert scores.metrics['AP'] == scores.metrics['AR100'] == 1
  names = [c.name for c in scores.per_class]
  assert names == ['class 2', 'class 7', 'class 31', 'class 90']
  counts = [sum(a['category_id'] == i and not a['iscrowd'] for a in truth['annotations'])
            for i in (2, 7, 31, 90)]
  assert [c.num_boxes for c in scores.per_class] == counts
  assert [c.ap for c in scores.per_class] == [1 if n else None for n in counts]


@pytest.mark.parametrize('scorer', coco.SCORERS)
def test_images_without_rows_or_boxes_count(scorer, capfd):
  truth, rows = random_problem(1)
  full = coco.score(truth, rows, scorer=scorer)
  nothing = coco.score(truth, [], scorer=scorer)
  assert nothing.metrics['AP'] == 0 and nothing.num_detections == 0
  assert nothing.num_images == len(truth['images'])
  of_one = [r for r in rows if r['image_id'] == rows[0]['image_id']]
  assert coco.score(truth, of_one, scorer=scorer).metrics['AR100'] < full.metrics['AR100']
  no_boxes = coco.score({**truth, 'annotations': []}, rows, scorer=scorer)
  assert set(no_boxes.metrics.values()) == {None}
  assert capfd.readouterr() == ('', '')


def test_detections_of_crowds_are_not_false():
  truth = {'images': [{'id': 1}], 'categories': [{'id': 1, 'name': 'thing'}], 'annotations': [
      {'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 50, 50], 'iscrowd': 0},
      {'image_id': 1, 'category_id': 1, 'bbox': [100, 100, 300, 300], 'iscrowd': 1}]}
  rows = [{'image_id': 1, 'category_id': 1, 'bbox': [150, 150, 60, 60], 'score': 0.9},
          {'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 50, 50], 'score': 0.5}]
  assert coco.score(truth, rows).metrics['AP'] == pytest.approx(1)
  truth['annotations'][1]['iscrowd'] = 0
  assert coco.score(truth, rows).metrics['AP'] < 0.5


def test_annotation_id_zero_can_be_matched():
  truth, _ = random_problem(2)
  assert truth['annotations'][0]['id'] == 0
  for scorer in coco.SCORERS:
    assert coco.score(truth, perfect_rows(truth), scorer=scorer).metrics['AR100'] == 1


def test_invalid_arguments_are_named():
  truth, rows = random_problem(0)
  with pytest.raises(InputError, match=r"unknown scorer 'pycoco'; did you mean 'pycocotools'\?"):
    coco.score(truth, rows, scorer='pycoco')
  with pytest.raises(InputError, match=r'result 0 has image_id 999, .* 12 images'):
    coco.score(truth, [rows[0] | {'image_id': 999}])
  with pytest.raises(InputError, match=r'result 1 has category_id 3, .* 4 categories'):
    coco.score(truth, [rows[0], rows[1] | {'category_id': 3}])


def test_table_is_aligned_and_shows_a_dash_for_missing_metrics():
  truth, rows = random_problem(0)
  truth['categories'][0]['name'] = 'a name of some length'
  scores = coco.score(truth, rows)
  lines = coco.format_table(scores).split('\n')
  assert lines[0] == f'12 images, {len(rows)} detections'
  assert lines[2].split()[:2] == ['AP', f'{scores.metrics["AP"]:.3f}']
  assert [line.split()[0] for line in lines[2:14]] == METRICS
  table = lines[15:]
  assert len({len(line) for line in table}) == 1
  assert [line.split() for line in table if '-' in line] == [['class', '31', '-', '-', '0']]


def test_results_are_written_atomically(tmp_path):
  path = tmp_path / 'new' / 'results.json'
  _, rows = random_problem(0)
  coco.write_results(path, rows)
  assert json.loads(path.read_text()) == rows
  with pytest.raises(ValueError):
    coco.write_results(path, [{'score': float('nan')}])
  with pytest.raises(TypeError):
    coco.write_results(path, [{'score': np.float32(1)}])
  assert json.loads(path.read_text()) == rows
  assert [p.name for p in path.parent.iterdir()] == ['results.json']


def test_missing_metrics_are_a_dash_and_null(tmp_path):
  """Metrics without ground truth are not COCO's -1, which looks like a value."""
  truth, rows = random_problem(1)
  scores = coco.score({**truth, 'annotations': []}, rows)
  coco.write_scores(tmp_path / 'scores.json', scores, {})
  written = json.loads((tmp_path / 'scores.json').read_text())
  assert set(written['figures'].values()) == {None}
  assert all(c[1:3] == [None, None] for c in written['per_class'])
  assert coco.format_headline(scores.metrics) == 'AP -  AP50 -  AP75 -'
  assert coco.format_headline(scores.metrics | {'AP': 0.25}) == 'AP 0.2500  AP50 -  AP75 -'
  table = coco.format_table(scores)
  assert '-1' not in table and 'AP             -  mean over' in table
