"""Assignment against the reference's 24,000 decisions and against SSD's rules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.matching import assign_targets
from ppn_jax.detection.structures import Anchors, GroundTruth

GRIDS = tuple((n, n) for n in (19, 10, 5, 3, 2, 1))


def make_ground_truth(boxes, labels=None, crowd=None, pad_to=None):
  """Makes the ground truth of one image; by default labels count up and there are no crowds."""
  boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
  n = len(boxes)

  def padded(values, dtype):
    values = np.asarray(values, dtype)
    rows = np.zeros((pad_to or n, *values.shape[1:]), dtype)
    rows[:n] = values
    return rows[None]

  return GroundTruth(padded(boxes, np.float32),
                     padded(np.arange(n) if labels is None else labels, np.int32),
                     padded(np.zeros(n) if crowd is None else crowd, bool),
                     padded(np.ones(n), bool))


def golden_ground_truth(golden):
  valid = golden['gt_weights'] > 0
  return GroundTruth(golden['gt_boxes'], np.where(valid, golden['gt_classes'], 0),
                     np.zeros_like(valid), valid)


def test_equal_to_the_reference_on_every_anchor(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  ground_truth = golden_ground_truth(golden)
  targets = jax.jit(assign_targets)(ssd_anchors(GRIDS), ground_truth)
  match = golden['ppn_match']
  assert match.size == 24_000
  np.testing.assert_array_equal(targets.positive, match >= 0)
  # Distinct boxes give distinct codes; labels alone would not tell two of a class apart.
  np.testing.assert_allclose(targets.box_codes, golden['ppn_reg_targets'], rtol=2e-5, atol=2e-5)
  label = np.where(match >= 0, np.take_along_axis(ground_truth.labels, np.maximum(match, 0), 1), 0)
  np.testing.assert_array_equal(targets.labels, label)
  np.testing.assert_array_equal(np.where(targets.positive, targets.labels + 1, -1),
                                golden['ppn_cls_targets_argmax'])
  assert not np.any(targets.ignored)


def test_padding_changes_nothing(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  ground_truth = golden_ground_truth(golden)
  padded = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 68)] + [(0, 0)] * (x.ndim - 2)),
                        ground_truth)
  narrow_targets, wide_targets = (jax.jit(assign_targets)(ssd_anchors(GRIDS), t)
                                  for t in (ground_truth, padded))
  jax.tree.map(np.testing.assert_array_equal, narrow_targets, wide_targets)


ANCHORS = Anchors(np.float32([[0, 0, .5, .5], [0, .5, .5, 1], [.5, 0, 1, .5], [.5, .5, 1, 1]]),
                  np.zeros(4, np.int32))


def test_the_box_of_larger_overlap_wins_and_ties_go_to_the_first():
  ground_truth = make_ground_truth([[0, 0, .5, .4], [0, 0, .5, .5], [0, 0, .5, .5]])
  targets = assign_targets(ANCHORS, ground_truth, force_match=False)
  assert targets.positive.tolist() == [[True, False, False, False]]
  assert targets.labels.tolist() == [[1, 0, 0, 0]]


def test_the_threshold_is_inclusive():
  ground_truth = make_ground_truth([[0, 0, .5, .25]])  # IoU exactly one half with anchor 0
  assert assign_targets(ANCHORS, ground_truth, matched_iou=0.5, force_match=False).positive[0, 0]
  targets = assign_targets(ANCHORS, ground_truth, matched_iou=0.51, force_match=False)
  assert not targets.positive.any()


def test_force_match_takes_the_first_best_anchor_for_the_first_box():
  tiny = [.48, .1, .52, .12]  # straddles anchors 0 and 2 equally
  ground_truth = make_ground_truth([tiny, tiny, [.9, .9, .95, .95]])
  targets = assign_targets(ANCHORS, ground_truth)
  assert targets.positive.tolist() == [[True, False, False, True]]
  assert targets.labels.tolist() == [[0, 0, 0, 2]]


def test_a_forced_match_overrides_a_better_overlap():
  # Anchor 0 equals box 1, but box 0 overlaps no other anchor.
  targets = assign_targets(ANCHORS, make_ground_truth([[0, 0, .1, .1], [0, 0, .5, .5]]))
  assert targets.labels[0, 0] == 0


def test_no_boxes_no_positives():
  empty = make_ground_truth(np.zeros((0, 4)), pad_to=3)
  targets = assign_targets(ANCHORS, empty)
  assert not targets.positive.any() and not targets.ignored.any()


def test_crowd_is_ignored_or_matched():
  ground_truth = make_ground_truth([[0, 0, .5, 1], [0, 0, .5, .5]], crowd=[True, False])
  ignoring = assign_targets(ANCHORS, ground_truth)
  assert ignoring.positive.tolist() == [[True, False, False, False]]
  assert ignoring.ignored.tolist() == [[False, True, False, False]]
  without_ignoring = assign_targets(ANCHORS, ground_truth, ignore_crowd=False)
  assert not without_ignoring.ignored.any()
  assert without_ignoring.positive.tolist() == [[True, True, False, False]]


def test_random_problems_equal_a_loop():
  rng = np.random.default_rng(0)
  anchors = ssd_anchors([(4, 4), (2, 2)])
  for trial in range(20):
    n = rng.integers(1, 12)
    corners = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    ground_truth = make_ground_truth(corners, pad_to=16)
    targets = assign_targets(anchors, ground_truth, matched_iou=0.4)
    expected = match_by_loop(anchors.boxes, corners, 0.4)
    np.testing.assert_array_equal(targets.positive[0], expected >= 0, err_msg=str(trial))
    np.testing.assert_array_equal(targets.labels[0], np.maximum(expected, 0), err_msg=str(trial))


def match_by_loop(anchors, boxes, threshold):
  def overlap(a, b):
    h = min(a[2], b[2]) - max(a[0], b[0])
    w = min(a[3], b[3]) - max(a[1], b[1])
    if h <= 0 or w <= 0:
      return 0.0
    return h * w / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - h * w)

  table = np.array([[overlap(a.astype(float), b.astype(float)) for a in anchors] for b in boxes])
  match = np.where(table.max(0) >= threshold, table.argmax(0), -1)
  for row in reversed(range(len(boxes))):
    match[table[row].argmax()] = row
  return match


@pytest.mark.parametrize('dtype', [jnp.float32])
def test_works_inside_jit_with_abstract_ground_truth(dtype):
  ground_truth = make_ground_truth([[0, 0, .5, .5]], pad_to=4)
  shapes = jax.eval_shape(lambda t: assign_targets(ANCHORS, t), ground_truth)
  assert shapes.box_codes.shape == (1, 4, 4) and shapes.box_codes.dtype == dtype
