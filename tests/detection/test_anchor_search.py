"""Search for anchors: each change matches the boxes that it claims to."""

import numpy as np
import pytest

from ppn_jax.detection import boxes as box_ops
from ppn_jax.detection.anchor_search import best_iou, search
from ppn_jax.detection.anchors import ssd_anchors

GRIDS = {size: [(n, n) for n in (cells, (cells + 1) // 2, (cells + 3) // 4)]
         for size, cells in ((64, 8), (96, 12), (128, 16))}
OPTIONS = {'min_scale': 0.3, 'max_scale': 0.9, 'aspect_ratios': (1.0, 2.0, 0.5),
           'reduce_lowest_level': False}


def boxes_of(height, width, count=60, seed=0):
  corner = np.random.default_rng(seed).uniform(0, 1 - max(height, width), (count, 2))
  return np.concatenate([corner, corner + np.array([height, width])], axis=1).astype(np.float32)


def applied(changes, options=OPTIONS, image_size=64):
  """Returns the anchors of a config with these changes."""
  options = dict(options)
  for change in changes:
    key = change.key.rpartition('.')[2]
    if key == 'image_size':
      image_size = change.value
    else:
      options[key] = change.value
  return ssd_anchors(GRIDS[image_size], **options).boxes


def found_changes(boxes, labels=None, **options):
  labels = np.zeros(len(boxes), np.int32) if labels is None else labels
  return search(boxes, labels, OPTIONS | options, GRIDS, 64, 0.5)


def test_best_iou_is_that_of_all_pairs():
  boxes, anchors = boxes_of(0.2, 0.3, 50), ssd_anchors(GRIDS[128]).boxes
  np.testing.assert_array_equal(best_iou(boxes, anchors), box_ops.iou(boxes, anchors).max(axis=1))
  assert best_iou(boxes[:0], anchors).shape == (0,)


@pytest.mark.parametrize('height, width, key', [
    (0.12, 0.12, 'model.anchors.min_scale'), (0.12, 0.6, 'model.anchors.aspect_ratios')])
def test_the_most_useful_key_comes_first(height, width, key):
  boxes = boxes_of(height, width)
  changes = found_changes(boxes)
  assert changes[0].key == key and changes[0].cost == 1
  before = (best_iou(boxes, applied([])) < 0.5).mean()
  for number in range(1, len(changes) + 1):
    matched = best_iou(boxes, applied(changes[:number])) >= 0.5
    np.testing.assert_array_equal(changes[number - 1].matched, matched)
    assert (~matched).mean() < before
    before = (~matched).mean()


def test_ratios_are_those_of_the_boxes():
  ratios = next(c.value for c in found_changes(boxes_of(0.12, 0.6)) if c.key.endswith('ratios'))
  assert ratios[:3] == (1.0, 2.0, 0.5) and all(1.2 <= r <= 6 for r in ratios[3:])


def test_larger_images_where_other_anchors_do_not_help():
  """Anchors have the right size, but their centres are as far apart as the boxes are large."""
  changes = found_changes(boxes_of(0.12, 0.12, 200), min_scale=0.12, max_scale=0.3)
  assert (changes[0].key, changes[0].value, changes[0].cost) == ('model.image_size', 128, 4.0)


def test_a_rare_class_counts():
  large, small = boxes_of(0.3, 0.3, 2000), boxes_of(0.1, 0.1, 20)
  changes = found_changes(np.concatenate([large, small]),
                    np.repeat(np.int32([0, 1]), [len(large), len(small)]))
  assert changes and changes[0].key == 'model.anchors.min_scale'
  assert changes[-1].matched[len(large):].mean() > 0.7


def test_no_change_where_none_helps():
  assert found_changes(boxes_of(0.3, 0.3)) == []
