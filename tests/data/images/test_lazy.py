"""Views of lazy images, compared with the same views of arrays."""

import io

import cv2
import numpy as np
import PIL.Image
import pytest

from ppn_jax.data.images import decoding
from ppn_jax.data.images.lazy import LazyImage, StoredImage
from ppn_jax.data.images.resizing import KERNELS
from ppn_jax.errors import InputError

FILL = (7, 90, 200)


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width):
  y, x = np.mgrid[:height, :width]
  return np.stack([y * 255 / height, x * 255 / width, (x + y) % 200], axis=-1).astype(np.uint8)


def save(image, kind, **options):
  buffer = io.BytesIO()
  PIL.Image.fromarray(image).save(buffer, kind, **options)
  return buffer.getvalue()


def turned(image, orientation, kind='PNG', **options):
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  return save(image, kind, exif=exif.tobytes(), **options)


def cut(image, window, fill=FILL):
  """Cuts a window out of an array, with borders, differently from the code."""
  y, x, height, width = window
  out = np.empty((height, width, 3), np.uint8)
  for i in range(height):
    for j in range(width):
      inside = 0 <= y + i < image.shape[0] and 0 <= x + j < image.shape[1]
      out[i, j] = image[y + i, x + j] if inside else fill
  return out


@pytest.mark.parametrize('orientation', range(1, 9))
def test_any_chain_of_crops_and_mirrors(orientation):
  rng = np.random.default_rng(orientation)
  for _ in range(20):
    lazy = decoding.open_image(turned(noise(11, 17), orientation), name='x')
    array = np.asarray(lazy)
    for _ in range(rng.integers(1, 5)):
      if rng.random() < 0.5:
        lazy, array = lazy.mirror(), array[:, ::-1]
      else:
        height, width = rng.integers(1, 20, 2).tolist()
        window = (int(rng.integers(-4, 8)), int(rng.integers(-4, 8)), height, width)
        fill = tuple(rng.choice([0, 128], 3).tolist())
        lazy, array = lazy.crop(window, fill), cut(array, window, fill)
      assert lazy.shape == array.shape
    np.testing.assert_array_equal(np.asarray(lazy), array)


@pytest.mark.parametrize('turns', [{}, {'transposed': True, 'upside_down': True},
                                   {'mirrored': True}])
def test_borders_of_several_colours_are_drawn_at_the_size_asked_for(turns, monkeypatch):
  stored = StoredImage((12, 16), lambda factor: np.full((12, 16, 3), 255, np.uint8))
  lazy = LazyImage.whole(stored, **turns)
  array = np.asarray(lazy)
  for window, fill in (((-4, 0, 20, 16), (1, 2, 3)), ((0, -8, 16, 20), FILL),
                       ((-4, -4, 28, 28), (9, 9, 9))):
    lazy, array = lazy.crop(window, fill), cut(array, window, fill)
  monkeypatch.setattr(LazyImage, 'pixels', None)
  pixels, frame = lazy.resize(28 * 2, 28 * 2, KERNELS['area'], reduce=True)
  assert frame == (0, 0, 28, 28)
  np.testing.assert_array_equal(pixels, array.repeat(2, axis=0).repeat(2, axis=1))
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 4


@pytest.mark.parametrize('method', KERNELS)
@pytest.mark.parametrize('orientation', [1, 2, 6, 8])
def test_resize_of_the_whole_is_that_of_the_array(method, orientation):
  lazy = decoding.open_image(turned(noise(60, 90), orientation, 'JPEG'), name='x')
  for view in (lazy, lazy.mirror(), lazy.crop((11, 7, 45, 33)), lazy.crop((3, 8, 20, 50)).mirror()):
    pixels, frame = view.resize(40, 30, KERNELS[method], reduce=False)
    np.testing.assert_array_equal(pixels, KERNELS[method](np.asarray(view), 40, 30))
    assert frame == (0, 0, *view.shape[:2])


class Recorded:
  """Stored image that records how it was loaded."""

  def __init__(self, height, width, factors=(8, 4, 2)):
    self.asked, self.image = [], smooth(height, width)
    self.lazy = LazyImage.whole(StoredImage((height, width), self.load, factors))

  def load(self, factor):
    self.asked.append(factor)
    height, width = (-(-side // factor) for side in self.image.shape[:2])
    return KERNELS['area'](self.image, height, width)


@pytest.mark.parametrize('window, size, factor', [
    ((0, 0, 480, 640), 300, 1), ((0, 0, 480, 640), 240, 2), ((0, 0, 480, 640), 241, 1),
    ((0, 0, 480, 640), 120, 4), ((0, 0, 480, 640), 60, 8), ((0, 0, 480, 640), 20, 8),
    ((10, 20, 240, 640), 120, 2), ((10, 20, 239, 640), 120, 2), ((10, 20, 237, 640), 120, 1),
    ((-480, -640, 1440, 1920), 300, 4), ((100, 100, 30, 400), 40, 1)])
def test_reduced_as_far_as_there_is_a_pixel_for_each(window, size, factor):
  stored = Recorded(480, 640)
  stored.lazy.crop(window).resize(size, size, KERNELS['area'], reduce=True)
  assert stored.asked == [factor]
  stored.asked.clear()
  stored.lazy.crop(window).resize(size, size, KERNELS['area'], reduce=False)
  assert stored.asked == [1]


def test_an_image_that_cannot_be_reduced_is_not():
  stored = Recorded(480, 640, factors=())
  pixels, frame = stored.lazy.resize(50, 50, KERNELS['area'], reduce=True)
  assert stored.asked == [1] and frame == (0, 0, 480, 640)
  whole = LazyImage.whole(StoredImage((480, 640), lambda f: stored.image, (8, 4, 2)))
  again, frame = whole.resize(50, 50, KERNELS['area'], reduce=True)  # There is nothing to reduce.
  np.testing.assert_array_equal(again, pixels)
  assert frame == (0, 0, 480, 640)


class Ramp:
  """Checks frames with brightness that grows evenly, so that pixels show where they are from."""

  def __init__(self, height, width):
    y, x = np.mgrid[:height, :width] + 0.5
    self.image = np.stack([y / height, x / width, y * 0], axis=-1).astype(np.float32) * 255

  def load(self, factor):
    """Reduces as a JPEG decoder does: the last pixel is a whole block, even beyond the image."""
    beyond = [-side % factor for side in self.image.shape[:2]]
    padded = np.pad(self.image, [(0, beyond[0]), (0, beyond[1]), (0, 0)], 'edge')
    return KERNELS['area'](padded, *(side // factor for side in padded.shape[:2]))


@pytest.mark.parametrize('mirrored', [False, True])
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('size', [(683, 1024), (1205, 1203)])
def test_the_whole_image_is_shown_exactly_however_far_it_is_reduced(size, transposed, mirrored):
  stored = StoredImage(size, Ramp(*size).load, (8, 4, 2))
  lazy = LazyImage.whole(stored, transposed=transposed, mirrored=mirrored)
  for method in ('area', 'supersample', 'bilinear'):
    pixels, frame = lazy.resize(300, 300, KERNELS[method], reduce=True)
    assert pixels.shape == (300, 300, 3) and frame == (0, 0, *lazy.shape[:2])
    centers = np.arange(2, 298) + 0.5
    for axis in (0, 1):
      shown = pixels[..., 1 - axis if transposed else axis].mean(axis=1 - axis)
      shown = shown[::-1] if mirrored and axis == 1 else shown
      # Both ends of the ramp, except for the jitter of averaging whole pixels.
      line = np.polynomial.Polynomial.fit(centers, shown[2:298], 1)
      ends = line(np.array([0, 300])) / 255 * 300
      np.testing.assert_allclose(ends, [0, 300], atol=0.03, err_msg=f'{method} {axis}')


@pytest.mark.parametrize('reduce', [False, True])
@pytest.mark.parametrize('turns', [{}, {'transposed': True, 'upside_down': True},
                                   {'upside_down': True, 'mirrored': True}])
def test_the_frame_is_what_is_shown(reduce, turns):
  """Checks frames with brightness that grows evenly, so that pixels show where they are from."""
  y, x = np.mgrid[:400, :400]
  image = np.stack([y / 400, x / 400, y * 0], axis=-1) * 255
  rng = np.random.default_rng(0)
  for _ in range(40):
    load = lambda f: KERNELS['area'](image.astype(np.float32), 400 // f, 400 // f)
    lazy = LazyImage.whole(StoredImage((400, 400), load, (8, 4, 2)), **turns)
    height, width = rng.integers(150, 380, 2).tolist()
    window = (int(rng.integers(0, 400 - height)), int(rng.integers(0, 400 - width)), height, width)
    lazy = lazy.crop(window)
    pixels, frame = lazy.resize(30, 30, KERNELS['area'], reduce=reduce)
    reference = np.asarray(lazy.resize(height, width, KERNELS['area'], reduce=False)[0])
    for axis, (start, extent) in enumerate(zip(frame[:2], frame[2:], strict=True)):
      channel = 1 - axis if 'transposed' in turns else axis
      along = reference[..., channel].mean(axis=1 - axis)
      shown = pixels[..., channel].mean(axis=1 - axis)
      centers = start + (np.arange(30) + 0.5) * extent / 30 - 0.5
      inside = (centers > 1) & (centers < len(along) - 2)
      wanted = np.interp(centers, np.arange(len(along)), along)
      # A tenth of a pixel of the result: the kernel's own error on a slope.
      assert np.abs(shown - wanted)[inside].max() < 0.1 * extent / 30 * 255 / 400
      assert abs(start) <= 0.5 * extent / 30 + 1e-6
      assert abs(start + extent - len(along)) <= 0.5 * extent / 30 + 1e-6


def test_a_window_that_misses_the_image():
  stored = Recorded(50, 60)
  lazy = stored.lazy.crop((-40, 0, 20, 30), FILL)
  for reduce in (False, True):
    pixels, frame = lazy.resize(8, 9, KERNELS['area'], reduce=reduce)
    assert pixels.shape == (8, 9, 3) and (pixels == FILL).all() and frame == (0, 0, 20, 30)
  assert (np.asarray(lazy) == FILL).all()


def test_a_sliver_of_the_image_stays_visible():
  lazy = LazyImage.of(np.full((50, 50, 3), 255, np.uint8)).crop((-2000, -2000, 4000, 4000), FILL)
  pixels, _ = lazy.resize(10, 10, KERNELS['area'], reduce=True)
  assert (pixels == 255).all(axis=-1).sum() == 1


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_reduced_photographs_look_averaged(shared, factor):
  """Compares with area averaging of all pixels; skipping pixels would be far worse."""
  for path in sorted((shared / 'data' / 'coco100' / 'val2017').glob('*.jpg'))[:8]:
    lazy = decoding.open_image(path.read_bytes(), name=path.name)
    whole = np.asarray(lazy)
    side = min(whole.shape[:2]) // factor
    reduced, _ = lazy.resize(side, side, KERNELS['area'], reduce=True)
    averaged = KERNELS['area'](whole, side, side).astype(int)
    nearest = cv2.resize(whole, (side, side), interpolation=cv2.INTER_NEAREST)
    error, left_out = (np.abs(p - averaged).mean() for p in (reduced, nearest))
    # Where the factor does not divide the sides, the frame is off by a fraction of a pixel too.
    even = not any(side % factor for side in whole.shape[:2])
    assert 0 < error < (left_out / 3 if even else left_out / 2), path.name
    assert error < (2.5 if even else 5), path.name


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}])
def test_truncated_files_are_found_at_any_scale(options):
  data = save(noise(64, 80), 'JPEG', **options)
  for length in [*range(20, len(data) - 1, 97), len(data) - 3]:
    found = set()
    for size in (64, 30, 15, 8):  # 1/1, 1/2, 1/4, 1/8
      try:
        lazy = decoding.open_image(data[:length], name='cut.jpg')
        lazy.resize(size, size, KERNELS['area'], reduce=True)
        found.add('')
      except InputError as e:
        assert str(e).startswith('cut.jpg: ') and '\n' not in str(e)
        found.add('error')
    assert len(found) == 1, length
    if length < len(data) - 200:
      assert found == {'error'}


def test_damaged_files_are_found_at_any_scale():
  rng = np.random.default_rng(0)
  data = save(noise(64, 80), 'JPEG')
  found = {'good': 0, 'bad': 0}
  for _ in range(150):
    broken, at = bytearray(data), rng.integers(len(data) // 3, len(data) - 4)
    broken[at:at + 2] = rng.bytes(2) if rng.random() < 0.5 else b'\xff' + rng.bytes(1)
    results = []
    for size in (64, 30, 15, 8):
      try:
        decoding.open_image(bytes(broken), name='x').resize(size, size, KERNELS['area'],
                                                            reduce=True)
        results.append('good')
      except InputError:
        results.append('bad')
    assert len(set(results)) == 1, results
    found[results[0]] += 1
  assert found['bad'] > 10


def test_what_the_header_tells_is_checked_before_any_pixel():
  data = save(smooth(40, 60), 'JPEG')
  with pytest.raises(InputError, match='a: the image is 40 x 60, but the annotations say 41 x 60'):
    decoding.open_image(data, name='a', size=(41, 60))
  with pytest.raises(InputError, match='a: too many pixels: 40 x 60'):
    decoding.open_image(data, name='a', max_pixels=2399)
  cut_off = decoding.open_image(data[:-20], name='a', size=(40, 60))  # The header does not show it.
  assert cut_off.shape == (40, 60, 3)
  with pytest.raises(InputError, match='a: damaged or truncated JPEG'):
    np.asarray(cut_off)


def test_padding_before_the_end_marker_at_any_scale():
  data = save(smooth(64, 64), 'JPEG', quality=95)
  data = data[:-2] + b'\0\1\2' + data[-2:]
  lazy = decoding.open_image(data, name='x')
  for size in (64, 32, 16, 8):
    pixels, frame = lazy.resize(size, size, KERNELS['area'], reduce=True)
    averaged = KERNELS['area'](np.asarray(lazy), size, size).astype(int)
    assert np.abs(pixels - averaged).mean() < 3 and frame == (0, 0, 64, 64)


def test_cmyk_is_never_reduced():
  buffer = io.BytesIO()
  PIL.Image.fromarray(smooth(64, 64)).convert('CMYK').save(buffer, 'JPEG')
  lazy = decoding.open_image(buffer.getvalue(), name='x')
  pixels, frame = lazy.resize(8, 8, KERNELS['area'], reduce=True)
  assert frame == (0, 0, 64, 64)
  np.testing.assert_array_equal(pixels, KERNELS['area'](np.asarray(lazy), 8, 8))


def test_numpy_s_protocol():
  lazy = LazyImage.of(noise(3, 4))
  assert np.asarray(lazy, dtype=np.float32).dtype == np.float32
  copied = np.array(lazy)
  assert copied.flags.writeable and not np.shares_memory(copied, lazy.pixels())
