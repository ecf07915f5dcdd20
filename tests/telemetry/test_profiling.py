"""Traces, as read by XProf, and estimates of memory and FLOPs."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG_FILE, tiny_config

from ppn_jax.cli.main import main
from ppn_jax.errors import InputError
from ppn_jax.jobs.train import train
from ppn_jax.telemetry import host_memory, profiling


def traced_steps(folder):
  """Returns the step numbers of the annotations in the only trace below `folder`."""
  path, = (folder / 'plugins' / 'profile').glob('*/*.xplane.pb')
  events = [event for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines for event in line.events if event.name == 'train']
  return sorted(dict(event.stats)['step_num'] for event in events)


def run_steps(trace, count, fail_at=None):
  step = jax.jit(lambda x: x @ x / 9)
  x, pending = jnp.ones((9, 9)), []
  with trace:
    for number in range(1, count + 1):
      with trace.step(number, pending):
        x = step(x)
        pending.append(x)
      if number == fail_at:
        raise KeyboardInterrupt


def test_only_the_given_steps_are_traced(tmp_path, log_lines):
  run_steps(profiling.StepTrace(profiling.parse_steps('3:5', 9), tmp_path), 9)
  assert traced_steps(tmp_path) == [3, 4, 5]
  assert len(log_lines) == 1 and str(tmp_path) in log_lines[0]


def test_a_trace_ends_with_the_run(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    run_steps(profiling.StepTrace(range(2, 9), tmp_path), 9, fail_at=3)
  assert traced_steps(tmp_path) == [2, 3]
  run_steps(profiling.StepTrace(range(5, 9), tmp_path / 'more'), 6)  # Another may begin.
  assert traced_steps(tmp_path / 'more') == [5, 6]


def test_no_steps_give_no_trace(tmp_path):
  run_steps(profiling.StepTrace(profiling.parse_steps('', 9), tmp_path), 3)
  assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, log_lines):
  (tmp_path / 'file').write_text('')
  run_steps(profiling.StepTrace(range(1, 2), tmp_path / 'file'), 2)
  assert len(log_lines) == 1 and 'no trace' in log_lines[0]


@pytest.mark.parametrize('text', ['3', '3:', ':3', '3:2', '0:3', '1:10', 'a:b', '1:2:3', '-1:2',
                                  '1.0:2', '٣:٤', ':'])
def test_bad_ranges(text):
  with pytest.raises(InputError, match=f'--profile={text}'):
    profiling.parse_steps(text, 9)


def test_a_bad_range_touches_nothing(tmp_path, capsys):
  (tmp_path / 'tiny_file.py').write_text(CONFIG_FILE.format(folder=str(tmp_path)))
  argv = ['train', f'--config={tmp_path / "tiny_file.py"}', f'--workdir={tmp_path / "w"}']
  assert main([*argv, '--profile=5:7']) == 2
  assert '--profile=5:7 must lie within the steps of the run, 1:6' in capsys.readouterr().err
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_training_traces_and_reports(tmp_path, log_lines):
  train(tiny_config(), tmp_path, profile='2:3')
  messages = '\n'.join(log_lines)
  assert 'a step needs' in messages and 'GFLOP' in messages and 'memory host' in messages
  assert traced_steps(tmp_path / 'tensorboard') == [2, 3]
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  peaks = [line['train/host_peak_bytes'] for line in lines]
  # The kernel's count of a process may fall back by some pages.
  assert 1e8 < peaks[-1] == pytest.approx(host_memory.peak_memory(), rel=0.02)
  assert all(before < 1.01 * after for before, after in itertools.pairwise(peaks))


def test_estimates_of_a_known_program():
  arguments = [jax.ShapeDtypeStruct((1000, 1000), jnp.float32)] * 2
  messages = profiling.describe(jax.jit(jnp.matmul).lower(*arguments).compile())
  assert '12 MB of memory' in messages and '2 GFLOP' in messages


def test_peak_memory_includes_freed_memory():
  before = host_memory.peak_memory()
  np.ones(before // 8 + 4_000_000)  # 8 bytes each; freed at once.
  assert host_memory.peak_memory() > before


@pytest.mark.parametrize('count, text', [(0, '0 bytes'), (999, '999 bytes'), (1234567, '1.23 MB'),
                                         (5e9, '5 GB'), (1.5e12, '1,500 GB')])
def test_format_bytes(count, text):
  assert profiling.format_bytes(count).replace('1.5e+03', '1,500') == text
