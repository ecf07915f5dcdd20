"""Metrics files and the progress line."""

import contextlib
import io
import json
import logging
import math
import re

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from ppn_jax.telemetry import metrics
from ppn_jax.telemetry.metrics import FIRST_LOSS, MetricsWriter, first_loss, read
from ppn_jax.telemetry.progress import LiveHandler, Progress, Stopwatch, duration


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def event_scalars(workdir):
  """Returns (tag, step, value) of every scalar in the event files, read without TensorFlow."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # Records: length u64, crc u32, payload, crc u32.
      length = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12:12 + length])
      data = data[16 + length:]
      found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
  return found


def test_the_same_scalars_in_both_files(tmp_path):
  writer = MetricsWriter(tmp_path, 0)
  writer.write(10, {'train/loss': 1.5, 'eval/AP': math.nan})
  writer.write(20, {'train/loss': 1.25})
  writer.close()
  assert lines(tmp_path) == [{'step': 10, 'train/loss': 1.5, 'eval/AP': None},
                             {'step': 20, 'train/loss': 1.25}]
  scalars = event_scalars(tmp_path)
  assert ('train/loss', 10, 1.5) in scalars and ('train/loss', 20, 1.25) in scalars


def test_a_restart_removes_lines_that_will_be_written_again(tmp_path):
  writer = MetricsWriter(tmp_path, 0)
  for step in (10, 20, 30):
    writer.write(step, {'train/loss': step})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "train/lo')  # The kill came here.
  writer = MetricsWriter(tmp_path, 20)
  writer.write(30, {'train/loss': -1})
  writer.close()
  assert [(line['step'], line['train/loss']) for line in lines(tmp_path)] == [
      (10, 10), (20, 20), (30, -1)]


def test_a_metric_that_does_not_exist_is_null_and_not_in_tensorboard(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    writer.write(1, {'eval/AP': None, 'eval/AP50': 0.5})
  assert lines(tmp_path) == [{'step': 1, 'eval/AP': None, 'eval/AP50': 0.5}]
  events, = (tmp_path / 'tensorboard').iterdir()
  assert b'eval/AP50' in events.read_bytes() and events.read_bytes().count(b'eval/AP') == 1


def test_files_of_earlier_versions_with_minus_one(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 1, "train/gradient": -1, "eval/AP": -1.0, "eval/AP50": 0.5}\n')
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
      {'step': 1, 'train/gradient': -1, 'eval/AP': None, 'eval/AP50': 0.5}]


@contextlib.contextmanager
def handled(**options):
  """Logs through a LiveHandler that writes to a text, which is returned as a stream."""
  logger, out = logging.getLogger('ppn_jax'), io.StringIO()
  handler = LiveHandler(Console(file=out, soft_wrap=True, **options))
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG)
  try:
    yield out
  finally:
    handler.close()
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_plain_lines_without_a_terminal():
  with handled(force_terminal=False) as out:
    progress = Progress(1000)
    logging.getLogger('ppn_jax.jobs.train').info('compiling')
    progress.advance(1)  # Silent: a log file needs no line a step.
    progress.report(50, ['left 3s', 'loss 1.5', 100 * '.'])
  assert out.getvalue().splitlines() == [
      'compiling', f'step 50/1,000  left 3s  loss 1.5  {100 * "."}']


def rows(text):
  """Returns the rows that a terminal has received, without control sequences."""
  return [row for row in re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]|\r', '\n', text).split('\n') if row]


STATUS = ['left 1h06m', 'loss 1.5', '512.0 images/s', 'rate 0.05', 'data 3%', 'class 0.8',
          'box 0.5', 'decay 0.2', 'memory host 998 MB']


@pytest.mark.parametrize('width, last', [(80, 'data 3%'), (100, 'box 0.5'), (120, 'decay 0.2'),
                                         (200, 'memory host 998 MB')])
def test_a_terminal_keeps_each_report_and_shows_the_last_step_below(width, last):
  with handled(force_terminal=True, width=width) as out:
    progress = Progress(1000)
    for step in (50, 100):
      progress.report(step, STATUS)
      progress.advance(step + 1)
  shown = rows(out.getvalue())
  assert all(len(row) <= width for row in shown)
  end = '  '.join(STATUS[:STATUS.index(last) + 1])
  for step in (50, 51, 100, 101):
    assert f'step {step}/1,000  {end}' in shown
  # The reports stay, each in a row of its own that is followed by a new one.
  assert out.getvalue().count(f'step 50/1,000  {end}\n') == 1


def test_an_activity_replaces_the_status():
  with handled(force_terminal=True, width=80) as out:
    progress = Progress(1000)
    progress.report(50, STATUS)
    progress.advance(50, 'evaluating: 3/10 images')
  assert rows(out.getvalue())[-1] == 'step 50/1,000  evaluating: 3/10 images'


def test_other_lines_appear_above_the_live_line(capsys):
  with handled(force_terminal=True, width=80) as out:
    Progress(1000).advance(3)
    logging.getLogger('ppn_jax.jobs.train').warning('skipped: a.jpg')
  assert rows(out.getvalue())[:3] == ['step 3/1,000', 'skipped: a.jpg', 'step 3/1,000']
  assert capsys.readouterr().err == ''


def test_without_a_handler_only_warnings_appear(capsys):
  Progress(1000).report(50, STATUS)
  assert capsys.readouterr() == ('', '')


def test_the_first_loss_is_read_back(tmp_path):
  assert first_loss(tmp_path) is None
  writer = MetricsWriter(tmp_path, 0)
  writer.write(10, {'train/loss': 1.5, FIRST_LOSS: 4.0})
  writer.write(20, {'train/loss': 1.25})
  writer.close()
  assert first_loss(tmp_path) == 4.0
  (tmp_path / 'metrics.jsonl').write_text('{"step": 10, "train/loss": 1.5}\n')
  assert first_loss(tmp_path) == 1.5, 'of runs of earlier versions'


def test_the_last_line_of_a_step_counts(tmp_path):
  writer = MetricsWriter(tmp_path, None)
  for step, ap in ((10, 0.1), (20, 0.2), (10, 0.3)):
    writer.write(step, {'eval/AP': ap})
  writer.write(10, {'train/loss': 1.5})
  writer.close()
  assert read(tmp_path / 'metrics.jsonl') == [
      {'step': 10, 'eval/AP': 0.3}, {'step': 10, 'train/loss': 1.5}, {'step': 20, 'eval/AP': 0.2}]
  MetricsWriter(tmp_path, None, keep=lambda step: step != 10).close()
  assert [line['step'] for line in lines(tmp_path)] == [20]


def test_stopwatch_shares(monkeypatch):
  now = iter([0.0, 1.0, 1.0, 4.0])
  monkeypatch.setattr('ppn_jax.telemetry.progress.time.perf_counter', lambda: next(now))
  watch = Stopwatch()
  with watch.wait():
    pass
  with watch.compute():
    pass
  assert watch.rates(batch_size=8) == {'images_per_second': 2.0, 'data_wait': 0.25}


def test_duration():
  assert [duration(s) for s in (5, 70, 4000)] == ['5s', '1m10s', '1h06m']
