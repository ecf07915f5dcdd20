"""A process that is slow is named, and one that hangs ends the run of all, with their stacks."""

import json
import re

import pytest
from two_processes import TESTS, train_in_two_processes

SOURCE = """
import os, time
from ppn_jax.data.sources.synthetic import SyntheticShapes
class SlowShapes(SyntheticShapes):
  def __getitem__(self, index):
    time.sleep(float(os.environ.get('SECONDS_PER_IMAGE', '0')))
    if os.path.exists(os.environ.get('HANGS_IF_EXISTS', '')):
      time.sleep(3600)
    return super().__getitem__(index)
"""

CONFIG = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from tiny import tiny_config
def get_config():
  config = tiny_config().unlock()
  config.data.train.name = 'slow_source:SlowShapes'
  return config.lock()
"""


@pytest.fixture
def slow_source(tmp_path):
  (tmp_path / 'slow_source.py').write_text(SOURCE)
  (tmp_path / 'config.py').write_text(CONFIG.format(tests=str(TESTS), here=str(tmp_path)))
  return tmp_path


@pytest.mark.slow
def test_the_process_that_waits_for_data_is_named(slow_source):
  codes, output, _ = train_in_two_processes(
      slow_source, slow_source / 'run', steps=16, environments=({}, {'SECONDS_PER_IMAGE': '2'}),
      more=['--config.train.log_every=4'])
  assert codes == [0, 0], output
  assert re.search(r'step 16/16 .* data \d+% \(most \d+%, process 1 on \S+\)', output), output
  lines = [json.loads(line) for line in (slow_source / 'run' / 'metrics.jsonl').open()]
  assert lines[-1]['train/slowest_process'] == 1
  assert lines[-1]['train/slowest_data_wait'] > 0.3


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_with_the_stacks_of_all(slow_source):
  trigger = slow_source / 'hang'

  def on_line(line, processes):
    if line.startswith('step 20/'):
      trigger.touch()

  workdir = slow_source / 'run'
  codes, *outputs = train_in_two_processes(
      slow_source, workdir, on_line, steps=100_000, environments=(
          {}, {'HANGS_IF_EXISTS': str(trigger)}),
      more=['--config.train.stuck_factor=20', '--config.train.stuck_seconds=20'])
  assert codes == [1, 1], outputs
  for output in outputs:
    assert 'stacks of all threads' in output and 'train_loop.py' in output, output
    assert re.search(r'stopped: .*step \d+ hangs', output.replace(',', '')), output
  assert 'slow_source.py' in outputs[1]  # Where it hangs.
  logs = [path.read_text() for path in sorted((workdir / 'logs').glob('*.log'))]
  assert len(logs) == 2 and all('stacks of all threads' in log for log in logs)
