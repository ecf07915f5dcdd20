"""`prepare` with a bucket, on a stand-in server: complete or no data set, and continued."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gcs_server import forget_clients, serve
from log_lines import logged
from time_limits import HANG_SECONDS
from tiny import CONFIG_FILE

from ppn_jax import storage
from ppn_jax.data import prepared_files
from ppn_jax.data.prepare import Options, prepare
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.distributed.ownership import Ownership
from ppn_jax.errors import InputError, StoreError

pytest.importorskip('tensorflow_datasets')
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Bucket:
  """A bucket in a local folder, and which of its objects may not be written."""

  def __init__(self, root):
    self.folder, self.refused, self.written = root / 'bucket', '', []
    self.folder.mkdir()

  def refuse(self, method, bucket, name):
    if method in ('POST', 'PUT') and name:
      self.written.append(name.rpartition('/')[2])
    return 403 * bool(self.refused and method != 'GET' and self.refused in name)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  bucket = Bucket(tmp_path)
  with serve(tmp_path, bucket.refuse) as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    forget_clients()
    yield bucket
  forget_clients()


def source(images=6):
  return SyntheticShapes(num_images=images, image_size=64)


def make(images=6, said=None, progress=lambda done, total: None, **options):
  with logged(said):
    return prepare({'train': source(images)}, 'gs://bucket/sets',
                   Options(**{'name': 'toy', 'shards': 3, 'threads': 1} | options),
                   progress=progress)


def names(bucket):
  return sorted(p.name for p in (bucket.folder / 'sets').rglob('*') if p.is_file())


def is_readable():
  found = []
  for arguments in (('toy', 'train', 'gs://bucket/sets'),
                    ('', 'train', 'gs://bucket/sets/toy/1.0.0')):
    try:
      Tfds(*arguments)
      found.append(True)
    except InputError:
      found.append(False)
  assert len(set(found)) == 1
  return found[0]


@pytest.mark.slow
def test_the_same_files_as_in_a_local_folder(bucket, tmp_path):
  local = prepare({'train': source()}, tmp_path / 'out',
                  Options('toy', shards=3, threads=1), progress=lambda *_: None)
  folder = make()
  assert str(folder) == 'gs://bucket/sets/toy/1.0.0'
  theirs = bucket.folder / 'sets' / 'toy' / '1.0.0'
  assert names(bucket) == sorted(p.name for p in local.iterdir())
  for file in local.iterdir():
    if file.name not in ('dataset_info.json', 'prepared.json'):
      assert (theirs / file.name).read_bytes() == file.read_bytes()
  read, expected = Tfds('toy', 'train', 'gs://bucket/sets'), Tfds(data_dir=str(local))
  assert read.ground_truth() == expected.ground_truth()
  np.testing.assert_array_equal(read[4].image, expected[4].image)
  prepared = [json.loads((where / 'prepared.json').read_text()) for where in (theirs, local)]
  assert prepared[0]['sha256'].keys() == prepared[1]['sha256'].keys()


@pytest.mark.slow
def test_the_disk_holds_two_shards_at_most(bucket, monkeypatch):
  folders, occupied = [], []
  add = prepared_files.Upload.add_shard

  def remember(self, path):
    folders.append(path.parent)
    add(self, path)

  def measure(done, total):
    for folder in folders[-1:]:
      occupied.append(sum(p.stat().st_blocks > 0 for p in folder.glob('*record-*')))

  monkeypatch.setattr(prepared_files.Upload, 'add_shard', remember)
  make(20, shards=10, progress=measure)
  assert len(occupied) >= 10 and max(occupied) <= 3  # One is being written.
  assert not folders[0].exists()


def test_stopped_anywhere_it_is_no_data_set_and_the_next_call_completes_it(bucket):
  class Killed(BaseException):
    pass

  def die(done, total):
    if done == 5:  # Two of three shards are complete.
      raise Killed

  with pytest.raises(Killed):
    make(progress=die)
  left = names(bucket)
  assert 'toy-train.array_record-00000-of-00003' in left and 'unfinished.json' in left
  assert not is_readable()
  for refused in ('00002-of', 'features.json', 'dataset_info.json'):
    bucket.refused = f'toy/1.0.0/{refused}' if 'json' in refused else refused
    with pytest.raises((StoreError, PermissionError)):
      make()
    assert not is_readable()
  bucket.refused, bucket.written, said = '', [], []
  folder = make(said=said)
  assert is_readable() and 'unfinished.json' not in names(bucket)
  assert not any('record-' in name for name in bucket.written), 'they were there already'
  assert any('files were in gs://bucket/sets/toy/1.0.0 already' in line for line in said)
  assert len(Tfds(data_dir=str(folder))) == 6


@pytest.mark.slow
def test_what_is_left_of_another_number_of_shards_is_removed(bucket):
  bucket.refused = 'features.json'
  with pytest.raises((StoreError, PermissionError)):
    make(shards=4)
  bucket.refused = ''
  make(shards=2)
  assert sum('record-' in name for name in names(bucket)) == 2 and is_readable()


def test_again_is_a_check(bucket):
  folder, said = make(), []
  bucket.written = []
  assert make(said=said, shards=0) == folder and 'exists already' in said[0]
  assert bucket.written == ['.preparation.lock']
  with pytest.raises(InputError, match='holds data made with quality=90, not 50'):
    make(quality=50)
  in_bucket = bucket.folder / 'sets' / 'toy' / '1.0.0'
  shard = in_bucket / 'toy-train.array_record-00001-of-00003'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(InputError, match=r'00001-of-00003 is missing or has changed; remove gs://'):
    make()
  shard.unlink()
  with pytest.raises(InputError, match=r'00001-of-00003 is missing or has changed'):
    make()
  shard.write_bytes(data)
  (in_bucket / 'unfinished.json').write_text('{}')  # Stopped at the very end.
  make()
  assert 'unfinished.json' not in names(bucket)
  for file in in_bucket.iterdir():
    if file.name != 'features.json':
      file.unlink()
  with pytest.raises(InputError, match='was not made by `ppn prepare`'):
    make()


@pytest.mark.slow
def test_data_that_was_copied_to_the_bucket_is_compared_by_its_content(bucket, tmp_path):
  prepare({'train': source()}, bucket.folder / 'sets', Options('toy', shards=3, threads=1),
          progress=lambda *_: None)
  said = []
  make(said=said)
  assert 'exists already' in said[0]
  file = bucket.folder / 'sets' / 'toy' / '1.0.0' / 'instances_train.json'
  file.write_text(file.read_text() + ' ')
  with pytest.raises(InputError, match=r'instances_train\.json is missing or has changed'):
    make()


def test_two_at_once(bucket):
  with Ownership(storage.folder_path('gs://bucket/sets') / 'toy', 'preparation'), \
       pytest.raises(InputError, match='in use by another preparation: process'):
    make()
  assert names(bucket) == []


@pytest.mark.slow
def test_killed_while_it_uploads_then_completed_and_trained_on(bucket, tmp_path):
  def ppn(*arguments):
    return [sys.executable, '-m', 'ppn_jax.cli.main', *arguments]

  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{ROOT}'}
  preparing = ppn(
      'prepare', f'--config={ROOT}/configs/quickstart.py', '--output=gs://bucket/sets',
      '--name=toy', '--shards=20', '--threads=1', '--config.data.train.num_images=160',
      '--config.data.eval.num_images=20')
  made = bucket.folder / 'sets' / 'toy' / '1.0.0'
  with subprocess.Popen(preparing, env=environment) as process:
    deadline = time.monotonic() + HANG_SECONDS
    while len(list(made.glob('*record-*'))) < 4:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
  assert not is_readable()
  assert subprocess.run(preparing, env=environment, timeout=HANG_SECONDS).returncode == 0
  assert is_readable() and not list((bucket.folder / 'sets').rglob('*.lock'))
  config = tmp_path / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=f'{ROOT}/tests') + '''
_tiny = get_config
def get_config():
  config = _tiny().unlock()
  for split in ('train', 'eval'):
    config.data[split] = dict(name='tfds', dataset='toy', data_dir='gs://bucket/sets', split=split)
  return config.lock()
''')
  training = ppn('train', f'--config={config}', f'--workdir={tmp_path}/run',
                 '--config.train.steps=2')
  done = subprocess.run(training, env=environment, timeout=HANG_SECONDS, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] == 2
