"""What a run writes and shows."""

import io
import json
import math

from rich.console import Console
from tensorboardX.proto import event_pb2

from ppn_jax.training import metrics
from ppn_jax.training.metrics import MetricsWriter, Progress, Stopwatch, duration


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def event_scalars(workdir):
  """(tag, step, value) of every scalar in the event files, read without TensorFlow."""
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


def test_a_restart_takes_back_what_will_be_written_again(tmp_path):
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


def test_files_of_versions_that_wrote_minus_one(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 1, "train/gradient": -1, "eval/AP": -1.0, "eval/AP50": 0.5}\n')
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
      {'step': 1, 'train/gradient': -1, 'eval/AP': None, 'eval/AP50': 0.5}]


def test_plain_lines_when_not_on_a_terminal():
  out = io.StringIO()
  with Progress(1000, Console(file=out, force_terminal=False, soft_wrap=True)) as progress:
    progress.say('compiling')
    progress.advance(1)  # Silent: a log file needs no line a step.
    progress.report(50, 'loss 1.5')
  assert out.getvalue().splitlines() == ['compiling', 'step 50/1,000  loss 1.5']


def test_one_live_line_on_a_terminal():
  out = io.StringIO()
  with Progress(1000, Console(file=out, force_terminal=True, width=80)) as progress:
    progress.report(50, 'loss 1.5')
    progress.advance(51)
  assert 'step 51/1,000  loss 1.5' in out.getvalue()


def test_stopwatch_shares(monkeypatch):
  now = iter([0.0, 1.0, 1.0, 4.0])
  monkeypatch.setattr('ppn_jax.training.metrics.time.perf_counter', lambda: next(now))
  watch = Stopwatch()
  with watch.waiting():
    pass
  with watch.stepping():
    pass
  assert watch.rates(batch_size=8) == {'images_per_second': 2.0, 'data_wait': 0.25}


def test_duration():
  assert [duration(s) for s in (5, 70, 4000)] == ['5s', '1m10s', '1h06m']
