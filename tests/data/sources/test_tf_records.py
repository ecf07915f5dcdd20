"""TFRecord files of the TF Object Detection API, whole and damaged."""

import numpy as np
import pytest
from data_formats import IMAGES, LABEL_MAP, framed, picture, tf_example, write

from ppn_jax.data.source import build_source
from ppn_jax.data.sources.tf_example import Span, parse_example
from ppn_jax.errors import InputError

pytest.importorskip('tensorflow_datasets', reason='its copy of tf.train.Example is the writer')


def load(folder, *, on_bad_example='raise', records='train.record-*', label_map='label_map.pbtxt',
         **options):
  return build_source({'name': 'tf_records', 'records': str(folder / records),
                       'label_map': label_map and str(folder / label_map), **options},
                      on_bad_example=on_bad_example)


def example(folder, name='a1.jpg', number=1, **more):
  size, objects = IMAGES[name]
  picture(folder / 'tmp.jpg', size)
  return tf_example(name, number, (folder / 'tmp.jpg').read_bytes(), size, objects, **more)


def single(folder, data):
  """Writes a file of one record, and a label map."""
  (folder / 'x.record').write_bytes(framed(data))
  (folder / 'label_map.pbtxt').write_text(LABEL_MAP)
  return dict(records='x.record')


def test_records(tmp_path):
  folder = write(tmp_path, 'tf_records')
  source = load(folder)
  truth = source.ground_truth()
  assert [(i['id'], i['file_name']) for i in truth['images']] == [
      (2, 'b2.jpg'), (4, 'd4.jpg'), (1, 'a1.jpg'), (3, 'c3.jpg')]
  assert source.categories == ((1, 'cat'), (2, 'dog'))
  third = source[2]
  assert third.labels.tolist() == [1, 0] and third.size == (48, 64)
  np.testing.assert_allclose(third.boxes[0], [12 / 48, 8 / 64, 36 / 48, 24 / 64], atol=1e-6)
  assert third.image.shape == (48, 64, 3) and len(source[3].boxes) == 0
  assert source.encoded(0)[:2] == b'\xff\xd8'
  assert load(folder, label_map='').categories == source.categories  # From class/text.


@pytest.mark.parametrize('data', [b'', b'\x0a\x00', b'\x0a\x05\x0a\x03\x0a\x01x'])
def test_examples_without_values(data):
  assert set(parse_example(memoryview(data), Span(0, len(data)))) <= {'x'}


def test_example_parser_agrees_with_protobuf(tmp_path):
  from tensorflow_datasets.proto import tf_example_pb2
  rng = np.random.default_rng(0)
  message = tf_example_pb2.Example()
  wanted = {'b': [rng.bytes(n) for n in (0, 1, 200, 70_000)],
            'i': [*rng.integers(-2**63, 2**63 - 1, 50).tolist(), 0, -1, 127, 128],
            'f': rng.standard_normal(40).astype(np.float32).tolist(), 'none': []}
  message.features.feature['b'].bytes_list.value.extend(wanted['b'])
  message.features.feature['i'].int64_list.value.extend(wanted['i'])
  message.features.feature['f'].float_list.value.extend(wanted['f'])
  message.features.feature['none'].SetInParent()
  data = b'before' + message.SerializeToString() + b'after'
  parsed = parse_example(memoryview(data), Span(6, len(data) - 5))
  assert [data[a:b] for a, b in parsed['b']] == wanted['b']
  for key in ('i', 'f', 'none'):
    assert list(parsed[key]) == wanted[key]
  # One value at a time, as protocol buffers of version 2 write them.
  unpacked = bytes([0x08, 0x05, 0x08, 0x7f])
  entry = b'\x0a\x01u\x12' + bytes([len(unpacked) + 2, 0x1a, len(unpacked)]) + unpacked
  inner = b'\x0a' + bytes([len(entry)]) + entry
  data = b'\x0a' + bytes([len(inner)]) + inner
  assert parse_example(memoryview(data), Span(0, len(data)))['u'].tolist() == [5, 127]


def test_broken_messages_are_value_errors(tmp_path):
  data = example(tmp_path)
  rng = np.random.default_rng(0)
  for _ in range(300):
    broken = bytearray(data[:rng.integers(1, len(data))])
    for at in rng.integers(0, min(len(broken), 400), 3):
      broken[at] = rng.integers(256)
    try:
      parse_example(memoryview(bytes(broken)), Span(0, len(broken)))
    except ValueError:
      pass


@pytest.mark.parametrize('cut, message', [
    (6, 'ends within the length of record 1'), (-1, 'but the file ends after')])
def test_truncated_files(tmp_path, cut, message):
  folder = write(tmp_path, 'tf_records')
  file = folder / 'train.record-00000-of-00002'
  data = file.read_bytes()
  first = 12 + int.from_bytes(data[:8], 'little') + 4
  file.write_bytes(data[:first + cut] if cut > 0 else data[:cut])
  with pytest.raises(InputError, match=message):
    load(folder)
  source = load(folder, on_bad_example='skip')
  assert len(source) == 4 and [i for i, _ in source.contents.unreadable] == [1]
  with pytest.raises(InputError, match=message):
    source[1]
  assert source[2].image.shape == (48, 64, 3)


def test_damaged_lengths_lose_the_rest_of_the_file(tmp_path):
  record = framed(example(tmp_path))
  (tmp_path / 'label_map.pbtxt').write_text(LABEL_MAP)
  damaged = bytearray(record * 5)
  damaged[2 * len(record) + 3] ^= 1
  (tmp_path / 'train.record-0').write_bytes(damaged)
  with pytest.raises(InputError, match=r'length of record 2 has a wrong checksum; copy the file'):
    load(tmp_path)
  source = load(tmp_path, on_bad_example='skip')
  assert len(source) == 5 and len(source.contents.unreadable) == 3


def test_damaged_images_are_found_by_their_checksum(tmp_path):
  data = bytearray(framed(example(tmp_path)))
  (tmp_path / 'label_map.pbtxt').write_text(LABEL_MAP)
  data[data.index(b'\xff\xd8') + 700] ^= 1
  (tmp_path / 'x.record').write_bytes(data)
  with pytest.raises(InputError, match=r'record 0 .*its checksum is wrong'):
    load(tmp_path, records='x.record')[0]


@pytest.mark.parametrize('more, message', [
    ({'image/encoded': []}, 'no image in image/encoded'),
    ({'image/encoded': [3]}, "'image/encoded' has numbers"),
    ({'image/object/bbox/xmin': [.1]}, 'values of ymin, xmin'),
    ({'image/object/class/label': [1]}, '2 boxes, but 1 entries of class/label'),
    ({'image/object/class/label': [7, 1]}, 'class 7 is not in the label map'),
    ({'image/object/is_crowd': [1]}, '1 values of object/is_crowd for 2 boxes'),
    ({'image/object/bbox/xmax': [.1, .6]}, 'no area')])
def test_wrong_records(tmp_path, more, message):
  options = single(tmp_path, example(tmp_path, **more))
  with pytest.raises(InputError, match=message):
    load(tmp_path, **options)


def test_optional_features(tmp_path):
  options = single(tmp_path, example(
      tmp_path, **{'image/object/is_crowd': [0, 1], 'image/object/area': [100., 50.],
                   'image/height': [], 'image/width': [], 'image/object/class/label': [],
                   'image/source_id': [b'']}))
  source = load(tmp_path, **options)
  assert source[0].crowd.tolist() == [False, True] and source[0].labels.tolist() == [1, 0]
  truth = source.ground_truth()
  assert [a['area'] for a in truth['annotations']] == [100, 50]
  assert truth['images'] == [{'id': 1, 'file_name': 'a1.jpg', 'height': 48, 'width': 64}]


@pytest.mark.parametrize('records, content, message', [
    ('x', b'\x1f\x8b\x08' + bytes(20), 'compressed'), ('x', bytes(50), 'not a TFRecord file'),
    ('x', b'', 'no records'), ('gone-*', b'', "no files '.*gone-")])
def test_other_files(tmp_path, records, content, message):
  (tmp_path / 'x').write_bytes(content)
  with pytest.raises(InputError, match=message):
    load(tmp_path, records=records, label_map='')


def test_missing_shards_and_label_maps(tmp_path):
  folder = write(tmp_path, 'tf_records')
  (folder / 'label_map.pbtxt').write_text('item { id: ')
  with pytest.raises(InputError, match=r'not a label map'):
    load(folder)
  (folder / 'label_map.pbtxt').write_text("item { id: 0 name: 'x' }")
  with pytest.raises(InputError, match="class 'x' has id 0"):
    load(folder)
  with pytest.raises(InputError, match='no files'):
    load(folder, records='val.record-*')
  (folder / 'train.record-00001-of-00002').rename(folder / 'train.record-00002-of-00003')
  (folder / 'train.record-00000-of-00002').rename(folder / 'train.record-00000-of-00003')
  with pytest.raises(InputError, match=r'train.record-00001-of-00003 is missing'):
    load(folder)


@pytest.mark.slow
def test_files_of_tensorflow(tmp_path):
  tf = pytest.importorskip('tensorflow', reason='TensorFlow is the writer')
  with tf.io.TFRecordWriter(str(tmp_path / 'train.record-0')) as writer:
    for number, name in enumerate(IMAGES, start=1):
      message = tf.train.Example.FromString(example(tmp_path, name, number))
      writer.write(message.SerializeToString())
  (tmp_path / 'label_map.pbtxt').write_text(LABEL_MAP)
  source = load(tmp_path)
  assert [i['file_name'] for i in source.ground_truth()['images']] == list(IMAGES)
  assert source[0].image.shape == (48, 64, 3)
