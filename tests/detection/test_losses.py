"""Losses against the reference, against definitions in float64, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection.losses import detection_loss, focal, smooth_l1
from ppn_jax.detection.structures import Outputs, Targets


def golden_problem(golden):
  """The reference's 91 columns are a 91-class problem whose labels are shifted by one."""
  positive = golden['ppn_match'] >= 0
  targets = Targets(golden['ppn_reg_targets'],
                    np.where(positive, golden['ppn_cls_targets_argmax'], 0), positive,
                    np.zeros_like(positive))
  return Outputs(golden['ppn_pred_box'], golden['ppn_pred_cls']), targets


def test_equal_to_the_reference(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  outputs, targets = golden_problem(golden)
  settings = {'alpha': 0.75, 'gamma': 2.0, 'localization_weight': 1.5}
  loss = jax.jit(lambda o, t: detection_loss(o, t, **settings))(outputs, targets)
  np.testing.assert_allclose(loss.num_positive, golden['ppn_normalizer'], rtol=0)
  np.testing.assert_allclose(loss.localization, golden['ppn_loc_loss'], rtol=1e-5)
  np.testing.assert_allclose(loss.classification, golden['ppn_cls_loss'], rtol=1e-5)

  def total(o):
    parts = detection_loss(o, targets, **settings)
    return parts.classification + parts.localization

  gradient = jax.jit(jax.grad(total))(outputs)
  np.testing.assert_allclose(gradient.box_codes, golden['ppn_grad_box'], rtol=1e-4, atol=1e-7)
  # The reference's gradient was stored as float16.
  np.testing.assert_allclose(gradient.class_logits, golden['ppn_grad_cls'], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize('alpha, gamma', [(0.25, 2.0), (0.75, 2.0), (0.5, 0.0), (0.25, 0.5)])
def test_focal_is_its_formula(alpha, gamma):
  logits = np.linspace(-12, 12, 49)
  targets = np.arange(49) % 2 == 0
  p = 1 / (1 + np.exp(-logits))
  p_t, alpha_t = np.where(targets, p, 1 - p), np.where(targets, alpha, 1 - alpha)
  expected = -alpha_t * (1 - p_t)**gamma * np.log(p_t)
  np.testing.assert_allclose(focal(jnp.float32(logits), targets, alpha=alpha, gamma=gamma),
                             expected, rtol=2e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize('logit', [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize('target', [True, False])
def test_focal_and_its_gradient_are_finite(gamma, logit, target):
  value, gradient = jax.value_and_grad(
      lambda x: focal(x, jnp.asarray(target), gamma=gamma))(jnp.float32(logit))
  assert np.isfinite(value) and np.isfinite(gradient) and value >= 0
  if abs(logit) >= 50 and (logit > 0) != target:  # A confident mistake has the slope of its weight.
    assert abs(gradient) == pytest.approx(0.25 if target else 0.75, rel=1e-4)


def test_smooth_l1():
  error = jnp.float32([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
  np.testing.assert_allclose(smooth_l1(error), [2.5, .5, .125, 0, .125, .5, 2.5])
  np.testing.assert_allclose(jax.vmap(jax.grad(smooth_l1))(error), [-1, -1, -.5, 0, .5, 1, 1])
  np.testing.assert_allclose(smooth_l1(jnp.float32([4.0]), delta=2.0), [2 * (4 - 1)])


def small_problem(rng):
  shape = (2, 12)
  positive = rng.uniform(size=shape) < 0.3
  ignored = (rng.uniform(size=shape) < 0.3) & ~positive
  outputs = Outputs(rng.normal(size=(*shape, 4)).astype('f'),
                    rng.normal(size=(*shape, 5)).astype('f'))
  targets = Targets(np.where(positive[..., None], rng.normal(size=(*shape, 4)), 0).astype('f'),
                    np.where(positive, rng.integers(0, 5, shape), 0).astype('i'), positive, ignored)
  return outputs, targets


def test_ignored_anchors_have_no_gradient_and_masked_codes_no_say():
  outputs, targets = small_problem(np.random.default_rng(0))
  assert targets.ignored.any() and targets.positive.any()
  total = lambda o: sum(detection_loss(o, targets)[:2])
  gradient = jax.grad(total)(outputs)
  assert not np.any(np.asarray(gradient.class_logits)[targets.ignored])
  assert np.all(np.asarray(gradient.class_logits)[~targets.ignored])
  assert not np.any(np.asarray(gradient.box_codes)[~targets.positive])
  assert np.any(np.asarray(gradient.box_codes)[targets.positive])


def test_a_batch_without_positives_is_normalised_by_one():
  outputs, targets = small_problem(np.random.default_rng(1))
  nothing = targets._replace(positive=np.zeros_like(targets.positive))
  loss = detection_loss(outputs, nothing)
  assert loss.num_positive == 0 and loss.localization == 0
  expected = np.sum(np.where(targets.ignored[..., None], 0, focal(outputs.class_logits, False)))
  np.testing.assert_allclose(loss.classification, expected, rtol=1e-5)
