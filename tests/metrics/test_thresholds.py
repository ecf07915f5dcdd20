"""Thresholds by class, confusion and results by image, by hand and against plain loops."""

import numpy as np
import pytest
from detections import random_problem, to_rows, to_truth

from ppn_jax.metrics import confusion, matching, thresholds
from ppn_jax.metrics.matching import MatchedDetections


def matched_of(score, correct, label=None, ignored=None):
  n = len(score)
  zeros = np.zeros(n, int)
  return MatchedDetections(zeros, zeros if label is None else np.array(label), zeros, zeros,
                           np.array(score, float), np.array(correct, bool),
                           np.zeros(n, bool) if ignored is None else np.array(ignored, bool))


def test_curve_by_hand():
  # Two of equal score are kept or left together.
  curve = thresholds.threshold_curve(matched_of([.9, .5, .5, .2], [1, 1, 0, 0]), 4)
  assert curve.scores.tolist() == [.9, .5, .2]
  assert curve.precision.tolist() == [1, 2 / 3, 2 / 4]
  assert curve.recall.tolist() == [1 / 4, 2 / 4, 2 / 4]
  assert curve.f1.tolist() == [2 / 5, 4 / 7, 4 / 8]


def test_the_best_threshold_lies_between_what_it_keeps_and_the_rest():
  score, correct = [.9, .8, .4, .3], [1, 1, 0, 0]
  best = thresholds.analyse(matched_of(score, correct), [10], ['cat']).classes[0]
  assert best == ('cat', pytest.approx(.6), 1.0, 0.2, 4 / 12, 10)
  # Everything is kept: between the lowest score and zero.
  assert thresholds.analyse(matched_of(score, [1] * 4), [10], ['cat']).classes[0].threshold == .15


def test_rare_classes_take_the_threshold_of_all():
  score, label = [.9, .8, .7, .6, .5, .4], [0, 0, 1, 1, 2, 2]
  matched = matched_of(score, [1, 0, 1, 0, 0, 0], label, ignored=[0, 0, 0, 0, 1, 0])
  found = thresholds.analyse(matched, [10, 9, 0], ['a', 'b', 'c'])
  assert found.every.threshold == pytest.approx(.65) and found.every.objects == 19
  assert found.classes[0].threshold == pytest.approx(.85)
  assert found.classes[1] == ('b', found.every.threshold, 1, 1 / 9, 2 / 10, 9)
  assert found.classes[2] == ('c', found.every.threshold, None, None, None, 0)
  assert found.by_label.tolist() == [c.threshold for c in found.classes]


def test_without_a_correct_detection_there_is_no_threshold():
  for matched in (matched_of([.9], [0]), matched_of([], [])):
    found = thresholds.analyse(matched, [20], ['cat'])
    assert found.by_label is None and found.curves == (None,)
    assert found.classes[0] == ('cat', None, None, None, None, 20)
    assert ' -' in thresholds.format_table(found, (None, None))


def test_no_other_threshold_has_a_higher_f1():
  truth, rows = random_problem(1)
  matched, objects = matching.match_detections(truth, rows), thresholds.count_objects(truth)
  best = thresholds.analyse(matched, objects, ['cat', 'dog']).classes[0]
  assert objects == [sum(not a['iscrowd'] for a in truth['annotations']), 0]
  for threshold in (best.threshold, *np.linspace(0, 1, 8)):
    # Matched again, from what is kept.
    kept = [r for r in rows if r['score'] >= threshold]
    which, ignored = matching.match(truth, kept)
    f1 = 2 * (which >= 0).sum() / ((~ignored).sum() + objects[0])
    assert f1 == pytest.approx(best.f1) if threshold == best.threshold else f1 <= best.f1


def two_classes():
  truth = to_truth([(0, [0, 0, 10, 10], 0), (0, [20, 0, 10, 10], 0), (0, [50, 50, 20, 20], 1),
                    (1, [0, 0, 10, 10], 0)], images=3)
  truth['annotations'][1]['category_id'] = 7
  truth['images'][1]['file_name'] = 'b.jpg'
  rows = to_rows([(0, [0, 0, 10, 10], .9),     # Cat found as cat.
                  (0, [20, 0, 10, 10], .8),    # Dog found as cat.
                  (0, [50, 50, 20, 20], .7),   # In a crowd: ignored.
                  (1, [0, 0, 10, 10], .3),     # Below its threshold: missed.
                  (2, [0, 0, 10, 10], .6)])    # Nothing there.
  return truth, rows


def test_confusion_by_hand():
  truth, rows = two_classes()
  paired = confusion.pair(truth, rows, confusion.keep_from(rows, {3: .5, 7: .5}))
  assert paired.annotation.tolist() == [0, 1, -1, -1, -1]
  assert confusion.confusion_matrix(truth, rows, paired).tolist() == [
      [1, 0, 1], [1, 0, 0], [1, 0, 0]]
  results = confusion.image_results(truth, rows, paired)
  assert results == [(0, '', 2, 1, 1, 0, 1), (1, 'b.jpg', 1, 0, 0, 0, 1), (2, '', 0, 0, 0, 1, 0)]
  assert [r.errors for r in results] == [2, 1, 1]


def test_the_right_class_is_assigned_before_a_better_score_of_another():
  truth, rows = two_classes()
  rows.append({**rows[0], 'category_id': 7, 'score': .99})
  paired = confusion.pair(truth, rows, np.ones(len(rows), bool))
  assert paired.annotation.tolist() == [0, 1, -1, 3, -1, -1]


def test_every_object_and_detection_counts_once():
  truth, rows = random_problem(2)
  rng = np.random.default_rng(0)
  rows = [r | {'category_id': int(rng.choice([3, 7]))} for r in rows]
  paired = confusion.pair(truth, rows, np.ones(len(rows), bool))
  matrix = confusion.confusion_matrix(truth, rows, paired)
  assert matrix[:-1].sum(axis=1).tolist() == thresholds.count_objects(truth)
  assert matrix.sum() - matrix[:, -1].sum() == (~paired.ignored).sum()
  found = paired.annotation[paired.annotation >= 0]
  assert len(set(found.tolist())) == len(found)
  matched = matching.match_detections(truth, rows)
  assert np.trace(matrix) == matched.correct.sum()
  results = confusion.image_results(truth, rows, paired)
  assert sum(r.correct for r in results) == np.trace(matrix)
  assert sum(r.background for r in results) == matrix[-1].sum()
  errors = [r.errors for r in results]
  assert errors == sorted(errors, reverse=True) and len(results) == len(truth['images'])
