"""Mosaics: what is drawn and dropped; test_boxes_follow_pixels has the positions of boxes."""

import numpy as np
import pytest

from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.data.transforms.mosaic import Mosaic
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError


def plain(level, boxes=((0, 0, 1, 1),), size=(30, 50)):
  """Makes an image of one grey level, which is also the label of its boxes."""
  n = len(boxes)
  return Example(np.full((*size, 3), level, np.uint8), np.float32(boxes).reshape(-1, 4),
                 np.full(n, level, np.int32), np.full(n, level % 2 == 1), level, size)


def run(op, seed, others=(20, 30, 41), **options):
  """Makes a mosaic of the images of level 10 and `others`."""
  rest = iter(others)
  return op(plain(10, **options), np.random.default_rng(seed), lambda: plain(next(rest), **options))


def test_four_images_around_a_point():
  op = Mosaic(64, probability=1.0, scale=(1.0, 1.0), min_coverage=0)
  places, first = [], []
  for seed in range(200):
    out = run(op, seed)
    assert out.image.shape == (64, 64, 3) and (out.image_id, out.size) == (10, (30, 50))
    levels = out.image[..., 0]
    corners = [levels[0, 0], levels[0, -1], levels[-1, 0], levels[-1, -1]]
    assert sorted(corners) == [10, 20, 30, 41]
    y, x = (levels[:, 0] == corners[0]).sum(), (levels[0] == corners[0]).sum()
    assert (levels[:y, :x] == corners[0]).all() and (levels[:y, x:] == corners[1]).all()
    assert (levels[y:, :x] == corners[2]).all() and (levels[y:, x:] == corners[3]).all()
    places.append([y, x])
    first.append(corners.index(10))
    wanted = {(0, 0, y, x): corners[0], (0, x, y, 64): corners[1], (y, 0, 64, x): corners[2],
              (y, x, 64, 64): corners[3]}
    got = {tuple(np.rint(box * 64).astype(int).tolist()): label
           for box, label in zip(out.boxes, out.labels, strict=True)}
    assert got == wanted
    np.testing.assert_array_equal(out.crowd, out.labels % 2 == 1)
  assert np.min(places) in (16, 17) and np.max(places) in (47, 48)
  assert set(first) == {0, 1, 2, 3}


def test_what_no_image_covers_is_filled():
  out = run(Mosaic(64, probability=1.0, center=(0.5, 0.5), scale=(0.25, 0.25), fill=(1, 2, 3)), 0)
  levels = out.image[..., 0]
  assert (out.image[:16] == (1, 2, 3)).all() and (out.image[:, 48:] == (1, 2, 3)).all()
  assert sorted(set(levels[16:48, 16:48].ravel().tolist())) == [10, 20, 30, 41]
  np.testing.assert_allclose(np.sort(out.boxes[:, 0]), [0.25, 0.25, 0.5, 0.5])


def test_boxes_that_show_too_little_are_dropped():
  far = ((0, 0, 0.3, 0.3), (0.4, 0.4, 0.6, 0.6))
  full = Mosaic(60, probability=1.0, center=(0.5, 0.5), scale=(1.0, 1.0), min_coverage=0.2,
                min_side=0)
  out = run(full, 0, (20, 30, 40), boxes=far)  # No crowds, which would be kept.
  # Each image shows one of its quarters: of the box in the middle a quarter, of the one at the top
  # left all or nothing.
  assert sorted(out.labels.tolist()) == sorted([10, 20, 30, 40, *out.labels[
      (out.boxes[:, 2] - out.boxes[:, 0]) > 0.25]])
  assert len(out.labels) == 5
  strict = Mosaic(60, probability=1.0, center=(0.5, 0.5), scale=(1.0, 1.0), min_coverage=0.26,
                  min_side=0)
  assert len(run(strict, 0, (20, 30, 40), boxes=far).labels) == 1
  small = Mosaic(60, probability=1.0, center=(0.5, 0.5), scale=(1.0, 1.0), min_side=7)
  assert len(run(small, 0, (20, 30, 40), boxes=far).labels) == 1  # The quarters are 6 pixels wide.


def test_images_without_boxes():
  out = run(Mosaic(32, probability=1.0), 0, boxes=())
  assert out.boxes.shape == (0, 4) and out.labels.shape == out.crowd.shape == (0,)
  assert (out.boxes.dtype, out.labels.dtype, out.crowd.dtype) == (np.float32, np.int32, bool)


def test_others_are_not_read_when_there_is_no_mosaic():
  op, rng, read = Mosaic(16, probability=0.3), np.random.default_rng(0), []
  def draw():
    read.append(1)
    return plain(20)
  made = sum(op(plain(10), rng, draw).image.shape[0] == 16 for _ in range(500))
  assert len(read) == 3 * made and abs(made - 150) < 45


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (300, 2)])
@pytest.mark.parametrize('center', [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_extreme_shapes(size, center):
  for seed in range(10):
    out = run(Mosaic(9, probability=1.0, center=center), seed, size=size)
    assert ((out.boxes >= 0) & (out.boxes <= 1)).all()


@pytest.mark.parametrize('options, message', [
    ({}, "needs the option 'size'"), ({'size': 1}, r'mosaic\.size is 1, legal: an integer, 2'),
    ({'size': 8, 'probability': -1}, r'probability is -1'), ({'size': 8, 'center': 0.5}, 'center'),
    ({'size': 8, 'scale': (0, 1)}, r'scale is \(0, 1\)'), ({'size': 8, 'fill': (1, 2)}, 'fill'),
    ({'size': 8, 'min_coverage': 1.5}, 'min_coverage is 1.5'), ({'size': 8, 'min_side': 9}, 'is 9'),
    ({'size': 8, 'method': 'best'}, "method 'best'"),
    ({'size': 8, 'reduced_decoding': None}, 'legal: True, False'),
    ({'size': 8, 'min_covrage': 0}, "did you mean 'min_coverage'")])
def test_wrong_options(options, message):
  with pytest.raises(InputError, match=message):
    build_transforms([{'name': 'mosaic', **options}])
