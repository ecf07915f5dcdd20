"""Tests that a step that hangs is noticed, and shown."""

import threading

import pytest
from time_limits import HANG_SECONDS

from ppn_jax.errors import InputError
from ppn_jax.telemetry.stuck import StepWatch, check_limits, stacks


def test_a_step_that_hangs_is_reported_once_with_its_number():
  said, seen = [], threading.Event()
  with StepWatch(2, 0.02, lambda what: (said.append(what), seen.set())) as watch:
    for step in range(1, 6):
      with watch.step(step):
        pass
    assert watch.limit() == 0.02
    with watch.step(6):
      assert seen.wait(HANG_SECONDS)
  assert len(said) == 1 and said[0].startswith('step 6 hangs, for 0s by now, 0s is usual')


def test_the_first_step_has_four_times_as_long_and_no_time_between_steps_counts():
  watch = StepWatch(100, 300, pytest.fail)
  assert watch.limit() == 1200
  with watch.step(1, timed=False):
    pass
  assert watch.limit() == 1200
  watch._durations.extend([9.0, 5.0, 5.0])
  assert watch.limit() == 500
  with watch.step(2):
    assert watch._step == 2
  assert watch._step == 0


def test_zero_turns_it_off():
  before = threading.active_count()
  with StepWatch(0, 1, pytest.fail):
    assert threading.active_count() == before


def test_stacks_of_all_threads_are_text():
  release, started = threading.Event(), threading.Event()

  def waiting_for_release():
    started.set()
    release.wait()

  thread = threading.Thread(target=waiting_for_release)
  thread.start()
  started.wait()
  text = stacks()
  release.set()
  thread.join()
  assert 'waiting_for_release' in text and 'test_stacks_of_all_threads_are_text' in text


@pytest.mark.parametrize('factor, seconds', [(1, 300), (-1, 300), (float('nan'), 300), (100, 0)])
def test_limits_out_of_range(factor, seconds):
  with pytest.raises(InputError, match='stuck_'):
    check_limits(factor, seconds)
