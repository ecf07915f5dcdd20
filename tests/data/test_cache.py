"""Cached images are the same as decoded ones, and are kept for later runs unless they change."""

import json
import os
import shutil
import time

import cv2
import numpy as np
import pytest

from ppn_jax.data import cache
from ppn_jax.data.cache import CachedSource
from ppn_jax.data.images import decoding
from ppn_jax.data.loader import train_batches
from ppn_jax.data.source import build_source
from ppn_jax.data.sources.coco import CocoJson
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.sources.yolo import YoloTxt
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.data.transforms.random_crop import SsdRandomCrop
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError


class Counting:
  """Source that counts how often it is read."""

  def __init__(self, source):
    self._source, self.reads = source, 0
    self.categories, self.max_boxes = source.categories, source.max_boxes

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self.reads += 1
    return self._source[index]

  def stamp(self, index):
    return self._source.stamp(index)

  def ground_truth(self):
    return self._source.ground_truth()


def shapes(**options):
  return Counting(SyntheticShapes(12, image_size=(60, 90), **options))


@pytest.fixture(params=['memory', 'folder'])
def where(request, tmp_path):
  return 'memory' if request.param == 'memory' else str(tmp_path / 'cache')


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_images_within_the_limit_come_back_bit_for_bit_and_are_read_once(where):
  source = shapes()
  cached = CachedSource(source, where, 90)
  for _ in range(3):
    for i in range(len(source)):
      assert same(cached[i], source._source[i])
  assert source.reads == len(source)


def test_larger_images_are_reduced_and_boxes_stay(where):
  source = shapes()
  cached, original = CachedSource(source, where, 45)[3], source._source[3]
  assert cached.image.shape == (45, 68, 3) and cached.size == (60, 90)
  np.testing.assert_array_equal(cached.boxes, original.boxes)
  expected = cv2.resize(original.image, (68, 45), interpolation=cv2.INTER_AREA)
  np.testing.assert_array_equal(cached.image, expected)


def test_batches_are_those_of_the_source(where):
  source = shapes()
  options = dict(transforms=(SsdRandomCrop(),), image_size=32, max_boxes=8, batch_size=5, seed=1)
  plain = train_batches(source, **options)
  cached = train_batches(CachedSource(source, where, 90), **options)
  for _ in range(6):
    a, b = next(plain), next(cached)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.ground_truth.boxes, b.ground_truth.boxes)


def test_a_folder_serves_the_next_run(tmp_path):
  first, second = shapes(), shapes()
  expected = [CachedSource(first, str(tmp_path / 'c'), 45)[i] for i in range(5)]
  cached = CachedSource(second, str(tmp_path / 'c'), 45)
  assert all(same(cached[i], e) for i, e in enumerate(expected)) and second.reads == 0
  cached[7]
  assert second.reads == 1


@pytest.mark.parametrize('at', [0, 5, 40, 300, 2000])
def test_a_record_that_was_half_written_is_decoded_again(tmp_path, at):
  expected = CachedSource(shapes(), str(tmp_path), 45)[0]
  file = tmp_path / 'images.bin'
  data = bytearray(file.read_bytes())
  data[at] ^= 0xff
  file.write_bytes(data)
  source = shapes()
  assert same(CachedSource(source, str(tmp_path), 45)[0], expected) and source.reads == 1


def test_a_truncated_file_is_started_again(tmp_path):
  CachedSource(shapes(), str(tmp_path), 45)[0]
  with open(tmp_path / 'images.bin', 'r+b') as f:
    f.truncate(1000)
  source = shapes()
  assert CachedSource(source, str(tmp_path), 45)[0].image.shape == (45, 68, 3)
  assert source.reads == 1


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
  folder = tmp_path / 'c'
  CachedSource(shapes(), str(folder), 45)
  with pytest.raises(InputError, match='cache_size is 45 there and 50 here'):
    CachedSource(shapes(), str(folder), 50)
  with pytest.raises(InputError, match='data is'):
    CachedSource(shapes(seed=1, max_shapes=6), str(folder), 45)
  (folder / 'cache.json').write_text('{')
  with pytest.raises(InputError, match='cannot be read'):
    CachedSource(shapes(), str(folder), 45)
  other = tmp_path / 'photos'
  other.mkdir()
  (other / 'mine.txt').write_text('x')
  with pytest.raises(InputError, match='not empty'):
    CachedSource(shapes(), str(other), 45)
  assert [p.name for p in other.iterdir()] == ['mine.txt']


def test_an_error_about_room_has_both_numbers(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'available_memory', lambda: 1000)
  with pytest.raises(InputError, match=r'needs up to 0\.0 GB for 12 images, but 0\.0 GB'):
    CachedSource(shapes(), 'memory', 45)
  usage = cache.shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(InputError, match=r'the disk has 0\.0 GB left'):
    CachedSource(shapes(), str(tmp_path / 'c'), 45)
  assert not (tmp_path / 'c' / 'cache.json').exists()


def test_the_label_says_what_is_in_the_folder(tmp_path):
  CachedSource(shapes(), str(tmp_path), 45)
  label = json.loads((tmp_path / 'cache.json').read_text())
  assert label['images'] == 12 and label['cache_size'] == 45


def grey(level):
  """Makes a JPEG file of one grey level; all have the same size in bytes."""
  data = decoding.encode_jpeg(np.full((16, 24, 3), level, np.uint8))
  return data + bytes(700 - len(data))


def write_photos(folder, *levels):
  """Writes files of grey levels, all with the same time, and annotations in two formats."""
  folder.mkdir()
  for i, level in enumerate(levels):
    (folder / f'{i}.jpg').write_bytes(grey(level))
    (folder / f'{i}.txt').write_text('0 .5 .5 .2 .2')
    os.utime(folder / f'{i}.jpg', (1e9, 1e9))
  (folder / 'a.json').write_text(json.dumps({
      'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': 16, 'width': 24}
                 for i in range(len(levels))],
      'annotations': [], 'categories': [{'id': 1, 'name': 'a'}]}))


FORMATS = {'coco': lambda folder: CocoJson(str(folder), str(folder / 'a.json')),
           'yolo': lambda folder: YoloTxt(images=str(folder), labels=str(folder), names=['a'])}


@pytest.fixture(params=FORMATS)
def photos(request, monkeypatch):
  """Opens the images of a folder; `photos.asked` records what a cache reads of them."""
  asked = []

  def open_folder(folder):
    source = FORMATS[request.param](folder)
    encoded, open_example = source.encoded, source.open_example
    source.encoded = lambda index: (asked.append(('bytes', index)), encoded(index))[1]
    source.open_example = lambda index: (asked.append(('pixels', index)), open_example(index))[1]
    return source

  open_folder.asked = asked
  monkeypatch.setattr(decoding, '_CLOCK_TICK', -np.inf)  # The files of a test are always new.
  return open_folder


def levels_of(source, tmp_path):
  cached = CachedSource(source, str(tmp_path / 'cache'), 10)
  return [round(cached[i].image.mean()) for i in range(len(source))]


def test_other_images_under_the_same_names_are_noticed(photos, tmp_path):
  write_photos(tmp_path / 'raw', 50, 60)
  write_photos(tmp_path / 'cleaned', 200, 210)
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50, 60]
  assert levels_of(photos(tmp_path / 'cleaned'), tmp_path) == [200, 210]
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50, 60]
  # Also if the other folder replaces the first.
  shutil.rmtree(tmp_path / 'raw')
  (tmp_path / 'cleaned').rename(tmp_path / 'raw')
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [200, 210]


def test_an_image_that_was_changed_in_place_is_decoded_again_and_no_other(photos, tmp_path):
  write_photos(tmp_path / 'raw', 50, 60, 70)
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50, 60, 70]
  photos.asked.clear()
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50, 60, 70] and not photos.asked
  time.sleep(0.02)  # Until the clock of the file system has advanced.
  (tmp_path / 'raw' / '1.jpg').write_bytes(grey(90))
  os.utime(tmp_path / 'raw' / '1.jpg', (1e9, 1e9))  # Size and time do not change.
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50, 90, 70]
  assert {index for _, index in photos.asked} == {1} and ('pixels', 1) in photos.asked


def test_a_file_that_may_change_unnoticed_is_compared(photos, tmp_path, monkeypatch):
  monkeypatch.setattr(decoding, '_CLOCK_TICK', 60)
  write_photos(tmp_path / 'raw', 50)
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [50]
  (tmp_path / 'raw' / '0.jpg').write_bytes(grey(90))  # At the same moment.
  assert levels_of(photos(tmp_path / 'raw'), tmp_path) == [90]


def test_a_copied_folder_is_not_decoded_again(photos, tmp_path):
  write_photos(tmp_path / 'raw', 50, 60)
  levels_of(photos(tmp_path / 'raw'), tmp_path)
  shutil.copytree(tmp_path / 'raw', tmp_path / 'copy', copy_function=shutil.copyfile)
  for asked in ([('bytes', 0), ('bytes', 1)], []):  # The second time the stamps are known.
    photos.asked.clear()
    assert levels_of(photos(tmp_path / 'copy'), tmp_path) == [50, 60]
    assert photos.asked == asked


def test_a_missing_file_is_an_error_as_without_a_cache(photos, tmp_path):
  write_photos(tmp_path / 'raw', 50, 60)
  levels_of(photos(tmp_path / 'raw'), tmp_path)
  source = photos(tmp_path / 'raw')
  (tmp_path / 'raw' / '1.jpg').unlink()
  with pytest.raises(InputError, match=r'1\.jpg'):
    levels_of(source, tmp_path)


class Drawn:
  """Source of arrays from outside the package, without `encoded` and `stamp`."""
  categories, max_boxes = (Category(1, 'a'),), 6

  def __init__(self, level):
    self._level, self._shapes = level, SyntheticShapes(2, image_size=32)

  def __len__(self):
    return 2

  def __getitem__(self, index):
    return self._shapes[index]._replace(image=np.full((32, 32, 3), self._level, np.uint8))

  def ground_truth(self):
    return self._shapes.ground_truth()


def test_a_source_that_cannot_tell_is_read_once_in_each_run(tmp_path):
  assert levels_of(Drawn(50), tmp_path) == [50, 50]
  assert levels_of(Drawn(60), tmp_path) == [60, 60]


def test_shapes_that_are_drawn_otherwise():
  """Checks that the stamp depends on everything that decides the pixels."""
  options = ({}, {'seed': 1}, {'split': 'eval'}, {'max_shapes': 5}, {'scale': (0.1, 0.2)},
             {'max_turn': 10}, {'image_size': 48})
  stamps = [SyntheticShapes(4, **{'image_size': 32, **o}).stamp(2) for o in options]
  assert len({*stamps, SyntheticShapes(4, image_size=32).stamp(1)}) == len(options) + 1


def test_stamps_reach_through_the_run_s_labels():
  block = {'name': 'synthetic_shapes', 'num_images': 3, 'image_size': 32}
  plain = build_source(block)
  more = (*plain.categories, Category(99, 'more'))
  assert build_source(block, categories=more).stamp(1) == plain.stamp(1)


def test_an_earlier_version_s_folder_is_refused(tmp_path):
  CachedSource(shapes(), str(tmp_path), 45)
  label = json.loads((tmp_path / 'cache.json').read_text())
  for key in ('version', 'decoding'):
    (tmp_path / 'cache.json').write_text(json.dumps(label | {key: 0}))
    with pytest.raises(InputError, match=r'another version of ppn_jax made.* delete it or give'):
      CachedSource(shapes(), str(tmp_path), 45)


@pytest.mark.parametrize('size', [(96, 128), (128, 96), (90, 270)])
def test_what_the_network_sees_is_nearly_as_sharp_as_without(size):
  """Compares fine stripes along each axis at the network's resolution."""
  class Stripes(Drawn):
    def __getitem__(self, index):
      image = np.zeros((*size, 3), np.uint8)
      at = np.arange(size[index]) * 48 // size[index] % 4 < 2
      image[:] = 255 * np.expand_dims(at, (1 - index, 2))
      return self._shapes[index]._replace(image=image, size=size)

    def ground_truth(self):
      truth = super().ground_truth()
      return truth | {'images': [i | {'height': size[0], 'width': size[1]}
                                 for i in truth['images']]}

  source = Stripes(0)
  cached = CachedSource(source, 'memory', 48)
  for index in (0, 1):
    assert min(cached[index].image.shape[:2]) == 48
    contrast = [Resize(48)(s[index]).image.std() for s in (cached, source)]
    assert contrast[0] > 0.88 * contrast[1], index


def test_images_of_another_size_than_the_source_tells(tmp_path):
  class Larger(Drawn):
    def __getitem__(self, index):
      return self._shapes[index]._replace(image=np.full((90, 400, 3), 7, np.uint8))

  cached = CachedSource(Larger(0), str(tmp_path), 16)
  for index in (0, 1):
    height, width, _ = cached[index].image.shape
    assert (cached[index].image == 7).all() and 3.5 < width / height < 6
