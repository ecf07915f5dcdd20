"""Pascal VOC's average precision, by hand and against the devkit's formula."""

import numpy as np
import pytest
from detections import random_problem, to_rows, to_truth

from ppn_jax.metrics import coco
from ppn_jax.metrics.voc import area_under_curve, voc_ap50


def test_voc_ap_by_hand():
  truth = to_truth([(0, [0, 0, 10, 10], 0), (0, [50, 50, 20, 20], 1), (1, [0, 0, 10, 10], 0),
                  (1, [30, 30, 10, 10], 0)])
  rows = to_rows([(0, [0, 0, 10, 10], .9),    # Right.
                (0, [0, 0, 10, 9], .8),     # A second detection: wrong.
                (0, [50, 50, 20, 20], .7),  # Difficult: ignored.
                (1, [0, 0, 10, 11], .6),    # Right.
                (1, [80, 80, 10, 10], .5),  # Wrong.
                (1, [30, 30, 10, 5], .4)])  # An IoU of 0.5 is not above 0.5: wrong.
  mean, by_class = voc_ap50(truth, rows)
  assert by_class == {'cat': pytest.approx((1 + 2 / 3) / 3), 'dog': None}
  assert mean == by_class['cat']


def test_voc_ap_takes_the_best_box_where_coco_takes_a_free_one():
  truth = to_truth([(0, [0, 0, 10, 10], 0), (0, [0, 0, 10, 8], 0)])
  rows = to_rows([(0, [0, 0, 10, 10], .9), (0, [0, 0, 10, 9.5], .8)])
  assert voc_ap50(truth, rows)[0] == pytest.approx(0.5)
  assert coco.score(truth, rows).metrics['AP50'] == pytest.approx(1, abs=1e-6)


def test_voc_ap_without_truth_or_detections():
  nothing = {'cat': None, 'dog': None}
  assert voc_ap50(to_truth([]), to_rows([(0, [0, 0, 9, 9], .5)])) == (None, nothing)
  assert voc_ap50(to_truth([(0, [0, 0, 9, 9], 0)]), [])[0] == 0


def test_area_is_the_devkits():
  rng = np.random.default_rng(0)
  for _ in range(20):
    right, total = rng.random(30) < 0.4, 25
    hits = np.cumsum(right)
    recall = np.concatenate([[0], hits / total, [1]])
    precision = np.concatenate([[0], hits / np.arange(1, 31), [0]])
    for i in range(len(precision) - 1, 0, -1):  # VOCap.m, line by line.
      precision[i - 1] = max(precision[i - 1], precision[i])
    at = np.flatnonzero(recall[1:] != recall[:-1])
    devkit = np.sum((recall[at + 1] - recall[at]) * precision[at + 1])
    assert area_under_curve(right, total) == pytest.approx(devkit)


def test_voc_ap_is_close_to_cocos_where_nothing_is_difficult():
  for seed in range(3):
    truth, rows = random_problem(seed)
    for annotation in truth['annotations']:
      annotation['iscrowd'] = 0
    assert voc_ap50(truth, rows)[0] == pytest.approx(coco.score(truth, rows).metrics['AP50'],
                                                     abs=0.015)
