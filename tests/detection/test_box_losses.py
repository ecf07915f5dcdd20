"""GIoU and CIoU against loops over pairs of boxes in float64, and losses of box codes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection import boxes
from ppn_jax.detection.box_losses import box_loss, check_localization, ciou_loss, giou_loss
from ppn_jax.detection.structures import Anchors
from ppn_jax.errors import InputError


def giou_by_hand(a, b):
  """Computes torchvision's generalized_box_iou_loss of one pair, in floats."""
  (t, e, d, r), (t2, e2, d2, r2) = map(float, a), map(float, b)
  overlap = max(min(d, d2) - max(t, t2), 0) * max(min(r, r2) - max(e, e2), 0)
  union = (d - t) * (r - e) + (d2 - t2) * (r2 - e2) - overlap
  around = (max(d, d2) - min(t, t2)) * (max(r, r2) - min(e, e2))
  return 1 - (overlap / (union + 1e-7) - (around - union) / (around + 1e-7))


def ciou_by_hand(a, b, alpha=None):
  """Computes torchvision's complete_box_iou_loss of one pair; returns (loss, alpha)."""
  (t, e, d, r), (t2, e2, d2, r2) = map(float, a), map(float, b)
  overlap = max(min(d, d2) - max(t, t2), 0) * max(min(r, r2) - max(e, e2), 0)
  union = (d - t) * (r - e) + (d2 - t2) * (r2 - e2) - overlap
  iou = overlap / (union + 1e-7)
  diagonal = (max(d, d2) - min(t, t2))**2 + (max(r, r2) - min(e, e2))**2 + 1e-7
  distance = ((t + d - t2 - d2) / 2)**2 + ((e + r - e2 - r2) / 2)**2
  v = 4 / math.pi**2 * (math.atan((r2 - e2) / (d2 - t2)) - math.atan((r - e) / (d - t)))**2
  alpha = v / (1 - iou + v + 1e-7) if alpha is None else alpha
  return 1 - iou + distance / diagonal + alpha * v, alpha


def random_pairs(seed, count=200):
  rng = np.random.default_rng(seed)
  corners, sides = rng.uniform(0, 2, (2, count, 2)), rng.uniform(0.05, 2, (2, count, 2))
  pairs = np.concatenate([corners, corners + sides], axis=-1)
  pairs[1, :5] = pairs[0, :5]  # Equal ones.
  pairs[1, 5:10] = pairs[0, 5:10] + 10  # Far apart.
  return pairs.astype(np.float32)


@pytest.mark.parametrize('loss, by_hand', [
    (giou_loss, giou_by_hand), (ciou_loss, lambda a, b: ciou_by_hand(a, b)[0])])
def test_values(loss, by_hand):
  a, b = random_pairs(0)
  values = np.asarray(jax.jit(loss)(a, b))
  np.testing.assert_allclose(values, [by_hand(p, q) for p, q in zip(a, b, strict=True)],
                             rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(values[:5], 0, atol=2e-6)
  assert (values[5:10] > 1).all() and np.ptp(values) > 1


def test_known_values():
  unit = jnp.float32([0, 0, 1, 1])
  # IoU 1 / 7 with a box of 2 x 2 around both of 3 x 3: GIoU = 1/7 - 2/9.
  shifted = (jnp.float32([0, 0, 2, 2]), jnp.float32([1, 1, 3, 3]))
  assert giou_loss(*shifted) == pytest.approx(1 - 1 / 7 + 2 / 9, rel=1e-5)
  # The same centre and area, aspect ratios 1 and 4: IoU 1 / 3.
  wide = jnp.float32([0.25, -0.5, 0.75, 1.5])
  v = 4 / math.pi**2 * (math.atan(4) - math.atan(1))**2
  assert ciou_loss(wide, unit) == pytest.approx(2 / 3 + v * v / (2 / 3 + v), rel=1e-5)
  assert giou_loss(unit, unit + 1e6) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize('name', ['giou', 'ciou'])
def test_gradients_are_those_of_differences(name):
  a, b = random_pairs(1, 60)
  loss = {'giou': giou_loss, 'ciou': ciou_loss}[name]
  gradient = np.asarray(jax.grad(lambda a: jnp.sum(loss(a, b)))(a))[10:]
  assert np.isfinite(gradient).all()
  step = 1e-6
  for got, p, q in zip(gradient, np.float64(a)[10:], np.float64(b)[10:], strict=True):
    alpha = ciou_by_hand(p, q)[1]  # No gradient flows through it.
    value = lambda box, q=q, alpha=alpha: (giou_by_hand(box, q) if name == 'giou'
                                           else ciou_by_hand(box, q, alpha)[0])
    expected = [(value(p + step * unit) - value(p - step * unit)) / (2 * step)
                for unit in np.eye(4)]
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


def codes_problem(dtype):
  """Returns anchors of many sizes, and codes from ordinary to absurd with targets."""
  rng = np.random.default_rng(0)
  sides = np.float32([1e-4, 1e-2, 0.1, 0.5, 1.5])[rng.integers(0, 5, (64, 2))]
  centers = rng.uniform(0, 1, (64, 2)).astype('f')
  anchors = Anchors(np.concatenate([centers - sides / 2, centers + sides / 2], axis=1),
                    np.zeros(64, np.int32))
  codes = rng.normal(size=(3, 64, 4)) * np.array([1, 100, 1e30])[:, None, None]
  targets = rng.normal(size=(3, 64, 4))
  targets[:, ::4] = np.asarray(boxes.encode(np.float32([0.5, 0.5, 0.5, 0.5]), anchors.boxes))[::4]
  return anchors, jnp.asarray(codes, dtype), jnp.asarray(targets, jnp.float32)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', ['giou', 'ciou'])
def test_values_and_gradients_are_finite(name, dtype):
  anchors, codes, targets = codes_problem(dtype)
  values, gradient = jax.jit(jax.value_and_grad(
      lambda c: jnp.sum(box_loss(c, targets, name, anchors))))(codes)
  assert np.isfinite(values) and np.isfinite(np.float32(gradient)).all()
  assert (np.float32(gradient)[0] != 0).any(axis=-1).all()
  equal = box_loss(targets, targets, name, anchors)[:, 1::4]
  np.testing.assert_allclose(equal, 0, atol=1e-2)  # Small anchors at 1: corners have 24 bits.


@pytest.mark.parametrize('name', ['giou', 'ciou'])
def test_the_size_of_an_object_does_not_matter(name):
  """The same codes have the same loss for a small anchor, whose area is less than epsilon."""
  codes, targets = (jnp.float32(np.random.default_rng(i).normal(size=(1, 50, 4))) for i in (0, 1))
  def losses(side):
    box = np.float32([-side / 2, -side / 2, side / 2, side / 2])
    anchors = Anchors(np.tile(box, (50, 1)), np.zeros(50, np.int32))
    return box_loss(codes, targets, name, anchors)
  np.testing.assert_allclose(losses(2**-12), losses(1), rtol=1e-5)


@pytest.mark.parametrize('name', ['giou', 'ciou'])
def test_descending_finds_the_box(name):
  anchors, target = Anchors(np.float32([[.2, .2, .5, .5]]), np.zeros(1, np.int32)), jnp.float32(
      [[[.35, .1, .95, .4]]])
  codes = boxes.encode(target, anchors.boxes)
  step = jax.jit(lambda c: c - jax.grad(
      lambda c: jnp.sum(box_loss(c, codes, name, anchors)))(c))
  found = jnp.zeros((1, 1, 4))
  for _ in range(600):
    found = step(found)
  overlap = boxes.iou(boxes.decode(found, anchors.boxes)[0], target[0])
  assert overlap[0, 0] > 0.9


def test_names():
  with pytest.raises(InputError, match="localization='gious' is unknown; did you mean 'giou'"):
    check_localization('gious')
  with pytest.raises(InputError, match="'ciou' compares boxes and needs the argument 'anchors'"):
    check_localization('ciou', takes_anchors=False)
