"""Mixup and copy-paste: pixels and boxes against loops, what is dropped, and bad options."""

import numpy as np
import pytest

from ppn_jax.data.loader import required_boxes
from ppn_jax.data.reading import read_example
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.data.transforms.mixing import CopyPaste, Mixup
from ppn_jax.detection.structures import Category, Example
from ppn_jax.device_data.transforms import build_augmentation
from ppn_jax.errors import InputError


def plain(level, boxes=((0.25, 0.25, 0.75, 0.75),), size=(32, 48), crowd=()):
  """Makes an image of one grey level, which is also the label of its boxes."""
  n = len(boxes)
  return Example(np.full((*size, 3), level, np.uint8), np.float32(boxes).reshape(-1, 4),
                 np.full(n, level, np.int32), np.isin(np.arange(n), crowd), level, size)


def objects(size=(60, 80)):
  """Makes a black image of four boxes whose pixels, and only those, have the level of their label.

  None overlaps another.
  """
  example = plain(0, [(.1, .05, .3, .25), (.1, .5, .5, .9), (.6, .1, .9, .3), (.7, .6, .8, .95)],
                  size)
  example = example._replace(labels=np.int32([50, 100, 150, 200]), image_id=7)
  for box, label in zip(example.boxes * np.tile(size, 2), example.labels, strict=True):
    top, left, bottom, right = np.rint(box).astype(int)
    example.image[top:bottom, left:right] = label
  return example


# Mixup.


@pytest.mark.parametrize('seed', range(5))
def test_mixup_blends_the_resized_images(seed):
  op = Mixup(40, probability=1.0, min_share=0)
  out = op(plain(200), np.random.default_rng(seed), lambda: plain(40, size=(20, 99)))
  rng = np.random.default_rng(seed)
  rng.random()
  share = rng.beta(1.5, 1.5)
  assert out.image.shape == (40, 40, 3) and out.image.dtype == np.uint8
  np.testing.assert_allclose(out.image, 200 * share + 40 * (1 - share), atol=0.51)
  np.testing.assert_allclose(out.boxes, [[.25, .25, .75, .75]] * 2)
  assert out.labels.tolist() == [200, 40] and (out.image_id, out.size) == (200, (32, 48))


def test_shares_have_the_beta_distribution():
  for alpha in (0.5, 1.5, 32.0):
    op, rng = Mixup(1, probability=1.0, alpha=alpha), np.random.default_rng(0)
    shares = np.array([op(plain(250), rng, lambda: plain(0)).image[0, 0, 0] / 250
                       for _ in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.12)


def test_boxes_of_an_image_that_can_hardly_be_seen_are_dropped():
  op, rng, both = Mixup(4, probability=1.0, alpha=1.0, min_share=0.2), np.random.default_rng(0), 0
  for _ in range(300):
    out = op(plain(250), rng, lambda: plain(0, crowd=(0,)))
    share = out.image[0, 0, 0] / 250
    if abs(share - 0.2) > 0.01 and abs(share - 0.8) > 0.01:
      assert out.labels.tolist() == [k for k, s in ((250, share), (0, 1 - share)) if s >= 0.2]
    np.testing.assert_array_equal(out.crowd, out.labels == 0)
    both += len(out.labels) == 2
  assert 140 < both < 220  # 60% of a uniform share.


# Copy-paste.


def paste(seed, base=None, other=None, **options):
  op = CopyPaste(100, **{'probability': 1.0, 'max_objects': 4, **options})
  return op(base or plain(10, size=(50, 70)), np.random.default_rng(seed), lambda: other)


@pytest.mark.parametrize('seed', range(30))
def test_pasted_boxes_are_where_their_pixels_are(seed):
  out = paste(seed, other=objects(), min_visible=1.0, scale=(0.7, 1.3))
  assert out.image.shape == (100, 100, 3) and (out.image_id, out.size) == (10, (50, 70))
  assert not out.crowd.any() and len(set(out.labels.tolist())) == len(out.labels)
  for box, label in zip(out.boxes * 100, out.labels, strict=True):
    if label != 10:  # Wholly visible.
      rows, columns = np.nonzero(np.abs(out.image[..., 0].astype(int) - label) < 20)
      found = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
      np.testing.assert_allclose(found, box, atol=1.6)


def test_sizes_places_and_numbers():
  sizes, places, counts = [], [], []
  for seed in range(400):
    out = paste(seed, plain(10, []), objects(), min_visible=0.0, scale=(0.5, 1.0))
    counts.append(len(out.boxes))
    for box, label in zip(out.boxes, out.labels, strict=True):
      if label == 100:  # A square of 0.4.
        sizes.append(box[2:] - box[:2])
        places.append(box[:2] / (1 - sizes[-1]))
  assert set(counts) <= {1, 2, 3, 4} and 2.2 < np.mean(counts) < 2.7
  sizes, places = np.array(sizes), np.array(places)
  assert 0.19 < sizes.min() < 0.23 and 0.37 < sizes.max() < 0.42
  np.testing.assert_allclose(sizes[:, 0], sizes[:, 1], atol=0.011)
  assert places.min() >= -1e-6 and places.max() <= 1 + 1e-6
  np.testing.assert_allclose(places.mean(axis=0), 0.5, atol=0.07)
  assert (np.quantile(places, 0.1, axis=0) < 0.15).all()


def visible_by_hand(image, box, level):
  """Returns the share of a box's pixels of the image of 100 px that have a level."""
  top, left, bottom, right = np.rint(box * 100).astype(int)
  return (image[top:bottom, left:right, 0] == level).mean()


@pytest.mark.parametrize('seed', range(40))
def test_hidden_boxes_are_dropped(seed):
  base = plain(10, [(0, 0, .5, .5), (0, .5, .5, 1), (.5, 0, 1, .5), (.5, .5, 1, 1), (0, 0, 1, 1),
                    (.4, .4, .45, .45), (.1, .8, .2, .9)], (100, 100), crowd=(3, 6))
  out = paste(seed, base, objects(), min_visible=0.7, scale=(1.0, 3.0), min_side=0)
  kept = {tuple(box) for box, label in zip(out.boxes.tolist(), out.labels, strict=True)
          if label == 10}
  for box, crowd in zip(base.boxes, base.crowd, strict=True):
    share = visible_by_hand(out.image, box, 10)
    if crowd or abs(share - 0.7) > 0.02:
      assert (tuple(box.tolist()) in kept) == (share > 0 if crowd else share >= 0.7)
  assert len(kept) == (out.labels == 10).sum()


def test_what_is_pasted_later_hides_what_was_pasted_before():
  dropped = 0
  for seed in range(200):
    out = paste(seed, plain(10, []), objects(), min_visible=0.8, scale=(1.5, 2.0))
    for box, label in zip(out.boxes, out.labels, strict=True):
      top, left, bottom, right = np.rint(box * 100).astype(int)
      inside = out.image[top:bottom, left:right, 0].astype(int)
      assert (np.abs(inside - label) < 10).mean() > 0.7
    levels = set(np.unique(out.image).tolist()) & {50, 100, 150, 200}
    dropped += len(levels - set(out.labels.tolist()))
  assert dropped > 20


def test_neighbours_inside_the_rectangle_come_along():
  # A small box inside a large one; a crowd is never chosen but comes along.
  nested = plain(90, [(0, 0, 1, .5), (.4, .1, .6, .3), (0, .35, 1, .5)], crowd=(2,))
  seen = set()
  for seed in range(60):
    out = paste(seed, plain(10, []), nested, max_objects=2, scale=(0.5, 0.5), min_side=0,
                min_visible=0.5)
    assert 1 <= len(out.boxes) <= 3
    seen.add((len(out.boxes), int(out.crowd.sum())))
  assert (3, 1) in seen and (1, 0) in seen
  # Never more than the image has, so twice the boxes of one image suffice.
  for seed in range(60):
    assert len(paste(seed, nested, nested, min_visible=0, scale=(.1, .5)).boxes) <= 6


def test_nothing_to_paste():
  for other in (plain(50, []), plain(50, crowd=(0,))):
    out = paste(0, plain(10), other)
    assert (out.image == 10).all() and out.labels.tolist() == [10]


# Both.


@pytest.mark.parametrize('op', [Mixup(16, probability=0.3), CopyPaste(16, probability=0.3)])
def test_the_other_image_is_not_read_in_vain(op):
  rng, read = np.random.default_rng(0), []
  def draw():
    read.append(1)
    return plain(20)
  made = sum(op(plain(10), rng, draw).image.shape[0] == 16 for _ in range(500))
  assert len(read) == made and abs(made - 150) < 45


@pytest.mark.parametrize('name', ['mixup', 'copy_paste'])
@pytest.mark.parametrize('size', [(1, 1), (1, 40), (300, 2)])
def test_extreme_shapes_and_images_without_boxes(name, size):
  op, = build_transforms([{'name': name, 'size': 9, 'probability': 1.0}])
  for seed in range(10):
    out = op(plain(3, size=size), np.random.default_rng(seed), lambda: plain(5, size=size))
    assert ((out.boxes >= 0) & (out.boxes <= 1)).all() and out.image.shape == (9, 9, 3)
    empty = op(plain(3, []), np.random.default_rng(seed), lambda: plain(5, []))
    assert empty.boxes.shape == (0, 4) and empty.boxes.dtype == np.float32
    assert (empty.labels.dtype, empty.crowd.dtype) == (np.int32, bool)


class Levels:
  """Source of images of one level, 10 times their number."""
  categories = (Category(1, 'thing'),)
  max_boxes = 1

  def __len__(self):
    return 5

  def __getitem__(self, index):
    return plain(10 * index)


@pytest.mark.parametrize('name', ['mixup', 'copy_paste'])
def test_the_other_image_goes_through_the_earlier_transforms(name):
  ops = build_transforms([{'name': 'expand', 'probability': 1.0, 'ratio': (2, 2)},
                          {'name': name, 'size': 32, 'probability': 1.0}])
  found = [read_example(Levels(), 4, ops, np.random.default_rng(seed)) for seed in range(30)]
  labels = {label for out in found for label in out.labels.tolist()}
  assert labels == {0, 10, 20, 30, 40}
  again = read_example(Levels(), 4, ops, np.random.default_rng(3))
  np.testing.assert_array_equal(again.image, found[3].image)
  np.testing.assert_array_equal(again.boxes, found[3].boxes)
  for out in found:
    assert (out.boxes[:, 2:] - out.boxes[:, :2]).max() <= 0.26  # Half of the width by half.
  assert required_boxes(Levels(), 0, (*ops, *ops, *ops, *ops)) == 16


def test_copy_paste_is_not_available_on_the_device():
  with pytest.raises(InputError, match="'copy_paste' is not available on the device; remove it"):
    build_augmentation([{'name': 'copy_paste', 'size': 32}], image_size=32, resize='area')


@pytest.mark.parametrize('name, options, message', [
    ('mixup', {}, "needs the option 'size'"), ('mixup', {'size': 0}, r'mixup\.size is 0'),
    ('mixup', {'size': 8, 'alpha': 0}, r'alpha is 0, which blends nothing'),
    ('mixup', {'size': 8, 'alpha': -1}, r'mixup\.alpha is -1'),
    ('mixup', {'size': 8, 'min_share': 0.6}, r'min_share is 0\.6'),
    ('mixup', {'size': 8, 'probability': 2}, 'probability is 2'),
    ('mixup', {'size': 8, 'method': 'best'}, "method 'best'"),
    ('copy_paste', {'size': 1}, r'copy_paste\.size is 1'),
    ('copy_paste', {'size': 8, 'max_objects': 0}, 'max_objects is 0'),
    ('copy_paste', {'size': 8, 'scale': (0, 1)}, r'scale is \(0, 1\)'),
    ('copy_paste', {'size': 8, 'min_visible': 1.5}, r'min_visible is 1\.5'),
    ('copy_paste', {'size': 8, 'min_side': 9}, 'is 9'),
    ('copy_paste', {'size': 8, 'reduced_decoding': None}, 'legal: True, False'),
    ('copy_paste', {'size': 8, 'max_object': 2}, "did you mean 'max_objects'")])
def test_wrong_options(name, options, message):
  with pytest.raises(InputError, match=message):
    build_transforms([{'name': name, **options}])
