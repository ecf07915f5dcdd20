"""Losses against the reference, against definitions in float64, and in edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.losses import (
  focal_loss,
  hard_negative_mining_loss,
  sigmoid_focal,
  smooth_l1,
)
from ppn_jax.detection.structures import Outputs, Targets
from ppn_jax.errors import InputError

FIVE = ClassLogitsSpec(5)


def golden_problem(golden):
  """Returns the reference's outputs and targets: 90 classes and a background."""
  positive = golden['ppn_match'] >= 0
  targets = Targets(golden['ppn_reg_targets'],
                    np.where(positive, golden['ppn_cls_targets_argmax'] - 1, 0), positive,
                    np.zeros_like(positive))
  return Outputs(golden['ppn_pred_box'], golden['ppn_pred_cls']), targets


def test_equal_to_the_reference(shared):
  golden = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  outputs, targets = golden_problem(golden)
  settings = {'alpha': 0.75, 'gamma': 2.0, 'localization_weight': 1.5,
              'class_spec': ClassLogitsSpec(90, background=True)}
  loss = jax.jit(lambda o, t: focal_loss(o, t, **settings))(outputs, targets)
  np.testing.assert_allclose(loss.num_positive, golden['ppn_normalizer'], rtol=0)
  np.testing.assert_allclose(loss.localization, golden['ppn_loc_loss'], rtol=1e-5)
  np.testing.assert_allclose(loss.classification, golden['ppn_cls_loss'], rtol=1e-5)

  def total(o):
    parts = focal_loss(o, targets, **settings)
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
  np.testing.assert_allclose(sigmoid_focal(jnp.float32(logits), targets, alpha=alpha, gamma=gamma),
                             expected, rtol=2e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize('logit', [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize('target', [True, False])
def test_focal_and_its_gradient_are_finite(gamma, logit, target):
  value, gradient = jax.value_and_grad(
      lambda x: sigmoid_focal(x, jnp.asarray(target), gamma=gamma))(jnp.float32(logit))
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


def test_ignored_anchors_have_no_gradient_and_masked_codes_no_effect():
  outputs, targets = small_problem(np.random.default_rng(0))
  assert targets.ignored.any() and targets.positive.any()
  total = lambda o: sum(focal_loss(o, targets, class_spec=FIVE)[:2])
  gradient = jax.grad(total)(outputs)
  assert not np.any(np.asarray(gradient.class_logits)[targets.ignored])
  assert np.all(np.asarray(gradient.class_logits)[~targets.ignored])
  assert not np.any(np.asarray(gradient.box_codes)[~targets.positive])
  assert np.any(np.asarray(gradient.box_codes)[targets.positive])


def test_a_batch_without_positives_is_normalised_by_one():
  outputs, targets = small_problem(np.random.default_rng(1))
  nothing = targets._replace(positive=np.zeros_like(targets.positive))
  loss = focal_loss(outputs, nothing, class_spec=FIVE)
  assert loss.num_positive == 0 and loss.localization == 0
  negative = sigmoid_focal(outputs.class_logits, False)
  expected = np.sum(np.where(targets.ignored[..., None], 0, negative))
  np.testing.assert_allclose(loss.classification, expected, rtol=1e-5)


def mined_by_hand(outputs, targets, *, softmax, background, ratio):
  """Computes the SSD paper's loss for one image and anchor at a time, in float64."""
  class_sum, box_sum = 0.0, 0.0
  for b in range(len(targets.labels)):
    costs = []
    for a, positive in enumerate(targets.positive[b]):
      z = np.float64(outputs.class_logits[b, a])
      target = np.zeros(len(z))
      if positive:
        target[targets.labels[b, a] + background] = 1
      elif background:
        target[0] = 1
      if softmax:
        costs.append(np.log(np.exp(z).sum()) - z @ target)
      else:
        costs.append(np.sum(np.log1p(np.exp(z)) - z * target))
    costs = np.array(costs)
    negatives = costs[~(targets.positive[b] | targets.ignored[b])]
    kept = np.sort(negatives)[::-1][:int(ratio * targets.positive[b].sum())]
    class_sum += costs[targets.positive[b]].sum() + kept.sum()
    error = np.abs(np.float64(outputs.box_codes - targets.box_codes)[b][targets.positive[b]])
    box_sum += np.where(error < 1, error**2 / 2, error - 0.5).sum()
  n = max(targets.positive.sum(), 1)
  return class_sum / n, box_sum / n


@pytest.mark.parametrize('softmax, background', [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize('seed', range(4))
def test_mining_keeps_the_hardest_negatives(softmax, background, seed):
  rng = np.random.default_rng(seed)
  outputs, targets = small_problem(rng)
  class_spec = ClassLogitsSpec(5 - background, background, 'softmax' if softmax else 'sigmoid')
  targets = targets._replace(labels=np.minimum(targets.labels, 4 - background))
  loss = jax.jit(lambda o, t: hard_negative_mining_loss(
      o, t, class_spec=class_spec, negatives_per_positive=1.0, localization_weight=2.0))(
          outputs, targets)
  by_class, by_box = mined_by_hand(outputs, targets, softmax=softmax, background=background,
                                   ratio=1.0)
  np.testing.assert_allclose(loss.classification, by_class, rtol=1e-5)
  np.testing.assert_allclose(loss.localization, 2 * by_box, rtol=1e-5)


def test_mining_leaves_easy_negatives_and_images_without_objects_alone():
  rng = np.random.default_rng(3)
  outputs, targets = small_problem(rng)
  targets.positive[1] = False
  class_spec = ClassLogitsSpec(4, background=True, activation='softmax')
  targets = targets._replace(labels=np.minimum(targets.labels, 3))
  total = lambda o: sum(hard_negative_mining_loss(o, targets, class_spec=class_spec)[:2])
  gradient = np.asarray(jax.grad(total)(outputs).class_logits)
  touched = np.any(gradient != 0, axis=-1)
  assert not touched[1].any()
  assert touched[0][targets.positive[0]].all()
  negatives = ~(targets.positive[0] | targets.ignored[0])
  assert touched[0][negatives].sum() == min(3 * targets.positive[0].sum(), negatives.sum())


def test_a_background_logit_is_never_a_target():
  outputs, targets = small_problem(np.random.default_rng(5))
  plain = focal_loss(outputs, targets, class_spec=FIVE)
  wide = Outputs(outputs.box_codes, np.pad(outputs.class_logits, ((0, 0), (0, 0), (1, 0)),
                                           constant_values=0.5))
  loss = focal_loss(wide, targets, class_spec=ClassLogitsSpec(5, background=True))
  extra = sigmoid_focal(jnp.float32(0.5), False) * np.sum(~targets.ignored) / loss.num_positive
  np.testing.assert_allclose(loss.classification, plain.classification + extra, rtol=1e-5)
  np.testing.assert_allclose(loss.localization, plain.localization)


@pytest.mark.parametrize('loss_function, options, words', [
    (focal_loss, {'alpha': 1.5}, 'alpha=1.5'),
    (focal_loss, {'class_spec': ClassLogitsSpec(4, True, 'softmax')}, 'hard_negative_mining'),
    (hard_negative_mining_loss, {'negatives_per_positive': -1.0}, 'negatives_per_positive=-1.0')])
def test_options_out_of_range(loss_function, options, words):
  with pytest.raises(InputError, match=words):
    loss_function(*small_problem(np.random.default_rng(0)), **{'class_spec': FIVE, **options})
