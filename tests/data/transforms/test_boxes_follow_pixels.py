"""Transforms move boxes and pixels together.

Rectangles are painted exactly where the boxes are, in one colour per label. After a transform the
paint must be where the boxes are.
"""

import itertools

import cv2
import numpy as np
import pytest

from ppn_jax.data.images import decoding
from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.data.reading import read_example
from ppn_jax.data.transforms import basic, geometry
from ppn_jax.detection.structures import Category, Example

GREY = (128, 128, 128)
# One extreme of one channel each, so that a mixture with grey shows which and how much.
COLOURS = np.full((6, 3), 128)
COLOURS[range(6), [0, 0, 1, 1, 2, 2]] = [255, 0] * 3


class Painted:
  """Source in which image i has one box, of label i % 6, and the crowd flag i % 2."""
  categories = tuple(Category(i, str(i)) for i in range(6))
  max_boxes = 1

  def __init__(self, kind, size=(300, 400), number=12):
    self.kind, self.size, self.number = kind, size, number

  def __len__(self):
    return self.number

  def boxes(self, index):
    rng = np.random.default_rng(index)
    top, left = (int(rng.integers(0, side * 0.6)) for side in self.size)
    height, width = (int(rng.integers(side * 0.15, side * 0.4)) for side in self.size)
    return top, left, top + height, left + width

  def __getitem__(self, index):
    image = np.full((*self.size, 3), GREY, np.uint8)
    ymin, xmin, ymax, xmax = box = self.boxes(index)
    image[ymin:ymax, xmin:xmax] = COLOURS[index % 6]
    boxes = np.float32([box]) / np.float32([*self.size, *self.size])
    return Example(image, boxes, np.array([index % 6], np.int32), np.array([index % 2 == 1]),
                   index, self.size)

  def open_example(self, index):
    example = self[index]
    if self.kind == 'array':
      return example
    data = cv2.imencode('.jpg', example.image[..., ::-1], [
        cv2.IMWRITE_JPEG_QUALITY, 97, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111])[1].tobytes()
    return example._replace(image=decoding.open_image(data, name='x', size=self.size))


def painted_box(image, label):
  """Returns the box of at least half of the paint of a label, in pixels, or None."""
  channel, end = label // 2, 127 if label % 2 == 0 else -128
  rows, columns = np.nonzero((image[..., channel].astype(float) - 128) / end >= 0.5)
  if not len(rows):
    return None
  return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])


def errors(example, least=4):
  """Measures the distance of each side of each box from the paint in pixels, f64 [4 K].

  Boxes of a label that occurs twice, or thinner than `least`, are left out.
  """
  image = np.asarray(example.image)
  found = [np.zeros(0)]
  for box, label, crowd in zip(example.boxes, example.labels.tolist(), example.crowd, strict=True):
    assert crowd == label % 2
    corners = box * np.tile(image.shape[:2], 2)
    if (example.labels == label).sum() == 1 and (corners[2:] - corners[:2]).min() >= least:
      paint = painted_box(image, label)
      assert paint is not None
      found.append(paint - corners)
  return np.concatenate(found)


# Without options that drop a box of which some paint is left.
OPS = {
    'horizontal_flip': {'probability': 1.0},
    'ssd_random_crop': {'keep_probability': 0.0, 'area': (0.3, 1.0), 'coverages': (0.0,)},
    'expand': {'probability': 1.0, 'fill': GREY, 'ratio': (1.0, 2.5)},
    'large_scale_jitter': {'size': 240, 'scale': (0.3, 2.0), 'fill': GREY, 'min_side': 0},
    'mosaic': {'size': 240, 'probability': 1.0, 'fill': GREY, 'min_coverage': 0, 'min_side': 0},
    'resize': {'size': 240},
}


def build(*names, **options):
  return basic.build_transforms([{'name': name, **OPS[name], **options} for name in names])


@pytest.mark.parametrize('kind', ['array', 'jpeg'])
@pytest.mark.parametrize('name', OPS)
def test_every_op_to_a_pixel(name, kind):
  source, ops, all_errors = Painted(kind), build(name), []
  for index in range(60):
    out = read_example(source, index % 12, ops, np.random.default_rng(index))
    all_errors.append(errors(out))
    assert out.boxes.dtype == np.float32 and out.labels.dtype == np.int32
  all_errors = np.concatenate(all_errors)
  assert len(all_errors) > 150
  assert np.abs(all_errors).max() <= 1.0 and abs(all_errors.mean()) < 0.1


@pytest.mark.parametrize('kind', ['array', 'jpeg'])
@pytest.mark.parametrize('name, options', [
    ('resize', {}), ('mosaic', {}), ('mixup', {'size': 240, 'probability': 1, 'min_share': 0}),
    ('copy_paste', {'size': 240, 'probability': 1, 'scale': (1, 1), 'min_visible': 0})])
def test_ops_that_keep_the_aspect_ratio(name, options, kind):
  """Checks the boxes of painted rectangles, and their shape."""
  source = Painted(kind)
  op, = basic.build_transforms([{'name': name, **OPS.get(name, {}), **options}], 'letterbox')
  for index in range(12):
    out = read_example(source, index, (op,), np.random.default_rng(index))
    assert out.image.shape == (240, 240, 3)
    if name in ('resize', 'mosaic'):
      found = errors(out)
      assert np.abs(found).max(initial=0) <= 1.0
    if name != 'mosaic':  # Which cuts objects, and may fill its canvas.
      assert (out.image[181:] == GREY).all() and out.boxes[:, 2].max() <= 0.75
      sides = (out.boxes[:, 2:] - out.boxes[:, :2]) * 240
      whole = [source.boxes(i) for i in range(12)]
      shapes = np.array([(b[2] - b[0], b[3] - b[1]) for b in whole]) * 240 / 400
      away = np.abs(shapes[:, None] - sides).max(axis=-1).min(axis=0)
      assert (away <= 1.5).mean() > 0.6  # Except for what is pasted over, or itself cut.


@pytest.mark.parametrize('mode', ['stretch', 'letterbox'])
@pytest.mark.parametrize('name', ['large_scale_jitter', 'mosaic', 'mixup', 'copy_paste', 'resize'])
def test_ops_with_a_result_that_is_no_square(name, mode):
  options = {'mixup': {'probability': 1}, 'copy_paste': {'probability': 1, 'scale': (1, 1)}}
  op, = basic.build_transforms([{'name': name, **OPS.get(name, {}), **options.get(name, {}),
                                 'size': (130, 260)}], mode)
  source, checked = Painted('array'), 0
  for index in range(12):
    out = read_example(source, index, (op,), np.random.default_rng(index))
    assert out.image.shape == (130, 260, 3) and ((out.boxes >= 0) & (out.boxes <= 1)).all()
    if name not in ('mixup', 'copy_paste'):
      found = errors(out)
      checked += len(found)
      assert np.abs(found).max(initial=0) <= 1.0
    elif mode == 'letterbox':  # Pictures of 300 x 400 fill 130 x 173.
      assert out.boxes[:, 3].max() <= 174 / 260
      checked += 4
  assert checked >= 40 or mode == 'stretch'


def test_jitter_shows_images_with_their_aspect_ratio():
  op, = basic.build_transforms([{'name': 'large_scale_jitter', 'size': (100, 300), 'scale': (1, 1),
                                 'fill': (9, 9, 9)}])
  for size, (rows, columns) in (((200, 300), (100, 150)), ((50, 300), (50, 300))):
    example = Painted('array', size)[0]
    out = op(example, np.random.default_rng(0))
    assert (out.image[rows:] == 9).all() and (out.image[:, columns:] == 9).all()
    assert (out.image[:rows, :columns] != 9).all()


def test_a_letterbox_has_the_pixels_of_a_resized_picture_at_the_top_left():
  example = Painted('array', size=(90, 200))[0]
  example.image[..., 1] = 60
  out = basic.Resize(100, resize_mode='letterbox')(example)
  np.testing.assert_array_equal(out.image[:45], geometry.resize(example, 45, 100).image)
  assert (out.image[45:] == 128).all()
  # A picture that is stored smaller is placed as its original would be.
  stored = example._replace(image=geometry.resize(example, 9, 21).image)
  whole = basic.ResizeWhole(100, resize_mode='letterbox')(stored)
  assert (whole.image[45:] == 128).all() and (whole.image[44] != 128).any()
  np.testing.assert_array_equal(whole.boxes, out.boxes)


@pytest.mark.parametrize('name', ['large_scale_jitter', 'mosaic', 'resize'])
@pytest.mark.parametrize('method', ['supersample', 'bilinear'])
def test_other_kernels(name, method):
  source, ops = Painted('jpeg'), build(name, method=method)
  for index in range(12):
    out = read_example(source, index, ops, np.random.default_rng(index))
    assert np.abs(errors(out)).max(initial=0) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['array', 'jpeg'])
def test_random_chains(kind):
  """Checks any transforms in any order; an image may be enlarged after a pixel was rounded."""
  source, rng, all_errors = Painted(kind), np.random.default_rng(0), []
  for trial in range(150):
    names = rng.permutation(list(OPS))[:rng.integers(1, 5)].tolist()
    out = read_example(source, trial % 12, (*build(*names), basic.Resize(240)),
                       np.random.default_rng(trial))
    assert out.image.shape == (240, 240, 3) and isinstance(out.image, np.ndarray)
    assert len(out.boxes) == len(out.labels) == len(out.crowd) <= 16
    assert ((out.boxes >= 0) & (out.boxes <= 1)).all()
    found = errors(out, least=12)
    assert np.abs(found).max(initial=0) <= 5, names
    all_errors.append(found)
  all_errors = np.concatenate(all_errors)
  assert len(all_errors) > 400
  assert np.abs(all_errors).mean() < 0.6 and abs(all_errors.mean()) < 0.1


def test_large_images_are_reduced_and_boxes_still_follow():
  source, ops = Painted('jpeg', size=(1500, 2001)), (*build('horizontal_flip', 'ssd_random_crop'),
                                                     basic.Resize(300))
  for index in range(8):
    out = read_example(source, index, ops, np.random.default_rng(index))
    assert np.abs(errors(out)).max(initial=0) <= 1.0


def test_boxes_follow_what_is_rounded():
  """Checks boxes to the last digit where images are at whole pixels."""
  image = np.full((160, 200, 3), COLOURS[0], np.uint8)
  example = Example(LazyImage.of(image), np.float32([[0, 0, 1, 1]]), np.zeros(1, np.int32),
                    np.zeros(1, bool), 0, (160, 200))
  for seed in range(20):
    out = basic.Resize(33)(build('expand')[0](example, np.random.default_rng(seed)))
    np.testing.assert_allclose(errors(out), 0, atol=1e-3)

  class Blocks(Painted):
    def boxes(self, index):
      return 160, 240, 880, 640  # Blocks of 8 x 8 pixels, one of the reduced image each.

  source = Blocks('jpeg', size=(1600, 1600))
  for top, left in ((3, 5), (0, 4), (7, 12), (1, 399)):
    out = geometry.resize(geometry.crop(source.open_example(0), (top, left, 1200, 1200)), 150, 150)
    np.testing.assert_allclose(errors(out), 0, atol=1e-3)


@pytest.mark.parametrize('names', [*itertools.permutations(
    ['horizontal_flip', 'ssd_random_crop', 'expand'], 2)])
def test_lazy_images_give_the_pixels_of_arrays(names):
  ops = (*build(*names), basic.Resize(100, reduced_decoding=False))
  source = Painted('array')
  for index in range(12):
    lazily = read_example(source, index, ops, np.random.default_rng(index))
    eagerly, rng = source[index], np.random.default_rng(index)
    for op in ops:
      eagerly = op(eagerly, rng)
      assert isinstance(eagerly.image, np.ndarray)
    # Borders are drawn after resizing rather than before, at whole pixels.
    shift = np.abs((lazily.boxes - eagerly.boxes) * 100).max(initial=0)
    assert shift <= (0.5 if 'expand' in names else 0)
    if 'expand' not in names:
      np.testing.assert_array_equal(lazily.image, eagerly.image)


PHOTOMETRIC = {'name': 'photometric_distortion'}
WIDE = {'name': 'expand', 'probability': 1, 'ratio': (3, 3), 'fill': (9, 8, 7)}


@pytest.mark.parametrize('names', [
    *itertools.product(OPS, repeat=2), ('photometric', 'expand', 'ssd_random_crop'),
    ('expand', 'ssd_random_crop', 'expand'), ('expand', 'expand', 'large_scale_jitter')],
    ids='-'.join)
def test_no_op_draws_more_than_the_result(names, monkeypatch):
  """Checks, for any order, that nothing is drawn that the next transform cuts off."""
  blocks = [{**WIDE} if name == 'expand' else PHOTOMETRIC if name == 'photometric'
            else {'name': name, **OPS[name]} for name in names]
  drawn, draw = [], LazyImage._draw

  def note(self, *arguments):
    pixels, factor = draw(self, *arguments)
    drawn.append(pixels.shape[:2])
    return pixels, factor

  monkeypatch.setattr(LazyImage, '_draw', note)
  source = Painted('jpeg', size=(1200, 1604), number=4)
  ops = (*basic.build_transforms(blocks), basic.Resize(240))
  out = read_example(source, 0, ops, np.random.default_rng(0))
  if names[0] == 'photometric':  # It needs the pixels.
    assert drawn.pop(0) == (1200, 1604)
  assert drawn and np.max(drawn) <= 240 and out.image.shape == (240, 240, 3)


def test_an_op_given_a_lazy_image_changes_nothing_in_place():
  source = Painted('array')
  example = source[0]._replace(image=LazyImage.of(source[0].image))
  before = np.array(example.image), example.boxes.copy()
  for op in (*build('horizontal_flip', 'ssd_random_crop', 'expand', 'large_scale_jitter'),
             basic.Resize(50)):
    op(example, np.random.default_rng(1))
  np.testing.assert_array_equal(np.asarray(example.image), before[0])
  np.testing.assert_array_equal(example.boxes, before[1])
