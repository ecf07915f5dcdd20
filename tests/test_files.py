"""Atomic writing."""

import os
import pathlib

import pytest

from ppn_jax import files
from ppn_jax.cli.main import main
from ppn_jax.data.sources import build_source, split_train_block
from ppn_jax.errors import InputError
from ppn_jax.run import open_run
from ppn_jax.serving import load
from ppn_jax.weights.files import read_weights
from ppn_jax.weights.labels import read_label_map


def test_replaces_and_makes_folders(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  files.write_text(path, 'one')
  files.write_text(path, 'two')
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['b.json']


def test_a_failure_leaves_the_old_file_and_no_piece(tmp_path, monkeypatch):
  path = tmp_path / 'b.json'
  files.write_text(path, 'old')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(files.os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write_text(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_tilde_is_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert files.folder_path('~/runs/a') == pathlib.Path('/home/me/runs/a')
  assert files.folder_path(pathlib.Path('~')) == pathlib.Path('/home/me')
  block = {'images': ['~/a', ('~', 'b~', '/c/~')], 'names': ['~', '~/x'], 'size': 3}
  assert files.expand_home(block) == {
      'images': ['/home/me/a', ('/home/me', 'b~', '/c/~')], 'names': ['~', '~/x'], 'size': 3}
  assert files.expand_home('~nobody-of-this-name/x') == '~nobody-of-this-name/x'
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  with pytest.raises(InputError, match='set HOME'):
    files.folder_path('~/runs')


@pytest.mark.parametrize('opens', [
    open_run, load, read_weights, read_label_map,
    lambda path: build_source({'name': 'coco_json', 'images': path, 'annotations': 'x.json'}),
    lambda path: build_source(split_train_block({
        'name': 'yolo_txt', 'images': path, 'names': ['a']})[0])])
def test_every_door_of_the_package_takes_it(monkeypatch, tmp_path, opens):
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(InputError, match=f'{tmp_path}/nothing'):
    opens('~/nothing')


def test_cache_takes_it(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert split_train_block({'name': '', 'cache': '~/c'})[1]['cache'] == '/home/me/c'


@pytest.mark.parametrize('argv', [
    ['train', '--config=~/nothing.py', '--workdir=w'], ['summary', '--workdir=~/nothing'],
    ['evaluate', '--workdir=~/nothing'], ['detect', '~/nothing', '--workdir=w', '--output=~/o'],
    ['export', '--workdir=w', '--format=onnx', '--output=o', '--images=~/nothing'],
    ['detect', '.', '--model=~/nothing', '--output=~/o']])
def test_commands_take_it(monkeypatch, tmp_path, capsys, argv):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.png').write_bytes(b'')
  assert main(argv) == 2
  assert f'{tmp_path}/nothing' in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']
