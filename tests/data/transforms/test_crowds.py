"""Visible parts of crowds never become background, whatever a transform cuts off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.data.reading import read_example
from ppn_jax.data.transforms.basic import Resize, build_transforms
from ppn_jax.data.transforms.geometry import crop, drop_small
from ppn_jax.detection.anchors import ssd_anchors
from ppn_jax.detection.matching import assign_targets
from ppn_jax.detection.structures import Example, GroundTruth
from ppn_jax.device_data.transforms import build_augmentation

# All blue pixels are the crowd; the rest is black, with a small object in the upper corner.
SIZE = (240, 320)
CROWD = (0.0, 0.4, 1.0, 1.0)
OBJECT = (0.05, 0.05, 0.15, 0.2)
OPS = {
    'crop': [{'name': 'ssd_random_crop', 'keep_probability': 0, 'area': (0.05, 0.3),
              'coverages': (0.9,), 'attempts': 5}],
    'jitter': [{'name': 'large_scale_jitter', 'size': 64, 'scale': (1.5, 3.0), 'min_coverage': 0.8,
                'min_side': 20}],
    'mosaic': [{'name': 'mosaic', 'size': 64, 'probability': 1, 'scale': (1.0, 1.0),
                'min_coverage': 0.9, 'min_side': 20}],
    'mixup': [{'name': 'mixup', 'size': 64, 'probability': 1}],
    'copy_paste': [{'name': 'copy_paste', 'size': 64, 'probability': 1, 'min_visible': 0.9,
                    'scale': (1.0, 2.0), 'min_side': 20}],
    'chain': [{'name': 'expand', 'probability': 1, 'fill': (0, 0, 0), 'ratio': (1, 2)},
              {'name': 'ssd_random_crop', 'keep_probability': 0, 'coverages': (0.9,)},
              {'name': 'large_scale_jitter', 'size': 64, 'fill': (0, 0, 0), 'min_coverage': 0.5},
              {'name': 'horizontal_flip'}]}


class Crowded:
  def __len__(self):
    return 3

  def __getitem__(self, index):
    image = np.zeros((*SIZE, 3), np.uint8)
    image[:, int(CROWD[1] * SIZE[1]):, 2] = 255
    return Example(image, np.float32([CROWD, OBJECT]), np.int32([0, 1]), np.array([True, False]),
                   index, SIZE)


def blue_but_unlabelled(image, boxes):
  """Returns the share of blue pixels that are outside all boxes."""
  outside = image[..., 2] > 127
  corners = np.rint(boxes * np.tile(image.shape[:2], 2)).astype(int)
  for ymin, xmin, ymax, xmax in corners:
    # Two pixels, since the border between two is rounded.
    outside[max(ymin - 2, 0):ymax + 2, max(xmin - 2, 0):xmax + 2] = False
  return outside.mean()


@pytest.mark.parametrize('name', OPS)
def test_all_that_is_seen_of_a_crowd_stays_labelled(name):
  ops, seen = (*build_transforms(OPS[name]), Resize(64)), 0
  for seed in range(60):
    out = read_example(Crowded(), 0, ops, np.random.default_rng(seed))
    assert blue_but_unlabelled(out.image, out.boxes[out.crowd]) == 0, seed
    seen += out.crowd.any()
  assert seen > 20


@pytest.mark.slow
@pytest.mark.parametrize('name', ['crop', 'jitter'])
def test_also_where_the_devices_augment(name):
  example = Crowded()[0]
  truth = GroundTruth(example.boxes, example.labels, example.crowd, np.ones(2, bool))
  stored = Resize(64)(example).image.transpose(2, 0, 1)
  augmentation = build_augmentation(OPS[name], image_size=64, resize='area')
  images, truth = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
      stored, jnp.int32(SIZE), truth, jax.random.split(jax.random.key(0), 60))
  images, boxes, shown = map(np.asarray, (images, truth.boxes, truth.valid & truth.crowd))
  assert shown.sum() > 20
  for image, of_image, which in zip(images, boxes, shown, strict=True):
    assert blue_but_unlabelled(image, of_image[which]) == 0


def test_what_is_outside_goes_and_objects_keep_their_rule():
  example = Crowded()[0]
  assert not len(crop(example, (100, 0, 100, 100)).boxes)
  assert crop(example, (100, 200, 50, 50), 0.5).labels.tolist() == [0]
  assert crop(example, (0, 0, 20, 200), 0.9).labels.tolist() == [0]
  np.testing.assert_allclose(crop(example, (0, 0, 240, 160), 1.0).boxes[:1], [[0, 0.8, 1, 1]],
                             atol=1e-6)
  assert drop_small(example, 200).labels.tolist() == [0]
  flat = example._replace(boxes=np.float32([[0.2, 0.3, 0.2, 0.8], OBJECT]))
  assert drop_small(flat, 0).labels.tolist() == [1]


def test_a_window_that_is_all_crowd_has_no_background():
  """Checks anchors that are mostly beyond the border too, such as large ones in the corners."""
  out = crop(Crowded()[0], (100, 200, 50, 50), 0.5)
  truth = GroundTruth(*(a[None] for a in (out.boxes, out.labels, out.crowd, np.ones(1, bool))))
  anchors = ssd_anchors([(side, side) for side in (19, 10, 5, 3, 2, 1)])
  targets = assign_targets(anchors, truth)
  assert np.asarray(targets.ignored).all() and not np.asarray(targets.positive).any()
