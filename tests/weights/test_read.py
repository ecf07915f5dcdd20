import numpy as np
import pytest
from foreign import keras_mobilenet, table, write_bundle, write_graph, write_keras_2

from ppn_jax.errors import InputError
from ppn_jax.weights.read import read_weights

TENSORS = {'a/weights': np.float32([1, 2])}


@pytest.mark.parametrize('given', ['model.ckpt-3', 'model.ckpt-3.index', '',
                                   'model.ckpt-3.data-00000-of-00001', 'model.ckpt-3.meta'])
def test_ways_to_name_a_checkpoint(tmp_path, given):
  write_bundle(tmp_path / 'model.ckpt-3', TENSORS)
  found = read_weights(tmp_path / given)
  assert found.path == str(tmp_path / 'model.ckpt-3') and found.kind == 'checkpoint'
  np.testing.assert_array_equal(found.tensors['a/weights'], [1, 2])


@pytest.mark.parametrize('folder', ['', '/home/somebody/train/'])
def test_checkpoint_file_of_a_folder(tmp_path, folder):
  for step in (1, 2, 30):
    write_bundle(tmp_path / f'model.ckpt-{step}', {'step': np.int64(step)})
  with pytest.raises(InputError, match=r'3 checkpoints in this folder; .* model\.ckpt-1, '):
    read_weights(tmp_path)
  (tmp_path / 'checkpoint').write_text(
      f'model_checkpoint_path: "{folder}model.ckpt-2"\n'
      'all_model_checkpoint_timestamps: 1.5e9\n')
  assert read_weights(tmp_path).tensors['step'] == 2
  (tmp_path / 'checkpoint').write_bytes(b'\xff\xfe no text')
  with pytest.raises(InputError, match='cannot be read as a `checkpoint` file'):
    read_weights(tmp_path)


def test_by_suffix(tmp_path):
  write_graph(tmp_path / 'g.pb', TENSORS)
  assert read_weights(tmp_path / 'g.pb').kind == 'frozen graph'
  pytest.importorskip('h5py')
  write_keras_2(tmp_path / 'k.h5', keras_mobilenet())
  assert read_weights(tmp_path / 'k.h5').kind == 'Keras file'


@pytest.mark.parametrize('name, content, message', [
    ('model.ckpt', table({b'': b'', b'x': b'y'}), 'a TensorFlow V1 checkpoint'),
    ('weights.txt', b'1 2 3', 'not a known format'), ('weights.npz', b'', 'empty'),
    ('model', b'\x89HDF\r\n\x1a\n123', 'an HDF5 file; rename it to .h5'),
    ('zoo.tar.gz', b'\x1f\x8b123456789', 'unpack it'),
    ('x.meta', b'', r'no file x\.index beside it'), ('elsewhere/x', None, 'no checkpoint at')])
def test_other_files_are_rejected(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    read_weights(tmp_path / name)


def test_empty_folder(tmp_path):
  with pytest.raises(InputError, match='no checkpoint in this folder; give the PREFIX'):
    read_weights(tmp_path)


@pytest.mark.parametrize('path', ['', ' '])
def test_an_empty_path(path):
  with pytest.raises(InputError, match='the path of the weights is empty; give the PREFIX'):
    read_weights(path)
