"""Tests where the time of a run is said to go."""

import json
import logging

import pytest

from ppn_jax.telemetry import goodput
from ppn_jax.telemetry.goodput import Start, Timeline, read, summarize
from ppn_jax.telemetry.run_log import RunLog


def start(began, ended, first, last, **seconds):
  return Start(began, ended, first, last, dict.fromkeys(goodput.KINDS, 0.0) | seconds, {})


def test_steps_that_are_taken_again_and_the_time_between_starts_are_lost():
  # 100 steps of 1 s, the last 40 of them lost; 30 s later the rest.
  found = summarize([start(1000, 1120, 0, 100, start=15, compile=5, steps=100),
                     start(1150, 1260, 60, 150, start=15, steps=90, save=5)])
  assert found.wall == 260 and found.starts == 2
  assert found.seconds['repeated'] == pytest.approx(40)
  assert found.seconds['steps'] == pytest.approx(150)
  assert found.seconds['down'] == 30
  assert sum(found.seconds.values()) == pytest.approx(260)
  assert found.describe() == ('goodput 58%: 2m30s of steps in 4m20s, 2 starts; 40s repeated, '
                              '30s start, 30s down, 5s compile, 5s save')


def test_a_start_that_saved_its_last_step_repeats_nothing():
  found = summarize([start(0, 10, 0, 10, steps=10), start(10, 20, 10, 20, steps=10)])
  assert found.share == 1 and found.seconds['repeated'] == 0
  assert summarize([]) is None


def test_time_is_that_of_the_innermost_kind(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(goodput.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(goodput.time, 'time', lambda: 5000.0 + now[0])
  timeline = Timeline(began=5090.0)

  def passing(seconds):
    now[0] += seconds

  with timeline:
    passing(1)
    with timeline.during('compile'):
      passing(2)
    timeline.open(tmp_path, 'a.json', 7, devices=4)
    with timeline.during('steps'):
      passing(4)
      with timeline.during('data'):
        passing(8)
      timeline.reached(9)
      with pytest.raises(KeyError), timeline.during('evaluate'):
        passing(16)
        raise KeyError
    passing(32)
  (found,) = read(tmp_path)
  assert found.seconds == {'start': 10, 'prepare': 33, 'compile': 2, 'steps': 4, 'data': 8,
                           'save': 0, 'evaluate': 16}
  assert (found.first_step, found.last_step, found.note) == (7, 9, {'devices': 4})
  assert found.ended - found.began == sum(found.seconds.values())


def test_damaged_files_are_left_out(tmp_path):
  (tmp_path / 'logs').mkdir()
  (tmp_path / 'logs' / 'a.json').write_text('{"began"')
  (tmp_path / 'logs' / 'b.json').write_text(json.dumps(start(1, 2, 0, 1)._asdict()))
  assert [s.began for s in read(tmp_path)] == [1]
  assert read(tmp_path / 'none') == []


def test_the_log_keeps_what_was_said_before_it_is_opened(tmp_path):
  logger = logging.getLogger('ppn_jax.jobs.train')
  logger.setLevel(logging.INFO)
  with RunLog() as log:
    logger.info('before')
    assert not any(tmp_path.iterdir())
    log.open(tmp_path, 'a.log')
    logger.warning('after')
    assert [line.split(' ', 2)[2] for line in (tmp_path / 'logs' / 'a.log').read_text(
        ).splitlines()] == ['before', 'after']
  with RunLog():
    logger.info('of a run that does not begin')
  assert len(list((tmp_path / 'logs').iterdir())) == 1
