"""Post-processing against a plain greedy algorithm and against the reference's detections."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.nms import postprocess as nms_postprocess
from ppn_jax.detection.structures import Anchors, Detections, Outputs
from ppn_jax.errors import InputError


def iou(a, b) -> float:
  height = min(a[2], b[2]) - max(a[0], b[0])
  width = min(a[3], b[3]) - max(a[1], b[1])
  if height <= 0 or width <= 0:
    return 0.0
  both = height * width
  return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def plain_nms(boxes, scores, *, score_threshold=1e-8, iou_threshold=0.6, max_per_class=100,
           max_detections=100, cross_class_iou=1.0):
  """Runs the plain algorithm on one image; returns rows (anchor, label, score, clipped box)."""
  kept = []
  pairs = sorted((-score, anchor, label) for (anchor, label), score in np.ndenumerate(scores))
  for negative_score, anchor, label in pairs:
    if not -negative_score > score_threshold or not np.isfinite(boxes[anchor]).all():
      continue
    of_class = [k for _, k, its in kept if its == label]
    if len(of_class) < max_per_class and all(
        iou(boxes[anchor], boxes[k]) <= iou_threshold for k in of_class) and (
            cross_class_iou >= 1 or all(
                iou(boxes[anchor], boxes[k]) <= cross_class_iou for _, k, _ in kept)):
      kept.append((negative_score, anchor, label))
  rows = []
  for negative_score, anchor, label in kept:
    clipped = np.clip(boxes[anchor], 0, 1)
    if (clipped[2] - clipped[0]) * (clipped[3] - clipped[1]) > 0:
      rows.append((anchor, label, -negative_score, clipped))
  return rows[:max_detections]


def problem(boxes, logits):
  """Returns outputs that decode to `boxes`, and anchors whose level is their index."""
  boxes, logits = np.asarray(boxes, np.float32), np.asarray(logits, np.float32)
  anchors = Anchors(boxes, np.arange(len(boxes), dtype=np.int32))
  return Outputs(np.zeros((1, *boxes.shape), np.float32), logits[None]), anchors


def postprocess(outputs, anchors, *, background=False, **options):
  class_spec = ClassLogitsSpec(outputs.class_logits.shape[-1] - background, background)
  return nms_postprocess(outputs, anchors, class_spec=class_spec, **options)


# One compilation serves all problems of the same shape and options.
compiled = jax.jit(postprocess, static_argnames=(
    'background', 'score_threshold', 'iou_threshold', 'cross_class_iou', 'max_per_class',
    'max_detections', 'candidates'))


def detect(outputs, anchors, **options) -> Detections:
  return jax.tree.map(np.asarray, compiled(outputs, anchors, **options))


def assert_equals_plain_nms(detections, outputs, anchors, **options):
  options.pop('candidates', None)
  for b in range(len(outputs.class_logits)):
    # The decoder and the sigmoid have tests of their own; here they only supply input.
    boxes = np.asarray(jax.jit(box_ops.decode)(outputs.box_codes[b], anchors.boxes))
    scores = np.asarray(jax.jit(jax.nn.sigmoid)(outputs.class_logits[b]))
    rows = plain_nms(boxes, scores, **options)
    one = jax.tree.map(lambda x, b=b: x[b], detections)
    n = len(rows)
    assert one.valid.sum() == n and one.valid[:n].all()
    assert one.level[:n].tolist() == [r[0] for r in rows]
    assert one.labels[:n].tolist() == [r[1] for r in rows]
    np.testing.assert_allclose(one.scores[:n], [r[2] for r in rows], rtol=1e-6)
    np.testing.assert_allclose(one.boxes[:n], np.array([r[3] for r in rows]).reshape(n, 4),
                               atol=1e-6)
    assert all(not x[n:].any() for x in one)


def random_boxes(rng, n, clusters=None):
  """Returns boxes that overlap much and reach beyond the image, optionally in clusters."""
  centres = rng.uniform(-0.1, 1.1, (clusters or n, 2))
  centre = centres[rng.integers(0, len(centres), n)] + rng.normal(0, 0.02, (n, 2))
  side = rng.uniform(0.05, 0.5, (len(centres), 2))[rng.integers(0, len(centres), n)]
  return np.concatenate([centre - side / 2, centre + side / 2], axis=1).astype(np.float32)


CASES = {
    'one class': dict(n=240, classes=1),
    'random boxes': dict(),
    'clusters': dict(clusters=8),
    'many classes': dict(n=60, classes=40, clusters=10),
    'fewer pairs than a round': dict(n=3, classes=2),
    'one anchor': dict(n=1, classes=1),
    'tied scores': dict(clusters=8, distinct=3),
    'all scores equal': dict(clusters=5, distinct=1),
    'duplicate boxes': dict(clusters=8, duplicates=True),
    'class cap binds': dict(max_per_class=3),
    'cap and room bind': dict(max_per_class=4, max_detections=10),
    'high score threshold': dict(score_threshold=0.7),
    'nothing reaches the threshold': dict(score_threshold=1.0),
    'suppress on any overlap': dict(iou_threshold=0.0),
    'suppress nothing': dict(duplicates=True, iou_threshold=1.0),
    'across classes': dict(clusters=8, cross_class_iou=0.8),
    # A full class must not suppress others.
    'across classes, cap binds': dict(clusters=8, cross_class_iou=0.3, max_per_class=2),
}


@pytest.mark.parametrize('case, candidates', [
    *((case, 7) for case in CASES),
    # Fewer rounds of more candidates: the same code in other shapes.
    *(pytest.param(case, 256, marks=() if case == 'clusters' else pytest.mark.slow)
      for case, options in CASES.items() if not any('_' in o for o in options))])
def test_equals_the_plain_algorithm(case, candidates):
  options = dict(CASES[case], candidates=candidates)
  shape = SimpleNamespace(n=options.pop('n', 120), classes=options.pop('classes', 4),
                          **{k: options.pop(k, None) for k in
                             ('clusters', 'distinct', 'duplicates')})
  rng = np.random.default_rng(list(CASES).index(case))
  boxes = random_boxes(rng, shape.n, shape.clusters)
  if shape.duplicates:
    boxes = boxes[rng.integers(0, max(shape.n // 4, 1), shape.n)]
  logits = rng.normal(0, 2, (shape.n, shape.classes))
  if shape.distinct:
    logits = rng.integers(0, shape.distinct, logits.shape)
  outputs, anchors = problem(boxes, logits)
  detections = detect(outputs, anchors, **options)
  assert_equals_plain_nms(detections, outputs, anchors, **options)


@pytest.mark.slow
def test_images_of_a_batch_are_independent():
  rng = np.random.default_rng(0)
  anchors = Anchors(random_boxes(rng, 100), np.arange(100, dtype=np.int32))
  codes = rng.normal(0, 1, (3, 100, 4)).astype(np.float32)
  logits = rng.normal(-2, 2, (3, 100, 5)).astype(np.float32)
  # Image 0 takes one round, image 1 has one repeated box and takes many, image 2 is empty.
  codes[1] = box_ops.encode(np.array([0.2, 0.2, 0.6, 0.7], np.float32), anchors.boxes)
  logits[2] = -100
  options = dict(candidates=16, max_detections=8)
  together = detect(Outputs(codes, logits), anchors, **options)
  assert together.valid.sum(axis=1).tolist() == [8, 5, 0]
  assert_equals_plain_nms(together, Outputs(codes, logits), anchors, **options)
  for b in range(3):
    alone = detect(Outputs(codes[b:b + 1], logits[b:b + 1]), anchors, **options)
    for one, all_ in zip(alone, together, strict=True):
      np.testing.assert_allclose(one[0], all_[b], atol=1e-6)


def test_a_long_chain_of_overlaps_settles():
  # Each box overlaps only its neighbours, in order of score: every second one survives.
  n = 200
  left = np.arange(n) * 0.001
  boxes = np.stack([np.zeros(n), left, np.ones(n), left + 0.0035], axis=1)
  outputs, anchors = problem(boxes, np.linspace(4, -4, n)[:, None])
  detections = detect(outputs, anchors, iou_threshold=0.5, max_per_class=n, max_detections=n)
  np.testing.assert_array_equal(detections.level[0][detections.valid[0]], np.arange(0, n, 2))


def test_one_box_a_class_is_left_of_a_collapsed_network():
  # Thousands of equal boxes: a naive preselection would report only the few top classes.
  rng = np.random.default_rng(0)
  boxes = np.tile(np.array([0.1, 0.2, 0.5, 0.8], np.float32), (700, 1))
  logits = rng.normal(0, 0.01, (700, 20)) + 0.1 * np.arange(20)
  detections = detect(*problem(boxes, logits), candidates=64)
  assert sorted(detections.labels[0][detections.valid[0]]) == list(range(20))


@pytest.mark.slow
def test_boxes_outside_the_image_suppress_and_count_but_are_not_reported():
  boxes = [[0.1, -0.8, 0.5, 0.0], [0.1, -0.7, 0.5, 0.1], [0.1, 0.5, 0.5, 0.9]]
  outputs, anchors = problem(boxes, [[3.0], [2.0], [1.0]])
  assert detect(outputs, anchors).level[0, :2].tolist() == [2, 0]
  assert detect(outputs, anchors).valid.sum() == 1
  assert detect(outputs, anchors, max_per_class=1).valid.sum() == 0


@pytest.mark.parametrize('candidates', [
    1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 256))])
def test_equal_scores_go_to_the_lower_anchor_then_the_lower_label(candidates):
  # The anchor with the best score of all is the last one, so its row is found first.
  outputs, anchors = problem([[0, x, 0.1, x + 0.1] for x in (0.1, 0.4, 0.7)],
                             [[0, 1, 0], [1, 2, 1], [1, 0, 3]])
  detections = detect(outputs, anchors, candidates=candidates, max_detections=9)
  assert list(zip(detections.level[0].tolist(), detections.labels[0].tolist(), strict=True)) == [
      (2, 2), (1, 1), (0, 1), (1, 0), (1, 2), (2, 0), (0, 0), (0, 2), (2, 1)]


def test_thresholds_are_strict():
  outputs, anchors = problem([[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0.5, 1, 1]], [[1.0], [0.5], [0.0]])
  # The halves overlap the whole by exactly a half; the last one scores exactly a half.
  options = dict(iou_threshold=0.5, score_threshold=0.5)
  assert detect(outputs, anchors, **options).level[0, :3].tolist() == [0, 1, 0]
  assert detect(outputs, anchors, **options).valid.sum() == 2
  assert detect(outputs, anchors, iou_threshold=0.499).valid.sum() == 1
  assert detect(outputs, anchors, score_threshold=0.499, iou_threshold=0.5).valid.sum() == 3


def test_values_that_are_not_finite_are_ignored():
  boxes = np.tile(np.array([0.2, 0.2, 0.6, 0.6], np.float32), (6, 1))
  outputs, anchors = problem(boxes, np.linspace(3, 1, 6)[:, None])
  outputs.box_codes[0, 0, 2] = 1e4  # exp overflows: an infinite box.
  outputs.box_codes[0, 1, 0] = np.nan
  outputs.class_logits[0, 2] = np.nan
  outputs.box_codes[0, 3, 2:] = 5 * 60.0  # Finite sides, infinite area.
  outputs.class_logits[0, 4] = np.inf  # A score of 1 like any other.
  detections = detect(outputs, anchors)
  assert detections.level[0][detections.valid[0]].tolist() == [4, 3]
  assert all(np.isfinite(x).all() for x in detections)
  everything = Outputs(np.full((1, 6, 4), np.nan, np.float32), np.full((1, 6, 1), np.nan))
  assert not detect(everything, anchors).valid.any()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_results_are_float32_of_static_shape(dtype):
  outputs = Outputs(jnp.zeros((2, 9, 4), dtype), jnp.zeros((2, 9, 3), dtype))
  anchors = Anchors(random_boxes(np.random.default_rng(0), 9), np.zeros(9, np.int32))
  detections = jax.eval_shape(
      functools.partial(postprocess, anchors=anchors, max_detections=33), outputs)
  assert detections.boxes.shape == (2, 33, 4) and detections.boxes.dtype == jnp.float32
  assert detections.scores.shape == (2, 33) and detections.scores.dtype == jnp.float32
  assert detections.labels.dtype == detections.level.dtype == jnp.int32
  assert detections.valid.dtype == bool


@pytest.mark.parametrize('option', [
    dict(iou_threshold=1.1), dict(iou_threshold=-0.1), dict(score_threshold=2),
    dict(cross_class_iou=1.5),
    dict(score_threshold=float('nan')), dict(max_per_class=0), dict(max_detections=-1),
    dict(candidates=0), dict(candidates=2.5), dict(max_detections=True)])
def test_options_out_of_range_are_named(option):
  outputs, anchors = problem([[0, 0, 1, 1]], [[0]])
  (name, value), = option.items()
  with pytest.raises(InputError, match=f'{name} is {value}; legal: '):
    postprocess(outputs, anchors, **option)


@pytest.mark.parametrize('network', ['ppn', 'ssd'])
def test_reproduces_the_reference(network, shared):
  golden = np.load(shared / 'golden' / f'forward_{network}_s1.npz')
  boxes = np.load(shared / 'golden' / f'anchors_{network}.npy')
  outputs = Outputs(golden['box_encodings'], golden['class_predictions_with_background'])
  detections = detect(outputs, Anchors(boxes, np.zeros(len(boxes), np.int32)), background=True)
  np.testing.assert_array_equal(detections.valid.sum(axis=1), golden['num_detections'])
  np.testing.assert_allclose(detections.scores, golden['detection_scores'], atol=1e-6)
  np.testing.assert_array_equal(detections.labels, golden['detection_classes'])
  np.testing.assert_allclose(detections.boxes, golden['detection_boxes'], atol=1e-6)
