"""Data sets in buckets are copied to this machine once, and again where they change."""

import os

import pytest
from data_formats import NAMES, write
from gcs_server import forget_clients, serve

from ppn_jax.cli.main import main
from ppn_jax.data.source import build_source
from ppn_jax.errors import InputError

pytest.importorskip('gcsfs')


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A bucket, as the folder that holds its objects; 'read' lists what was downloaded from it."""
  folder, read = tmp_path / 'bucket', []
  folder.mkdir()

  def refuse(method, bucket, name):
    if method == 'GET' and name:
      read.append(name)
    return 0

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  with serve(tmp_path, refuse) as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    forget_clients()
    yield folder, read
  forget_clients()


PATHS = {
    'coco_json': dict(images='set/images', annotations='set/instances.json'),
    'pascal_voc': dict(folder='set'),
    'labelme': dict(folder='set'),
    'yolo_txt': dict(data='set/data.yaml'),
}


@pytest.mark.parametrize('name', PATHS)
def test_sources_read_from_buckets(bucket, name):
  folder, read = bucket
  write(folder / 'set', name)
  options = {key: f'gs://bucket/{path}' for key, path in PATHS[name].items()}
  if name == 'coco_json':
    options['annotations'] = f'gs://bucket/set/{next((folder / "set").glob("*.json")).name}'
  source = build_source({'name': name, **options})
  assert [c.name for c in source.categories] == list(NAMES)
  assert source[0].image.ndim == 3
  count = len(read)
  assert count
  build_source({'name': name, **options})
  assert len(read) == count  # Nothing has changed.


def test_only_changes_are_copied_again(bucket, tmp_path, log_lines):
  folder, read = bucket
  write(folder / 'set', 'labelme')
  block = {'name': 'labelme', 'folder': 'gs://bucket/set/'}
  before = len(build_source(block))
  assert any('copying' in line and 'gs://bucket/set' in line for line in log_lines)
  read.clear()
  gone, changed = sorted((folder / 'set').rglob('*.json'))[:2]
  gone.unlink()
  os.utime(changed)
  changed.write_text(changed.read_text() + ' ')
  assert len(build_source(block)) == before - 1
  assert read == [changed.relative_to(folder).as_posix()]
  assert not list((tmp_path / 'cache').rglob(gone.name))


def test_commands_take_buckets(bucket, capsys):
  folder, _ = bucket
  write(folder / 'set', 'labelme')
  assert main(['data', '--config=own_data:labelme', '--config.model.image_size=64',
               '--config.data.train.folder=gs://bucket/set', '--config.data.eval_fraction=0.3',
               '--config.model.neck.num_levels=3']) == 0
  assert f'{len(NAMES)} classes' in capsys.readouterr().out
  assert main(['data', 'gs://bucket/set']) == 2
  assert 'give --config=own_data:FORMAT with paths in the bucket' in capsys.readouterr().err


@pytest.mark.parametrize('path, message', [
    ('gs://bucket/none', r'there is nothing at gs://bucket/none'),
    ('gs://bucket/set/*.record', r'there is nothing at gs://bucket/set/\*.record'),
    ('gs://other/set', 'there is no bucket gs://other')])
def test_what_is_not_there(bucket, path, message):
  with pytest.raises(InputError, match=f'data.train: {message}'):
    build_source({'name': 'labelme', 'folder': path}, key='data.train')
