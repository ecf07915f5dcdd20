"""Tests TIDE's kinds of errors by hand, and on random boxes against a second implementation."""

import numpy as np
import pytest

from ppn_jax.metrics import coco, error_analysis
from ppn_jax.metrics.error_analysis import BACKGROUND, BOTH, DUPLICATE, KINDS, NO_ERROR
from ppn_jax.metrics.error_analysis import POORLY_PLACED as PLACE
from ppn_jax.metrics.error_analysis import WRONG_CLASS as CLASS


def instances(boxes, num_images=1):
  """Returns an instances dict of boxes (image, category, x, y, w, h, *iscrowd)."""
  return {
      'images': [{'id': i, 'height': 200, 'width': 200} for i in range(num_images)],
      'categories': [{'id': c, 'name': str(c)} for c in (1, 2, 3)],
      'annotations': [{'id': n, 'image_id': b[0], 'category_id': b[1], 'bbox': list(b[2:6]),
                       'area': b[4] * b[5], 'iscrowd': int(len(b) > 6)}
                      for n, b in enumerate(boxes, start=1)]}


def row(image, category, score, x, y, w, h):
  return {'image_id': image, 'category_id': category, 'score': score, 'bbox': [x, y, w, h],
          'level': 0}


TRUTH = instances([(0, 1, 0, 0, 40, 40), (0, 2, 100, 0, 40, 40), (0, 3, 0, 100, 40, 40),
                   (0, 1, 100, 100, 60, 60, 'crowd')])
ROWS = [
    row(0, 1, 0.9, 0, 0, 40, 40),        # Correct.
    row(0, 1, 0.8, 0, 0, 40, 36),        # Its duplicate.
    row(0, 1, 0.7, 100, 0, 40, 40),      # Ground truth of class 2.
    row(0, 3, 0.6, 0, 120, 40, 40),      # IoU 1/3.
    row(0, 2, 0.5, 20, 20, 40, 40),      # IoU 1/7 with another class.
    row(0, 2, 0.4, 60, 60, 20, 20),      # Nothing near.
    row(0, 1, 0.3, 105, 105, 40, 40)]    # In the crowd.


def test_one_of_each_kind():
  found = error_analysis.classify(TRUTH, ROWS)
  assert found.kind.tolist() == [NO_ERROR, DUPLICATE, CLASS, PLACE, BOTH, BACKGROUND, NO_ERROR]
  assert found.target.tolist() == [0, 0, 1, 2, 0, -1, -1]
  np.testing.assert_allclose(found.iou[1:6], [0.9, 1, 1 / 3, 1 / 7, 0])
  assert found.missed.tolist() == []  # The second and third are targets of wrong detections.
  assert found.counts() == dict(zip(KINDS, (0, 1, 1, 1, 1, 1), strict=True))


def test_low_scores_are_ignored():
  found = error_analysis.classify(TRUTH, ROWS, min_score=0.65)
  assert found.kind.tolist() == [NO_ERROR, DUPLICATE, CLASS] + [NO_ERROR] * 4
  assert found.missed.tolist() == [2]
  assert error_analysis.classify(TRUTH, ROWS, min_score=0.95).missed.tolist() == [0, 1, 2]


def test_no_detections_and_no_ground_truth():
  assert error_analysis.classify(TRUTH, []).counts()['missed'] == 3
  found = error_analysis.classify(instances([], 1), ROWS)
  assert found.kind.tolist() == [BACKGROUND] * 7 and not len(found.missed)


@pytest.mark.parametrize('kind, rows, gain', [
    # A correct detection after a duplicate.
    ('duplicate', [row(0, 1, 0.9, 0, 0, 40, 40), row(0, 1, 0.8, 0, 0, 40, 39),
                   row(0, 1, 0.7, 100, 0, 40, 40)], None),
    ('background', [row(0, 1, 0.9, 60, 150, 20, 20), row(0, 1, 0.8, 0, 0, 40, 40)], 0.5),
    ('wrong class', [row(0, 2, 0.9, 0, 0, 40, 40)], 1.0),
    ('poorly placed', [row(0, 1, 0.9, 0, 20, 40, 40)], 1.0),
    # Fixing two for one box leaves one.
    ('poorly placed', [row(0, 1, 0.9, 0, 20, 40, 40), row(0, 1, 0.8, 0, 21, 40, 40)], 1.0),
    # The box is matched already, so the wrong detection is removed.
    ('poorly placed', [row(0, 1, 0.9, 0, 25, 40, 40), row(0, 1, 0.8, 0, 0, 40, 40)], 0.5),
])
def test_costs_by_hand(kind, rows, gain):
  truth = instances([(0, 1, 0, 0, 40, 40)] + [(0, 1, 100, 0, 40, 40)] * (gain is None))
  gains = error_analysis.costs(truth, rows)
  if gain is None:  # Recall 1/2 at precision 1, the rest at 2/3.
    gain = 1 - coco.score(truth, rows).metrics['AP50']
    assert gain == pytest.approx(50 / 101 / 3)
  assert gains[kind] == pytest.approx(gain, abs=1e-9)
  others = [name for name in KINDS if name not in (kind, 'missed')]
  assert all(gains[name] == pytest.approx(0, abs=1e-9) for name in others)


def test_the_cost_of_missed_boxes_is_the_missing_recall():
  truth = instances([(0, 1, 0, 0, 40, 40), (0, 1, 100, 0, 40, 40)])
  rows = [row(0, 1, 0.9, 0, 0, 40, 40)]
  gains = error_analysis.costs(truth, rows)
  assert gains['missed'] == pytest.approx(50 / 101)
  assert sum(gains.values()) == gains['missed']


def iou(a, b):
  width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
  height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
  both = max(width, 0) * max(height, 0)
  return both / (a[2] * a[3] + b[2] * b[3] - both)


def by_definition(truth, rows):
  """Returns the kind of each wrong detection and the missed boxes, by the paper's section 2.2."""
  matched, kinds, targets = {}, {}, set()
  for i in sorted(range(len(rows)), key=lambda i: -rows[i]['score']):
    r = rows[i]
    near = [(iou(r['bbox'], a['bbox']), n) for n, a in enumerate(truth) if
            a['image_id'] == r['image_id'] and a['category_id'] == r['category_id'] and
            n not in matched]
    if near and max(near)[0] >= 0.5:
      matched[max(near)[1]] = i
  for i, r in enumerate(rows):
    if i in matched.values():
      continue
    here = [(iou(r['bbox'], a['bbox']), n, a['category_id'] == r['category_id'])
            for n, a in enumerate(truth) if a['image_id'] == r['image_id']]
    own = max(((o, n) for o, n, same in here if same), default=(0, -1))
    other = max(((o, n) for o, n, same in here if not same), default=(0, -1))
    if 0.1 <= own[0] < 0.5:
      kinds[i] = PLACE
      targets.add(own[1])
    elif other[0] >= 0.5:
      kinds[i] = CLASS
      targets.add(other[1])
    elif own[0] >= 0.5:
      kinds[i] = DUPLICATE
    else:
      kinds[i] = BACKGROUND if max(own[0], other[0]) < 0.1 else BOTH
  return kinds, set(range(len(truth))) - set(matched) - targets


@pytest.mark.parametrize('seed', range(5))
def test_random_boxes_agree_with_the_definitions(seed):
  rng = np.random.default_rng(seed)
  boxes = lambda n: np.concatenate([rng.uniform(0, 60, (n, 2)), rng.uniform(20, 60, (n, 2))], 1)
  truth = instances([(int(rng.integers(6)), int(rng.integers(1, 4)), *b)
                     for b in boxes(25).tolist()], 6)
  rows = [row(int(rng.integers(6)), int(rng.integers(1, 4)), float(rng.random()), *b)
          for b in boxes(60).tolist()]
  rows += [row(a['image_id'], int(rng.integers(1, 4)), float(rng.random()),
               *(a['bbox'] + rng.normal(0, 4, 4))) for a in truth['annotations'] * 3]
  found = error_analysis.classify(truth, rows)
  kinds, missed = by_definition(truth['annotations'], rows)
  assert {i: k for i, k in enumerate(found.kind.tolist()) if k != NO_ERROR} == kinds
  assert set(found.missed.tolist()) == missed
  assert len(set(kinds.values())) == 5
  assert all(gain >= -1e-9 for gain in error_analysis.costs(truth, rows).values())
  # The library that computes the costs counts the same errors.
  counts = coco.tide_errors(truth, rows, min_iou=0.5, background_iou=0.1)['counts']
  assert found.counts() == {kind: counts[error_analysis._HOTCOCO_NAMES[kind]] for kind in KINDS}
