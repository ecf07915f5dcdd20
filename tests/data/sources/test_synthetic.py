import itertools

import numpy as np
import pytest

from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.detection import boxes as box_ops
from ppn_jax.errors import InputError


def test_an_image_is_a_function_of_seed_split_and_index():
  a, b = SyntheticShapes(20, seed=3), SyntheticShapes(5, seed=3)
  for i in (4, 0):  # In another order, from a data set of another length.
    np.testing.assert_array_equal(a[i].image, b[i].image)
    np.testing.assert_array_equal(a[i].boxes, b[i].boxes)
  pictures = [s[i].image.tobytes() for s in (a, SyntheticShapes(5, seed=4),
                                             SyntheticShapes(5, seed=3, split='eval'))
              for i in range(5)]
  assert len(set(pictures)) == 15


@pytest.mark.parametrize('size', [128, (96, 160)])
def test_examples(size):
  source = SyntheticShapes(60, image_size=size, max_shapes=4, scale=(0.1, 0.6))
  height, width = (size, size) if isinstance(size, int) else size
  numbers, labels, extents = [], [], []
  for i in range(len(source)):
    example = source[i]
    assert example.image.shape == (height, width, 3) and example.image.dtype == np.uint8
    assert example.size == (height, width) and example.image_id == i + 1
    assert example.boxes.dtype == np.float32 and example.labels.dtype == np.int32
    assert ((example.boxes >= 0) & (example.boxes <= 1)).all() and not example.crowd.any()
    pixels = (example.boxes[:, 2:] - example.boxes[:, :2]) * [height, width]
    numbers.append(len(pixels))
    labels += example.labels.tolist()
    extents += (pixels.max(axis=1) / min(height, width)).tolist()
    for a, b in itertools.combinations(example.boxes, 2):
      shared = box_ops.intersection(a[None], b[None])[0, 0]
      assert shared <= 0.151 * min(box_ops.area(a), box_ops.area(b))
  assert set(numbers) == {1, 2, 3, 4} and source.max_boxes == 4
  assert set(labels) == set(range(len(source.categories)))
  assert 0.0999 < min(extents) < 0.15 and 0.4 < max(extents) < 0.6001


def test_boxes_are_where_the_shapes_are():
  """Checks that drawing shapes changes the image inside their boxes, up to the sides."""
  source = SyntheticShapes(40, image_size=128, max_shapes=1, scale=(0.2, 0.6))
  for i in range(len(source)):
    example = source[i]
    box = example.boxes[0] * 128
    pixels = example.image.astype(int)
    outside = np.ones((128, 128), bool)
    ymin, xmin, ymax, xmax = np.rint(box).astype(int)
    outside[max(ymin - 2, 0):ymax + 2, max(xmin - 2, 0):xmax + 2] = False
    # The background has muted colours and no edges, so pixels unlike those nearby are the shape.
    middle = pixels[(ymin + ymax) // 2 - 2:(ymin + ymax) // 2 + 2,
                    (xmin + xmax) // 2 - 2:(xmin + xmax) // 2 + 2].mean(axis=(0, 1))
    around = pixels[outside].mean(axis=0)
    assert np.abs(middle - around).sum() > 25, i


def test_boxes_touch_their_shapes():
  """Checks that, without background and noise, drawn pixels extend exactly to the box."""
  from ppn_jax.data.sources import synthetic
  source = SyntheticShapes(60, max_shapes=1, scale=(0.1, 0.6))
  for i in range(len(source)):
    shape, = source._layout(i)
    canvas = np.zeros((160, 160, 3), np.uint8)
    synthetic._draw(np.random.default_rng(i), canvas, shape)
    rows, columns = np.nonzero(canvas.sum(axis=-1) > 20)
    found = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    np.testing.assert_allclose(found, shape.box, atol=1.6)


def test_ground_truth_says_what_the_examples_say():
  source = SyntheticShapes(12, image_size=(96, 128))
  truth = source.ground_truth()
  assert [i['id'] for i in truth['images']] == list(range(1, 13))
  assert [a['id'] for a in truth['annotations']] == list(range(1, len(truth['annotations']) + 1))
  for i in range(12):
    example = source[i]
    rows = [a for a in truth['annotations'] if a['image_id'] == example.image_id]
    assert [a['category_id'] - 1 for a in rows] == example.labels.tolist()
    bbox = np.array([a['bbox'] for a in rows]) / [128, 96, 128, 96]
    np.testing.assert_allclose(
        np.stack([bbox[:, 1], bbox[:, 0], bbox[:, 1] + bbox[:, 3], bbox[:, 0] + bbox[:, 2]], -1),
        example.boxes, atol=1e-6)
    assert all(0 < a['area'] < a['bbox'][2] * a['bbox'][3] for a in rows)


def test_index_beyond_the_end():
  with pytest.raises(IndexError):
    SyntheticShapes(3)[3]


@pytest.mark.parametrize('options, message', [
    ({'num_images': 0}, 'num_images is 0, legal: an integer, 1 or more'),
    ({'num_images': 2.5}, 'num_images is 2.5'),
    ({'seed': -1}, 'seed is -1'),
    ({'split': 'test'}, "split is 'test', legal: 'train', 'eval'"),
    ({'image_size': 16}, 'image_size'), ({'image_size': 99.5}, 'image_size'),
    ({'scale': 0.5}, 'scale is 0.5'), ({'scale': (0.5, 0.1)}, 'two numbers in order'),
    ({'max_shapes': 0}, 'max_shapes'),
])
def test_wrong_options(options, message):
  with pytest.raises(InputError, match=message):
    SyntheticShapes(**{'num_images': 3, **options})
