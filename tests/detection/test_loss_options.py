"""Label smoothing, class weights and the choice of box loss, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.config import complete
from ppn_jax.config_files import override
from ppn_jax.detection import boxes
from ppn_jax.detection.box_losses import ciou_loss, giou_loss
from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.detection.class_weights import check_class_weights, resolve_class_weights
from ppn_jax.detection.losses import focal_loss, hard_negative_mining_loss, sigmoid_focal
from ppn_jax.detection.structures import Anchors, Category, Outputs, Targets
from ppn_jax.errors import InputError
from ppn_jax.run import build_detector, create_run, resolve_classes, without_class_weights

SMOOTHING, WEIGHTS = 0.1, (1.0, 2.0, 0.25, 0.5)


def problem(seed, spec):
  rng = np.random.default_rng(seed)
  shape = (2, 12)
  positive = rng.uniform(size=shape) < 0.4
  ignored = (rng.uniform(size=shape) < 0.2) & ~positive
  outputs = Outputs(rng.normal(size=(*shape, 4)).astype('f'),
                    2 * rng.normal(size=(*shape, spec.num_logits)).astype('f'))
  codes = np.where(positive[..., None], rng.normal(size=(*shape, 4)), 0).astype('f')
  labels = np.where(positive, rng.integers(0, 4, shape), 0)
  return outputs, Targets(codes, labels, positive, ignored)


def log_sigmoid(z):
  return -np.log1p(np.exp(-z))


def focal_by_hand(outputs, targets, spec, alpha=0.25, gamma=2.0):
  total = 0.0
  for at in np.ndindex(targets.positive.shape):
    if targets.ignored[at]:
      continue
    for k, z in enumerate(np.float64(outputs.class_logits[at])):
      y = bool(targets.positive[at]) and k == targets.labels[at] + spec.background
      weight = alpha * WEIGHTS[k - spec.background] if y else 1 - alpha
      p = np.exp(log_sigmoid(z))
      smooth = y * (1 - SMOOTHING) + SMOOTHING / 2
      cross_entropy = -smooth * log_sigmoid(z) - (1 - smooth) * log_sigmoid(-z)
      total += weight * (1 - p if y else p)**gamma * cross_entropy
  return total / max(targets.positive.sum(), 1)


@pytest.mark.parametrize('background', [True, False])
@pytest.mark.parametrize('per_cell', [1, 3])
def test_focal(background, per_cell):
  spec = ClassLogitsSpec(4, background, anchors_per_cell=per_cell)
  outputs, targets = problem(0, spec)
  loss = jax.jit(lambda o, t: focal_loss(o, t, class_spec=spec, label_smoothing=SMOOTHING,
                                         class_weights=WEIGHTS))(outputs, targets)
  np.testing.assert_allclose(loss.classification, focal_by_hand(outputs, targets, spec), rtol=1e-5)
  np.testing.assert_allclose(loss.localization,
                             focal_loss(outputs, targets, class_spec=spec).localization)


def mined_by_hand(outputs, targets, spec):
  """Computes the loss with one negative for each positive anchor."""
  total = 0.0
  for b, positive in enumerate(targets.positive):
    costs = []
    for a, z in enumerate(np.float64(outputs.class_logits[b])):
      y = np.zeros(len(z))
      if positive[a]:
        y[targets.labels[b, a] + spec.background] = 1
      elif spec.background:
        y[0] = 1
      factor = WEIGHTS[targets.labels[b, a]] if positive[a] else 1.0
      if spec.activation == 'softmax':
        log_p = z - np.log(np.exp(z).sum())
        costs.append(-factor * np.sum((y * (1 - SMOOTHING) + SMOOTHING / len(z)) * log_p))
      else:
        smooth = y * (1 - SMOOTHING) + SMOOTHING / 2
        each = -smooth * log_sigmoid(z) - (1 - smooth) * log_sigmoid(-z)
        costs.append(np.sum(np.where(y == 1, factor, 1.0) * each))
    costs = np.array(costs)
    negatives = np.sort(costs[~(positive | targets.ignored[b])])[::-1]
    total += costs[positive].sum() + negatives[:positive.sum()].sum()
  return total / targets.positive.sum()


@pytest.mark.parametrize('spec', [ClassLogitsSpec(4, True, 'softmax'), ClassLogitsSpec(4, True),
                                  ClassLogitsSpec(4)], ids=['softmax', 'background', 'sigmoid'])
@pytest.mark.parametrize('seed', range(3))
def test_mining(spec, seed):
  outputs, targets = problem(seed, spec)
  loss = jax.jit(lambda o, t: hard_negative_mining_loss(
      o, t, class_spec=spec, negatives_per_positive=1.0, label_smoothing=SMOOTHING,
      class_weights=WEIGHTS))(outputs, targets)
  np.testing.assert_allclose(loss.classification, mined_by_hand(outputs, targets, spec), rtol=1e-5)


@pytest.mark.parametrize('logit', [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize('target', [True, False])
def test_smoothed_focal_and_its_gradient_are_finite(logit, target):
  for gamma in (0.0, 2.0):
    value, gradient = jax.value_and_grad(lambda x, gamma=gamma: sigmoid_focal(
        x, jnp.asarray(target), gamma=gamma, label_smoothing=0.1))(jnp.float32(logit))
    assert np.isfinite(value) and np.isfinite(gradient) and value >= 0


def test_smoothing_moves_the_best_probability():
  """At gamma 0, the minimum of the loss is at the smoothed target."""
  z = jnp.linspace(-6, 6, 2401)
  for target, best in ((True, 0.9), (False, 0.1)):
    loss = sigmoid_focal(z, jnp.full(z.shape, target), gamma=0.0, label_smoothing=0.2)
    assert jax.nn.sigmoid(z[jnp.argmin(loss)]) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize('function, spec, by_code', [
    (focal_loss, ClassLogitsSpec(4), 4), (hard_negative_mining_loss, ClassLogitsSpec(4), 1)])
@pytest.mark.parametrize('name, of_boxes', [('giou', giou_loss), ('ciou', ciou_loss)])
def test_localization(function, spec, by_code, name, of_boxes):
  outputs, targets = problem(0, spec)
  rng = np.random.default_rng(1)
  corner = rng.uniform(0, 0.5, (12, 2))
  side = rng.uniform(0.1, 0.5, (12, 1))  # Squares: one unit for both axes.
  anchors = Anchors(np.concatenate([corner, corner + side], 1).astype('f'), np.zeros(12, 'i'))
  options = {'class_spec': spec, 'localization_weight': 3.0, 'anchors': anchors}
  loss = function(outputs, targets, localization=name, **options)
  unit = side.astype('f')
  each = of_boxes(*(boxes.decode(codes, anchors.boxes) / unit
                    for codes in (outputs.box_codes, targets.box_codes)))
  expected = 3 * np.sum(np.asarray(each)[targets.positive]) / targets.positive.sum()
  np.testing.assert_allclose(loss.localization, expected, rtol=1e-5)
  plain = function(outputs, targets, **options)
  np.testing.assert_allclose(loss.classification, plain.classification)
  error = np.abs(outputs.box_codes - targets.box_codes)[targets.positive]
  huber = np.where(error < 1, error**2 / 2, error - 0.5).sum()
  np.testing.assert_allclose(plain.localization, 3 * huber / by_code / targets.positive.sum(),
                             rtol=1e-5)
  gradient = jax.grad(lambda o: function(o, targets, localization=name, **options).localization)(
      outputs).box_codes
  assert np.isfinite(gradient).all()
  assert (np.any(gradient != 0, axis=-1) == targets.positive).all()


@pytest.mark.parametrize('function', [focal_loss, hard_negative_mining_loss])
@pytest.mark.parametrize('options, words', [
    ({'label_smoothing': 1.0}, 'label_smoothing=1.0'), ({'label_smoothing': -0.1}, '-0.1'),
    ({'localization': 'iou'}, "did you mean '[gc]iou'"), ({'localization': 'giou'}, 'anchors'),
    ({'class_weights': (1.0, 2.0)}, '2 weights, but there are 4'),
    ({'class_weights': (1.0, -2.0, 1.0, 1.0)}, '-2.0 is no weight'),
    ({'class_weights': (1.0, 0.0, 1.0, 1.0)}, '0.0 is no weight; legal: a number above 0'),
    ({'localization_weight': float('nan')}, 'localization_weight=nan'),
    ({'class_weights': 'cat'}, "'cat' must be weights by name"),
    ({'class_weights': (('cat', 1.0),)}, "such as 'cat'")])
def test_options_out_of_range(function, options, words):
  spec = ClassLogitsSpec(4)
  with pytest.raises(InputError, match=words):
    function(*problem(0, spec), class_spec=spec, **options)


# Weights by name, in a config.

NAMES = [Category(7 * i, name) for i, name in enumerate(['circle', 'traffic.light', 'star'])]


def test_names_become_weights_of_labels(tmp_path):
  config = tiny_config().unlock()
  config.loss.class_weights = {'star': 3.0}
  run = create_run(tmp_path / 'run', config, NAMES)
  assert run.config.loss.class_weights == (1.0, 1.0, 3.0)
  assert run.detector().outputs_loss.keywords['class_weights'] == (1.0, 1.0, 3.0)
  run.save()
  again = create_run(tmp_path / 'run', run.config, NAMES)  # What is recorded means the same.
  assert again.config.loss.class_weights == (1.0, 1.0, 3.0)


@pytest.mark.parametrize('text', ["{'traffic.light': 2.5, 'star': 3}", "(('traffic.light', 2.5),)"])
def test_names_on_the_command_line(text):
  config = override(tiny_config(), [f'--config.loss.class_weights={text}'])
  assert resolve_classes(config, NAMES).loss.class_weights[:2] == (1.0, 2.5)
  assert complete(config) == config
  # Without classes, as in `ppn plan`.
  config.unlock().model.num_classes = 5
  assert build_detector(without_class_weights(config)).num_classes == 5
  with pytest.raises(InputError, match='names classes'):
    build_detector(config)


def test_unknown_names():
  with pytest.raises(InputError, match="named 'sta'; did you mean 'star'"):
    resolve_class_weights({'sta': 1.0}, [c.name for c in NAMES])
  with pytest.raises(InputError, match="names the class 'star' twice"):
    resolve_class_weights((('star', 1.0), ('star', 2.0)), [c.name for c in NAMES])
  assert check_class_weights((2, 1), 2) == (2.0, 1.0)


@pytest.mark.slow
def test_a_trained_step_takes_the_options():
  config = tiny_config().unlock()
  config.model.num_classes = 3
  config.loss.update(localization='ciou', label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0))
  detector = build_detector(config)
  rows = len(detector.anchors.boxes)
  rng = np.random.default_rng(0)
  outputs = Outputs(rng.normal(size=(2, rows, 4)).astype('f'), np.zeros((2, rows, 3), 'f'))
  targets = Targets(np.zeros((2, rows, 4), 'f'), np.ones((2, rows), 'i'),
                    rng.uniform(size=(2, rows)) < 0.1, np.zeros((2, rows), bool))
  loss = detector.outputs_loss(outputs, targets)
  by_hand = np.asarray(ciou_loss(
      boxes.decode(outputs.box_codes, detector.anchors.boxes), detector.anchors.boxes[None]))
  np.testing.assert_allclose(loss.localization, by_hand[targets.positive].mean(), rtol=1e-3)
