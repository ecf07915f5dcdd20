import random
import re

import ml_dtypes
import numpy as np
import pytest
from foreign import write_bundle

from ppn_jax.errors import InputError
from ppn_jax.weights.tf_bundle import masked_crc32c, read_tf_bundle
from ppn_jax.weights.tf_protos import BundleHeader

RNG = np.random.default_rng(0)
TENSORS = {
    'FeatureExtractor/MobilenetV1/Conv2d_0/weights': RNG.normal(size=(3, 3, 3, 4)).astype('f'),
    'FeatureExtractor/MobilenetV1/Conv2d_0/BatchNorm/beta': RNG.normal(size=4).astype('f'),
    'FeatureExtractor/MobilenetV1/Conv2d_0/BatchNorm/gamma': RNG.normal(size=4),
    'half': RNG.normal(size=(2, 3)).astype(np.float16),
    'bfloat16': RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    'empty': np.zeros((0, 3), np.float32),
    'global_step': np.int64(123), 'flag': np.array([True, False])}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == np.asarray(value).dtype
    np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize('model, count', [('ppn', 164), ('ssd', 199)])
def test_checkpoints_that_tensorflow_wrote(shared, model, count):
  found = read_tf_bundle(shared / f'golden/ckpt_{model}_s1/model.ckpt')
  lines = (shared / f'golden/variables_{model}.txt').read_text().splitlines()
  shapes = dict(re.match(r'(\S+) \[(.*?)\]', line).groups() for line in lines)
  assert {name: ', '.join(map(str, t.shape)) for name, t in found.items()} == shapes
  assert len(found) == count
  assert all(t.dtype == np.float32 and np.isfinite(t).all() for t in found.values())


def test_known_checksum():
  # RFC 3720's test vector, 32 bytes of zeros, masked.
  assert masked_crc32c(bytes(32)) == ((0x8a9136aa >> 15 | 0x8a9136aa << 17) + 0xa282ead8) % 2**32


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('block_size', [1, 200, 10**6])
def test_types_shards_and_blocks(tmp_path, shards, block_size):
  assert_same(read_tf_bundle(write_bundle(tmp_path / 'model.ckpt-7', TENSORS, shards=shards,
                                   block_size=block_size)), TENSORS)


def test_many_names(tmp_path):
  tensors = {f'scope/{i % 7}/layer_{i}/weights': np.float32([i]) for i in range(500)}
  assert_same(read_tf_bundle(write_bundle(tmp_path / 'x', tensors)), tensors)


def test_strings_are_left_out(tmp_path):
  def change(name, entry):
    entry.dtype = 7 if name == 'half' else entry.dtype
  found = read_tf_bundle(write_bundle(tmp_path / 'x', TENSORS, change=change))
  assert found.keys() == TENSORS.keys() - {'half'}


@pytest.mark.parametrize('options, message', [
    ({'header': BundleHeader(num_shards=1, endianness=1)}, 'big-endian'),
    ({'compression': 1}, 'compressed'),
    ({'header': BundleHeader()}, 'shard 0 of 0'),
    ({'change': lambda n, e: e.slices.append(b'')}, 'stored in slices'),
    ({'change': lambda n, e: setattr(e, 'dtype', 8)}, 'of type DT_COMPLEX64; legal: DT_FLOAT'),
    ({'change': lambda n, e: setattr(e, 'dtype', 999)}, 'of type DataType 999'),
    ({'change': lambda n, e: setattr(e, 'offset', -4)}, 'truncated'),
    ({'change': lambda n, e: setattr(e, 'offset', 10**15)}, 'truncated'),
    ({'change': lambda n, e: setattr(e, 'shard_id', 5)}, 'shard 5 of 1'),
    ({'change': lambda n, e: e.shape.dim.add(size=2**40)}, 'damaged'),
    ({'change': lambda n, e: e.shape.dim.add(size=-1)}, 'unknown shape'),
    ({'change': lambda n, e: setattr(e, 'crc32c', 1)}, 'checksum of .* is wrong'),
])
def test_entries_that_are_rejected(tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    read_tf_bundle(write_bundle(tmp_path / 'x', TENSORS, **options))


def test_missing_files(tmp_path):
  prefix = write_bundle(tmp_path / 'x', TENSORS, shards=2)
  (tmp_path / 'x.data-00001-of-00002').unlink()
  with pytest.raises(InputError, match=r'no file x\.data-00001-of-00002, shard 2 of 2'):
    read_tf_bundle(prefix)
  (tmp_path / 'x.index').unlink()
  with pytest.raises(InputError, match=r'there is no file .*x\.index'):
    read_tf_bundle(prefix)


@pytest.mark.parametrize('suffix', ['.index', '.data-00000-of-00001'])
def test_cut_at_any_length(tmp_path, suffix):
  prefix = write_bundle(tmp_path / 'x', TENSORS, block_size=200)
  path = tmp_path / f'x{suffix}'
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(InputError):
      read_tf_bundle(prefix)


@pytest.mark.parametrize('suffix', ['.index', '.data-00000-of-00001'])
def test_any_flipped_bit_is_found_or_harmless(tmp_path, suffix):
  prefix = write_bundle(tmp_path / 'x', TENSORS, block_size=200)
  path = tmp_path / f'x{suffix}'
  whole, choose, found = path.read_bytes(), random.Random(0), 0
  for at in range(len(whole)):
    damaged = bytearray(whole)
    damaged[at] ^= 1 << choose.randrange(8)
    path.write_bytes(damaged)
    try:
      assert_same(read_tf_bundle(prefix), TENSORS)
    except InputError as e:
      assert '\n' not in str(e)
      found += 1
  # The handle of the meta index and the padding of the footer are not read.
  assert found == len(whole) if suffix != '.index' else found > len(whole) - 60


def test_other_bytes(tmp_path):
  (tmp_path / 'x.data-00000-of-00001').write_bytes(b'')
  for content in (b'', b'no table\n' * 100, bytes(1000)):
    (tmp_path / 'x.index').write_bytes(content)
    with pytest.raises(InputError, match='not the index of a TensorFlow checkpoint'):
      read_tf_bundle(tmp_path / 'x')
