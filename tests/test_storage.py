"""Atomic writing, and stores that cannot be used for a while."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import time

import pytest

from ppn_jax import storage
from ppn_jax.cli.main import main
from ppn_jax.data.cache import cache_source
from ppn_jax.data.source import build_source
from ppn_jax.errors import InputError, StoreError, exit_status, is_outage
from ppn_jax.image_detector import load
from ppn_jax.run import open_run
from ppn_jax.weights.labels import read_label_map
from ppn_jax.weights.read import read_weights


def test_writing_replaces_files_and_creates_folders(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  storage.write_text(path, 'one')
  storage.write_text(path, 'two')
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['b.json']


def test_a_failure_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
  path = tmp_path / 'b.json'
  storage.write_text(path, 'old')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(storage.os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    storage.write_text(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_tilde_is_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert storage.folder_path('~/runs/a') == pathlib.Path('/home/me/runs/a')
  assert storage.folder_path(pathlib.Path('~')) == pathlib.Path('/home/me')
  block = {'images': ['~/a', ('~', 'b~', '/c/~')], 'names': ['~', '~/x'], 'size': 3}
  assert storage.expand_home(block) == {
      'images': ['/home/me/a', ('/home/me', 'b~', '/c/~')], 'names': ['~', '~/x'], 'size': 3}
  assert storage.expand_home('~nobody-of-this-name/x') == '~nobody-of-this-name/x'
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  with pytest.raises(InputError, match='set HOME'):
    storage.folder_path('~/runs')


@pytest.mark.parametrize('opens', [
    open_run, load, read_weights, read_label_map,
    lambda path: build_source({'name': 'coco_json', 'images': path, 'annotations': 'x.json'}),
    lambda path: build_source({'name': 'yolo_txt', 'images': path, 'names': ['a']})])
def test_every_door_of_the_package_takes_it(monkeypatch, tmp_path, opens):
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(InputError, match=f'{tmp_path}/nothing'):
    opens('~/nothing')


def test_cache_takes_it(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  source = build_source({'name': 'synthetic_shapes', 'num_images': 1, 'image_size': 32})
  cache_source(source, '~/c', 32, image_size=32)
  assert (tmp_path / 'c' / 'cache.json').is_file()


@pytest.mark.parametrize('argv', [
    ['train', '--config=~/nothing.py', '--workdir=w'], ['summary', '--workdir=~/nothing'],
    ['evaluate', '--workdir=~/nothing'], ['detect', '~/nothing', '--workdir=w', '--output=~/o'],
    ['export', '--workdir=w', '--format=onnx', '--output=o', '--images=~/nothing'],
    ['detect', '.', '--model=~/nothing', '--output=~/o']])
def test_commands_expand_the_tilde(monkeypatch, tmp_path, capsys, argv):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.png').write_bytes(b'')
  assert main(argv) == 2
  assert f'{tmp_path}/nothing' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']
KILLED = """
import os, pathlib, signal, sys
from ppn_jax import storage
storage.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
storage.write_text(pathlib.Path(sys.argv[1]), 'new')
"""


def aged(path, seconds):
  then = time.time() - seconds
  os.utime(path, (then, then))


def test_incomplete_files_of_a_killed_writer_are_removed(tmp_path):
  subprocess.run([sys.executable, '-c', KILLED, str(tmp_path / 'scores.json')], check=False)
  left, = tmp_path.iterdir()
  storage.remove_partial(tmp_path)
  assert left.exists(), 'so young that it may not be locked yet'
  aged(left, 120)
  storage.remove_partial(tmp_path)
  assert not left.exists()


def test_files_of_others_are_not_removed(tmp_path):
  kept = [tmp_path / name for name in (
      '.scores.json.abcdefgh.partial', '.scores.json.abcdefgh', '.hidden', 'a.partial', '.a.json')]
  for path in kept:
    path.touch()
    aged(path, 7200)
  with kept[0].open() as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # As its writer does.
    storage.remove_partial(tmp_path)
  assert all(path.exists() for path in kept)
  for path in kept:
    aged(path, 100_000)
  storage.remove_partial(tmp_path)
  assert [path.exists() for path in kept] == [False, False, True, True, True]


TRANSIENT = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT,
             errno.EBUSY, errno.ENETUNREACH, errno.EREMOTEIO]


def failing(monkeypatch, number, times):
  """Makes reading fail `times` times with an OSError; returns a list that grows with each try."""
  tried, original = [], pathlib.Path.read_text

  def read(self, **options):
    tried.append(self)
    if len(tried) <= times:
      raise OSError(number, os.strerror(number), str(self))
    return original(self, **options)

  monkeypatch.setattr(pathlib.Path, 'read_text', read)
  monkeypatch.setattr(storage, 'RETRY_SECONDS', (0, 0, 0))
  return tried


@pytest.mark.parametrize('number', TRANSIENT)
def test_reading_is_retried_during_an_outage(tmp_path, monkeypatch, number):
  path = tmp_path / 'config.json'
  path.write_text('{}')
  tried = failing(monkeypatch, number, 3)
  assert storage.read_text(path) == '{}' and len(tried) == 4
  tried = failing(monkeypatch, number, 99)
  with pytest.raises(StoreError, match=r'config\.json cannot be read now') as error:
    storage.read_text(path)
  assert len(tried) == 4 and os.strerror(number) in str(error.value)
  assert exit_status(error.value).code == 1


@pytest.mark.parametrize('number, kind', [
    (errno.ENOENT, FileNotFoundError), (errno.ENOTDIR, NotADirectoryError),
    (errno.EACCES, PermissionError)])
def test_permanent_errors_are_raised_at_once(tmp_path, monkeypatch, number, kind):
  tried = failing(monkeypatch, number, 99)
  with pytest.raises(kind):
    storage.read_text(tmp_path / 'config.json')
  assert len(tried) == 1


def test_outages_are_distinguished_from_bad_content():
  assert all(is_outage(OSError(number, '')) for number in TRANSIENT)
  assert is_outage(MemoryError()) and is_outage(PermissionError(errno.EACCES, ''))
  for error in (OSError('no JPEG'), FileNotFoundError(errno.ENOENT, ''), ValueError('Forbidden'),
                IsADirectoryError(errno.EISDIR, ''), InputError('typo')):
    assert not is_outage(error)
  wrapped = ValueError('cannot read')
  wrapped.__cause__ = OSError(errno.EIO, '')
  assert is_outage(wrapped)


def test_an_error_of_the_disk_is_one_line():
  code, line = exit_status(OSError(errno.EIO, 'Input/output error', '/data/a.json'))
  assert (code, line) == (1, 'ppn: failed: /data/a.json: Input/output error')


def test_partial_folder(tmp_path):
  output = tmp_path / 'model.onnx'
  dead = tmp_path / '.model.onnx.abcdefgh.partial'
  other = tmp_path / '.other.onnx.abcdefgh.partial'
  for folder in (dead, other):
    folder.mkdir()
    aged(folder, 120)
  with storage.partial_folder(output) as folder:
    (folder / 'a').touch()
    aged(folder, 120)
    assert not dead.exists() and other.exists(), 'another one\'s is left to that one'
    storage.remove_partial(tmp_path, output.name)
    assert folder.exists(), 'its writer lives'
  assert [*tmp_path.iterdir()] == [other]
