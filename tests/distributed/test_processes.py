"""Several processes compute the same as one, and write every file once."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs.evaluate import evaluate
from ppn_jax.run import open_run
from ppn_jax.storage import folder_path
from ppn_jax.weights.workdir import read_workdir

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS.parent / 'benchmarks'))
import processes  # noqa: E402

LOCAL_POD = TESTS.parent / 'launch' / 'local_pod.sh'
# Compiling is most of the time here, and none of the matter.
FAST_COMPILE = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


@pytest.mark.slow
def test_two_and_four_processes_compute_the_steps_of_one(tmp_path):
  """Uses float64: in float32 another order of sums changes single gradients by up to a percent."""
  one = processes.run(tmp_path, 1, 6, until=6)
  two = processes.run(tmp_path, 2, 6, until=3, workdir='broken')
  four = processes.run(tmp_path, 4, 6, until=6, workdir='broken')
  np.testing.assert_array_equal(np.concatenate([two['ids'], four['ids']]), one['ids'])
  assert len(np.unique(one['ids'][:2])) == 16  # Of 20 images; each is shown once an epoch.
  losses = np.concatenate([two['losses'], four['losses']])
  np.testing.assert_allclose(losses, one['losses'], rtol=1e-9)
  assert json.loads(str(four['figures'])) == json.loads(str(one['figures']))
  states = [name for name in one if name.startswith('state')]
  assert len(states) > 10 and all(one[name].dtype == np.float64 for name in states)
  for name in states:
    np.testing.assert_allclose(four[name], one[name], rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.slow
def test_frozen_blocks_keep_their_bits_in_two_processes(tmp_path):
  entries = ['optim.freeze=backbone/conv2d_[0-1]', 'optim.ema_decay=0.9',
             'optim.micro_batches=2', 'optim.shard_state=True']
  one, start = (processes.run(tmp_path, 1, 4, until=until, entries=entries) for until in (4, 1))
  processes.run(tmp_path, 2, 4, until=2, workdir='broken', entries=entries)
  two = processes.run(tmp_path, 2, 4, until=4, workdir='broken', entries=entries)
  np.testing.assert_allclose(two['losses'], one['losses'][2:], rtol=1e-9)
  frozen = {name for name in one if re.match('state/.*/backbone/conv2d_[01]/', name)}
  assert len(frozen) > 10
  for name in (name for name in one if name.startswith('state')):
    np.testing.assert_allclose(two[name], one[name], rtol=1e-8, atol=1e-10, err_msg=name)
    assert np.array_equal(two[name], start[name]) == (name in frozen), name


def _free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def pod_launcher(folder, program='-m ppn_jax.cli.main'):
  """Returns a function that runs two processes of two devices each by launch/local_pod.sh.

  Args:
    folder: For the config file, config.py, and for a command `ppn`.
    program: What Python runs as that command.
  """
  (folder / 'config.py').write_text(CONFIG_FILE.format(folder=str(TESTS)))
  (folder / 'bin').mkdir()
  ppn = folder / 'bin' / 'ppn'
  ppn.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
  ppn.chmod(0o755)
  environment = {**os.environ, **FAST_COMPILE, 'PATH': f'{folder}/bin:{os.environ["PATH"]}',
                 'PYTHONPATH': str(TESTS.parent)}

  def launch(*arguments):
    command = ['bash', str(LOCAL_POD), '--processes=2', '--devices=2', '--', *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True,
                          timeout=HANG_SECONDS)

  return launch


SMALLER = ('--config.model.backbone.last_block=3', '--config.model.neck.stride=4',
           '--config.model.neck.num_levels=2')


@pytest.fixture(scope='module')
def pod(tmp_path_factory):
  """Trains in two processes."""
  folder = tmp_path_factory.mktemp('pod')
  launch = pod_launcher(folder)
  result = launch('train', f'--config={folder}/config.py', f'--workdir={folder}/run',
                  '--config.train.evaluate_every=3', *SMALLER)
  assert result.returncode == 0, result.stderr
  return folder / 'run', result, launch


@pytest.mark.slow
def test_a_run_is_written_once(pod):
  workdir, result, _ = pod
  assert 'exit codes 0 0' in result.stderr and 'on 4 x cpu' in result.stderr
  assert '[1] step' not in result.stderr
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [2, 3, 3, 4, 6, 6]
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [3, 6]


@pytest.mark.slow
def test_evaluation_gives_the_scores_of_one_process(pod):
  workdir, _, launch = pod
  last = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
  one = evaluate(open_run(workdir), output=workdir / 'alone').scores.metrics
  for name, value in one.items():
    assert last[f'eval/{name}'] == pytest.approx(value, abs=1e-6, nan_ok=True), name
  result = launch('evaluate', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('detections on 6 images') == 1
  two = json.loads((workdir / 'evaluation' / '6' / 'scores.json').read_text())['figures']
  assert two == pytest.approx(one, abs=1e-6, nan_ok=True)


# Prints what each process holds after batch norm is put back, and may end before the first step.
PUT_BACK = """
import hashlib, os, sys
import jax
from ppn_jax.cli.main import main
from ppn_jax.jobs import train
put_back = train._with_batch_norm

def tell(*args):
  run, state = put_back(*args)
  values = b''.join(bytes(leaf.addressable_data(0)) for leaf in jax.tree.leaves(state.variables))
  print('holds', hashlib.sha256(values).hexdigest(), flush=True)
  return run, state

train._with_batch_norm = tell
if '--kill' in sys.argv:
  sys.argv.remove('--kill')
  train.TrainLoop.run_steps = lambda *_: os._exit(9)
sys.exit(main())
"""


@pytest.mark.slow
def test_batch_norm_is_put_back_with_the_same_bits_in_all_processes_and_after_a_kill(tmp_path):
  pytest.importorskip('tflite')
  from tflite_writer import write_classifier
  write_classifier(tmp_path / 'x.tflite')
  (tmp_path / 'put_back.py').write_text(PUT_BACK)
  launch = pod_launcher(tmp_path, tmp_path / 'put_back.py')

  def train(name, codes, *options):
    result = launch('train', f'--config={tmp_path}/config.py', f'--workdir={tmp_path / name}',
                    f'--config.init.backbone={tmp_path / "x.tflite"}', '--config.train.steps=3',
                    # More images than there are.
                    '--config.init.norm_images=20', '--config.optim.ema_decay=0.9', *SMALLER,
                    *options)
    assert f'exit codes {codes}' in result.stderr, result.stderr
    held = re.findall(r'\[(\d)\] holds (\w+)', result.stdout)
    assert sorted(process for process, _ in held) == ['0', '1']
    assert 'put back from 20 training images' in result.stderr
    return {digest for _, digest in held}

  held = [train('whole', '0 0'), train('killed', '9 9', '--kill'), train('killed', '0 0')]
  assert held[0] == held[1] == held[2] and len(held[0]) == 1
  whole, killed = (read_workdir(folder_path(tmp_path / name)).values
                   for name in ('whole', 'killed'))
  assert len(whole) > 40 and whole.keys() == killed.keys()
  for path, value in whole.items():
    np.testing.assert_array_equal(killed[path], value, err_msg=str(path))


# The first process has a clock that runs faster and faster, so that a run is slower than it was
# measured to be. That of the second stands still.
CLOCK = """
import itertools, sys
import jax
from ppn_jax.cli.main import main
from ppn_jax.jobs import time_budget
ticks = itertools.count()
time_budget.now = lambda: 0.0 if jax.process_index() else 0.5 * next(ticks) ** 2
sys.exit(main())
"""


@pytest.mark.slow
def test_processes_agree_on_an_early_end(tmp_path):
  (tmp_path / 'clock.py').write_text(CLOCK)
  launch = pod_launcher(tmp_path, tmp_path / 'clock.py')

  def train(name, *options):
    result = launch('train', f'--config={tmp_path}/config.py', f'--workdir={tmp_path / name}',
                    '--config.train.evaluate_every=3', *SMALLER, *options)
    assert 'exit codes 0 0' in result.stderr, result.stderr
    run = open_run(tmp_path / name)
    return run, result.stderr

  # No gain is above 1, so the second evaluation is the last.
  patient = ('--config.train.steps=30', '--config.train.patience=1',
             '--config.train.min_improvement=1')
  run, output = train('patient', *patient)
  assert max(run.saved_steps()) == run.ending().step == 6
  assert 'ended at step 6 of 30: AP has not improved for 1 evaluation' in output
  _, output = train('patient', *patient)
  assert 'nothing to do' in output and 'ended at step 6, since AP has not improved' in output

  run, output = train('timed', '--config.train.steps=0', '--config.train.minutes=1')
  planned, end = run.config.train.steps, run.ending()
  assert json.loads((run.workdir / 'time_budget.json').read_text())['steps'] == planned
  assert 1 <= end.step < planned and max(run.saved_steps()) == end.step
  assert f'ended at step {end.step} of {planned}' in output
  last = json.loads((run.workdir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['step'] == end.step and 'eval/AP' in last
  _, output = train('timed', '--config.train.steps=0', '--config.train.minutes=1')
  assert f'ended at step {end.step}, since ' in output


@pytest.mark.parametrize('arguments, message', [
    (dict(coordinator='localhost:1'), '--num_processes, --process_id missing'),
    (dict(num_processes=2, process_id=0), '--coordinator missing'),
    (dict(coordinator='localhost:1', num_processes=2, process_id=2), '--process_id=2'),
    (dict(coordinator='localhost:1', num_processes=0, process_id=0), '--process_id=0'),
    (dict(coordinator='localhost', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='localhost:70000', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='h:1', num_processes=2, process_id=0, distributed='auto'), 'not both'),
    (dict(distributed='yes'), "'yes' is unknown"),
    (dict(local_devices=-1), '--local_devices=-1'),
    (dict(timeout=0), '--join_timeout=0'),
])
def test_flags_that_do_not_fit_together(arguments, message):
  with pytest.raises(InputError, match=message):
    sharding.join_processes(**arguments)


def test_a_machine_whose_name_has_no_address(monkeypatch):
  monkeypatch.setattr(socket, 'gethostname', lambda: 'nobody-knows.invalid')
  with pytest.raises(InputError, match=r"name 'nobody-knows\.invalid' has no address .*/etc/hosts"):
    sharding.join_processes(coordinator='localhost:1', num_processes=2, process_id=0)


@pytest.mark.parametrize('process, code', [(0, 2), (1, 2)])
def test_missing_processes_end_in_one_line(process, code):
  result = subprocess.run(
      [sys.executable, '-c', 'from ppn_jax.distributed import sharding\nsharding.join_processes('
       f'coordinator="localhost:{_free_port()}", num_processes=2, process_id={process}, '
       'timeout=2)'],
      text=True, capture_output=True, timeout=HANG_SECONDS)
  assert result.returncode == code
  assert result.stderr.splitlines()[-1].startswith('ppn: error: not all processes at localhost:')


def test_auto_on_a_machine_outside_a_slice():
  result = subprocess.run(
      [sys.executable, '-c', 'from ppn_jax.distributed import sharding\n'
       'sharding.join_processes(distributed="auto")'], text=True, capture_output=True,
      timeout=HANG_SECONDS)
  assert 'InputError: --distributed=auto finds no TPU slice' in result.stderr
