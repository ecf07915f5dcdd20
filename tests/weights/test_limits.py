"""Small files that declare large arrays are rejected in one line, before memory is allocated."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from foreign import table, varint, write_bundle
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.types_pb2 import DataType

from ppn_jax.errors import InputError
from ppn_jax.weights import importer
from ppn_jax.weights.limits import Limit
from ppn_jax.weights.read import WeightFile, read_weights
from ppn_jax.weights.tf_bundle import MAGIC, masked_crc32c, read_table
from ppn_jax.weights.tf_protos import BundleHeader

MOST = 100 * 2**20  # Bytes that rejecting a file may take.


def assert_rejected(path, message):
  """Checks that reading `path` fails in one line and without much memory."""
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match=message) as error:
      read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < MOST
  finally:
    tracemalloc.stop()
  assert '\n' not in str(error.value)


def graph(path, *constants):
  """Writes a frozen graph with constants given as (shape, values)."""
  found = GraphDef()
  for number, (shape, values) in enumerate(constants):
    proto = found.node.add(name=f'c{number}', op='Const').attr['value'].tensor
    proto.dtype = DataType.Value('DT_FLOAT')
    proto.float_val.extend(values)
    for side in shape:
      proto.tensor_shape.dim.add(size=side)
  path.write_bytes(found.SerializeToString())
  assert path.stat().st_size < 5000
  return path


@pytest.mark.parametrize('constants', [
    [([2**28], [1, 2])], [([2**28], [1])], [([2**22], [1, 2])] * 5, [([0, 2**62], [])],
    [([2**62, 0], [])], [([1] * 70, [1])], [([2**40, 2**40, 2**40], [1])]])
def test_frozen_graphs(tmp_path, constants):
  assert_rejected(graph(tmp_path / 'x.pb', *constants), 'damaged: c[0-9] is declared as an array')


def test_a_graph_of_repeated_values_is_read(tmp_path):
  found = read_weights(graph(tmp_path / 'x.pb', ([1024, 2], [1, 2]), ([64, 64], [3]))).tensors
  assert found['c0'].shape == (1024, 2) and (found['c1'] == 3).all()


@pytest.mark.parametrize('shape, message', [
    ([0, 2**62], 'cannot hold'), ([1] * 70, 'with 70 axes'), ([2**62, 4], 'damaged')])
def test_shapes_in_checkpoints(tmp_path, shape, message):
  def change(name, entry):
    del entry.shape.dim[:]
    for side in shape:
      entry.shape.dim.add(size=side)

  empty = 0 in shape
  values = np.zeros(0 if empty else 1, np.float32)
  assert_rejected(write_bundle(tmp_path / 'x', {'a/weights': values}, change=change), message)


def test_variables_that_share_their_bytes(tmp_path):
  """Each variable is intact, but all of them point to the same bytes."""
  values = np.arange(250_000, dtype=np.float32)

  def change(name, entry):
    entry.offset = 0

  prefix = write_bundle(tmp_path / 'x', {f'v{i}': values for i in range(3)}, change=change)
  data = prefix.with_name('x.data-00000-of-00001')
  data.write_bytes(data.read_bytes()[:values.nbytes])
  assert_rejected(prefix, 'its variables overlap')


def index_of_long_keys(count, length, repeats=1):
  """Returns a table whose keys share all but their last bytes with the first."""
  block = varint(0) + varint(length) + varint(0) + b'k' * length
  for number in range(count):
    block += varint(length) + varint(4) + varint(0) + number.to_bytes(4, 'big')
  block += (0).to_bytes(4, 'little') + (1).to_bytes(4, 'little')
  file = b''

  def add(raw):
    nonlocal file
    handle, raw = varint(len(file)) + varint(len(raw)), raw + b'\0'
    file += raw + masked_crc32c(raw).to_bytes(4, 'little')
    return handle

  handle, end = add(block), (1).to_bytes(4, 'little')
  index = b''.join(varint(0) + varint(4) + varint(len(handle)) + i.to_bytes(4, 'big') + handle
                   for i in range(repeats))
  footer = add(bytes(4) + end) + add(index + bytes(4) + end)
  return file + footer.ljust(40, b'\0') + MAGIC


@pytest.mark.parametrize('options, message', [
    ({'count': 6000, 'length': 100_000}, 'keys are too long for a file of this size'),
    ({'count': 20, 'length': 10, 'repeats': 10_000}, 'keys are not in order')])
def test_keys_of_an_index(tmp_path, options, message):
  content = index_of_long_keys(**options)
  assert len(content) < 300_000
  (tmp_path / 'x.index').write_bytes(content)
  assert_rejected(tmp_path / 'x', message)


def test_long_names_of_many_variables_are_read():
  names = [f'{"scope/" * 30}{i}/weights'.encode() for i in range(3000)]
  entries = {b'': BundleHeader(num_shards=1).SerializeToString()} | {n: b'x' * 30 for n in names}
  assert read_table(table(entries, block_size=1 << 18), 'x').keys() == entries.keys()


def keras(path, make):
  h5py = pytest.importorskip('h5py')
  with h5py.File(path, 'w') as file:
    make(file)
  return path


@pytest.mark.parametrize('make, message', [
    (lambda file: [file.create_dataset(f'a{i}/kernel', (2**18,), 'f4', fillvalue=1)
                   for i in range(40)], 'a[0-9]+/kernel is declared'),
    (lambda file: file.create_dataset('a/kernel', (2**20, 2**20), 'f4'), 'is declared'),
    (lambda file: file.create_dataset('a/kernel', (0, 2**62), 'f4', maxshape=(None, 2**62),
                                      chunks=(1, 2)), 'is declared'),
    (lambda file: file.create_dataset('a/kernel', (1,), 'f4', maxshape=(None,), chunks=(2**29,)),
     'is declared'),
    (lambda file: file.create_dataset('a/kernel', data=np.zeros(2**22, 'f4'), compression='gzip'),
     'h5repack -f NONE'),
    (lambda file: file.create_dataset('a/kernel', (4,), 'f4', external=[('other', 0, 16)]),
     'in another file')])
def test_keras_files(tmp_path, make, message):
  path = keras(tmp_path / 'x.h5', make)
  assert path.stat().st_size < 300_000
  assert_rejected(path, message)


@pytest.mark.parametrize('packing, message', [
    (zipfile.ZIP_DEFLATED, r'model\.weights\.h5 is declared'), (zipfile.ZIP_BZIP2, 'compressed in'),
    (zipfile.ZIP_LZMA, 'compressed in')])
def test_archives(tmp_path, packing, message):
  with zipfile.ZipFile(tmp_path / 'x.keras', 'w', packing) as file:
    file.writestr('model.weights.h5', bytes(2**25))
  assert (tmp_path / 'x.keras').stat().st_size < 300_000
  pytest.importorskip('h5py')
  assert_rejected(tmp_path / 'x.keras', message)


def test_too_many_classes(tmp_path):
  """Each class gets a name, which takes more memory than its bias."""
  tensors = {'FeatureExtractor/MobilenetV1/Conv2d_0/weights': np.zeros((3, 3, 3, 8)),
             'BoxPredictor_0/BoxEncodingPredictor/biases': np.zeros(4, np.float32),
             'BoxPredictor_0/ClassPredictor/biases': np.zeros(200_000, np.float32)}
  with pytest.raises(InputError, match='200,000 classes, which is too many'):
    importer.class_columns(WeightFile('x', 'checkpoint', tensors))


def test_large_files_may_hold_large_arrays():
  limit = Limit('x', 10**9)
  limit.claim('a', (10**9 // 4,), 4)
  limit.claim('b', (0, 3), 4)
