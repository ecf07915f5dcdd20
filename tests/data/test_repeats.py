"""Repeat factor sampling: factors by loops, how often images are shown, and equal streams."""

import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.data import loader
from ppn_jax.data.repeats import (
  build_repeats,
  class_factors,
  describe_repeats,
  place,
  repeat_factors,
)
from ppn_jax.data.source import contents_of
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection.structures import Category, Example
from ppn_jax.device_data.shuffle import example_at, repeated_images
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job


class Rare:
  """Source of N images with one box of the class 'common'; every tenth has a 'rare' one too.

  Image 5 has a crowd of the class 'crowded', image 7 no box. Images have their number as id.
  """
  categories = (Category(1, 'common'), Category(2, 'rare'), Category(3, 'crowded'),
                Category(4, 'absent'))
  max_boxes = 2

  def __init__(self, number=40):
    self.number = number

  def __len__(self):
    return self.number

  def labels_of(self, index):
    if index == 7:
      return []
    return [0, *([1] if index % 10 == 0 else []), *([2] if index == 5 else [])]

  def __getitem__(self, index):
    labels = self.labels_of(index)
    boxes = np.tile(np.float32([[0.1, 0.2, 0.5, 0.6]]), (len(labels), 1))
    noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
    return Example(noise, boxes, np.int32(labels), np.array(labels, int) == 2, index, (8, 8))

  def ground_truth(self):
    annotations = [(i, label) for i in range(self.number) for label in self.labels_of(i)]
    return {
        'images': [{'id': i, 'height': 8, 'width': 8, 'file_name': str(i)}
                   for i in range(self.number)],
        'categories': [c._asdict() for c in self.categories],
        'annotations': [{'id': n, 'image_id': i, 'category_id': label + 1, 'iscrowd': label == 2,
                         'bbox': [1.6, .8, 3.2, 3.2], 'area': 10.24}
                        for n, (i, label) in enumerate(annotations, start=1)]}


def factors_by_hand(source, threshold):
  count = len(source)
  share = {label: sum(label in source.labels_of(i) for i in range(count)) / count
           for label in (0, 1)}
  return [max([1.0, *(math.sqrt(threshold / share[k]) for k in source.labels_of(i) if k < 2)])
          for i in range(count)]


@pytest.mark.parametrize('threshold', [0.01, 0.3, 1.0])
def test_factors(threshold):
  source = Rare()
  by_class = class_factors(contents_of(source), 4, threshold)
  assert by_class[2:].tolist() == [1, 1]  # Crowds do not count.
  np.testing.assert_allclose(repeat_factors(contents_of(source), by_class),
                             factors_by_hand(source, threshold))
  assert by_class[1] == pytest.approx(max(1, math.sqrt(threshold / 0.1)))


def test_a_data_set_without_boxes():
  class Empty(Rare):
    def labels_of(self, index):
      return []
  repeats = build_repeats(Empty(), 0.5)
  assert repeats.num_shown == 40 and (np.diff(repeats.ends, prepend=0) == repeats.unit).all()


def shown(repeats, first):
  """Returns how often each image is shown, by a loop over the points."""
  counts = np.zeros(len(repeats.ends), int)
  for slot in range(repeats.num_shown):
    counts[next(i for i, end in enumerate(repeats.ends) if slot * repeats.unit + first < end)] += 1
  return counts


@pytest.mark.parametrize('seed', range(5))
def test_images_are_shown_as_often_as_their_factor(seed):
  rng = np.random.default_rng(seed)
  factors = np.where(rng.uniform(size=30) < 0.5, 1.0, rng.uniform(1, 5, 30))
  repeats = place(factors)
  assert repeats.num_shown == math.ceil(factors.sum() - 30 / repeats.unit)
  firsts = np.linspace(0, repeats.unit - 1, 257).astype(int)
  counts = np.array([shown(repeats, first) for first in firsts])
  assert (counts.sum(axis=1) == repeats.num_shown).all()
  length = np.diff(repeats.ends, prepend=0) / repeats.unit
  assert (counts >= np.floor(length)).all() and (counts <= np.ceil(length)).all()
  assert (counts >= 1).all()
  np.testing.assert_allclose(counts.mean(axis=0), length, atol=0.02)
  assert (length >= factors - 1 / repeats.unit).all()
  assert (length <= factors + 1 / 30 + 2 / repeats.unit).all()
  slots = np.arange(repeats.num_shown)
  for first, expected in zip(firsts[::50], counts[::50], strict=True):
    np.testing.assert_array_equal(np.bincount(repeats.image_at(slots, first), minlength=30),
                                  expected)


def test_very_many_images_fit_into_32_bits():
  repeats = place(np.full(3_000_000, 7.7))
  assert repeats.ends[-1] <= 2**31 and repeats.num_shown == math.ceil(
      np.floor(7.7 * repeats.unit) * 3_000_000 / repeats.unit)
  assert repeats.image_at(np.uint32(repeats.num_shown - 1), np.uint32(0)) == 2_999_999


def batches(count, *, source=None, start=0, **options):
  source = source or Rare()
  options = {'transforms': (), 'image_size': 8, 'max_boxes': 4, 'batch_size': 8, 'seed': 3,
             'threads': 2, 'repeats': build_repeats(source, 0.5), **options}
  stream = loader.train_batches(source, start_step=start, **options)
  out = list(itertools.islice(stream, count))
  stream.close()
  return out


def test_epochs_of_the_loader():
  repeats = build_repeats(Rare(), 0.5)
  count = repeats.num_shown
  numbers = np.concatenate([b.image_id for b in batches(100)])[:15 * count].reshape(15, count)
  counts = np.stack([np.bincount(epoch, minlength=40) for epoch in numbers])
  assert (counts >= 1).all() and (counts[:, 1:10] <= 2).all()
  length = np.diff(repeats.ends, prepend=0) / repeats.unit
  assert length[0] > 2.2 and set(counts[:, ::10].ravel()) == {2, 3}  # sqrt(.5 / .1) = 2.24
  np.testing.assert_allclose(counts.mean(axis=0), length, atol=0.4)
  assert len({tuple(epoch) for epoch in numbers}) == 15
  other = np.concatenate([b.image_id for b in batches(7, seed=4)])
  assert (other != numbers.ravel()[:len(other)]).any()


def arrays(parts):
  return [np.concatenate(columns) for columns in zip(*(
      (b.images, *b.ground_truth, b.image_id) for b in parts), strict=True)]


def test_the_same_stream_for_any_threads_and_hosts_and_from_any_step():
  options = {'transforms': build_transforms([
      {'name': 'horizontal_flip'}, {'name': 'photometric_distortion'}])}
  whole = batches(14, threads=1, **options)
  for got, wanted in zip(arrays(batches(14, threads=8, **options)), arrays(whole), strict=True):
    np.testing.assert_array_equal(got, wanted)
  for got, wanted in zip(arrays(batches(5, start=9, **options)), arrays(whole[9:]), strict=True):
    np.testing.assert_array_equal(got, wanted)
  halves = [batches(14, rows=slice(4 * h, 4 * h + 4), **options) for h in (0, 1)]
  for step in range(14):
    for got, wanted in zip(arrays([half[step] for half in halves]), arrays([whole[step]]),
                           strict=True):
      np.testing.assert_array_equal(got, wanted)
  # Each showing of an image is augmented in another way.
  first = arrays(whole)
  rows = np.flatnonzero(first[-1][:build_repeats(Rare(), 0.5).num_shown] == 10)
  assert len(rows) in (2, 3) and len({first[0][row].tobytes() for row in rows}) > 1


def test_without_repeats_the_stream_is_as_before():
  """An epoch that repeats nothing has the order of one without repeats."""
  none = build_repeats(Rare(), 1e-6)
  assert none.num_shown == 40
  for got, wanted in zip(arrays(batches(9, repeats=none)), arrays(batches(9, repeats=None)),
                         strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_epochs_on_the_device():
  repeats = place(np.array([1.0, 2.5, 1.0, 3.2, 1.0, 1.3]))
  count, epochs = repeats.num_shown, 400
  @jax.jit
  def draw(positions):
    epoch, places = example_at(positions, count, jax.random.key(0))
    return epoch, places, repeated_images(epoch, places, repeats, jax.random.key(1))
  # A batch of 16 straddles epochs.
  total = count * epochs // 16 * 16
  out = [draw(jnp.arange(at, at + 16, dtype=jnp.uint32)) for at in range(0, total, 16)]
  epoch, places, images = (np.concatenate([np.asarray(o[i]) for o in out]) for i in range(3))
  kept = epoch < epoch[-1]
  numbers = images[kept].reshape(-1, count)
  counts = np.stack([np.bincount(e, minlength=6) for e in numbers])
  length = np.diff(repeats.ends, prepend=0) / repeats.unit
  assert (counts >= np.floor(length)).all() and (counts <= np.ceil(length)).all()
  np.testing.assert_allclose(counts.mean(axis=0), length, atol=0.12)
  assert (np.sort(places[kept].reshape(-1, count), axis=1) == np.arange(count)).all()


# Configs.


def test_a_line_names_the_rarest_classes():
  line = describe_repeats(Rare(), 0.5)
  count = build_repeats(Rare(), 0.5).num_shown
  assert line == (f'data.repeat_threshold=0.5: an epoch shows {count} images in place of 40; '
                  "1 of 4 classes are repeated, most of all 'rare' 2.2 times")
  assert 'each image once' in describe_repeats(Rare(), 0.01)
  assert describe_repeats(Rare(), 0.0) == '' and build_repeats(Rare(), 0.0) is None


def test_wrong_thresholds_and_sources():
  with pytest.raises(InputError, match=r'data\.repeat_threshold is 2'):
    build_repeats(Rare(), 2)
  class Silent:
    def __len__(self):
      return 40
  with pytest.raises(InputError, match=r'threshold=0\.1 needs .* Silent has no ground_truth'):
    build_repeats(Silent(), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize('resident', [False, True])
def test_training(resident, tmp_path, caplog):
  config = tiny_config(steps=2, log_every=1, checkpoint_every=2).unlock()
  config.data.repeat_threshold = 1.0
  config.data.transforms = ({'name': 'horizontal_flip'},)
  config.data.resident.update(enabled=resident, size=64)
  with caplog.at_level(logging.INFO):
    train_job.train(config.lock(), tmp_path)
  source = SyntheticShapes(10, image_size=64)
  shown = build_repeats(source, 1.0).num_shown
  assert shown > 10
  assert f'an epoch shows {shown} images in place of 10' in caplog.text
