"""When a run ends: functions of its evaluations and of measured times."""

import pytest

from ppn_jax.training import stopping
from ppn_jax.training.stopping import (
  EarlyStopping,
  best_step,
  is_timed,
  slow_step_seconds,
  steps_that_fit,
  without_improvement,
)


@pytest.mark.parametrize('values, least, expected', [
    ([], 0.0, 0),
    ([0.1], 0.0, 0),
    ([0.0, 0.0, 0.0], 0.0, 2),  # Equal is no improvement.
    ([0.1, 0.2, 0.15], 0.0, 1),
    ([0.3, 0.1, 0.2], 0.0, 2),  # The best counts, not the one before.
    ([None, None], 0.0, 0),  # Nothing to compare with yet.
    ([None, 0.1, None, None], 0.0, 2),
    ([0.1, 0.12, 0.14, 0.16], 0.05, 0),  # Small gains add up: 0.16 is 0.06 above 0.1.
    ([0.1, 0.12, 0.14], 0.05, 2),
    ([0.25, 0.5], 0.25, 1),  # Not above the least gain.
])
def test_evaluations_without_improvement(values, least, expected):
  by_step = {100 * i: value for i, value in enumerate(values, start=1)}
  assert without_improvement(by_step, least) == expected
  assert without_improvement(dict(reversed(by_step.items())), least) == expected


def test_patience():
  rule = EarlyStopping('AP50', patience=2)
  reached = []
  for step, value in enumerate([0.1, 0.3, 0.2, 0.4, 0.4, 0.3], start=1):
    rule.values[step] = value
    reached.append(rule.reached())
  assert reached == [False] * 5 + [True]
  assert rule.reason() == 'AP50 has not improved for 2 evaluations (train.patience=2)'
  assert rule.describe_best() == 'step 5 was best, AP50 0.4000'
  assert not EarlyStopping('AP50', patience=0, values=rule.values).reached()
  assert not EarlyStopping('AP50', patience=3, values=rule.values).reached()


def test_the_best_step_is_the_last_of_equal_ones():
  """As checkpoints.retention chooses it."""
  assert best_step({10: 0.2, 20: 0.5, 30: 0.5, 40: None}) == (20 + 10, 0.5)
  assert best_step({10: None}) is None and best_step({}) is None
  assert EarlyStopping().describe_best() == ''


def simulated(seconds, step_seconds, evaluation_seconds, every, start, save=0.0, save_every=0):
  """Returns the last step by taking them one by one, for all ends."""
  best = start
  for last in range(start + 1, start + 200):
    evaluated = [s for s in range(start + 1, last + 1) if every and (s % every == 0 or s == last)]
    saved = [s for s in range(start + 1, last + 1)
             if s == last or s in evaluated or (save_every and s % save_every == 0)]
    if ((last - start) * step_seconds + len(evaluated) * evaluation_seconds + len(saved) * save
        <= seconds):
      best = last
  return best


@pytest.mark.parametrize('start', [0, 3, 8])
@pytest.mark.parametrize('every', [0, 1, 4, 7])
@pytest.mark.parametrize('evaluation', [0.0, 0.5, 8.0])
@pytest.mark.parametrize('save, save_every', [(0.0, 0), (1.0, 3), (0.25, 14)])
def test_steps_that_fit_are_those_of_a_simulation(start, every, evaluation, save, save_every):
  for seconds in [0.0, 0.25, 1.0, 8.25, 9.0, 16.0, 30.5, 64.0]:
    fit = steps_that_fit(seconds, step_seconds=0.5, evaluation_seconds=evaluation,
                         evaluate_every=every, save_seconds=save, checkpoint_every=save_every,
                         start=start)
    assert fit == simulated(seconds, 0.5, evaluation, every, start, save, save_every), seconds


def test_an_endless_budget():
  assert steps_that_fit(1e300, step_seconds=1e-6) == 2**32


def test_no_time_is_left():
  assert steps_that_fit(-5.0, step_seconds=1.0, start=7) == 7


def test_enough_is_timed():
  assert not is_timed([], 1.0) and not is_timed([9.0, 9.0], 1.0)  # The first do not count.
  assert not is_timed([9.0, 9.0, 0.5], 1.0) and is_timed([9.0, 9.0, 0.5, 0.5], 1.0)
  assert is_timed([1e-6] * (stopping.WARM_UP_CHUNKS + stopping.MAX_CHUNKS), 1.0)
  assert slow_step_seconds([0.0] * 3, 4) > 0  # A clock that is too coarse.


def test_steps_are_planned_as_slow_as_in_the_slower_half():
  assert slow_step_seconds([9.0, 9.0, 0.5], 4) == 0.125
  assert slow_step_seconds([9.0, 9.0, 1.5, 0.5], 4) == 0.375
  assert slow_step_seconds([9.0, 9.0] + [2.0] * 57, 4) == 0.5
  # Chunks that alternate are no noise, a machine that is slower for a while is.
  assert slow_step_seconds([9.0, 9.0] + [1.0, 3.0] * 30, 4) == 0.5
  assert slow_step_seconds([9.0, 9.0] + [3.0] * 30 + [1.0] * 30, 4) == 0.75
