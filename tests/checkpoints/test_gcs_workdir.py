"""Workdirs on gs://, on a stand-in server: killed, resumed, damaged and evaluated."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from gcs_server import serve
from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE, tiny_config, untrained_run

from ppn_jax import storage
from ppn_jax.cli.main import main
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs.evaluate import evaluate
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run
from ppn_jax.training.train_step import abstract_state

TESTS = pathlib.Path(__file__).resolve().parents[1]

STEPS, EVERY = 20, 5


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """Returns (folder of the buckets, environment in which gs:// refers to them)."""
  root = tmp_path_factory.mktemp('buckets')
  (root / 'bucket').mkdir()
  (root / 'forbidden').mkdir()

  def refuse(method, bucket, name):
    closed = root / 'closed'
    return 403 * (bucket == 'forbidden' or (closed.exists() and closed.read_text() in name))

  with serve(root, refuse) as environment:
    yield root, {**os.environ, **environment, 'JAX_PLATFORMS': 'cpu',
                 'PYTHONPATH': f'{TESTS.parent}'}


def python(environment, code, *arguments):
  return subprocess.run([sys.executable, '-c', code, *arguments], env=environment, text=True,
                        capture_output=True, timeout=HANG_SECONDS, check=False)


@pytest.fixture(scope='module')
def runs(store, tmp_path_factory):
  """Workdirs of a run in the bucket, killed once and then evaluated, and of the same, undisturbed,
  in a local folder."""
  root, environment = store
  folder = tmp_path_factory.mktemp('local')
  options = dict(steps=STEPS, checkpoint_every=EVERY, log_every=1, keep_last=2)
  config = folder / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  arguments = ['train', f'--config={config}', '--workdir=gs://bucket/run',
               *(f'--config.train.{name}={value}' for name, value in options.items())]
  with subprocess.Popen([sys.executable, '-m', 'ppn_jax.cli.main', *arguments], env=environment,
                        stderr=subprocess.DEVNULL) as process:
    try:
      deadline = time.monotonic() + HANG_SECONDS
      while not (root / 'bucket/run/checkpoints/10/commit_success.txt').exists():
        assert process.poll() is None and time.monotonic() < deadline, 'no checkpoint to kill after'
        time.sleep(0.02)
    finally:
      process.kill()
  evaluating = ['evaluate', '--workdir=gs://bucket/run', '--follow', '--poll=0.1', '--pictures=2']
  ended = python(environment, f'from ppn_jax.cli.main import main\n'
                 f'raise SystemExit(main({arguments}) or main({evaluating}))')
  assert ended.returncode == 0, ended.stderr
  assert 'resuming gs://bucket/run from step 1' in ended.stderr
  train(tiny_config(**options), folder / 'run')
  return root / 'bucket' / 'run', folder / 'run'


def final_state(workdir):
  run = open_run(workdir)
  like = abstract_state(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    return checkpoints.restore(like, STEPS)


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [(line['step'], line['train/loss']) for line in lines]


@pytest.mark.slow
def test_a_killed_run_equals_the_local_one_bit_for_bit(runs):
  states = [jax.tree.leaves(final_state(workdir)) for workdir in runs]
  assert all(map(np.array_equal, *states))


@pytest.mark.slow
def test_no_line_is_lost_or_repeated(runs):
  bucket, local = runs
  assert [step for step, _ in losses(bucket)] == list(range(1, STEPS + 1))
  assert losses(bucket) == losses(local)
  assert len([p for p in (bucket / 'tensorboard').iterdir() if p.is_file()]) == 2  # Of two starts.


@pytest.mark.slow
def test_old_checkpoints_are_deleted_and_nothing_is_left_behind(runs):
  for workdir in runs:
    assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == ['15', '20']


@pytest.mark.slow
def test_evaluated_in_the_bucket(runs):
  bucket, local = runs
  expected = evaluate(open_run(local)).scores
  folder = bucket / 'evaluation'
  assert json.loads((folder / '20/scores.json').read_text())['figures'] == expected.metrics
  assert len(json.loads((folder / '20/results.json').read_text())) == expected.num_detections
  assert (folder / '20/pictures.png').read_bytes().startswith(b'\x89PNG')
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [15, 20]
  assert list((bucket / 'tensorboard' / 'evaluation').iterdir())
  assert not (bucket / 'readers').exists() and not (bucket / '.training.lock').exists()


DAMAGE = """
import pathlib, shutil, sys, test_damaged_checkpoints as damaged
from ppn_jax import storage
from ppn_jax.checkpoints.manager import Checkpoints
root = pathlib.Path(sys.argv[1])
folder = storage.folder_path('gs://bucket/damage/checkpoints')
with Checkpoints(folder, keep_last=2) as checkpoints:
  for step in (1, 2, 3, 4):
    checkpoints.save(step, damaged.make_state(step))
in_bucket = root / 'bucket/damage/checkpoints'
print(sorted(p.name for p in in_bucket.iterdir()))

shutil.copytree(in_bucket / '4', in_bucket / '9')  # By another machine.
with Checkpoints(folder, read_only=True) as checkpoints:
  print(checkpoints.steps())
shutil.rmtree(in_bucket / '9')

(root / 'closed').write_text('checkpoints/4/')
try:
  damaged.restore_newest(folder, read_only=False)
except Exception as e:
  print(type(e).__name__, isinstance(e, ValueError), (in_bucket / '4').is_dir())
(root / 'closed').unlink()

for _ in range(2):
  data = max((in_bucket / '4/state/d').iterdir(), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:100])
  with Checkpoints(folder, keep_last=2) as checkpoints:
    with damaged.logged() as messages:
      step, state = checkpoints.restore_newest(damaged.like())
    print(step, damaged.same(state, damaged.make_state(3)), checkpoints.steps(), messages[0])
    checkpoints.save(4, damaged.make_state(4))
print(damaged.restore_newest(folder)[0], sorted(p.name for p in (
    root / 'bucket/damage/damaged_checkpoints').iterdir()))
"""


@pytest.mark.slow
def test_damage_is_set_aside_and_an_outage_is_not_damage(store):
  root, environment = store
  path = f'{environment["PYTHONPATH"]}:{TESTS}:{TESTS}/checkpoints'
  done = python({**environment, 'PYTHONPATH': path}, DAMAGE, str(root))
  assert done.returncode == 0, done.stderr
  kept, seen, outage, first, second, last = done.stdout.splitlines()
  assert kept == "['3', '4']" and seen == '[3, 4, 9]'
  assert outage == 'StoreError False True', 'what cannot be read now may be whole'
  for line in (first, second):
    assert line.startswith('3 True [3] gs://bucket/damage/checkpoints/4 is damaged: ')
    assert line.endswith('going back to step 3')
  assert last == "4 ['4', '4-1']"


REFUSED = """
import os
from ppn_jax import storage
from ppn_jax.cli.main import main
storage._CHECK_SECONDS = 1
for bucket in ('missing', 'forbidden', 'bucket', 'unreachable'):
  if bucket == 'unreachable':
    os.environ['STORAGE_EMULATOR_HOST'] = 'http://127.0.0.1:9'
  print(main(['summary', f'--workdir=gs://{bucket}/new']))
"""


@pytest.mark.slow
def test_an_unusable_bucket_is_reported_in_one_line(store):
  done = python(store[1], REFUSED)
  assert done.stdout.split() == ['2'] * 4, done.stderr
  for line, reply in zip(done.stderr.splitlines(), [
      'there is no bucket gs://missing', 'storage.buckets.get is needed',
      'workdir gs://bucket/new is not a run', 'gs://unreachable cannot be reached: '], strict=True):
    assert line.startswith('ppn: error: ') and reply in line


@pytest.mark.parametrize('workdir', ['s3://bucket/run', 'http://host/run', 'gs:///run'])
def test_other_schemes_are_refused(workdir):
  with pytest.raises(InputError, match='must be a local folder or gs://BUCKET/FOLDER'):
    storage.folder_path(workdir)


def test_without_gcsfs_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(InputError, match=r"pip install .*\[gcs\]"):
    storage.folder_path('gs://another/run')


OWNED = """
import sys
from ppn_jax import storage
from ppn_jax.errors import InputError, Stopped
from ppn_jax.distributed import ownership
from ppn_jax.distributed.ownership import Ownership, Process
ownership.HEARTBEAT_SECONDS = 0.1
folder = storage.folder_path('gs://bucket/owned')
path = folder / '.training.lock'

def elsewhere(text):
  return Process.parse(text)._replace(host='pod-1', token='other').as_json(beat=0)

with Ownership(folder, 'training') as first:
  begun = first._version
  while storage.read_versioned(path).version == begun:
    pass
  ownership.HEARTBEAT_SECONDS = 1e6
  print('beats')
  try:
    Ownership(folder, 'training').__enter__()
  except InputError as e:
    print('refused', 'in use by another training: process' in str(e))
  theirs = storage.read_versioned(path)
  while not storage.replace_version(path, elsewhere(theirs.text), theirs.version):
    theirs = storage.read_versioned(path)
  try:
    first._send_heartbeat()
    first.check()
  except Stopped:
    print('lost')
print(Process.parse(storage.read_versioned(path).text).host)
with Ownership(folder, 'training'):  # Its last sign of life is decades old.
  print('taken over')
print(storage.read_versioned(path), storage.replace_version(path, 'x', 12345))
"""


@pytest.mark.slow
def test_a_workdir_in_the_bucket_has_one_owner(store):
  done = python(store[1], OWNED)
  assert done.stdout.splitlines() == [
      'beats', 'refused True', 'lost', 'pod-1', 'taken over', 'None None'], done.stderr


WEIGHTS = """
import sys
import numpy as np
import ppn_jax
from ppn_jax.run import open_model
from ppn_jax.errors import InputError
for path in sys.argv[1:3]:
  print(ppn_jax.load(path)(np.zeros((64, 64, 3), np.uint8)).scores.sum(), open_model(path).step)
try:
  ppn_jax.load('gs://bucket/none.safetensors')
except InputError as e:
  print(e)
"""


@pytest.mark.slow
def test_a_weights_file_in_the_bucket(store, tmp_path):
  root, environment = store
  run = untrained_run(tmp_path / 'run', (6,))
  local = root / 'bucket' / 'mine.safetensors'
  assert main(['export', f'--workdir={run}', '--format=weights', f'--output={local}']) == 0
  done = python(environment, WEIGHTS, str(local), 'gs://bucket/mine.safetensors')
  assert done.returncode == 0, done.stderr
  here, there, missing = done.stdout.splitlines()
  assert here == there and here.endswith(' 6')
  assert missing.startswith('no file gs://bucket/none.safetensors; ')
