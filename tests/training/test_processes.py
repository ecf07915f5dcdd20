"""Processes that are joined compute what one does, and write once what one writes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny import CONFIG_FILE

from ppn_jax.errors import InputError
from ppn_jax.evaluation.job import evaluate
from ppn_jax.run import open_run
from ppn_jax.training import partition

TESTS = pathlib.Path(__file__).resolve().parents[1]
LOCAL_POD = TESTS.parent / 'launch' / 'local_pod.sh'
# Compiling is most of the time here, and none of the matter.
FAST_COMPILE = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}

# In float64: in float32 sums in another order change single gradients by up to a percent.
STEPS = """
import pathlib, sys
import jax
sys.path.insert(0, sys.argv[1])
jax.config.update('jax_enable_x64', True)
from ppn_jax.cli.main import _Parser
from ppn_jax.cli.flags import add_process_flags, join_processes
parser = _Parser()
add_process_flags(parser)
join_processes(parser.parse_args(sys.argv[3:]))
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config
from ppn_jax.data.loader import train_batches
from ppn_jax.data.sources import build_source
from ppn_jax.run import build_detector
from ppn_jax.training import partition
from ppn_jax.training.optim import build_optimizer
from ppn_jax.training.step import jit_init, jit_train_step

config = tiny_config().copy_and_resolve_references().unlock()
config.model.num_classes = 5
config.model.layers.dtype = 'float64'
config.model.backbone.last_block, config.model.neck.stride, config.model.neck.num_levels = 3, 4, 2
detector = build_detector(config)
optimizer = build_optimizer(steps=3, batch_size=8, learning_rate=.1, ema_decay=.9)
source = build_source({'name': 'synthetic_shapes', 'num_images': 10, 'image_size': 64})
mesh = partition.data_mesh()
widen = jax.jit(lambda tree: jax.tree.map(
    lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree))
state = widen(jit_init(detector, optimizer, mesh)(0))
step, losses = jit_train_step(detector, optimizer, mesh), []
batches = train_batches(source, transforms=(), image_size=64, max_boxes=8, batch_size=8, seed=0,
                        rows=partition.local_rows(8, mesh))
for batch, _ in zip(batches, range(3)):
  assert len(batch.images) == 8 // jax.process_count()
  state, metrics = step(state, *partition.to_global((batch.images, batch.truth), mesh, 8))
  losses.append(float(metrics.loss))
if jax.process_index() == 0:
  leaves = jax.tree.leaves(jax.device_get(state))
  np.savez(sys.argv[2], *leaves, losses=np.array(losses), devices=jax.device_count())
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
  command = [sys.executable, '-c', STEPS, str(TESTS)]
  port = _free_port()
  environment = {**os.environ, **FAST_COMPILE}
  alone = subprocess.Popen([*command, str(tmp_path / 'one.npz'), '--local_devices=1'],
                           env=environment)
  together = [subprocess.Popen([
      *command, str(tmp_path / 'two.npz'), f'--coordinator=localhost:{port}', '--num_processes=2',
      f'--process_id={i}', '--local_devices=2'], env=environment) for i in range(2)]
  assert [p.wait(timeout=120) for p in (alone, *together)] == [0, 0, 0]
  one, two = (dict(np.load(tmp_path / name)) for name in ('one.npz', 'two.npz'))
  assert one.pop('devices') == 1 and two.pop('devices') == 4
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-11, err_msg=name)


def _free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


@pytest.fixture(scope='module')
def pod(tmp_path_factory):
  """A run of two processes with two devices each, through launch/local_pod.sh."""
  folder = tmp_path_factory.mktemp('pod')
  (folder / 'config.py').write_text(CONFIG_FILE.format(folder=str(TESTS)))
  (folder / 'bin').mkdir()
  ppn = folder / 'bin' / 'ppn'
  ppn.write_text(f'#!/bin/sh\nexec {sys.executable} -m ppn_jax.cli.main "$@"\n')
  ppn.chmod(0o755)
  environment = {**os.environ, **FAST_COMPILE, 'PATH': f'{folder}/bin:{os.environ["PATH"]}',
                 'PYTHONPATH': str(TESTS.parent)}

  def launch(*arguments):
    command = ['bash', str(LOCAL_POD), '--processes=2', '--devices=2', '--', *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=400)

  result = launch('train', f'--config={folder}/config.py', f'--workdir={folder}/run',
                  '--config.train.evaluate_every=3', '--config.model.backbone.last_block=3',
                  '--config.model.neck.stride=4', '--config.model.neck.num_levels=2')
  assert result.returncode == 0, result.stderr
  return folder / 'run', result, launch


def test_a_run_is_written_once(pod):
  workdir, result, _ = pod
  assert 'exit codes 0 0' in result.stderr and 'on 4 x cpu' in result.stderr
  assert '[1] step' not in result.stderr
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [2, 3, 3, 4, 6, 6]
  assert len(list((workdir / 'tensorboard').iterdir())) == 1
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [3, 6]


def test_evaluation_gives_the_figures_of_one_process(pod):
  workdir, _, launch = pod
  last = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
  one = evaluate(open_run(workdir), output=workdir / 'alone', say=lambda _: None).scores.figures
  for name, value in one.items():
    assert last[f'eval/{name}'] == pytest.approx(value, abs=1e-6, nan_ok=True), name
  result = launch('evaluate', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('detections on 6 images') == 1
  two = json.loads((workdir / 'evaluation' / '6' / 'scores.json').read_text())['figures']
  assert two == pytest.approx(one, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize('arguments, said', [
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
def test_flags_that_do_not_go_together(arguments, said):
  with pytest.raises(InputError, match=said):
    partition.join_processes(**arguments)


@pytest.mark.parametrize('process, code', [(0, 2), (1, 2)])
def test_others_that_never_come_end_in_one_line(process, code):
  result = subprocess.run(
      [sys.executable, '-c', 'from ppn_jax.training import partition\npartition.join_processes('
       f'coordinator="localhost:{_free_port()}", num_processes=2, process_id={process}, '
       'timeout=2)'],
      text=True, capture_output=True, timeout=60)
  assert result.returncode == code
  assert result.stderr.splitlines()[-1].startswith('ppn: error: not all processes at localhost:')


def test_auto_on_a_machine_of_no_slice():
  result = subprocess.run(
      [sys.executable, '-c', 'from ppn_jax.training import partition\n'
       'partition.join_processes(distributed="auto")'], text=True, capture_output=True, timeout=60)
  assert 'InputError: --distributed=auto finds no TPU slice' in result.stderr
