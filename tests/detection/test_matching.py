"""Assignment against the reference's 24,000 decisions and against SSD's rules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.matching import assign
from ppn_jax.detection.structures import Anchors, GroundTruth

GRIDS = tuple((n, n) for n in (19, 10, 5, 3, 2, 1))


def make_truth(boxes, labels=None, crowd=None, pad_to=None):
  """One image's truth; labels count up and nothing is a crowd unless given."""
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


def golden_truth(golden):
  valid = golden['gt_weights'] > 0
  return GroundTruth(golden['gt_boxes'], np.where(valid, golden['gt_classes'], 0),
                     np.zeros_like(valid), valid)


def test_equal_to_the_reference_on_every_anchor(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  truth = golden_truth(golden)
  targets = jax.jit(assign)(ssd_anchors(GRIDS), truth)
  match = golden['ppn_match']
  assert match.size == 24_000
  np.testing.assert_array_equal(targets.positive, match >= 0)
  # Distinct boxes give distinct codes; labels alone would not tell two of a class apart.
  np.testing.assert_allclose(targets.box_codes, golden['ppn_reg_targets'], rtol=2e-5, atol=2e-5)
  label = np.where(match >= 0, np.take_along_axis(truth.labels, np.maximum(match, 0), 1), 0)
  np.testing.assert_array_equal(targets.labels, label)
  np.testing.assert_array_equal(np.where(targets.positive, targets.labels + 1, -1),
                                golden['ppn_cls_targets_argmax'])
  assert not np.any(targets.ignored)


def test_padding_changes_nothing(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  truth = golden_truth(golden)
  wide = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 68)] + [(0, 0)] * (x.ndim - 2)), truth)
  narrow_targets, wide_targets = (jax.jit(assign)(ssd_anchors(GRIDS), t) for t in (truth, wide))
  jax.tree.map(np.testing.assert_array_equal, narrow_targets, wide_targets)


ANCHORS = Anchors(np.float32([[0, 0, .5, .5], [0, .5, .5, 1], [.5, 0, 1, .5], [.5, .5, 1, 1]]),
                  np.zeros(4, np.int32))


def test_the_better_of_two_truths_wins_and_the_first_of_equals():
  truth = make_truth([[0, 0, .5, .4], [0, 0, .5, .5], [0, 0, .5, .5]])
  targets = assign(ANCHORS, truth, force_match=False)
  assert targets.positive.tolist() == [[True, False, False, False]]
  assert targets.labels.tolist() == [[1, 0, 0, 0]]


def test_a_threshold_is_reached_not_passed():
  truth = make_truth([[0, 0, .5, .25]])  # IoU exactly one half with anchor 0
  assert assign(ANCHORS, truth, matched_iou=0.5, force_match=False).positive[0, 0]
  assert not assign(ANCHORS, truth, matched_iou=0.51, force_match=False).positive.any()


def test_force_match_claims_the_first_best_anchor_for_the_first_claimant():
  tiny = [.48, .1, .52, .12]  # straddles anchors 0 and 2 equally
  truth = make_truth([tiny, tiny, [.9, .9, .95, .95]])
  targets = assign(ANCHORS, truth)
  assert targets.positive.tolist() == [[True, False, False, True]]
  assert targets.labels.tolist() == [[0, 0, 0, 2]]


def test_a_claim_overrides_a_better_overlap():
  # Anchor 0 fits truth 1 perfectly, yet truth 0 has no other anchor to claim.
  targets = assign(ANCHORS, make_truth([[0, 0, .1, .1], [0, 0, .5, .5]]))
  assert targets.labels[0, 0] == 0


def test_no_truth_no_positive():
  empty = make_truth(np.zeros((0, 4)), pad_to=3)
  targets = assign(ANCHORS, empty)
  assert not targets.positive.any() and not targets.ignored.any()


def test_crowd_is_ignored_or_matched():
  truth = make_truth([[0, 0, .5, 1], [0, 0, .5, .5]], crowd=[True, False])
  ignoring = assign(ANCHORS, truth)
  assert ignoring.positive.tolist() == [[True, False, False, False]]
  assert ignoring.ignored.tolist() == [[False, True, False, False]]
  like_any_other = assign(ANCHORS, truth, ignore_crowd=False)
  assert not like_any_other.ignored.any()
  assert like_any_other.positive.tolist() == [[True, True, False, False]]


def test_random_problems_equal_a_loop():
  rng = np.random.default_rng(0)
  anchors = ssd_anchors([(4, 4), (2, 2)])
  for trial in range(20):
    n = rng.integers(1, 12)
    corners = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    truth = make_truth(corners, pad_to=16)
    targets = assign(anchors, truth, matched_iou=0.4)
    expected = match_by_loop(anchors.boxes, corners, 0.4)
    np.testing.assert_array_equal(targets.positive[0], expected >= 0, err_msg=str(trial))
    np.testing.assert_array_equal(targets.labels[0], np.maximum(expected, 0), err_msg=str(trial))


def match_by_loop(anchors, truth, threshold):
  def overlap(a, b):
    h = min(a[2], b[2]) - max(a[0], b[0])
    w = min(a[3], b[3]) - max(a[1], b[1])
    if h <= 0 or w <= 0:
      return 0.0
    return h * w / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - h * w)

  table = np.array([[overlap(a.astype(float), t.astype(float)) for a in anchors] for t in truth])
  match = np.where(table.max(0) >= threshold, table.argmax(0), -1)
  for row in reversed(range(len(truth))):
    match[table[row].argmax()] = row
  return match


@pytest.mark.parametrize('dtype', [jnp.float32])
def test_works_inside_jit_with_abstract_truth(dtype):
  truth = make_truth([[0, 0, .5, .5]], pad_to=4)
  shapes = jax.eval_shape(lambda t: assign(ANCHORS, t), truth)
  assert shapes.box_codes.shape == (1, 4, 4) and shapes.box_codes.dtype == dtype
