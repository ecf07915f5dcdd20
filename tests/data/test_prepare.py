"""Data of several formats in TFDS's format has the same ground truth and pixels."""

import json
import os
import pathlib
import re
import shutil
import tarfile

import numpy as np
import pytest
from log_lines import logged
from PIL import Image

from ppn_jax.data import prepare as prepare_lib
from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.data.prepare import Options, prepare
from ppn_jax.data.sources import tfds_records
from ppn_jax.data.sources.coco import CocoJson
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

tfds = pytest.importorskip('tensorflow_datasets')

# Data of the fixture `earlier`, made when this package wrote TFDS's files itself.
EARLIER = pathlib.Path(__file__).with_name('prepared_by_processes.tar.gz')


@pytest.fixture
def coco(tmp_path):
  """Writes seven images of several sizes and formats, with gaps in ids and categories."""
  (tmp_path / 'images').mkdir()
  rng, images, annotations = np.random.default_rng(0), [], []
  for i in range(7):
    size = (20 + 10 * i, 40)
    pixels = rng.integers(0, 255, (*size, 3), np.uint8)
    name = f'{i}.png' if i == 3 else f'{i}.jpg'
    if i == 3:
      Image.fromarray(pixels).save(tmp_path / 'images' / name)
    else:
      (tmp_path / 'images' / name).write_bytes(encode_jpeg(pixels))
    images.append({'id': 100 - 9 * i, 'file_name': name, 'height': size[0], 'width': size[1]})
    annotations += [{'image_id': 100 - 9 * i, 'category_id': (3, 90)[k % 2], 'iscrowd': k // 2,
                     'bbox': [1.1 + k, 2.3, 10.7, 9.1], 'area': 50.5 + k} for k in range(i % 4)]
  content = {'images': images, 'annotations': annotations,
             'categories': [{'id': 90, 'name': 'dog'}, {'id': 3, 'name': 'cat'}]}
  (tmp_path / 'truth.json').write_text(json.dumps(content))
  return tmp_path


def load(coco):
  return CocoJson(str(coco / 'images'), str(coco / 'truth.json'))


def make(sources, folder, said=None, progress=None, **options):
  options = {'name': 'toy', 'shards': 3, 'threads': 1} | options
  with logged(said):
    return prepare(sources, folder / 'out', Options(**options),
                   progress=progress or (lambda done, total: None))


def same(ours, theirs):
  assert ours.ground_truth() == theirs.ground_truth() and ours.max_boxes == theirs.max_boxes
  for i in range(len(theirs)):
    for a, b in zip(ours[i], theirs[i], strict=True):
      np.testing.assert_array_equal(a, b)


def test_the_same_data_comes_back(coco):
  source = load(coco)
  steps = []
  folder = make({'train': source}, coco, progress=lambda *step: steps.append(step))
  assert folder == coco / 'out' / 'toy' / '1.0.0' and steps[-1] == (7, 7)
  same(Tfds(dataset='toy', data_dir=str(coco / 'out')), source)
  assert sorted(os.listdir(folder)) == [
      'dataset_info.json', 'features.json', 'instances_train.json', 'objects-label.labels.txt',
      'prepared.json', *(f'toy-train.array_record-0000{k}-of-00003' for k in range(3))]
  assert os.listdir(coco / 'out') == ['toy'] and os.listdir(coco / 'out' / 'toy') == ['1.0.0']


def test_images_are_stored_as_they_are(coco):
  ours = Tfds(data_dir=str(make({'train': load(coco)}, coco)))
  for i, image in enumerate(ours.ground_truth()['images']):
    assert ours.encoded(i) == (coco / 'images' / image['file_name']).read_bytes()


def test_tfds_prints_nothing_and_leaves_nothing(coco, capsys, tmp_path, monkeypatch):
  (tmp_path / 'temporary').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'temporary'))
  before = tfds.list_builders(with_community_datasets=False)
  make({'train': load(coco)}, coco)
  assert capsys.readouterr() == ('', '') and not os.listdir(tmp_path / 'temporary')
  assert tfds.list_builders(with_community_datasets=False) == before


def test_slices_keep_the_data_s_own_ids(coco):
  source = load(coco)
  folder = make({'train': source}, coco)
  part = Tfds(data_dir=str(folder), split='train[2:5]')
  assert [i['id'] for i in part.ground_truth()['images']] == [82, 73, 64]
  assert part.categories == source.categories
  np.testing.assert_array_equal(part[1].image, source[3].image)


def test_tfds_reads_it(coco):
  source = load(coco)
  make({'train': source, 'eval': source}, coco)
  records = tfds.data_source('toy', data_dir=str(coco / 'out'))
  assert set(records) == {'train', 'eval'} and len(records['eval']) == 7
  example = records['train'][3]
  assert example['image/id'] == 73 and example['image/filename'] == b'3.png'
  assert (example['image/height'], example['image/width']) == (50, 40)
  np.testing.assert_array_equal(example['image'], source[3].image)
  objects = example['objects']
  np.testing.assert_allclose(objects['bbox'], source[3].boxes)
  assert list(objects['label']) == [0, 1, 0] and list(objects['is_crowd']) == [0, 0, 1]
  np.testing.assert_allclose(objects['area'], [50.5, 51.5, 52.5])
  builder = tfds.builder_from_directory(str(coco / 'out' / 'toy' / '1.0.0'))
  assert builder.info.features['objects'].feature['label'].names == ['cat', 'dog']
  assert builder.info.splits['train'].shard_lengths == [2, 2, 3]


def test_smaller_images(coco):
  source = load(coco)
  small = Tfds(data_dir=str(make({'train': source}, coco, max_side=48, quality=95)))
  assert small.ground_truth() == source.ground_truth()
  for i in range(7):
    ours, theirs = small[i], source[i]
    assert ours.size == theirs.size and max(ours.image.shape) <= 48
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    if max(theirs.size) <= 48:
      np.testing.assert_array_equal(ours.image, theirs.image)
    else:
      assert ours.image.shape[0] == 48 and ours.image.shape[1] == round(40 * 48 / theirs.size[0])


def test_the_same_bytes_whatever_writes_them(coco):
  source = load(coco)
  one = make({'train': source}, coco)
  two = make({'train': source}, coco, name='toz', threads=2)
  for a, b in zip(sorted(one.glob('*record*')), sorted(two.glob('*record*')), strict=True):
    assert a.read_bytes() == b.read_bytes()
  records = tfds.builder_from_directory(str(one)).as_data_source(
      'train', deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES).data_source
  for i in range(7):  # Not in the order of a hash table, which differs between processes.
    assert tfds_records.sort_features(records[i]) == records[i]


def test_few_images_are_in_memory_at_once(coco, monkeypatch):
  monkeypatch.setattr(prepare_lib, '_READ_AHEAD', 1)
  held, most, read = [], [], prepare_lib._read_example

  def remember(*args):
    held.append(read(*args))
    return held[-1]

  monkeypatch.setattr(prepare_lib, '_read_example', remember)
  make({'train': load(coco)}, coco, shards=1,
       progress=lambda *step: most.append(sum(map(bool, held))))
  assert len(held) == 7 and max(most) <= 2 and not any(held)


@pytest.fixture
def earlier(tmp_path):
  with tarfile.open(EARLIER) as tar:
    tar.extractall(tmp_path / 'earlier', filter='data')
  return tmp_path / 'earlier'


def test_data_of_an_earlier_version(earlier):
  """Checks that it is read and recognised, and has the records that are written today."""
  source, folder, said = load(earlier), earlier / 'out' / 'toy' / '1.0.0', []
  ours = Tfds('toy', data_dir=str(earlier / 'out'))
  assert [ours[i].image_id for i in range(len(ours))] == [50, 43, 29]
  assert ours.encoded(2) == (earlier / 'images' / '3.jpg').read_bytes()
  kept = [a['bbox'] for a in source.ground_truth()['annotations'] if a['image_id'] != 36]
  assert [a['bbox'] for a in ours.ground_truth()['annotations']] == kept
  assert make({'train': source}, earlier, said) == folder
  assert 'exists already' in said[0] and said[1].startswith('1 images were left out because')
  (earlier / 'out').rename(earlier / 'before')
  made = make({'train': source}, earlier, shards=2, on_bad_image='skip', max_bad=0.5)
  for file in sorted((earlier / 'before' / 'toy' / '1.0.0').iterdir()):
    if file.name not in ('dataset_info.json', 'prepared.json'):
      assert (made / file.name).read_bytes() == file.read_bytes()
  theirs, ours = (json.loads((p / 'toy' / '1.0.0' / 'prepared.json').read_text())
                  for p in (earlier / 'before', earlier / 'out'))
  assert theirs.keys() == ours.keys() and theirs['plan'] == ours['plan']
  assert [digest for digest, _ in theirs['images']] == [digest for digest, _ in ours['images']]
  change_image(earlier, '0.jpg')
  with pytest.raises(InputError, match='was made from other images'):
    make({'train': source}, earlier)


def test_data_without_files(tmp_path):
  source = SyntheticShapes(num_images=5, image_size=64)
  ours = Tfds(data_dir=str(make({'train': source}, tmp_path, quality=100)))
  assert ours.ground_truth() == source.ground_truth()
  difference = ours[2].image.astype(int) - source[2].image
  assert np.abs(difference).mean() < 8


def test_again_is_a_check(coco):
  said = []
  folder = make({'train': load(coco)}, coco, said)
  assert not said
  times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  assert make({'train': load(coco)}, coco, said, shards=0) == folder
  assert 'exists already' in said[0]
  assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
  for options, message in (({'max_side': 32}, 'data made with max_side=0, not 32'),
                           ({'quality': 50}, 'data made with quality=90, not 50')):
    with pytest.raises(InputError, match=message):
      make({'train': load(coco)}, coco, **options)
  with pytest.raises(InputError, match=r'other data \(splits differ\)'):
    make({'train': load(coco), 'eval': load(coco)}, coco)
  shard = next(folder.glob('*00001-of*'))
  data = bytearray(shard.read_bytes())
  data[200] ^= 1
  shard.write_bytes(data)
  with pytest.raises(InputError, match=r'00001-of-00003 is missing or has changed'):
    make({'train': load(coco)}, coco)
  (folder / 'prepared.json').write_text('{}')
  with pytest.raises(InputError, match='was not made by `ppn prepare`'):
    make({'train': load(coco)}, coco)


class Killed(BaseException):
  """Exception that ends the work as abruptly as a signal."""


def killed_after(images):
  def progress(done, total):
    if done >= images:
      raise Killed
  return progress


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_stopped_leaves_nothing(coco):
  expected = contents(make({'train': load(coco)}, coco))
  shutil.rmtree(coco / 'out')
  for images in (0, 1, 3, 5, 7):
    with pytest.raises(Killed):
      make({'train': load(coco)}, coco, progress=killed_after(images))
    assert os.listdir(coco / 'out') == ['toy'] and not os.listdir(coco / 'out' / 'toy')
  assert contents(make({'train': load(coco)}, coco)) == expected


@pytest.mark.parametrize('step', ['_check_skipped', '_finish'])
def test_a_kill_at_the_end(coco, monkeypatch, step):
  expected = contents(make({'train': load(coco)}, coco))
  shutil.rmtree(coco / 'out')
  def die(*arguments):
    raise Killed
  with monkeypatch.context() as patch:
    patch.setattr(prepare_lib, step, die)
    with pytest.raises(Killed):
      make({'train': load(coco)}, coco)
    assert not os.listdir(coco / 'out' / 'toy')
  assert contents(make({'train': load(coco)}, coco)) == expected


def test_what_a_kill_has_left_is_no_data_and_is_removed(coco):
  folder = make({'train': load(coco)}, coco)
  expected, left = contents(folder), folder.with_name('incomplete.A1B2C3_1.0.0')
  folder.rename(left)  # As after a SIGKILL at the very end.
  left.with_name('incomplete.A1B2C3_2.0.0').mkdir()
  with pytest.raises(InputError, match='is not prepared in'):
    Tfds('toy', data_dir=str(coco / 'out'))
  said = []
  assert contents(make({'train': load(coco)}, coco, said)) == expected
  assert said == [f'removed {left}, left by a call that was stopped']
  assert sorted(os.listdir(coco / 'out' / 'toy')) == ['1.0.0', 'incomplete.A1B2C3_2.0.0']


def test_a_file_system_without_locks(coco, monkeypatch):
  """Checks that nothing is removed without a lock, since another call may use it."""
  def refuse(*arguments):
    raise OSError(95, 'Operation not supported')
  monkeypatch.setattr('fcntl.flock', refuse)
  left = coco / 'out' / 'toy' / 'incomplete.A1B2C3_1.0.0'
  left.mkdir(parents=True)
  make({'train': load(coco)}, coco)
  assert left.is_dir()


def test_what_came_to_be_there_meanwhile_is_not_overwritten(coco):
  target = coco / 'out' / 'toy' / '1.0.0'

  def come(done, total):
    if done == 7:
      target.mkdir()
      (target / 'mine').write_text('')
  with pytest.raises(FileExistsError, match='already exists'):
    make({'train': load(coco)}, coco, progress=come)
  assert os.listdir(target) == ['mine'] and os.listdir(target.parent) == ['1.0.0']


def test_two_at_once(coco):
  def second(done, total):
    with pytest.raises(InputError, match='another `ppn prepare` is writing there'):
      make({'train': load(coco)}, coco)
    second.tried = True
  make({'train': load(coco)}, coco, progress=second)
  assert second.tried


def test_bad_images(coco):
  for name in ('2.jpg', '5.jpg'):
    path = coco / 'images' / name
    path.write_bytes(path.read_bytes()[:-300])
  source, said = load(coco), []
  with pytest.raises(InputError, match=r'2 of 7 images cannot be read, .*2\.jpg: .*--on_bad_image'):
    make({'train': source}, coco)
  with pytest.raises(InputError, match=r'2 of 7 .*more than the share 0\.01'):
    make({'train': source}, coco, on_bad_image='skip')
  assert not os.listdir(coco / 'out' / 'toy')
  steps = []
  folder = make({'train': source}, coco, said, lambda *step: steps.append(step),
                on_bad_image='skip', max_bad=0.3)
  assert steps[-1] == (7, 7) and len(said) == 2 and 'image 82: ' in said[0]
  ours, theirs = Tfds(data_dir=str(folder)), source.ground_truth()
  kept = [i['id'] for i in theirs['images'] if i['id'] not in (82, 55)]
  assert [ours[i].image_id for i in range(5)] == kept
  truth = ours.ground_truth()
  assert [i['id'] for i in truth['images']] == kept
  assert [a['bbox'] for a in truth['annotations']] == [
      a['bbox'] for a in theirs['annotations'] if a['image_id'] in kept]
  skipped = json.loads((folder / 'prepared.json').read_text())['skipped']
  assert [image for image, _ in skipped] == [82, 55]


@pytest.mark.parametrize('policy', ['raise', 'skip'])
def test_an_image_that_was_repaired_is_added(coco, policy):
  """Checks both cases: the first call failed, or left the image out permanently."""
  path, whole = coco / 'images' / '2.jpg', (coco / 'images' / '2.jpg').read_bytes()
  path.write_bytes(whole[:-300])
  source, said = load(coco), []
  if policy == 'raise':
    for _ in range(2):
      with pytest.raises(InputError, match='1 of 7 images cannot be read'):
        make({'train': source}, coco)
    path.write_bytes(whole)
    same(Tfds(data_dir=str(make({'train': source}, coco))), source)
    return
  folder = make({'train': source}, coco, on_bad_image='skip', max_bad=1)
  make({'train': source}, coco, said, on_bad_image='skip', max_bad=1)
  assert said[1:] == ['1 images were left out because they could not be read']
  path.write_bytes(whole)
  make({'train': source}, coco, said)
  assert said[-1] == (f'1 of them can be read now; remove {folder} and prepare again to add them')
  assert len(Tfds(data_dir=str(folder))) == 6


def test_joined_splits_have_distinct_ids(coco):
  """Checks that prepared data keeps the original ids, which repeat from split to split."""
  source = load(coco)
  folder = str(make({'train': source, 'eval': source}, coco))
  both = Tfds(data_dir=folder, split='train+eval[:4]')
  assert [both[i].image_id for i in range(len(both))] == list(range(1, 12))
  truth = both.ground_truth()
  assert [i['id'] for i in truth['images']] == list(range(1, 12))
  assert {a['image_id'] for a in truth['annotations']} == {2, 3, 4, 6, 7, 9, 10, 11}
  np.testing.assert_array_equal(both[8].image, source[1].image)
  apart = Tfds(data_dir=folder, split='train[:2]+eval[2:]')
  assert [apart[i].image_id for i in range(7)] == [100 - 9 * i for i in range(7)]
  with pytest.raises(InputError, match=r"names records of 'train' twice"):
    Tfds(data_dir=folder, split='train[:3]+train[2:]')


class Own(SyntheticShapes):
  """Source from outside the package; `change` alters its contents."""
  change = staticmethod(lambda truth: truth)

  def ground_truth(self):
    return self.change(super().ground_truth())


def test_a_source_at_odds_with_itself(tmp_path):
  source = Own(num_images=4, image_size=64)
  source.change = lambda truth: truth | {'images': truth['images'][::-1]}
  with pytest.raises(InputError, match='image 0 of train has the id 1, but ground_truth lists 4'):
    make({'train': source}, tmp_path)


def test_a_source_that_cannot_be_pickled(tmp_path):
  source = Own(num_images=4, image_size=64)
  source.change = lambda truth: truth
  make({'train': source}, tmp_path, threads=2)


def test_a_shard_without_images(coco):
  """Checks that empty splits are rejected, since readers do not expect empty files."""
  path = coco / 'images' / '2.jpg'
  path.write_bytes(path.read_bytes()[:-300])
  with pytest.raises(InputError, match=r'1 of 7 images cannot be read'):
    make({'train': load(coco)}, coco, shards=7, on_bad_image='skip', max_bad=1)


@pytest.mark.parametrize('options, message', [
    ({'name': 'My Set'}, "name is 'My Set', legal: small letters"),
    ({'name': 'coco'}, "'coco' is that of one of TFDS's own"),
    ({'version': '1'}, "version is '1', legal: three numbers"),
    ({'max_side': -1}, 'max_side is -1'), ({'shards': 1.5}, 'shards is 1.5'),
    ({'quality': 0}, 'quality is 0'), ({'quality': 101}, 'quality is 101'),
    ({'on_bad_image': 'hide'}, "on_bad_image is 'hide', legal: 'raise', 'skip'"),
    ({'max_bad': 2}, 'max_bad is 2'),
])
def test_wrong_options(tmp_path, options, message):
  with pytest.raises(InputError, match=re.escape(message)):
    make({'train': SyntheticShapes(num_images=2, image_size=64)}, tmp_path, **options)
  assert not (tmp_path / 'out').exists()


def test_wrong_sources_and_outputs(coco, tmp_path):
  shapes = SyntheticShapes(num_images=2, image_size=64)
  with pytest.raises(InputError, match=r"split 'eval' beside 'train': its classes are not those"):
    make({'train': load(coco), 'eval': shapes}, coco)
  with pytest.raises(InputError, match='names no source'):
    make({}, coco)
  with pytest.raises(InputError, match=r'output s3://bucket/x must be a local folder or gs://'):
    prepare({'train': shapes}, 's3://bucket/x', Options('toy'), progress=print)
  twice = load(coco)
  twice.categories = (Category(1, 'a'), Category(2, 'a'))
  with pytest.raises(InputError, match="two classes are called 'a'"):
    make({'train': twice}, coco)


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),
                                   RuntimeError('No space left\non device')])
def test_a_disk_that_is_full(coco, monkeypatch, error):
  def full(*arguments, **options):
    raise error

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(InputError, match='00000-of-00003: cannot be written: No space left on devic'):
    make({'train': load(coco)}, coco)
  assert not os.listdir(coco / 'out' / 'toy')


def test_the_number_of_shards_goes_with_the_bytes(coco, monkeypatch):
  monkeypatch.setattr(prepare_lib, '_SHARD_BYTES', 8000)
  folder = make({'train': load(coco)}, coco, shards=0)
  sizes = [p.stat().st_size for p in (coco / 'images').iterdir()]
  shards = len(list(folder.glob('*.array_record-*')))
  assert abs(shards - sum(sizes) / 8000) <= 1.5


def change_image(coco, name):
  (coco / 'images' / name).write_bytes(encode_jpeg(np.full((20, 40, 3), 99, np.uint8)))


def test_images_that_changed_after_all_was_done_are_noticed(coco):
  folder = make({'train': load(coco)}, coco)
  before = contents(folder)
  shutil.copytree(coco / 'images', coco / 'copy')
  make({'train': CocoJson(str(coco / 'copy'), str(coco / 'truth.json'))}, coco)
  change_image(coco, '0.jpg')
  with pytest.raises(InputError, match=r"of split 'train', some from image 100 to image 91 have "
                                       r'changed; remove .* and prepare again'):
    make({'train': load(coco)}, coco)
  assert contents(folder) == before


def test_stamps_of_prepared_data_change_with_its_files(coco, monkeypatch):
  folder = make({'train': load(coco), 'eval': load(coco)}, coco)
  assert Tfds(data_dir=str(folder)).stamp(0) == b''  # It was written a moment ago.
  monkeypatch.setattr('ppn_jax.data.images.decoding._CLOCK_TICK', -np.inf)
  train = Tfds(data_dir=str(folder)).stamp(0)
  assert train and train == Tfds(data_dir=str(folder)).stamp(3)
  assert train != Tfds(data_dir=str(folder), split='eval').stamp(0)
  for split, same_as_before in (('eval', True), ('train', False)):
    shard = next(folder.glob(f'toy-{split}.array_record-*'))
    shutil.copyfile(shard, coco / 'copy')
    (coco / 'copy').rename(shard)
    assert (Tfds(data_dir=str(folder)).stamp(0) == train) == same_as_before
