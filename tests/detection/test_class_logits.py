"""Class logits: scores and targets with and without a background."""

import numpy as np
import pytest

from ppn_jax.detection.class_logits import ClassLogitsSpec
from ppn_jax.errors import InputError

LOGITS = np.float32([[0.5, -1.0, 2.0], [3.0, 0.0, -3.0]])


def test_sigmoid_scores_each_logit_and_drops_the_background():
  every = 1 / (1 + np.exp(-LOGITS))
  np.testing.assert_allclose(ClassLogitsSpec(3).scores(LOGITS), every, rtol=1e-6)
  np.testing.assert_allclose(ClassLogitsSpec(2, background=True).scores(LOGITS), every[:, 1:],
                             rtol=1e-6)


def test_softmax_scores_share_one_with_the_background():
  every = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
  scores = ClassLogitsSpec(2, True, 'softmax').scores(LOGITS)
  np.testing.assert_allclose(scores, every[:, 1:], rtol=1e-6)


def test_targets():
  labels, positive = np.int32([1, 0, 0]), np.array([True, True, False])
  np.testing.assert_array_equal(ClassLogitsSpec(2).targets(labels, positive),
                                [[0, 1], [1, 0], [0, 0]])
  wide = ClassLogitsSpec(2, background=True)
  assert wide.num_logits == 3
  np.testing.assert_array_equal(wide.targets(labels, positive), [[0, 0, 1], [0, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(wide.targets_with_background(labels, positive),
                                [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(ClassLogitsSpec(2).targets_with_background(labels, positive),
                                ClassLogitsSpec(2).targets(labels, positive))


@pytest.mark.parametrize('options, words', [
    ({'activation': 'softmx'}, "did you mean 'softmax'"),
    ({'activation': 'softmax'}, 'background_column=True')])
def test_specs_that_make_no_sense(options, words):
  with pytest.raises(InputError, match=words):
    ClassLogitsSpec(3, **options)
