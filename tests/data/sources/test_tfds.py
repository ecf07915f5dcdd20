"""Tfds on data sets that TFDS writes here, local and from a stand-in for gs://."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gcs_server import serve
from PIL import Image
from time_limits import HANG_SECONDS
from tiny import tiny_config

from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.source import build_source
from ppn_jax.data.sources import tfds_records
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.errors import InputError

tfds = pytest.importorskip('tensorflow_datasets')
F = tfds.features


def objects(crowd='is_crowd', **more):
  return F.Sequence({'bbox': F.BBoxFeature(), 'label': F.ClassLabel(names=['cat', 'dog']),
                     crowd: np.bool_} | more)


COCO = {'image': F.Image(encoding_format='jpeg'), 'image/filename': F.Text(), 'image/id': np.int64,
        'objects': objects(area=np.int64, id=np.int64)}
VOC = {'image': F.Image(), 'image/filename': F.Text(), 'labels': F.Sequence(F.ClassLabel(
    names=['cat', 'dog'])), 'objects': objects('is_difficult', pose=F.ClassLabel(names=['left']))}


def picture(size):
  return io.BytesIO(encode_jpeg(np.full((*size, 3), 120, np.uint8)))


def coco_example(number, *boxes, size=(20, 40), **fields):
  return {'image': picture(size), 'image/filename': f'{number:03d}.jpg', 'image/id': number,
          'objects': [{'area': 37, 'bbox': F.BBox(*box), 'id': 1, 'is_crowd': crowd,
                       'label': label} for box, label, crowd in boxes]} | fields


def voc_example(number, *boxes):
  return {'image': picture((10, 10)), 'image/filename': f'2007_{number:06d}.jpg', 'labels': [],
          'objects': [{'bbox': F.BBox(*box), 'is_difficult': hard, 'label': label, 'pose': 0}
                      for box, label, hard in boxes]}


EXAMPLES = [coco_example(30, ((.1, .2, .5, .6), 1, False), ((.0, .0, 1., 1.), 0, True)),
            coco_example(10, size=(30, 20)), coco_example(20, ((.5, .5, .75, 1.), 0, False))]


def write(folder, features, examples, file_format='array_record', name='toy'):
  """Prepares a data set with TFDS and returns the folder of its version."""
  def info(self):
    return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))
  def rewound(examples):  # A file is read once for each split.
    return enumerate(e | {k: io.BytesIO(v.getvalue()) for k, v in e.items()
                          if isinstance(v, io.BytesIO)} for e in examples)
  def split_generators(self, manager):
    return {'train': rewound(examples), 'validation': rewound(examples[:1])}
  with tfds.core.registered.skip_registration():
    kind = type(name.title(), (tfds.core.GeneratorBasedBuilder,), {
        'VERSION': tfds.core.Version('1.2.0'), '_info': info, '__module__': __name__,
        '_split_generators': split_generators, '_generate_examples': None, 'name': name})
    builder = kind(data_dir=str(folder), file_format=file_format)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
      try_download_gcs=False))
  return folder / name / '1.2.0'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp('tfds'), COCO, EXAMPLES)


def by_id(source):
  return {e.image_id: e for e in (source[i] for i in range(len(source)))}


def test_examples_of_coco_s_schema(folder):
  source = Tfds(data_dir=str(folder))
  assert [tuple(c) for c in source.categories] == [(1, 'cat'), (2, 'dog')]
  assert len(source) == 3 and source.max_boxes == 2 and not source.contents.left_out
  examples = by_id(source)
  first = examples[30]
  assert first.image.shape == (20, 40, 3) and first.size == (20, 40)
  np.testing.assert_allclose(first.boxes, [[.1, .2, .5, .6], [0, 0, 1, 1]], atol=1e-6)
  np.testing.assert_array_equal(first.labels, [1, 0])
  np.testing.assert_array_equal(first.crowd, [False, True])
  assert examples[10].size == (30, 20) and examples[10].boxes.shape == (0, 4)


def test_ground_truth(folder):
  truth = Tfds(data_dir=str(folder)).ground_truth()
  json.dumps(truth)
  annotation, = (a for a in truth['annotations'] if a['image_id'] == 20)
  assert (annotation['category_id'], annotation['iscrowd'], annotation['area']) == (1, 0, 37)
  np.testing.assert_allclose(annotation['bbox'], [20, 10, 20, 5], atol=1e-4)
  assert {'id': 10, 'file_name': '010.jpg', 'height': 30, 'width': 20} in truth['images']


def test_by_name_and_by_slice(folder):
  data_dir = str(folder.parents[1])
  for name in ('toy', 'toy:1.2.0', 'toy:1.*.*'):
    assert len(Tfds(dataset=name, data_dir=data_dir)) == 3
  assert len(Tfds(dataset='toy', split='validation', data_dir=data_dir)) == 1
  both = Tfds(dataset='toy', split='train[:2]', data_dir=data_dir)
  whole = Tfds(dataset='toy', data_dir=data_dir)
  assert [i['id'] for i in both.ground_truth()['images']] == [
      i['id'] for i in whole.ground_truth()['images']][:2]
  block = {'name': 'tfds', 'dataset': 'toy', 'split': 'train[1:]', 'data_dir': data_dir}
  assert len(build_source(block)) == 2


def test_examples_of_voc_s_schema(tmp_path):
  examples = [voc_example(5, ((.1, .2, .5, .6), 1, True)), voc_example(9)]
  source = Tfds(data_dir=str(write(tmp_path, VOC, examples)))
  assert set(by_id(source)) == {2007000005, 2007000009}
  assert by_id(source)[2007000005].crowd.all()
  annotation, = source.ground_truth()['annotations']
  np.testing.assert_allclose(annotation['area'], 16, rtol=1e-5)


def test_a_source_goes_to_other_processes(folder):
  source = pickle.loads(pickle.dumps(Tfds(data_dir=str(folder))))
  assert source[1].image.shape == Tfds(data_dir=str(folder))[1].image.shape


def test_without_tensorflow_and_jax(folder):
  code = ('import sys; from ppn_jax.data.sources.tfds import Tfds; Tfds(data_dir=sys.argv[1])[0]\n'
          'assert not {"jax", "tensorflow"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code, str(folder)], check=True)


@pytest.mark.parametrize('box, reason', [
    ((.5, .5, .5, .8), 'no area'), ((.6, .5, .5, .8), 'no area')])
def test_bad_boxes(tmp_path, box, reason, monkeypatch):
  # TFDS's own check would keep such boxes out of data that is written today.
  monkeypatch.setattr(F.BBoxFeature, 'encode_example', lambda self, b: np.float32(b))
  examples = [coco_example(1, (box, 0, False), ((.1, .1, .3, .3), 1, False))]
  where = str(write(tmp_path, COCO, examples))
  with pytest.raises(InputError, match=rf'box .* of image 1 .*{reason}.*on_bad_box'):
    Tfds(data_dir=where)
  source = Tfds(data_dir=where, on_bad_box='drop')
  assert source.contents.left_out.reasons == {reason: 1}
  np.testing.assert_array_equal(source[0].labels, [1])


def test_boxes_that_are_cut_and_merged(tmp_path, monkeypatch):
  monkeypatch.setattr(F.BBoxFeature, 'encode_example', lambda self, b: np.float32(b))
  over, once = ((.5, .5, .7, 1.25), 0, False), ((.1, .1, .3, .3), 1, False)
  source = Tfds(data_dir=str(write(tmp_path, COCO, [coco_example(1, over, once, once)])))
  assert (source.contents.clipped.count, source.contents.merged.count) == (1, 1)
  np.testing.assert_allclose(source[0].boxes, [[.5, .5, .7, 1], [.1, .1, .3, .3]], atol=1e-6)
  assert [a['area'] for a in source.ground_truth()['annotations']] == [37, 37]


def test_records_that_cannot_be_read_are_skipped(folder, monkeypatch):
  whole = Tfds(data_dir=str(folder))
  read_record, lost = tfds_records.read_record, whole[1].image_id

  def damaged(data, schema):
    record = read_record(data, schema)
    if record.image_id == lost:
      raise ValueError('damaged')
    return record

  monkeypatch.setattr(tfds_records, 'read_record', damaged)
  with pytest.raises(InputError, match='record 1: cannot be read: damaged'):
    Tfds(data_dir=str(folder))
  source = Tfds(data_dir=str(folder), on_bad_example='skip')
  assert len(source) == 3 and len(source.contents.unreadable) == 1
  ids = [i['id'] for i in source.ground_truth()['images']]
  assert ids[0] == whole[0].image_id and len(set(ids)) == 3
  with pytest.raises(InputError, match='record 1: cannot be read: damaged'):
    source[1]
  assert source[2].image_id == whole[2].image_id


@pytest.mark.parametrize('features, example, message', [
    ({'image': F.Image(), 'label': F.ClassLabel(names=['a'])}, {'image': picture((4, 4)),
                                                                'label': 0},
     r'0 features are sequences of boxes with classes, needed: 1.*label: ClassLabel'),
    ({'text': F.Text(), 'objects': objects()}, {'text': '', 'objects': []},
     r'0 features are images, needed: 1'),
    ({'image': F.Image(), 'objects': objects(), 'parts': objects()},
     {'image': picture((4, 4)), 'objects': [], 'parts': []}, '2 features are sequences of boxes'),
])
def test_other_features(tmp_path, features, example, message):
  where = str(write(tmp_path, features, [example]))
  with pytest.raises(InputError, match=message):
    Tfds(data_dir=where)
  if 'parts' in features:
    assert len(Tfds(data_dir=where, objects='parts')) == 1


def test_wrong_places_and_options(folder, tmp_path):
  for options, message in (
      ({}, "tfds.data_dir is '', legal: a path"),
      ({'data_dir': str(tmp_path)}, 'no data set there: .*give the folder with dataset_info.json'),
      ({'dataset': 'coco/2017', 'data_dir': str(tmp_path)},
       'is not prepared in .*ppn prepare.*tfds build coco/2017 --file_format=array_record'),
      ({'dataset': '../x y', 'data_dir': str(tmp_path)}, 'is not prepared'),
      ({'dataset': 3}, 'tfds.dataset is 3, legal: a path'),
      ({'data_dir': str(folder), 'split': 'trian'}, r"split 'trian' cannot .*splits: train, valid"),
      ({'data_dir': str(folder), 'split': 'train[x'}, 'cannot be read'),
      ({'data_dir': str(folder), 'split': 'train[9:]'}, 'cannot be read'),
      ({'data_dir': str(folder), 'split': None}, 'tfds.split is None, legal: train, validation'),
      ({'data_dir': str(folder), 'on_bad_box': 'keep'}, "legal: 'clip', 'drop', 'raise'"),
      ({'data_dir': str(folder), 'objects': 'things'}, "0 features .* called 'things'")):
    with pytest.raises(InputError, match=message) as caught:
      Tfds(**options)
    assert '\n' not in str(caught.value)


def test_without_the_library(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(InputError, match=r"pip install .*\[tfds\]"):
    Tfds(data_dir=str(folder))


def test_another_file_format(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / 'x')
  info = copy / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(InputError, match=r'no ArrayRecord files; make them with `tfds conv'):
    Tfds(data_dir=str(copy))


@pytest.mark.parametrize('spoil', [
    lambda data: b'', lambda data: data[:len(data) // 2], lambda data: b'\0' * len(data),
    lambda data: data[:100] + bytes(200) + data[300:]])
def test_damaged_records(folder, tmp_path, spoil):
  copy = shutil.copytree(folder, tmp_path / 'x')
  shard, = copy.glob('*train*')
  shard.write_bytes(spoil(shard.read_bytes()))
  with pytest.raises(InputError, match=r'cannot be read|damaged|not an image') as caught:
    Tfds(data_dir=str(copy))
  assert '\n' not in str(caught.value)


def test_a_missing_shard(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / 'x')
  next(copy.glob('*train*')).unlink()
  with pytest.raises(InputError, match='cannot be read'):
    Tfds(data_dir=str(copy))


def test_records_of_another_schema(tmp_path):
  where = write(tmp_path / 'coco', COCO, EXAMPLES[:1])
  shutil.copy(next(write(tmp_path / 'voc', VOC, [voc_example(5)]).glob('*-train*')),
              next(where.glob('*-train*')))
  with pytest.raises(InputError, match=r"record 0: cannot be read: 0 values of 'image/id'"):
    Tfds(data_dir=str(where))


@pytest.mark.slow
def test_reading_from_google_cloud_storage(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'bucket' / 'sets' / 'toy' / '1.2.0')
  code = ('from ppn_jax.data.sources.tfds import Tfds\n'
          'a = Tfds(data_dir="gs://bucket/sets/toy/1.2.0")\n'
          'b = Tfds(dataset="toy", data_dir="gs://bucket/sets", split="train")\n'
          'print(*(int(s[i].image.sum()) for s in (a, b) for i in range(3)))\n')
  with serve(tmp_path) as environment:
    result = subprocess.run([sys.executable, '-c', code], env=os.environ | environment,
                            timeout=HANG_SECONDS, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  local = Tfds(data_dir=str(folder))
  assert list(map(int, result.stdout.split())) == [
      int(local[i].image.sum()) for i in range(3)] * 2


@pytest.mark.slow
def test_training(tmp_path):
  from ppn_jax.jobs.train import train
  three = COCO | {'objects': objects(area=np.int64, id=np.int64, label=F.ClassLabel(
      names=['cat', 'dog', 'fox']))}
  config = tiny_config(steps=2, checkpoint_every=2).copy_and_resolve_references()
  config.data.train = dict(name='tfds', data_dir=str(write(tmp_path, three, EXAMPLES)))
  config.data.max_boxes = 32  # As test_voc.py trains with: compiled once for both.
  train(config.lock(), str(tmp_path / 'run'))
  categories = json.loads((tmp_path / 'run' / 'categories.json').read_text())
  assert categories[2] == {'id': 3, 'name': 'fox'}


def test_a_turned_photograph_stays_as_tfds_shows_it(tmp_path):
  turned, file = Image.Exif(), io.BytesIO()
  turned[0x0112] = 6
  Image.new('RGB', (40, 20)).save(file, 'JPEG', exif=turned)
  file.seek(0)
  source = Tfds(data_dir=str(write(tmp_path, COCO, [coco_example(1, image=file)])))
  assert source[0].size == source[0].image.shape[:2] == (20, 40)
