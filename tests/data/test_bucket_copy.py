"""Data sets in buckets are copied to this machine once, and again where they change."""

import pathlib

import pytest
from data_formats import NAMES, write
from gcs_server import forget_clients, serve

from ppn_jax import storage
from ppn_jax.cli.main import main
from ppn_jax.data.bucket_copy import with_local_paths
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


def change(path, text):
  """Writes an object through the bucket's interface, which gives it another generation."""
  _, _, name = path.as_posix().partition('/bucket/')
  storage.write_text(storage.folder_path(f'gs://bucket/{name}'), text)


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
  assert any(path.endswith('.jpg') for path in read)
  read.clear()
  build_source({'name': name, **options})
  assert not any(path.endswith('.jpg') for path in read)  # Nothing has changed.


def test_only_changes_are_copied_again(bucket, tmp_path, log_lines):
  folder, read = bucket
  write(folder / 'set', 'labelme')
  block = {'name': 'labelme', 'folder': 'gs://bucket/set/'}
  before = len(build_source(block))
  assert any('copying' in line and 'gs://bucket/set' in line for line in log_lines)
  read.clear()
  gone, changed = sorted((folder / 'set').rglob('*.json'))[:2]
  gone.unlink()
  change(changed, changed.read_text() + ' ')
  assert len(build_source(block)) == before - 1
  assert [path for path in read if path != 'set'] == [changed.relative_to(folder).as_posix()]
  assert not list((tmp_path / 'cache').rglob(gone.name))


def test_wildcards_and_folders_of_a_yaml_file_follow_the_bucket(bucket, tmp_path):
  folder, _ = bucket
  for name in ('t/train-0', 't/train-1', 't/deep/train-2', 't/other'):
    change(folder / name, name)
  copied = lambda: sorted(p.name for p in (tmp_path / 'cache').rglob('*') if p.is_file())
  records = lambda: with_local_paths({'records': 'gs://bucket/t/train-*'})['records']
  assert records().endswith('/bucket/t/train-*') and copied() == ['train-0', 'train-1']
  (folder / 't/train-0').unlink()
  records()
  assert copied() == ['train-1']
  change(folder / 'y/data.yaml', 'names: []')
  change(folder / 'y/images/a.jpg', 'a')
  with_local_paths({'data': 'gs://bucket/y/data.yaml'})
  (folder / 'y/images/a.jpg').unlink()
  with_local_paths({'data': ('gs://bucket/y/data.yaml',)})
  assert copied() == ['data.yaml', 'train-1']


def test_an_object_becomes_a_folder_and_a_folder_an_object(bucket):
  folder, _ = bucket
  for before, after in (('x', 'x/1.jpg'), ('x/1.jpg', 'x')):
    change(folder / 's' / before, before)
    with_local_paths({'folder': 'gs://bucket/s'})
    (folder / 's' / before).unlink()
    if (folder / 's/x').is_dir():
      (folder / 's/x').rmdir()
    change(folder / 's' / after, after)
    copy = pathlib.Path(with_local_paths({'folder': 'gs://bucket/s'})['folder'])
    assert (copy / after).read_text() == after


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
    ('gs://bucket', r'there is nothing at gs://bucket'), ('gs://', 'gs://: legal: gs://BUCKET/PATH'),
    ('gs://*', r'gs://\*: legal: gs://BUCKET/PATH'),
    ('gs://other/set', 'there is no bucket gs://other')])
def test_what_is_not_there(bucket, path, message):
  with pytest.raises(InputError, match=f'data.train: {message}'):
    build_source({'name': 'labelme', 'folder': path}, key='data.train')
