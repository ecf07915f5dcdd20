"""Weights files: what is written comes back, and nothing else is taken for one."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.export import weights_file
from ppn_jax.export.weights_file import is_weights_file, read_weights_file, write_weights_file

CATEGORIES = (Category(3, 'cat'), Category(7, 'größer "als"'))
KERNEL, BIAS = ('params', 'head', 'kernel'), ('params', 'head', 'bias')
VAR, COUNT = ('batch_stats', 'head', 'norm', 'var'), ('batch_stats', 'head', 'count')


def values(**changes):
  rng = np.random.default_rng(0)
  made = {KERNEL: rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
          BIAS: rng.normal(size=4).astype(np.float32),
          VAR: np.float32([1e-3, 2e5, 1, 3e38]), COUNT: np.int32(5)}
  return made | {{'kernel': KERNEL, 'bias': BIAS, 'var': VAR}[k]: v for k, v in changes.items()}


def write(path, made=None, precision='float32', **header):
  write_weights_file(path, values() if made is None else made, precision=precision, step=2000,
                     categories=CATEGORIES, **{'config': {'seed': 1}, **header})
  return path


def test_values_and_header_come_back(tmp_path):
  path = write(tmp_path / 'a.safetensors', thresholds={'score_threshold': 0.1})
  found = read_weights_file(path)
  assert found.values.keys() == values().keys()
  for name, value in values().items():
    np.testing.assert_array_equal(found.values[name], value, strict=True)
  assert (found.step, found.categories, found.path) == (2000, CATEGORIES, str(path))
  assert found.header == {'version': 1, 'precision': 'float32', 'config': {'seed': 1},
                          'thresholds': {'score_threshold': 0.1}}
  assert found.description == 'a weights file of 2 classes, step 2,000'


def test_float16_is_for_kernels(tmp_path):
  found = read_weights_file(write(tmp_path / 'a.safetensors', precision='float16'))
  np.testing.assert_array_equal(found.values[VAR], values()[VAR], strict=True)
  np.testing.assert_array_equal(found.values[BIAS], values()[BIAS], strict=True)
  kernel = values()[KERNEL]
  np.testing.assert_array_equal(found.values[KERNEL], kernel.astype(np.float16).astype(np.float32),
                                strict=True)
  assert found.description.endswith(', float16')


def test_the_same_bytes_in_every_process(tmp_path):
  code = ('import sys; sys.path[:0] = sys.argv[1:2]; import test_weights_file as t\n'
          't.write(sys.argv[2], a={"x": [1, 2]}, b="c", d=None)')
  folder = str(pathlib.Path(__file__).parent)
  contents = set()
  for seed in range(2):
    path = tmp_path / f'{seed}.safetensors'
    subprocess.run([sys.executable, '-c', code, folder, str(path)], check=True,
                   env={**os.environ, 'PYTHONHASHSEED': str(seed)})
    contents.add(path.read_bytes())
  assert len(contents) == 1


@pytest.mark.parametrize('changes, precision, message', [
    ({'kernel': np.full((2, 2), 7e4)}, 'float16',
     r'params/head/kernel has a value of 7e\+04, and float16 ends at 6.55e\+04; use --precision'),
    ({'bias': np.float32([0, np.nan])}, 'float32', 'params/head/bias has values that are not'),
    ({'kernel': np.float32([[np.inf]])}, 'float16', 'params/head/kernel has values that are not'),
    ({'bias': np.array([1e300])}, 'float32', 'float32 ends at')])
def test_values_that_cannot_be_kept(tmp_path, changes, precision, message):
  with pytest.raises(InputError, match=message):
    write(tmp_path / 'a.safetensors', values(**changes), precision)
  assert not any(tmp_path.iterdir())


def test_no_flipped_bit_goes_unnoticed(tmp_path):
  """Either the file is refused in one line, or the bit has no meaning, as in padding."""
  path = write(tmp_path / 'a.safetensors')
  data, expected = path.read_bytes(), read_weights_file(path)
  rng = np.random.default_rng(0)
  places = {*range(60), *rng.integers(60, len(data), 500).tolist(), len(data) - 1}
  refused = 0
  for place in sorted(places):
    damaged = bytearray(data)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
      found = read_weights_file(path)
    except InputError as e:
      assert '\n' not in str(e) and str(path) in str(e)
      refused += 1
      continue
    assert found[2:] == expected[2:] and all(
        (found.values[name] == value).all() for name, value in expected.values.items()), place
  assert refused > 0.9 * len(places)


@pytest.mark.parametrize('length', [0, 1, 7, 8, 9, 100, 600, -1])
def test_truncated_files(tmp_path, length):
  path = write(tmp_path / 'a.safetensors')
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(InputError, match=f'{path}: (damaged|the file is empty)'):
    read_weights_file(path)


def changed(path, change):
  """Rewrites the metadata of a file, with a checksum that fits."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(json.loads(data[8:8 + length])['__metadata__']['ppn_jax'])
  tensors = safetensors.numpy.load(data)
  del header['sha256']
  change(header, tensors)
  header['sha256'] = weights_file._digest(header, tensors)
  path.write_bytes(safetensors.numpy.save(tensors, {'ppn_jax': json.dumps(header)}))


@pytest.mark.parametrize('change, message', [
    (lambda h, t: h.update(version=2), r'layout 2, and this version of ppn_jax reads 1; install'),
    (lambda h, t: h.update(step='2'), 'its description cannot be used'),
    (lambda h, t: h.update(step=-1), 'its description cannot be used'),
    (lambda h, t: h.pop('config'), 'its description cannot be used'),
    (lambda h, t: h.update(config=[]), 'its description cannot be used'),
    (lambda h, t: h.update(categories=[]), 'its description cannot be used'),
    (lambda h, t: h.update(categories=7), 'its description cannot be used'),
    (lambda h, t: h.update(categories=[{'id': 1}]), 'its description cannot be used'),
    (lambda h, t: h.update(categories=[{'id': 1, 'name': 'a'}] * 2), 'two with the same id'),
    (lambda h, t: t['params/head/bias'].__setitem__(0, np.nan), 'bias has values that are not fin'),
    (lambda h, t: t['batch_stats/head/norm/var'].__setitem__(0, -1), 'has negative values'),
    (lambda h, t: t.update({'params/head/bias': np.zeros(4)}), 'bias is float64, not float16 or')])
def test_a_header_or_values_that_lie(tmp_path, change, message):
  path = write(tmp_path / 'a.safetensors')
  changed(path, change)
  with pytest.raises(InputError, match=f'{re.escape(str(path))}: .*{message}'):
    read_weights_file(path)


@pytest.mark.parametrize('metadata', [
    None, {'format': 'pt'}, {'ppn_jax': 'x'}, {'ppn_jax': '[]'}, {'ppn_jax': '{}'},
    {'ppn_jax': '[' * 100_000}])
def test_files_of_other_programs(tmp_path, metadata):
  path = tmp_path / 'a.safetensors'
  path.write_bytes(safetensors.numpy.save({'layer.0.weight': np.ones(3)}, metadata))
  with pytest.raises(InputError, match=r'of another program .tensors: layer\.0\.weight'):
    read_weights_file(path)


def test_which_paths_are_weights_files(tmp_path):
  path = write(tmp_path / 'a.safetensors')
  (tmp_path / 'folder.safetensors').mkdir()
  (tmp_path / 'renamed').write_bytes(path.read_bytes())
  (tmp_path / 'text').write_text('{"a": 1} and more')
  assert is_weights_file(path) and is_weights_file(tmp_path / 'renamed')
  assert is_weights_file('missing.safetensors') and is_weights_file('gs://b/x.safetensors')
  assert not any(map(is_weights_file, (tmp_path / 'text', tmp_path, tmp_path / 'missing',
                                       tmp_path / 'folder.safetensors', 'gs://b/run')))
  with pytest.raises(InputError, match=r'no file missing.safetensors; give a file of `ppn export'):
    read_weights_file('missing.safetensors')
