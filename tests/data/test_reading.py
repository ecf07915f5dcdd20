import numpy as np

from ppn_jax.data.images import decoding
from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.data.reading import read_example
from ppn_jax.data.transforms.basic import HorizontalFlip, Resize
from ppn_jax.detection.structures import Example


class Files:
  """Source of JPEG files of one grey level each, decoded late."""

  def __init__(self, levels):
    self.levels, self.opened = levels, []

  def __len__(self):
    return len(self.levels)

  def open_example(self, index):
    self.opened.append(index)
    data = decoding.encode_jpeg(np.full((64, 64, 3), self.levels[index], np.uint8))
    return Example(decoding.open_image(data, name=f'{index}.jpg'), np.zeros((0, 4), np.float32),
                   np.zeros(0, np.int32), np.zeros(0, bool), index, (64, 64))

  def __getitem__(self, index):
    raise AssertionError('open_example must be called')


class Watch:
  """Transform from outside the package that accepts arrays only."""

  def __init__(self):
    self.seen = []

  def __call__(self, example, rng):
    self.seen.append(type(example.image))
    return example._replace(image=example.image + np.uint8(1))


class Blend:
  """Transform from outside the package that mixes two images."""
  takes_others = True

  def __call__(self, example, rng, draw):
    other = draw()
    assert isinstance(example.image, np.ndarray) and isinstance(other.image, np.ndarray)
    return example._replace(image=example.image // 2 + other.image // 2)


def test_ops_of_others_get_arrays():
  watch = Watch()
  out = read_example(Files([100]), 0, [HorizontalFlip(1.0), watch, HorizontalFlip(1.0)],
                     np.random.default_rng(0))
  assert watch.seen == [np.ndarray] and isinstance(out.image, np.ndarray)
  assert (out.image == 101).all()


def test_an_image_stays_undecoded_until_it_must_be():
  out = read_example(Files([100]), 0, [HorizontalFlip(1.0)], np.random.default_rng(0))
  assert isinstance(out.image, LazyImage) and (np.asarray(out.image) == 100).all()


def test_others_pass_the_ops_before():
  watch = Watch()
  source = Files([0, 100, 200])
  out = read_example(source, 2, [watch, Blend(), Watch()], np.random.default_rng(0))
  drawn = source.opened[1]
  assert source.opened[0] == 2 and len(source.opened) == 2 and watch.seen == [np.ndarray] * 2
  assert (out.image == 201 // 2 + (source.levels[drawn] + 1) // 2 + 1).all() and out.image_id == 2


def test_every_image_is_drawn_and_by_the_generator_alone():
  source, picks = Files([0, 100, 200]), []
  for seed in range(30):
    source.opened.clear()
    read_example(source, 1, [Blend(), Resize(8)], np.random.default_rng(seed))
    read_example(source, 1, [Blend(), Resize(8)], np.random.default_rng(seed))
    assert source.opened[:2] == source.opened[2:]
    picks.append(source.opened[1])
  assert set(picks) == {0, 1, 2}
