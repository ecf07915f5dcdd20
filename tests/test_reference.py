"""Comparison with the TF Object Detection API: its checkpoints in our network, and a training step.

`../shared/golden/README.md` says how the arrays were made. Outputs agree to 1e-4 on any processor:
rounding alone moves them by up to 2e-5, which depends on the vector units.
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from ppn_jax.config_files import load_config
from ppn_jax.detection.structures import GroundTruth
from ppn_jax.models import layers
from ppn_jax.run import build_detector
from ppn_jax.training.optimizer import build_optimizer
from ppn_jax.training.state import TrainState
from ppn_jax.training.train_step import StepMetrics, train_step
from ppn_jax.weights import names
from ppn_jax.weights.importer import import_detector
from ppn_jax.weights.read import read_weights

TOLERANCE = 1e-4
# The slopes of the logistic function and the softmax are at most a quarter.
SCORE_TOLERANCE = TOLERANCE / 4

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def reference(kind, *overrides):
  return load_config(str(CONFIGS / f'{kind}_mobilenet_v1_coco_reference.py'), [
      '--config.model.num_classes=90', *overrides])


def imported(golden, kind, config):
  """Returns the reference's detector and the variables of its checkpoint."""
  detector = build_detector(config)
  like = jax.eval_shape(detector.init, jax.random.key(0))
  file = read_weights(golden / f'ckpt_{kind}_s1' / 'model.ckpt')
  return detector, jax.tree.map(jnp.asarray, import_detector(file, like).variables)


@pytest.fixture(scope='module', params=['ppn', 'ssd'])
def forward(request, shared):
  """Returns (detector, variables, arrays of the reference) for one of its two models."""
  golden = shared / 'golden'
  detector, variables = imported(golden, request.param, reference(request.param))
  return detector, variables, np.load(golden / f'forward_{request.param}_s1.npz')


@pytest.mark.slow
def test_feature_maps_of_all_levels(forward):
  detector, variables, golden = forward
  pyramid = jax.jit(lambda v, x: detector.network.apply(v, x, train=False, method='pyramid'))
  levels = pyramid(variables, golden['images_uint8'])
  assert len(levels) == 6
  for i, level in enumerate(levels):
    np.testing.assert_allclose(level, golden[f'feature_map_{i}'], atol=TOLERANCE,
                               err_msg=f'level {i}')


def test_box_encodings_and_logits(forward):
  detector, variables, golden = forward
  outputs = jax.jit(detector.forward)(variables, golden['images_uint8'])
  np.testing.assert_allclose(outputs.box_codes, golden['box_encodings'], atol=TOLERANCE)
  np.testing.assert_allclose(outputs.class_logits, golden['class_predictions_with_background'],
                             atol=TOLERANCE)


@pytest.mark.slow
def test_detections(forward):
  detector, variables, golden = forward
  found = jax.device_get(jax.jit(detector.detect)(variables, golden['images_uint8']))
  np.testing.assert_array_equal(found.valid.sum(axis=1), golden['num_detections'])
  np.testing.assert_allclose(found.scores, golden['detection_scores'], atol=SCORE_TOLERANCE)
  for b, scores in enumerate(found.scores):
    match_up_to_ties(found.labels[b], found.boxes[b], golden['detection_classes'][b],
                     golden['detection_boxes'][b], scores)


def match_up_to_ties(labels, boxes, expected_labels, expected_boxes, scores):
  """Asserts equal detections in equal order, except that close scores may change places."""
  for k in range(len(labels)):
    tied = np.abs(scores - scores[k]) <= 2 * SCORE_TOLERANCE
    same = expected_labels[tied] == labels[k]
    near = np.abs(expected_boxes[tied] - boxes[k]).max(axis=-1) <= TOLERANCE
    assert np.any(same & near), f'detection {k}'


def summed_like_the_reference(x):
  """Computes mean and biased variance of [..., C] with the rounding of the reference.

  TensorFlow's CPU kernel added 180,000 float32 rows one after another, in two halves of two
  threads, so its first variances are off by up to 3e-4. Gradients of this network are a hundred
  times as sensitive (ReLU6 elements change sides), so they only agree closely with this error.
  """
  return _moments(x.reshape(-1, x.shape[-1]))


@jax.custom_vjp
def _moments(rows):
  mean = _in_halves(rows) * np.float32(1 / len(rows))
  return mean, _in_halves((rows - mean)**2) * np.float32(1 / len(rows))


def _in_halves(rows):
  half = (len(rows) + 1) // 2
  total_of = lambda part: jax.lax.scan(lambda total, row: (total + row, None),
                                       jnp.zeros(part.shape[1:], part.dtype), part)[0]
  return total_of(rows[:half]) + total_of(rows[half:])


def _moments_forward(rows):
  mean, variance = _moments(rows)
  return (mean, variance), (rows, mean)


def _moments_backward(residuals, cotangents):
  (rows, mean), (of_mean, of_variance) = residuals, cotangents
  return ((of_mean + of_variance * 2 * (rows - mean)) / len(rows),)


_moments.defvjp(_moments_forward, _moments_backward)


class Step(NamedTuple):
  """PPN step of the reference, and ours from the same state."""
  golden: np.lib.npyio.NpzFile
  boxes: np.ndarray  # Codes in training mode.
  gradient: dict  # By the reference's names, as are the next two.
  params: dict
  batch_stats: dict
  metrics: StepMetrics


def take_step(shared) -> Step:
  golden = np.load(shared / 'golden' / 'train_step_ppn_s1.npz')
  golden_truth = np.load(shared / 'golden' / 'targets_loss_ppn.npz')
  # The reference builds blocks 12 and 13 for PPN too, and decays their weights.
  config = reference('ppn', '--config.model.backbone.last_block=13')
  detector, variables = imported(shared / 'golden', 'ppn', config)
  optimizer = build_optimizer(steps=50_000, batch_size=512, **config.optim.to_dict())
  state = TrainState(jnp.zeros((), jnp.int32), variables,
                     optimizer.transform.init(variables['params']), {})
  labels, valid = golden_truth['gt_classes'], golden_truth['gt_weights'] > 0
  ground_truth = GroundTruth(golden_truth['gt_boxes'], np.maximum(labels, 0).astype(np.int32),
                             np.zeros(labels.shape, bool), valid)
  outputs, _ = jax.jit(detector.forward_train)(variables, golden['images_uint8'])
  after, metrics = jax.jit(lambda *a: train_step(detector, optimizer, *a))(
      state, golden['images_uint8'], ground_truth)
  # The momentum was zero before the step, so it is the gradient afterwards.
  is_trace = lambda s: isinstance(s, optax.TraceState)
  (momentum,) = filter(is_trace, jax.tree.leaves(after.opt_state, is_leaf=is_trace))
  return Step(golden, outputs.box_codes, by_reference_name(momentum.trace, 'params'),
              *(by_reference_name(after.variables[c], c) for c in ('params', 'batch_stats')),
              metrics)


@pytest.fixture(scope='module')
def step(shared):
  return take_step(shared)


@pytest.fixture(scope='module')
def rounded_step(shared):
  """Takes the same step with the reference's rounding in batch norm."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, '_moments', summed_like_the_reference)
    return take_step(shared)


def by_reference_name(tree, collection):
  """Returns {the reference's name: array in its layout}."""
  named = {}
  for path, leaf in flatten_dict(tree).items():
    leaf = np.asarray(leaf)
    if path[-2:] == ('depthwise', 'kernel'):
      leaf = leaf.swapaxes(2, 3)
    named[names.detector_name((collection, *path))] = leaf
  return named


def golden_of(golden, prefix):
  return {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)}


def norm_errors(ours, norms):
  """Returns relative errors of Euclidean norms."""
  return np.array([abs(np.linalg.norm(ours[name]) / norm - 1) for name, norm in norms.items()])


def largest_error(ours, theirs):
  """Returns the largest |difference| / |theirs| of all arrays, in Euclidean norms."""
  return max(np.linalg.norm(ours[name] - value) / np.linalg.norm(value)
             for name, value in theirs.items())


@pytest.mark.slow
def test_step_losses(step, rounded_step):
  for taken, rtol in ((step, 2e-4), (rounded_step, 5e-6)):
    golden, metrics = taken.golden, taken.metrics
    np.testing.assert_allclose(metrics.localization, golden['loc_loss'], rtol=rtol)
    np.testing.assert_allclose(metrics.classification, golden['cls_loss'], rtol=rtol)
    np.testing.assert_allclose(metrics.regularization, golden['reg_loss'], rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, golden['total_loss'], rtol=5e-6)
    np.testing.assert_allclose(metrics.learning_rate, golden['lr'], rtol=1e-6)


@pytest.mark.slow
def test_step_gradients(step, rounded_step):
  norms = golden_of(step.golden, 'norm/grad/')
  assert norms.keys() <= step.gradient.keys() and len(norms) == 90
  # The reference has no gradient for the scales and biases of the unused blocks.
  for name in step.gradient.keys() - norms.keys():
    assert not step.gradient[name].any(), name
  errors = norm_errors(rounded_step.gradient, norms)
  assert errors.max() < 6e-3 and np.mean(errors < 1e-3) > 0.7
  assert largest_error(rounded_step.gradient, golden_of(step.golden, 'grad/')) < 0.03
  # Without its rounding, the reference's own error dominates in the earliest layers.
  errors = norm_errors(step.gradient, norms)
  assert errors.max() < 0.1 and np.median(errors) < 3e-3


@pytest.mark.slow
def test_step_moves_the_averages_of_batch_norm(step, rounded_step):
  names = [k for k in golden_of(step.golden, 'after/') if 'moving_' in k]
  assert len(names) == 2 * 33
  theirs = {name: step.golden[f'after/{name}'] for name in names}
  assert largest_error(rounded_step.batch_stats, theirs) < 1e-4
  assert largest_error(step.batch_stats, theirs) < 1e-3


@pytest.mark.slow
def test_step_leaves_the_same_weights(step, rounded_step):
  norms = {k: v for k, v in golden_of(step.golden, 'norm/after/').items() if 'moving_' not in k}
  assert norms.keys() == step.params.keys()
  assert norm_errors(rounded_step.params, norms).max() < 3e-3
  assert norm_errors(step.params, norms).max() < 0.06
