import io
import json
import random
import sys
import zipfile

import numpy as np
import pytest
from foreign import keras_mobilenet, write_keras_2, write_keras_3

from ppn_jax.errors import InputError
from ppn_jax.weights.keras import read_keras_file

h5py = pytest.importorskip('h5py')
WEIGHTS = keras_mobilenet()


def archive(path, **options):
  content = io.BytesIO()
  write_keras_3(content, WEIGHTS, **options)
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('metadata.json', json.dumps({'keras_version': '3.15.1'}))
    file.writestr('model.weights.h5', content.getvalue())


@pytest.mark.parametrize('name, write', [
    ('mobilenet_2_5_224_tf_no_top.h5', lambda p: write_keras_2(p, WEIGHTS)),
    ('model.h5', lambda p: write_keras_2(p, WEIGHTS, model=True)),
    ('keras3.h5', lambda p: write_keras_2(p, WEIGHTS, model=True, depthwise='kernel', suffix='')),
    ('x.weights.h5', lambda p: write_keras_3(p, WEIGHTS)),
    ('old.weights.h5', lambda p: write_keras_3(p, WEIGHTS, layer_names=False)),
    ('x.keras', archive),
    ('old.keras', lambda p: archive(p, layer_names=False))])
def test_every_layout(tmp_path, name, write):
  write(tmp_path / name)
  found = read_keras_file(tmp_path / name)
  assert found.keys() == {'/'.join(key) for key in WEIGHTS}
  for key, value in WEIGHTS.items():
    np.testing.assert_array_equal(found['/'.join(key)], value)


def test_another_net_without_layer_names(tmp_path):
  few = {key: value for key, value in WEIGHTS.items() if '13' not in key[0]}
  write_keras_3(tmp_path / 'x.weights.h5', few, layer_names=False)
  assert 'layers/conv2d_1/kernel' in read_keras_file(tmp_path / 'x.weights.h5')


@pytest.mark.parametrize('name, content, message', [
    ('x.h5', b'', 'cannot be read as a Keras file'), ('x.keras', b'text', 'cannot be read'),
    ('x.h5', None, 'no Keras file at')])
def test_not_a_keras_file(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    read_keras_file(tmp_path / name)


def test_files_without_weights(tmp_path):
  h5py.File(tmp_path / 'x.h5', 'w').close()
  with pytest.raises(InputError, match='no weights'):
    read_keras_file(tmp_path / 'x.h5')
  with zipfile.ZipFile(tmp_path / 'x.keras', 'w') as file:
    file.writestr('config.json', '{}')
  with pytest.raises(InputError, match=r'model\.weights\.h5'):
    read_keras_file(tmp_path / 'x.keras')


def test_declared_space_is_not_allocated(tmp_path):
  with h5py.File(tmp_path / 'x.h5', 'w') as file:
    file.create_dataset('conv1/conv1/kernel:0', (2**20, 2**20), np.float32)
  with pytest.raises(InputError, match='damaged'):
    read_keras_file(tmp_path / 'x.h5')


def test_damage_is_an_input_error_or_another_value(tmp_path):
  """Without a checksum, damage may go unnoticed, but it must not raise anything else."""
  choose, rejected = random.Random(0), 0
  small = {key: value for key, value in WEIGHTS.items() if key[0] in ('conv1', 'conv1_bn')}
  write_keras_3(tmp_path / 'a.weights.h5', small)
  archive(tmp_path / 'b.keras')
  for name in ('a.weights.h5', 'b.keras'):
    whole = (tmp_path / name).read_bytes()
    changed = [whole[:choose.randrange(len(whole))] for _ in range(20)]
    for _ in range(60):
      at = choose.randrange(min(len(whole), 4000))
      changed.append(whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1:])
    for content in changed:
      (tmp_path / name).write_bytes(content)
      try:
        read_keras_file(tmp_path / name)
      except InputError:
        rejected += 1
  assert rejected > 40


def test_without_h5py(tmp_path, monkeypatch):
  write_keras_2(tmp_path / 'x.h5', WEIGHTS)
  monkeypatch.setitem(sys.modules, 'h5py', None)
  with pytest.raises(InputError, match=r"pip install .*\[keras\]"):
    read_keras_file(tmp_path / 'x.h5')
