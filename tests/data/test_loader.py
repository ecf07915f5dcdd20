import itertools
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.data import loader
from ppn_jax.data.images import decoding
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.transforms import basic
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

OPS = basic.build_transforms([{'name': 'horizontal_flip'}, {'name': 'ssd_random_crop'}])


class Numbered:
  """Source whose image i has level i % 256, id 1000 + i and i % 4 boxes; records what is read."""
  categories = (Category(1, 'thing'),)
  max_boxes = 3

  def __init__(self, length, bad=()):
    self.length, self.bad, self.read = length, bad, []

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    self.read.append(index)
    if index in self.bad:
      raise InputError(f'{index}.jpg: truncated')
    n = index % 4
    boxes = np.tile(np.float32([0.1, 0.2, 0.5, 0.6]), (n, 1))
    return Example(np.full((8, 8, 3), index % 256, np.uint8), boxes, np.zeros(n, np.int32),
                   np.arange(n) == 1, 1000 + index, (8, 8))


def train(source, **options):
  options = {'transforms': (), 'image_size': 8, 'max_boxes': 4, 'batch_size': 4, 'seed': 0,
             'threads': 2, **options}
  return loader.train_batches(source, **options)


# All transforms, with a source that decodes late and one that does not.
ALL_OPS = basic.build_transforms([
    {'name': 'expand', 'ratio': (1, 2)}, {'name': 'ssd_random_crop'}, {'name': 'horizontal_flip'},
    {'name': 'copy_paste', 'size': 60}, {'name': 'mosaic', 'size': 48},
    {'name': 'mixup', 'size': 48}, {'name': 'large_scale_jitter', 'size': 48, 'scale': (0.5, 2)},
    {'name': 'photometric_distortion'}, {'name': 'resize', 'size': 40}])


class Photos:
  """Source of JPEGs of 200 x 260 pixels, decoded late and at a fraction of their size."""
  categories = (Category(1, 'thing'),)
  max_boxes = 2

  def __init__(self, number=20):
    self.data = [decoding.encode_jpeg(
        np.random.default_rng(i).integers(0, 256, (25, 26, 3), np.uint8).repeat(8, 0).repeat(10, 1))
        for i in range(number)]

  def __len__(self):
    return len(self.data)

  def open_example(self, index):
    boxes = np.random.default_rng(index).uniform(0, 0.5, (index % 3, 2)).astype(np.float32)
    return Example(decoding.open_image(self.data[index], name='x', size=(200, 260)),
                   np.concatenate([boxes, boxes + np.float32(0.4)], axis=1),
                   np.arange(index % 3, dtype=np.int32), np.arange(index % 3) == 1, index,
                   (200, 260))

  def __getitem__(self, index):
    example = self.open_example(index)
    return example._replace(image=np.asarray(example.image))


SOURCES = {'late': Photos(), 'drawn': SyntheticShapes(20, image_size=64, max_shapes=2)}
OPTIONS = {'transforms': ALL_OPS, 'image_size': 48, 'max_boxes': 32, 'batch_size': 8, 'seed': 5}


def take(batches, n):
  out = list(itertools.islice(batches, n))
  batches.close()
  return out


def arrays(batch):
  return [batch.images, *batch.ground_truth, batch.image_id, batch.size, batch.valid]


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    for p, q in zip(arrays(x), arrays(y), strict=True):
      np.testing.assert_array_equal(p, q)
      assert p.dtype == q.dtype


def join(parts):
  """Concatenates the rows of several processes."""
  return [np.concatenate(columns) for columns in zip(*map(arrays, parts), strict=True)]


def ids(batches):
  return [b.image_id.tolist() for b in batches]


def test_shapes_types_and_padding():
  batch, = take(train(Numbered(4)), 1)
  assert batch.images.shape == (4, 8, 8, 3) and batch.images.dtype == np.uint8
  assert batch.images.flags.c_contiguous
  boxes = batch.ground_truth.boxes
  assert boxes.shape == (4, 4, 4) and boxes.dtype == np.float32
  assert batch.ground_truth.labels.dtype == np.int32 and batch.ground_truth.crowd.dtype == bool
  assert batch.image_id.dtype == np.int64 and batch.size.dtype == np.int32
  for row, number in enumerate(batch.image_id - 1000):
    assert (batch.images[row] == number).all()
    np.testing.assert_array_equal(batch.ground_truth.valid[row], np.arange(4) < number)
    np.testing.assert_array_equal(batch.ground_truth.crowd[row], (np.arange(4) == 1) & (number > 1))
    assert (batch.ground_truth.boxes[row][~batch.ground_truth.valid[row]] == 0).all()
    np.testing.assert_array_equal(batch.size[row], [8, 8])
  assert batch.valid.all()


def test_every_epoch_shows_every_image_once_in_another_order():
  numbers = np.concatenate([b.image_id for b in take(train(Numbered(10), batch_size=5), 12)])
  epochs = numbers.reshape(6, 10)
  assert all(sorted(e) == list(range(1000, 1010)) for e in epochs.tolist())
  assert len({tuple(e) for e in epochs.tolist()}) == 6


def test_epochs_of_neighbouring_seeds_are_not_shifts_of_each_other():
  def epochs(seed):
    stream = train(Numbered(10), batch_size=10, seed=seed)
    return {tuple(b.image_id.tolist()) for b in take(stream, 5)}
  assert len(epochs(0) | epochs(1) | epochs(2)) == 15


def test_batch_larger_than_the_data_set():
  batch, = take(train(Numbered(3), batch_size=9), 1)
  assert all(sorted(batch.image_id[i:i + 3].tolist()) == [1000, 1001, 1002] for i in (0, 3, 6))


def test_one_image():
  assert ids(take(train(Numbered(1), batch_size=2), 2)) == [[1000, 1000]] * 2


def test_any_number_of_threads_gives_the_same_stream():
  source = SyntheticShapes(20, image_size=64)
  options = {'transforms': OPS, 'image_size': 48, 'max_boxes': 8, 'batch_size': 6}
  one, two, eight = (take(train(source, threads=n, **options), 6) for n in (1, 2, 8))
  assert_equal(one, two)
  assert_equal(one, eight)
  assert len({b.images.tobytes() for b in one}) == 6


def test_resuming_reads_nothing_of_the_past():
  source = SyntheticShapes(20, image_size=64)
  options = {'transforms': OPS, 'image_size': 48, 'max_boxes': 8, 'batch_size': 6}
  assert_equal(take(train(source, **options), 9)[5:],
               take(train(source, start_step=5, **options), 4))
  counted = Numbered(1000)
  later = take(train(counted, start_step=100), 1)
  assert len(counted.read) <= 4 + 2 * 4 + 2 + 2  # One batch and what is read ahead.
  assert later[0].image_id[0] - 1000 in counted.read


def test_rows_of_processes_make_the_global_batch():
  source = SyntheticShapes(20, image_size=64)
  options = {'transforms': OPS, 'image_size': 48, 'max_boxes': 8, 'batch_size': 6}
  for split in ((slice(0, 3), slice(3, 6)), ([0, 4], [1, 2, 3, 5]), (range(6), [5])):
    whole = take(train(source, **options), 4)
    parts = [take(train(source, rows=rows, **options), 4) for rows in split]
    order = np.concatenate([np.arange(6)[np.r_[rows]] for rows in split])
    for step in range(4):
      joined = join([part[step] for part in parts])
      for got, wanted in zip(joined, arrays(whole[step]), strict=True):
        np.testing.assert_array_equal(got, wanted[order])


@pytest.mark.slow
@pytest.mark.parametrize('name', SOURCES)
def test_every_op_for_any_number_of_threads_and_hosts_and_from_any_step(name):
  """Checks that batches are bit-equal for any number of threads, with mosaics too."""
  source = SOURCES[name]
  whole = take(train(source, threads=1, **OPTIONS), 5)
  assert len({b.images.tobytes() for b in whole}) == 5
  assert max(b.ground_truth.valid.sum(axis=1).max() for b in whole) > 2  # There are mosaics.
  for threads in (2, 8):
    assert_equal(whole, take(train(source, threads=threads, **OPTIONS), 5))
  for hosts in (2, 4):
    parts = [take(train(source, rows=slice(h * 8 // hosts, (h + 1) * 8 // hosts), **OPTIONS), 3)
             for h in range(hosts)]
    for step in range(3):
      for got, wanted in zip(join([part[step] for part in parts]), arrays(whole[step]),
                             strict=True):
        np.testing.assert_array_equal(got, wanted)
  step = int(np.random.default_rng().integers(1, 5))
  assert_equal(whole[step:], take(train(source, start_step=step, **OPTIONS), 5 - step))


class Undecided:
  """`Photos` without the optional members."""
  categories, max_boxes = Photos.categories, 2

  def __len__(self):
    return len(SOURCES['late'])

  def __getitem__(self, index):
    return SOURCES['late'][index]


@pytest.mark.parametrize('resize', ['area', 'supersample', 'bilinear', 'legacy'])
def test_reduced_decoding(resize):
  """Checks that it changes little, nothing if it is off, and never the legacy kernel."""
  options = OPTIONS | {'transforms': OPS, 'resize': resize}
  shared_options = {k: options[k] for k in ('image_size', 'max_boxes', 'batch_size', 'resize')}
  for batches, given in ((train, options), (loader.eval_batches, shared_options)):
    wanted = take(batches(Undecided(), **given), 3)
    late = SOURCES['late']
    assert_equal(wanted, take(batches(late, reduced_decoding=False, **given), 3))
    reduced = take(batches(late, **given), 3)
    if resize == 'legacy':
      assert_equal(wanted, reduced)
    else:
      error = np.abs(np.stack([a.images.astype(int) - b.images
                               for a, b in zip(wanted, reduced, strict=True)]))
      assert 0 < error.mean() < (20 if resize == 'bilinear' else 12)  # For noise in blocks.
      for a, b in zip(wanted, reduced, strict=True):
        assert np.abs(a.ground_truth.boxes - b.ground_truth.boxes).max() < 0.5 / 48 + 1e-6
        np.testing.assert_array_equal(a.ground_truth.labels, b.ground_truth.labels)


def test_evaluation_decodes_late():
  late, options = SOURCES['late'], {'image_size': 25, 'max_boxes': 8, 'batch_size': 4}
  reduced = list(loader.eval_batches(late, **options))
  whole = list(loader.eval_batches(late, reduced_decoding=False, **options))
  assert any((a.images != b.images).any() for a, b in zip(reduced, whole, strict=True))


@pytest.mark.parametrize('resize', ['area', 'supersample', 'bilinear'])
def test_evaluation_shows_all_of_an_image_whatever_it_is_decoded_at(resize):
  """Checks boxes relative to the original, by whose size detections are scaled."""
  class Odd(Photos):
    def open_example(self, index):
      lazy = decoding.open_image(decoding.encode_jpeg(np.zeros((683, 1021, 3), np.uint8)), name='x')
      return super().open_example(index)._replace(image=lazy, size=(683, 1021))

  options = {'image_size': 100, 'max_boxes': 8, 'batch_size': 4, 'resize': resize}
  reduced, whole = (next(loader.eval_batches(Odd(4), reduced_decoding=reduced, **options))
                    for reduced in (True, False))
  np.testing.assert_array_equal(reduced.ground_truth.boxes, whole.ground_truth.boxes)


@pytest.mark.parametrize('rows', [[], [6], [-1], slice(6, 9)])
def test_rows_outside_the_batch(rows):
  with pytest.raises(ValueError, match='of a batch of 6'):
    train(Numbered(3), batch_size=6, rows=rows)


def test_seeds_differ_and_the_same_image_is_augmented_differently_each_epoch():
  source = SyntheticShapes(1, image_size=64)
  options = {'transforms': OPS, 'image_size': 48, 'max_boxes': 8, 'batch_size': 8}
  a, b = (take(train(source, seed=seed, **options), 1)[0] for seed in (0, 1))
  assert not np.array_equal(a.images, b.images)
  assert len({image.tobytes() for image in a.images}) >= 5


def test_batches_own_their_memory():
  stream = train(Numbered(8))
  a, b = next(stream), next(stream)
  assert not any(np.shares_memory(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))
  stream.close()


@pytest.mark.parametrize('length, batch_size', [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_covers_every_image_once(length, batch_size):
  options = {'image_size': 8, 'max_boxes': 4, 'batch_size': batch_size}
  batches = list(loader.eval_batches(Numbered(length), **options))
  assert len(batches) == loader.num_eval_batches(length, batch_size) == -(-length // batch_size)
  numbers = np.concatenate([b.image_id[b.valid] for b in batches])
  np.testing.assert_array_equal(numbers, 1000 + np.arange(length))
  assert all(len(b.valid) == batch_size for b in batches)
  padding = ~batches[-1].valid
  assert padding.sum() == len(batches) * batch_size - length
  assert all((column[padding] == 0).all() for column in arrays(batches[-1]))


def test_evaluation_in_processes():
  options = {'image_size': 8, 'max_boxes': 4, 'batch_size': 4}
  whole = list(loader.eval_batches(Numbered(9), **options))
  parts = [list(loader.eval_batches(Numbered(9), rows=rows, **options))
           for rows in ([0, 1], [2, 3])]
  assert len(whole) == len(parts[0]) == len(parts[1]) == 3  # The last of the second is all padding.
  for step in range(3):
    for got, wanted in zip(join([p[step] for p in parts]), arrays(whole[step]), strict=True):
      np.testing.assert_array_equal(got, wanted)


def test_resize_method():
  source = SyntheticShapes(2, image_size=100)
  batch = next(loader.eval_batches(source, image_size=40, max_boxes=8, batch_size=1,
                                   resize='legacy'))
  np.testing.assert_array_equal(batch.images[0],
                                basic.Resize(40, 'legacy')(source[0]).image)
  with pytest.raises(InputError, match=r'resize\.method'):
    loader.eval_batches(source, image_size=40, max_boxes=8, batch_size=1, resize='cubic')


def test_an_error_in_a_thread_is_the_original_error():
  stream = train(Numbered(100, bad=range(100)))
  with pytest.raises(InputError) as caught:
    next(stream)
  assert str(caught.value).endswith('.jpg: truncated') and type(caught.value) is InputError
  with pytest.raises(InputError) as caught:
    list(loader.eval_batches(Numbered(9, bad=[6]), image_size=8, max_boxes=4, batch_size=4))
  assert str(caught.value) == '6.jpg: truncated'


@pytest.mark.parametrize('threads', [1, 3])
def test_nothing_is_read_after_an_error(threads):
  options = {'image_size': 8, 'max_boxes': 4, 'batch_size': 64, 'threads': threads}
  source = Numbered(256, bad=[10, 11, 40])
  with pytest.raises(InputError, match=r'^10\.jpg: truncated'):  # In any order.
    list(loader.eval_batches(source, **options))
  assert threads > 1 or sorted(source.read) == list(range(11))
  source = Numbered(256, bad=[70])
  batches = loader.eval_batches(source, **options)
  assert next(batches).valid.all()  # The batch before the error is complete.
  with pytest.raises(InputError, match=r'^70\.jpg: truncated'):
    next(batches)
  assert threads > 1 or sorted(source.read) == list(range(71))


def test_more_boxes_than_there_is_room_for():
  with pytest.raises(InputError, match='image 1003 has 3 boxes, but max_boxes is 2'):
    list(loader.eval_batches(Numbered(9), image_size=8, max_boxes=2, batch_size=4))


def test_required_boxes():
  a, b = Numbered(4), SyntheticShapes(1, max_shapes=11)
  assert loader.required_boxes(a, 0) == 8
  assert loader.required_boxes(b, 0) == 16
  assert loader.required_boxes(b, 11) == 11
  with pytest.raises(InputError, match='max_boxes is 10, but one image has 11 boxes'):
    loader.required_boxes(b, 10)
  with pytest.raises(InputError, match='max_boxes is -1'):
    loader.required_boxes(a, -1)


def test_required_boxes_of_mosaics():
  mosaic, = basic.build_transforms([{'name': 'mosaic', 'size': 8}])
  source = SyntheticShapes(1, max_shapes=11)
  assert loader.required_boxes(source, 0, [*OPS, mosaic]) == 48
  assert loader.required_boxes(source, 44, [mosaic]) == 44
  assert loader.required_boxes(source, 0, [mosaic, mosaic]) == 176
  with pytest.raises(InputError, match='max_boxes is 43, but 4 images in one can have 44 boxes'):
    loader.required_boxes(source, 43, [mosaic])


@pytest.mark.parametrize('how', ['close', 'drop', 'error'])
def test_threads_end_with_the_iterator(how):
  before = set(threading.enumerate())
  def started():
    return [t for t in threading.enumerate() if t not in before]
  stream = train(Numbered(100, bad=range(100) if how == 'error' else ()))
  if how == 'error':
    with pytest.raises(InputError):
      next(stream)
  else:
    next(stream)
    assert started()
  if how == 'close':
    stream.close()
  del stream
  deadline = time.monotonic() + HANG_SECONDS
  while started() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not started()


def test_a_program_that_just_ends():
  """Checks exits with iterators that are half-way, not started or finished: no hang, no output."""
  script = '''
import json
from ppn_jax.data import loader
from ppn_jax.data.sources.synthetic import SyntheticShapes
options = dict(image_size=32, max_boxes=8, batch_size=4, threads=2)
source = SyntheticShapes(10, image_size=32)
streams = [loader.train_batches(source, transforms=(), seed=s, **options) for s in range(3)]
first = [next(s).image_id.tolist() for s in streams[:2]]
dry = list(loader.eval_batches(source, **options))
print(json.dumps(first))
'''
  done = subprocess.run([sys.executable, '-X', 'dev', '-c', script], capture_output=True,
                        text=True, timeout=HANG_SECONDS)
  assert (done.returncode, done.stderr) == (0, '')
  source = SyntheticShapes(10, image_size=32)
  assert json.loads(done.stdout) == [  # And another process sees the same order.
      next(train(source, seed=s, image_size=32, max_boxes=8)).image_id.tolist() for s in (0, 1)]


@pytest.mark.parametrize('options, message', [
    ({'seed': -1}, 'seed is -1'), ({'batch_size': 0}, 'batch_size is 0'),
    ({'threads': -1}, 'threads is -1'), ({'image_size': 0}, r'resize\.size is 0'),
])
def test_wrong_options(options, message):
  with pytest.raises(InputError, match=message):
    train(Numbered(3), **options)
