"""Tests that pictures of pyramids, anchors, images and curves show what they should."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import Detections
from ppn_jax.errors import InputError
from ppn_jax.metrics.coco import NO_GROUND_TRUTH
from ppn_jax.run import build_detector, resolve_classes
from ppn_jax.visualization import anchors, curves, gallery, pyramid
from ppn_jax.visualization.drawing import class_colour
from ppn_jax.visualization.gallery import CaptionedImage, Gallery

NAMES = ['circle', 'square', 'triangle', 'star', 'cross']


@pytest.fixture(scope='module')
def detector():
  return build_detector(resolve_classes(tiny_config(), NAMES))


@pytest.fixture(scope='module')
def source():
  return build_source({'name': 'synthetic_shapes', 'num_images': 6, 'image_size': 64})


def has(image, label, apart=4):
  """Returns whether there are pixels of a class's colour."""
  return (np.abs(image.astype(int) - class_colour(label)).max(axis=-1) <= apart).sum() > 20


@pytest.mark.slow
def test_activations_are_those_of_the_detector(detector, source):
  variables, image = jax.jit(detector.init)(jax.random.key(0)), source[0].image
  inside = pyramid.build_activations(detector)(variables, image)
  assert [f.shape for f in inside.features] == [(8, 8), (4, 4), (2, 2)]
  expected = jax.device_get(jax.jit(detector.detect)(variables, image[None]))
  np.testing.assert_allclose(inside.detections.scores, expected.scores[0][expected.valid[0]],
                             rtol=1e-4)
  # The best detection of a level comes from a cell at least as good.
  for k, cells in enumerate(inside.scores):
    here = inside.detections.scores[inside.detections.level == k]
    if len(here):
      assert cells.max() >= here.max() * (1 - 1e-4)
  assert max(s.max() for s in inside.scores) == pytest.approx(inside.detections.scores.max(),
                                                              rel=1e-4)


def test_detections_are_drawn_on_their_level():
  features = tuple(np.ones((n, n), np.float32) for n in (4, 2))
  found = Detections(np.float32([[0.2, 0.2, 0.8, 0.8]] * 2), np.float32([0.9, 0.2]),
                     np.int32([1, 3]), np.int32([1, 0]), np.ones(2, bool))
  drawn = pyramid.draw_levels(np.zeros((64, 64, 3), np.uint8),
                              pyramid.Activations(features, features, found), NAMES)
  lower = drawn[2 * drawn.shape[0] // 3:]
  left, right = np.split(lower[:, :lower.shape[1] // 2 * 2], 2, axis=1)
  assert has(right, 1) and not has(left, 1) and not has(drawn, 3)  # That is below the threshold.


@pytest.mark.slow
def test_matched_anchors_have_the_colour_of_their_class(detector, source):
  example = source[1]
  drawn = anchors.draw_assigned_anchors(detector, example.image, example.boxes, example.labels,
                                        example.crowd)
  # Antialiased lines on a picture can only be compared with the picture without them.
  bare = anchors.draw_assigned_anchors(detector, example.image, example.boxes[:0],
                                       example.labels[:0], example.crowd[:0])
  assert {k for k in range(5) if has(drawn, k) and not has(bare, k)} == set(example.labels.tolist())


def gallery_of(source, rows):
  return Gallery(source, source.ground_truth(), rows, source.categories)


def rows_of(truth, image_id, score):
  return [{'image_id': image_id, 'category_id': a['category_id'], 'bbox': a['bbox'],
           'score': score, 'level': 0} for a in truth['annotations'] if a['image_id'] == image_id]


def test_best_and_worst_by_quality(source):
  truth = source.ground_truth()
  ids = [image['id'] for image in truth['images']]
  rows = [row for i, score in zip(ids, (0.9, 0.5, 0.31, 0.2, 0.7, 1.0), strict=True)
          for row in rows_of(truth, i, score)]
  shown = gallery_of(source, rows)
  expected = [2 * s / (s + 1) for s in (0.9, 0.5, 0.31, 0, 0.7, 1.0)]
  np.testing.assert_allclose(shown.quality, expected)
  order = lambda pictures: [int(p.caption.partition('.')[0]) for p in pictures]
  assert order(shown.best(3)) == [5, 0, 4] and order(shown.worst(3)) == [3, 2, 1]
  assert [p.caption.endswith(' 0 found') for p in shown.worst(2)] == [True, False]
  with pytest.raises(InputError, match='choose one from 0 to 5'):
    shown.compare(6)


def test_an_image_that_cannot_be_read_is_left_out(source):
  class Damaged(type(source)):
    def __getitem__(self, index):
      if index == 0:
        raise InputError('image 0 is cut short')
      return super().__getitem__(index)

  damaged = Damaged(num_images=6, image_size=64)
  shown = gallery_of(damaged, [])
  assert len(shown.worst(10)) == 5 and 0 < len(shown.mistakes('missed', 100)) < 24


def test_crops_contain_their_boxes():
  rng = np.random.default_rng(0)
  for _ in range(200):
    shape = tuple(rng.integers(10, 500, 2).tolist())
    corners = np.sort(rng.random((2, 2)), axis=0).reshape(1, 4)
    window = gallery._window(corners, shape)
    within = gallery._within(corners, window, shape)
    assert (window[2:] > window[:2]).all() and within.min() > -1e-6 and within.max() < 1 + 1e-6


def test_captions_break_into_lines():
  image = np.zeros((20, 100, 3), np.uint8)
  short, long = (gallery.draw_caption(CaptionedImage(image, text))
                 for text in ('one', 'some words ' * 9))
  assert short.shape[1] == long.shape[1] == 100 and long.shape[0] > short.shape[0] > 20
  assert (short[20:] < 100).any()


@pytest.mark.parametrize('lines', [[], [{'step': 3, 'train/loss': None}], [{'step': 3}],
                                   [{'step': 3, 'train/loss': 2.0, 'eval/AP': None}]])
def test_curves_of_a_run_that_has_just_begun(lines):
  assert curves.training(lines).shape[2] == 3


def test_classes_without_ground_truth_have_no_curve():
  table = np.full((10, 101, 5, 4), NO_GROUND_TRUTH)
  for draw in (curves.precision_recall, curves.average_precision):
    nothing = draw(table, NAMES)
    known = table.copy()
    known[:, :, 2, 0] = 0.5
    drawn = draw(known, NAMES)
    assert has(drawn, 2) and not has(drawn, 1) and not has(nothing, 2)
