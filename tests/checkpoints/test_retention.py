"""Of several processes the first decides which checkpoints are kept."""

import types

import pytest

from ppn_jax.checkpoints.retention import DecidedByFirst
from ppn_jax.distributed import coordination


class Policy:
  """Keeps the steps that it is given, and counts how often it is asked."""

  def __init__(self, *kept):
    self.kept, self.asked = kept, 0

  def should_preserve(self, checkpoints, *, context):
    self.asked += 1
    return [checkpoint.step in self.kept for checkpoint in checkpoints]


@pytest.fixture
def of_two(monkeypatch):
  """Returns a function that makes this process one of two."""
  messages = {}
  monkeypatch.setattr(coordination, 'publish', messages.__setitem__)
  monkeypatch.setattr(coordination, 'find', messages.get)
  monkeypatch.setattr('jax.process_count', lambda: 2)
  return lambda index: monkeypatch.setattr('jax.process_index', lambda: index)


def decide(policy, *steps):
  return policy.should_preserve([types.SimpleNamespace(step=step) for step in steps], context=None)


def test_the_others_take_over_what_the_first_decides(of_two):
  here, there = DecidedByFirst(Policy(1, 3)), DecidedByFirst(Policy())
  of_two(0)
  assert decide(here, 1, 2, 3) == [True, False, True]
  here.policy.kept = (2,)
  assert decide(here, 1, 2, 3) == [False, True, False]  # Asked again, as after a failed save.
  assert decide(here, 2, 4) == [True, False]
  of_two(1)
  assert decide(there, 1, 2, 3) == [True, False, True]
  assert decide(there, 1, 2, 3) == [False, True, False]
  assert decide(there, 2, 4) == [True, False]
  assert (here.policy.asked, there.policy.asked) == (3, 0)


def test_without_a_decision_all_are_kept(of_two):
  of_two(1)
  assert decide(DecidedByFirst(Policy()), 1, 2) == [True, True]
  assert decide(DecidedByFirst(Policy())) == []


def test_one_process_decides_itself():
  policy = DecidedByFirst(Policy(2))
  assert decide(policy, 1, 2) == [False, True] and policy.policy.asked == 1
