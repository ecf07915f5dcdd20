"""Mixup of resident images: the host's distribution, and batches against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.data.source import build_source
from ppn_jax.detection.structures import GroundTruth
from ppn_jax.device_data import dataset
from ppn_jax.device_data.transforms import Stored, build_augmentation
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError

SIDE, DRAWS = 8, 3000


def stored(level, boxes):
  """Makes an image of one level with boxes of this label, padded to 7; two fit into a half."""
  count = np.arange(7) < len(boxes)
  padded = np.zeros((7, 4), np.float32)
  padded[:len(boxes)] = boxes
  return Stored(np.full((3, SIDE, SIDE), level, np.uint8), np.int32([SIDE, SIDE]),
                GroundTruth(padded, np.where(count, level, 0).astype('i'), count & (level == 50),
                            count))


ONE = stored(250, [(.1, .2, .3, .4), (.5, .5, .6, .9)])
TWO = stored(50, [(0, 0, .5, .5)])


def mixed(blocks, draws=DRAWS):
  augmentation = build_augmentation(blocks, image_size=SIDE, resize='area')
  images, truth = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0, None)))(
      *ONE, jax.random.split(jax.random.key(0), draws), TWO)
  return np.asarray(images), jax.tree.map(np.asarray, truth)


def test_blends_have_the_shares_and_boxes_of_the_host():
  block = {'name': 'mixup', 'size': SIDE, 'probability': 0.5, 'alpha': 1.5, 'min_share': 0.2}
  images, truth = mixed([block])
  assert (images == images[:, :1, :1, :1]).all()
  level = images[:, 0, 0, 0]
  share = (level.astype(float) - 50) / 200
  alone = level == 250  # Hardly any blend has a share of 0.997 or more.
  assert abs(alone.mean() - 0.5) < 0.04
  shares = share[~alone]
  assert abs(shares.mean() - 0.5) < 0.03 and shares.var() == pytest.approx(1 / 16, rel=0.12)
  for row, s in enumerate(share):
    labels = truth.labels[row][truth.valid[row]].tolist()
    if alone[row]:
      assert labels == [250, 250]
    elif min(abs(s - 0.2), abs(s - 0.8)) > 0.01:
      assert labels == [250, 250] * bool(s > 0.2) + [50] * bool(s < 0.8)
    kept = truth.boxes[row][truth.valid[row]]
    expected = {250: ONE.ground_truth.boxes[:2].tolist(), 50: TWO.ground_truth.boxes[:1].tolist()}
    assert kept.tolist() == [box for label in dict.fromkeys(labels) for box in expected[label]]
  np.testing.assert_array_equal(truth.crowd, truth.labels == 50)
  assert not truth.boxes[~truth.valid].any() and not truth.labels[~truth.valid].any()
  assert truth.valid.shape == (DRAWS, 7)


@pytest.mark.slow
def test_both_images_take_the_ops_before_and_the_blend_those_after():
  flip = {'name': 'horizontal_flip', 'probability': 0.5}
  mixup = {'name': 'mixup', 'size': SIDE, 'probability': 1.0, 'min_share': 0}
  bright = {'name': 'photometric_distortion', 'contrast': (1, 1), 'saturation': (1, 1), 'hue': 0}
  _, truth = mixed([flip, mixup], 400)
  assert truth.valid.sum(axis=1).tolist() == [3] * 400
  flipped = [truth.boxes[truth.labels == label].reshape(400, -1, 4)[:, 0, 1] > limit
             for label, limit in ((250, 0.4), (50, 0.2))]
  table = np.array([[np.mean((flipped[0] == a) & (flipped[1] == b)) for a in (0, 1)]
                    for b in (0, 1)])
  np.testing.assert_allclose(table, 0.25, atol=0.08)  # Each by itself.
  plain, changed = (mixed([flip, mixup, *more], 400)[0] for more in ([], [bright]))
  shift = changed.astype(int)[:, 0, 0, 0] - plain[:, 0, 0, 0]
  assert 0.3 < (shift == 0).mean() < 0.7 and shift.max() > 0 > shift.min()
  assert np.abs(shift).max() <= 33


@pytest.mark.slow
def test_batches_blend_what_the_loop_blends():
  """Each image of a batch is a blend of two stored ones, and each row has its own partner."""
  source = build_source({'name': 'synthetic_shapes', 'num_images': 6, 'image_size': 32})
  mesh = sharding.data_mesh()
  augmentation = build_augmentation([{'name': 'mixup', 'size': 32, 'probability': 1.0,
                                      'min_share': 0}], image_size=32, resize='area')
  spec = dataset.ResidentSpec(6, 8, 16, 32, augmentation, 3)
  data = dataset.load(source, spec, mesh)
  draw = jax.jit(lambda data, step: dataset.draw_batch(spec, mesh, data, step))
  examples, partners = [source[i] for i in range(6)], []
  pixels = [e.image.astype(float) for e in examples]
  for step in range(3):
    images, truth = jax.device_get(draw(data, jnp.int32(step)))
    for row, image in enumerate(images):
      found = {tuple(box) for box in truth.boxes[row][truth.valid[row]].tolist()}
      # One with itself may also be explained by a share of 1, with any partner.
      pairs = [(a, b) for a in range(6) for b in range(6)
               if np.abs(fit(image, pixels[a], pixels[b])).max() <= 0.6
               and found == {tuple(box) for i in (a, b) for box in examples[i].boxes.tolist()}]
      assert pairs
      partners.append(pairs[0])
  assert len(set(partners)) > 8


def fit(image, a, b):
  """Returns what the best blend of two images leaves of a third."""
  direction = (a - b).ravel()
  share = (image - b).ravel() @ direction / max(direction @ direction, 1)
  return image - b - np.clip(share, 0, 1) * (a - b)


@pytest.mark.parametrize('blocks, message', [
    ([{'name': 'mixup', 'size': 9}], 'mixup.size is 9, but .* must be model.image_size=8'),
    ([{'name': 'mixup', 'size': 8}, {'name': 'horizontal_flip'}],
     "'horizontal_flip' follows 'mixup', which is not available on the device; put it before"),
    ([{'name': 'mixup', 'size': 8}] * 2, "'mixup' follows 'mixup'")])
def test_what_the_device_cannot_do(blocks, message):
  with pytest.raises(InputError, match=message):
    build_augmentation(blocks, image_size=SIDE, resize='area')
