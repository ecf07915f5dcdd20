"""`ppn evaluate` of many steps, as typed: sweeps, following, kills and mistakes."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from time_limits import HANG_SECONDS
from tiny import tiny_config

from ppn_jax.cli.main import main
from ppn_jax.jobs import train as train_job

TESTS = pathlib.Path(__file__).resolve().parents[1]
PPN = [sys.executable, '-m', 'ppn_jax.cli.main']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config(steps=4, checkpoint_every=1, keep_last=9)
  with config.unlocked():
    config.optim.ema_decay = 0.9
    config.model.backbone.last_block = 3
    config.model.neck.update(stride=4, num_levels=2)
  train_job.train(config, workdir)
  return workdir


def figures(folder, step):
  return json.loads((folder / str(step) / 'scores.json').read_text())['figures']


def start(*arguments):
  return subprocess.Popen([*PPN, 'evaluate', *map(str, arguments)], cwd=TESTS.parent, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_a_sweep_of_the_raw_weights_and_one_step_again(run, tmp_path, capsys):
  assert main(['evaluate', f'--workdir={run}', '--steps=2::2', '--no-ema']) == 0
  table = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in table] == ['step', '2', '4']
  raw = run / 'evaluation_raw'
  assert sorted(p.name for p in raw.iterdir()) == ['2', '4', 'metrics.jsonl']
  assert not (run / 'evaluation').exists()
  argv = ['evaluate', f'--workdir={run}', '--step=4', '--no-ema', f'--output={tmp_path}']
  assert main(argv) == 0
  alone = json.loads((tmp_path / 'scores.json').read_text())['figures']
  assert alone == pytest.approx(figures(raw, 4), nan_ok=True)


@pytest.mark.slow
def test_a_killed_follower_goes_on_where_it_was(run):
  folder = run / 'evaluation'
  first = start(f'--workdir={run}', '--follow', '--poll=0.2')
  deadline = time.monotonic() + HANG_SECONDS
  while not list(folder.glob('*/scores.json')) and time.monotonic() < deadline:
    time.sleep(0.01)
  first.send_signal(signal.SIGKILL)
  first.communicate()
  done = {path: path.stat().st_mtime_ns for path in folder.glob('*/scores.json')}
  assert done
  ports = socket.socket()
  ports.bind(('', 0))
  port = ports.getsockname()[1]
  ports.close()
  together = [start(f'--workdir={run}', '--follow', '--poll=0.2', '--num_processes=2',
                    f'--coordinator=localhost:{port}', f'--process_id={i}') for i in range(2)]
  (out, said), (other, _) = [process.communicate(timeout=HANG_SECONDS) for process in together]
  assert [process.returncode for process in together] == [0, 0], said
  table, nothing = ([line.split()[0] for line in text.splitlines() if 'Gloo' not in line]
                    for text in (out, other))
  assert table == ['step', '1', '2', '3', '4'] and not nothing
  assert said.count('evaluating step') == 4 - len(done)
  assert all(path.stat().st_mtime_ns == before for path, before in done.items())
  curve = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in curve] == [1, 2, 3, 4]
  assert [line['eval/AP'] for line in curve] == [figures(folder, s)['AP'] for s in range(1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize('flags, said', [
    (['--steps=9:'], 'no checkpoint'),
    (['--steps=x'], '--steps=x is not a range'),
    (['--steps=all', '--step=3'], 'not allowed with'),
    (['--follow', '--step=3'], 'not allowed with'),
    (['--follow', '--poll=0'], '--poll=0'),
    (['--follow', '--timeout=-1'], '--timeout=-1'),
    (['--follow', '--config.eval.batch_size=2'], '--output'),
    (['--matmul_dtype=auto'], '--output'),
])
def test_mistakes(run, capsys, flags, said):
  assert jax.process_count() == 1
  assert main(['evaluate', f'--workdir={run}', *flags]) == 2
  errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith('ppn: error: ')]
  assert len(errors) == 1 and said in errors[0]


def test_a_training_that_does_not_come(tmp_path, capsys):
  argv = ['evaluate', f'--workdir={tmp_path}', '--follow', '--poll=0.01', '--timeout=0.05']
  assert main(argv) == 2
  assert 'waiting for training to begin' in capsys.readouterr().err
