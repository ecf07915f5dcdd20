"""Random crops, compared with windows that the TF Object Detection API drew."""

import numpy as np
import pytest

from ppn_jax.data.transforms.random_crop import SsdRandomCrop, crop, draw_window
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError

COVERAGES = SsdRandomCrop().coverages
NO_BOXES = np.zeros((0, 4), np.float32)


@pytest.fixture(scope='module')
def golden(shared):
  with np.load(shared / 'golden' / 'ssd_random_crop_samples.npz') as arrays:
    return dict(arrays)


def example_of(boxes, size=(480, 640)):
  n = len(boxes)
  return Example(np.zeros((*size, 3), np.uint8), np.asarray(boxes, np.float32),
                 np.arange(n, dtype=np.int32), np.zeros(n, bool), 1, size)


def assert_same_distribution(a, b):
  """Applies a two-sample Kolmogorov-Smirnov test with about one false alarm in 10,000."""
  a, b = np.sort(a), np.sort(b)
  both = np.concatenate([a, b])
  distance = np.abs(np.searchsorted(a, both, 'right') / len(a)
                    - np.searchsorted(b, both, 'right') / len(b)).max()
  assert distance < 2.23 * np.sqrt(1 / len(a) + 1 / len(b)), distance


def statistics(windows):
  y, x, height, width = np.asarray(windows, float).T
  return {'y': y, 'x': x, 'height': height, 'width': width, 'area': height * width,
          'aspect': width / height, 'bottom': y + height, 'right': x + width}


def assert_same_windows(ours, theirs):
  ours, theirs = statistics(ours), statistics(theirs)
  for name in ours:
    assert_same_distribution(ours[name], theirs[name])


@pytest.mark.parametrize('case', range(7))
def test_windows_are_distributed_as_the_reference_s(golden, case):
  size, rng = tuple(golden['image_hw'].tolist()), np.random.default_rng(case)
  ours = [draw_window(rng, size, golden['boxes'], COVERAGES[case]) for _ in range(3000)]
  assert_same_windows(ours, golden['window_y_x_h_w_boxes'][case])


@pytest.mark.parametrize('case', [0, 3])
def test_windows_without_boxes(golden, case):
  size, rng = tuple(golden['image_hw'].tolist()), np.random.default_rng(10 + case)
  ours = [draw_window(rng, size, NO_BOXES, COVERAGES[case]) for _ in range(3000)]
  assert_same_windows(ours, golden['window_y_x_h_w_nobox'][case])


def test_the_statistics_would_notice_a_uniform_area(golden):
  """Checks that the test above detects an area that is drawn uniformly."""
  rng = np.random.default_rng(0)
  theirs = statistics(golden['window_y_x_h_w_nobox'][0])['area']
  with pytest.raises(AssertionError):
    assert_same_distribution(rng.uniform(0.1, theirs.max() / 480 / 640, 3000) * 480 * 640, theirs)


@pytest.mark.parametrize('case', range(7))
def test_kept_boxes_equal_the_reference_s(golden, case):
  example = example_of(golden['boxes'])
  windows = golden['window_y_x_h_w_boxes'][case].tolist()
  outs = [crop(example, tuple(w), COVERAGES[case]) for w in windows]
  np.testing.assert_array_equal([len(o.boxes) for o in outs], golden['num_kept_boxes'][case])
  for out, boxes, labels in zip(outs, golden['kept_boxes_first50'][case],
                                golden['kept_labels_first50'][case], strict=False):
    kept = labels >= 0
    np.testing.assert_array_equal(out.labels, labels[kept])
    np.testing.assert_allclose(out.boxes, boxes[kept], atol=2e-7)


def test_the_whole_op(golden):
  example, op, rng = example_of(golden['boxes']), SsdRandomCrop(), np.random.default_rng(0)
  outs = [op(example, rng) for _ in range(5000)]
  shapes = np.array([o.image.shape[:2] for o in outs])
  theirs = golden['full_op_y_x_h_w_kept']
  for ours, golds in ((shapes[:, 0], theirs[:, 2]), (shapes[:, 1], theirs[:, 3]),
                      ([len(o.boxes) for o in outs], theirs[:, 4])):
    assert_same_distribution(ours, golds)
  whole = [(shapes == example.image.shape[:2]).all(axis=1).mean(),
           (theirs[:, 2:4] == example.image.shape[:2]).all(axis=1).mean()]
  np.testing.assert_allclose(whole, 0.15, atol=0.02)


def test_the_window_covers_enough_of_some_box():
  rng = np.random.default_rng(0)
  boxes = rng.uniform(0, 1, (3, 2, 2))
  boxes = np.concatenate([boxes.min(axis=1), boxes.max(axis=1)], axis=-1).astype(np.float32)
  for coverage in (0.3, 0.9, 1.0):
    for _ in range(200):
      y, x, height, width = draw_window(rng, (200, 300), boxes, coverage)
      assert 0 <= y <= y + height <= 200 and 0 <= x <= x + width <= 300
      pixels = np.trunc(boxes * [200, 300, 200, 300])
      inside = (np.minimum(pixels[:, 2:], [y + height, x + width])
                - np.maximum(pixels[:, :2], [y, x])).clip(0).prod(axis=1)
      assert (inside >= coverage * (pixels[:, 2:] - pixels[:, :2]).prod(axis=1)).any()


def test_whole_image_when_no_window_will_do():
  thin = np.array([[0.5, 0.5, 0.5001, 0.5001]], np.float32)  # Below one pixel, so it is ignored.
  assert draw_window(np.random.default_rng(0), (100, 100), thin, 0.0) == (0, 0, 100, 100)
  wide = np.array([[0, 0, 1, 1]], np.float32)
  assert draw_window(np.random.default_rng(0), (100, 400), wide, 1.0) == (0, 0, 100, 400)


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (3, 2), (2000, 7)])
def test_images_of_extreme_shape(size):
  op, rng = SsdRandomCrop(keep_probability=0.0), np.random.default_rng(0)
  for boxes in (NO_BOXES, [[0, 0, 1, 1]]):
    for _ in range(30):
      out = op(example_of(boxes, size), rng)
      assert min(out.image.shape) > 0
      assert ((out.boxes >= 0) & (out.boxes <= 1)).all()


def test_all_boxes_may_go():
  out = crop(example_of([[0, 0, 0.1, 0.1]]), (240, 320, 100, 100), 0.0)
  assert out.boxes.shape == (0, 4) and out.labels.shape == (0,) and out.crowd.shape == (0,)


def test_touching_is_not_inside():
  assert not len(crop(example_of([[0, 0, 0.5, 0.5]]), (240, 0, 240, 320), 0.0).boxes)


def test_coverages_come_from_a_list():
  assert SsdRandomCrop(coverages=[0.5]).coverages == [0.5]
  with pytest.raises(InputError, match='coverages'):
    SsdRandomCrop(coverages=0.5)
