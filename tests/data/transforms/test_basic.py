import dataclasses
import subprocess
import sys

import cv2
import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.data.images import resizing
from ppn_jax.data.transforms import basic, random_crop
from ppn_jax.detection.structures import Example
from ppn_jax.errors import InputError

MARK = (250, 20, 20)


def marked(box, size=(60, 80), extra=()):
  """Makes an Example with one box that is painted into the pixels, and `extra` boxes."""
  image = np.full((*size, 3), 90, np.uint8)
  ymin, xmin, ymax, xmax = box
  image[ymin:ymax, xmin:xmax] = MARK
  boxes = np.array([box, *extra], np.float32) / np.float32([*size, *size])
  n = len(boxes)
  return Example(image, boxes, np.arange(n, dtype=np.int32), np.arange(n) % 2 == 1, 7, size)


def find_mark(image):
  """Returns the box of the marked pixels, in pixels."""
  rows, columns = np.nonzero(image[..., 0].astype(int) - image[..., 1] > 80)
  return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])


def in_pixels(example):
  return example.boxes[0] * np.tile(example.image.shape[:2], 2)


def test_flip_moves_box_and_pixels():
  example = marked((10, 5, 30, 25))
  out = basic.HorizontalFlip(1.0)(example, np.random.default_rng(0))
  np.testing.assert_allclose(in_pixels(out), [10, 55, 30, 75], atol=1e-4)
  np.testing.assert_array_equal(find_mark(out.image), [10, 55, 30, 75])
  np.testing.assert_array_equal(find_mark(example.image), [10, 5, 30, 25])  # Input untouched.


@pytest.mark.parametrize('probability', [0.0, 0.3, 1.0])
def test_flip_happens_as_often_as_asked(probability):
  example, rng = marked((10, 5, 30, 25)), np.random.default_rng(0)
  op = basic.HorizontalFlip(probability)
  flips = np.mean([op(example, rng) is not example for _ in range(1000)])
  assert abs(flips - probability) < 4 * np.sqrt(probability * (1 - probability) / 1000) + 1e-9


@pytest.mark.parametrize('window', [(0, 0, 60, 80), (5, 3, 40, 50), (15, 10, 10, 10)])
def test_crop_moves_box_and_pixels(window):
  out = random_crop.crop(marked((10, 5, 30, 25)), window)
  assert out.image.shape == (*window[2:], 3)
  np.testing.assert_allclose(in_pixels(out), find_mark(out.image), atol=1e-3)


@pytest.mark.parametrize('method', ['area', 'supersample', 'bilinear', 'legacy'])
@pytest.mark.parametrize('size', [48, 160])
def test_resize_moves_box_and_pixels(method, size):
  example = marked((12, 8, 48, 64))
  out = basic.Resize(size, method)(example)
  assert out.image.shape == (size, size, 3) and out.image.dtype == np.uint8
  np.testing.assert_array_equal(out.boxes, example.boxes)
  # The legacy kernel shifts the picture by up to half a source pixel.
  assert np.abs(in_pixels(out) - find_mark(out.image)).max() <= 1.5 * max(1, size / 60)
  assert out.size == (60, 80)


def test_a_chain_keeps_box_and_pixels_together():
  ops = basic.build_transforms([
      {'name': 'horizontal_flip'}, {'name': 'ssd_random_crop'}, {'name': 'resize', 'size': 100},
      {'name': 'photometric_distortion', 'brightness': 5, 'hue': 3, 'saturation': (0.9, 1.1),
       'contrast': (0.9, 1.1)}])
  seen = 0
  for seed in range(60):
    out, rng = marked((20, 15, 40, 50)), np.random.default_rng(seed)
    for op in ops:
      out = op(out, rng)
    if len(out.boxes):
      seen += 1
      assert np.abs(in_pixels(out) - find_mark(out.image)).max() <= 6, seed
  assert seen > 30


@pytest.mark.parametrize('shape', [(97, 45), (20, 30), (90, 20), (33, 300)])
def test_area_resize_keeps_the_mean_brightness(shape):
  """Checks that all pixels count equally where a side shrinks, unlike with aliasing."""
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  example = marked((1, 1, 5, 5))._replace(image=image)
  out = basic.Resize(40)(example).image
  if min(shape) >= 40:
    assert abs(out.mean() - image.mean()) < 0.6
  shrunk = cv2.resize(image, (min(shape[1], 40), min(shape[0], 40)), interpolation=cv2.INTER_AREA)
  assert np.abs(cv2.resize(shrunk, (40, 40), interpolation=cv2.INTER_LINEAR) - out).max() == 0


def test_supersampling_is_near_averaging_and_far_from_aliasing(shared):
  """Compares on photographs and on the worst case, noise of single pixels."""
  photo = cv2.imread(str(shared / 'data' / 'coco100' / 'val2017' / '000000006818.jpg'))
  noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
  for image, most in ((photo, 1.0), (noise, 8.0)):
    for side in (400, 300, 200, 100):
      area, two, one = (resizing.KERNELS[m](image, side, side).astype(int)
                        for m in ('area', 'supersample', 'bilinear'))
      near, far = np.abs(two - area).mean(), np.abs(one - area).mean()
      assert near < most and near < far / 1.5, (side, near, far)


def test_resize_of_the_right_size_changes_nothing():
  example = marked((1, 1, 5, 5), size=(40, 40))
  for method in ('area', 'bilinear', 'legacy'):
    assert basic.Resize(40, method)(example) is example


def test_legacy_resize_equals_the_reference(shared):
  golden = np.load(shared / 'golden' / 'resize.npz')
  for before, after in (('original_1', 'resized_1'), ('crop_0', 'crop_resized_0'),
                        ('crop_1', 'crop_resized_1')):
    out = resizing.legacy_resize(golden[before], 300, 300)
    np.testing.assert_array_equal(out, golden[after])
    op = basic.Resize(300, 'legacy')
    rounded = op(marked((1, 1, 5, 5))._replace(image=golden[before])).image
    assert np.abs(rounded - golden[after]).max() <= 0.5


def test_photometric_distortion_changes_colours_only():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (40, 50, 3), np.uint8)
  example = marked((10, 5, 30, 25))._replace(image=image)
  outs = [basic.PhotometricDistortion()(example, rng) for _ in range(50)]
  assert all(o.image.shape == image.shape and o.image.dtype == np.uint8 for o in outs)
  for out in outs:
    np.testing.assert_array_equal(out.boxes, example.boxes)
  same = np.mean([np.array_equal(o.image, image) for o in outs])
  assert 0 < same < 0.3  # 1/16 in the long run.


def only(**options):
  """Makes a PhotometricDistortion that only changes what `options` say."""
  nothing = {'brightness': 0, 'contrast': (1, 1), 'saturation': (1, 1), 'hue': 0}
  return basic.PhotometricDistortion(**{**nothing, **options})


def results(op, color, times=200):
  """Returns all colours that a uniform image of `color` becomes, [K, 3]."""
  example = marked((1, 1, 5, 5))._replace(image=np.full((4, 4, 3), color, np.uint8))
  rng = np.random.default_rng(0)
  return np.array([op(example, rng).image[0, 0] for _ in range(times)]).astype(int)


def test_brightness():
  out = results(only(brightness=32), (100, 120, 140))
  shift = out - [100, 120, 140]
  assert (np.ptp(shift, axis=1) <= 3).all() and shift.min() < -25 and shift.max() > 25
  assert np.abs(shift).max() <= 34


def test_contrast():
  out = results(only(contrast=(0.5, 1.5)), (100, 120, 140))
  factor = out[:, 2:] / 140
  assert np.abs(out - factor * [100, 120, 140]).max() <= 5
  assert 0.48 < factor.min() < 0.6 and 1.4 < factor.max() < 1.52


def test_saturation_leaves_grey_alone_and_hue_turns_red_to_both_sides():
  assert np.abs(results(only(saturation=(0.5, 1.5)), (99, 99, 99)) - 99).max() <= 1
  pale = results(only(saturation=(0.5, 0.5)), (200, 100, 100))
  assert {tuple(c) for c in pale} <= {(200, 100, 100), (200, 150, 150), (200, 149, 149),
                                      (200, 151, 151)}
  turned = results(only(hue=18), (200, 10, 10))
  assert (turned[:, 1] > 30).any() and (turned[:, 2] > 30).any() and (turned[:, 0] > 195).all()


def test_same_generator_same_result():
  ops = basic.build_transforms([{'name': 'ssd_random_crop'}, {'name': 'horizontal_flip'},
                                     {'name': 'photometric_distortion'}])
  def run(seed):
    out, rng = marked((20, 15, 40, 50)), np.random.default_rng(seed)
    for op in ops:
      out = op(out, rng)
    return out
  for seed in range(5):
    a, b = run(seed), run(seed)
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.boxes, b.boxes)


@pytest.mark.parametrize('block, message', [
    ({'name': 'horizontal_flp'}, "did you mean 'horizontal_flip'"),
    ({'name': 'horizontal_flip', 'probabilty': 1}, "did you mean 'probability'"),
    ({'name': 'horizontal_flip', 'probability': 1.5}, 'is 1.5, legal: 0 to 1'),
    ({'name': 'resize', 'size': 0}, 'resize.size is 0'),
    ({'name': 'resize', 'size': 10, 'method': 'lanczos'}, "unknown resize.method 'lanczos'"),
    ({'name': 'photometric_distortion', 'contrast': (1.5, 0.5)}, 'two numbers in order'),
    ({'name': 'ssd_random_crop', 'coverages': ()}, 'coverages'),
    ({'name': 'ssd_random_crop', 'coverages': (0.1, 2)}, 'is 2, legal: 0 to 1'),
    ({'name': 'ssd_random_crop', 'area': 0.5}, 'two numbers in order'),
    ({'name': 'ssd_random_crop', 'attempts': 0}, '1 or more'),
])
def test_wrong_blocks(block, message):
  with pytest.raises(InputError, match=message):
    basic.build_transforms([block])


@dataclasses.dataclass(frozen=True)
class Invert:
  """Transform from outside the package."""

  def __call__(self, example, rng):
    return example._replace(image=255 - example.image)


def test_transform_by_dotted_path(monkeypatch):
  monkeypatch.setitem(sys.modules, 'somebody_elses', sys.modules[__name__])
  op, = basic.build_transforms([{'name': 'somebody_elses:Invert'}])
  assert op(marked((1, 1, 2, 2)), None).image[0, 0, 0] == 165


def test_jax_is_not_imported():
  """Checks that input workers do not import JAX."""
  script = ('import sys, ppn_jax.data.source, ppn_jax.data.sources.coco; '
            'import ppn_jax.data.sources.synthetic; '
            'import ppn_jax.data.transforms.basic, ppn_jax.data.transforms.random_crop; '
            'sys.exit("jax" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', script], timeout=HANG_SECONDS).returncode == 0
