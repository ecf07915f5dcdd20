"""Windows of tiles, and what is merged from them."""

import numpy as np
import pytest

from ppn_jax.detection.structures import Detections
from ppn_jax.detection.tiles import merge_tiles, tile_windows
from ppn_jax.errors import InputError


@pytest.mark.parametrize('size, tiles, overlap', [
    ((300, 400), 2, 0.2), ((400, 300), 5, 0.5), ((37, 1001), 7, 0.1), ((100, 100), 3, 0.0),
    ((1, 500), 4, 0.2), ((2, 3), 32, 0.5)])
def test_windows_cover_the_picture(size, tiles, overlap):
  windows = tile_windows(size, tiles, overlap)
  assert windows[-1].tolist() == [0, 0, *size]
  seen = np.zeros(size, int)
  for top, left, bottom, right in windows[:-1]:
    assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
    seen[top:bottom, left:right] += 1
  assert seen.min() >= 1
  longer = np.argmax(size)
  assert len(np.unique(windows[:-1, longer])) == min(tiles, max(size) - 1)
  if overlap == 0:
    assert len(windows) == 10 and (seen == 1).mean() > .9  # Sides that 3 does not divide overlap.


def test_one_tile_is_the_picture():
  assert tile_windows((30, 40), 1).tolist() == [[0, 0, 30, 40]]


@pytest.mark.parametrize('options', [(0, .2), (33, .2), (2.0, .2), (True, .2), (2, .6), (2, -1)])
def test_options_out_of_range(options):
  with pytest.raises(InputError, match=r'tiles=|overlap='):
    tile_windows((30, 40), *options)


def detections(*rows):
  """Makes detections of (ymin, xmin, ymax, xmax, score, label)."""
  rows = np.array(rows, np.float32).reshape(-1, 6)
  return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int32),
                    np.zeros(len(rows), np.int32), np.ones(len(rows), bool))


def test_merging():
  windows = tile_windows((100, 200), 2, 0.2)  # Two tiles, 112 wide.
  (_, a_left, _, a_right), (_, b_left, _, _), _ = windows.tolist()
  width = a_right - a_left
  to_tile = lambda left, box: ((box[0] / 100, (box[1] - left) / width, box[2] / 100,
                                (box[3] - left) / width))
  both = (20, 92, 40, 108)  # Inside the overlap.
  cut = (50, 60, 90, 180)  # Each tile shows a part of it.
  cut_in_a, cut_in_b = (50, 60, 90, a_right), (50, b_left, 90, 180)
  at_border = (0, 150, 30, 200)  # It ends at the edge of the picture.
  found = [
      detections((*to_tile(a_left, both), .8, 1), (*to_tile(a_left, cut_in_a), .95, 0)),
      detections((*to_tile(b_left, both), .9, 1), (*to_tile(b_left, cut_in_b), .95, 0),
                 (*to_tile(b_left, at_border), .7, 0), (*to_tile(b_left, both), .6, 0)),
      detections((*np.array(cut) / (100, 200, 100, 200), .5, 0))]
  merged = merge_tiles(found, windows, (100, 200), 3)
  np.testing.assert_allclose(merged.scores, [.9, .7, .6, .5], atol=1e-6)
  assert merged.labels.tolist() == [1, 0, 0, 0]
  np.testing.assert_allclose(merged.boxes * (100, 200, 100, 200), [both, at_border, both, cut],
                             atol=1e-3)
  nothing = merge_tiles([detections()] * 3, windows, (100, 200), 3)
  assert nothing.boxes.shape == (0, 4)


def test_merging_equals_plain_suppression():
  rng = np.random.default_rng(0)
  corners = rng.uniform(0, .8, (120, 2))
  rows = np.concatenate([corners, corners + rng.uniform(.05, .2, (120, 2)),
                         rng.permutation(120)[:, None] / 121 + .001,
                         rng.integers(0, 3, (120, 1))], axis=1)
  window = np.array([[0, 0, 50, 50]])
  merged = merge_tiles([detections(*rows)], window, (50, 50), 3)
  kept = []
  for row in sorted(rows.tolist(), key=lambda r: -r[4]):
    if all(k[5] != row[5] or iou(k, row) <= .5 for k in kept):
      kept.append(row)
  np.testing.assert_allclose(merged.scores, [k[4] for k in kept], rtol=1e-6)
  np.testing.assert_allclose(merged.boxes, [k[:4] for k in kept], rtol=1e-5)


def iou(a, b):
  height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
  width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
  area = lambda r: (r[2] - r[0]) * (r[3] - r[1])
  return height * width / (area(a) + area(b) - height * width)
