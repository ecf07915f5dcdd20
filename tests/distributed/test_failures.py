"""If one process of a run fails, the others end soon, with its reason and its exit code."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE

TESTS = pathlib.Path(__file__).resolve().parents[1]

# `ppn train`, in which the first process waits for the second in a way that nothing interrupts.
PROCESS = """
import os, signal, sys, time
import numpy as np
from ppn_jax.cli import flags, main, train
from ppn_jax.errors import InputError
from ppn_jax.distributed import sharding
culprit, failure, wait = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sharding.HEARTBEAT_SECONDS = 6 if failure == 'kill' else 7200  # Longer than the test waits.

def run(args):
  flags.join_processes(args)
  import jax
  from jax.experimental import multihost_utils
  from ppn_jax.distributed import coordination
  multihost_utils.process_allgather(np.arange(3))
  if jax.process_index() == culprit:
    print('up', flush=True)
    if failure == 'kill':
      os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    raise {'mistake': InputError('image 7 is damaged'), 'bug': KeyError('seven')}[failure]
  if wait == 'collective':
    multihost_utils.process_allgather(np.arange(3))
  coordination.client().wait_at_barrier('never', 300_000)

train.run = run
sys.exit(main.main(['train', '--config=c', '--workdir=w', *sys.argv[4:]]))
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def start(command, count=2, devices=1, **environment):
  port = free_port()
  environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', **environment}
  return [subprocess.Popen(
      [*command, f'--coordinator=localhost:{port}', f'--num_processes={count}',
       f'--process_id={i}', f'--local_devices={devices}'], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, cwd=TESTS.parent, env=environment) for i in range(count)]


def ends(processes):
  """Returns exit code and stderr of each process."""
  outputs = [p.communicate(timeout=HANG_SECONDS)[1] for p in processes]
  return [p.returncode for p in processes], outputs


def misbehave(culprit, failure, wait):
  """Returns how both end, which must not take until the heartbeats are missed."""
  processes = start([sys.executable, '-c', PROCESS, str(culprit), failure, wait])
  if not any(line == 'up\n' for line in processes[culprit].stdout):  # Gloo writes there, too.
    pytest.fail(str(ends(processes)))
  return ends(processes)


@pytest.mark.slow
@pytest.mark.parametrize('culprit, failure, wait, code, line', [
    (1, 'mistake', 'barrier', 2, 'image 7 is damaged'),
    (0, 'mistake', 'collective', 2, 'image 7 is damaged'),
    (1, 'bug', 'collective', 1, "KeyError: 'seven'"),
])
def test_all_end_with_the_reason_and_exit_code_of_the_first(culprit, failure, wait, code, line):
  codes, outputs = misbehave(culprit, failure, wait)
  assert codes == [code, code], outputs
  assert f'ppn: process {culprit} stopped: {line}' in outputs[1 - culprit].splitlines()
  assert 'Traceback' not in outputs[1 - culprit]
  if failure == 'mistake':
    assert outputs[culprit].splitlines()[-1] == f'ppn: error: {line}'
  else:
    assert 'Traceback' in outputs[culprit] and outputs[culprit].rstrip().endswith(line)


@pytest.mark.slow
def test_a_killed_process_ends_the_others():
  codes, outputs = misbehave(1, 'kill', 'barrier')
  assert codes == [-signal.SIGABRT, -signal.SIGKILL], outputs
  assert 'stopped sending heartbeats' in outputs[0]


# A data set whose image 3 only the second host cannot read.
SOURCE = """
import jax
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.errors import InputError

class Shapes(SyntheticShapes):
  def __getitem__(self, index):
    if index == 3 and jax.process_index() == 1:
      raise InputError('image 3 is damaged')
    return super().__getitem__(index)
"""


def train_on_damaged_shapes(tmp_path, block, *arguments):
  (tmp_path / 'damaged_shapes.py').write_text(SOURCE)
  (tmp_path / 'config.py').write_text(CONFIG_FILE.format(folder=str(TESTS)))
  environment = {'PYTHONPATH': f'{tmp_path}:{TESTS.parent}'}
  return ends(start(
      [sys.executable, '-m', 'ppn_jax.cli.main', 'train', f'--config={tmp_path}/config.py',
       f'--workdir={tmp_path}/run', f'--config.data.{block}.name=damaged_shapes:Shapes',
       f'--config.data.{block}.num_images={6 if block == "eval" else 10}',
       f'--config.data.{block}.image_size=64', f'--config.data.{block}.split={block}',
       '--config.train.evaluate_every=3', '--config.train.checkpoint_every=1',
       '--config.model.backbone.last_block=3', '--config.model.neck.stride=4',
       '--config.model.neck.num_levels=2', *arguments], **environment))


@pytest.mark.slow
@pytest.mark.parametrize('block', ['train', 'eval'])
def test_a_damaged_image_on_one_host_ends_training_on_all(tmp_path, block):
  codes, outputs = train_on_damaged_shapes(tmp_path, block, '--config.train.steps=30')
  assert codes == [2, 2], outputs
  assert 'ppn: process 1 stopped: ' in outputs[0] and 'image 3 is damaged' in outputs[0]
  assert 'Traceback' not in ''.join(outputs)
  assert 'ppn: error: ' in outputs[1] and 'image 3 is damaged' in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize('block', ['train', 'eval'])
def test_a_damaged_image_that_one_host_skips_is_reported_by_the_first(tmp_path, block):
  codes, outputs = train_on_damaged_shapes(
      tmp_path, block, '--config.data.on_bad_example=skip', '--config.data.max_bad_share=0.5',
      '--config.train.steps=12')
  assert codes == [0, 0], outputs
  assert outputs[0].count('skipped: ') == 1 and 'image 3 is damaged' in outputs[0]
  assert 'image 3 is damaged' in (tmp_path / 'run' / 'bad_examples.txt').read_text()


@pytest.mark.slow
def test_evaluation_in_several_processes_ends_on_sigterm(tmp_path):
  processes = start([sys.executable, '-m', 'ppn_jax.cli.main', 'evaluate', '--follow',
                     f'--workdir={tmp_path}/none'])
  assert any(line.startswith('waiting for training') for line in processes[0].stderr)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  assert ends(processes)[0] == [-signal.SIGTERM] * 2
