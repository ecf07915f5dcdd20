"""Cached images: the same as decoded ones, kept over restarts, never wrong."""

import json

import cv2
import numpy as np
import pytest

from ppn_jax.data import cache
from ppn_jax.data.cache import CachedSource
from ppn_jax.data.loader import train_batches
from ppn_jax.data.random_crop import SsdRandomCrop
from ppn_jax.data.synthetic import SyntheticShapes
from ppn_jax.errors import InputError


class Counting:
  """A source that counts how often it is read."""

  def __init__(self, source):
    self._source, self.reads = source, 0
    self.categories, self.max_boxes = source.categories, source.max_boxes

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self.reads += 1
    return self._source[index]

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
  assert cached.image.shape == (30, 45, 3) and cached.size == (60, 90)
  np.testing.assert_array_equal(cached.boxes, original.boxes)
  expected = cv2.resize(original.image, (45, 30), interpolation=cv2.INTER_AREA)
  np.testing.assert_array_equal(cached.image, expected)


def test_batches_are_those_of_the_source(where):
  source = shapes()
  options = dict(transforms=(SsdRandomCrop(),), image_size=32, max_boxes=8, batch_size=5, seed=1)
  plain = train_batches(source, **options)
  cached = train_batches(CachedSource(source, where, 90), **options)
  for _ in range(6):
    a, b = next(plain), next(cached)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.truth.boxes, b.truth.boxes)


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


def test_a_file_that_was_cut_short_starts_anew(tmp_path):
  CachedSource(shapes(), str(tmp_path), 45)[0]
  with open(tmp_path / 'images.bin', 'r+b') as f:
    f.truncate(1000)
  source = shapes()
  assert CachedSource(source, str(tmp_path), 45)[0].image.shape == (30, 45, 3)
  assert source.reads == 1


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
  folder = tmp_path / 'c'
  CachedSource(shapes(), str(folder), 45)
  with pytest.raises(InputError, match='longest_side is 45 there and 50 here'):
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


def test_no_room_is_said_with_both_numbers(tmp_path, monkeypatch):
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
  assert label['images'] == 12 and label['longest_side'] == 45
