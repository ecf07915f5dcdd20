"""Augmentation on the device has the distributions of the host's and the reference's."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppn_jax.data.transforms.basic import PhotometricDistortion, build_transforms
from ppn_jax.data.transforms.geometry import crop as crop_on_host
from ppn_jax.detection.structures import Example, GroundTruth
from ppn_jax.device_data.transforms import View, build_augmentation, crop, shift_hsv
from ppn_jax.errors import InputError

DRAWS = 2000
SIZE = (60, 84)
BOXES = np.float32([[0.1, 0.1, 0.4, 0.5], [0.3, 0.5, 0.9, 0.95], [0.62, 0.05, 0.7, 0.12],
                    [0.0, 0.6, 0.25, 1.0]])


def ground_truth_of(boxes, padded=8):
  n = len(boxes)
  boxes = np.concatenate([boxes, np.zeros((padded - n, 4), np.float32)])
  return GroundTruth(boxes, np.arange(padded, dtype=np.int32), np.zeros(padded, bool),
                     np.arange(padded) < n)


def views(blocks, boxes=BOXES, size=SIZE, draws=DRAWS, image_size=32):
  """Returns the device's draws: windows (y, x, height, width) in pixels, flips, box counts."""
  augmentation = build_augmentation(blocks, image_size=image_size, resize='area')
  view = jax.jit(jax.vmap(augmentation.view, in_axes=(None, None, 0)))(
      jnp.int32(size), ground_truth_of(boxes), jax.random.split(jax.random.key(1), draws))
  frame = np.asarray(view.frame, np.float64) * [*size, *size]
  windows = np.concatenate([frame[:, :2], frame[:, 2:] - frame[:, :2]], axis=1)
  counts = np.asarray(view.ground_truth.valid.sum(axis=1))
  return np.round(windows, 3), np.asarray(view.mirrored), counts


def host_draws(blocks, boxes=BOXES, size=SIZE, draws=DRAWS):
  """Returns the host's draws, reading windows from an image whose pixels are their coordinates."""
  ops = build_transforms(blocks)
  rows, columns = np.indices(size)
  image = np.stack([rows, columns, 0 * rows + 255], axis=-1).astype(np.uint8)
  found = []
  for draw in range(draws):
    rng = np.random.default_rng(draw)
    example = Example(image, boxes, np.arange(len(boxes)), np.zeros(len(boxes), bool), 0, size)
    for op in ops:
      example = op(example, rng)
    pixels = np.asarray(example.image)
    if pixels[0, 0, 2] == 255 == pixels[-1, -1, 2]:
      y, x = pixels[0, [0, -1]].min(axis=0)[:2].astype(int)
    else:  # The image on a canvas.
      y, x = -np.argwhere(pixels[..., 2] == 255).min(axis=0)
    mirrored = pixels[0, 0, 1] > pixels[0, -1, 1]
    found.append((y, x, *pixels.shape[:2], mirrored, len(example.boxes)))
  found = np.array(found)
  return found[:, :4], found[:, 4].astype(bool), found[:, 5]


def assert_same_distribution(ours, theirs):
  """Tests by Kolmogorov-Smirnov, with one false alarm in 10,000."""
  result = stats.ks_2samp(ours, theirs)
  assert result.pvalue > 1e-4, result


def assert_same_windows(ours, theirs):
  columns = []
  for windows in (ours, theirs):
    y, x, height, width = np.asarray(windows, float).T
    columns.append([y, x, height, width, height * width, width / height, y + height, x + width])
  for a, b in zip(*columns, strict=True):
    assert_same_distribution(a, b)


CROP = {'name': 'ssd_random_crop'}
FLIP = {'name': 'horizontal_flip'}
CASES = {
    'crop then flip': [CROP, FLIP], 'flip then crop': [FLIP, CROP],
    'options': [CROP | {'coverages': (0.3,), 'aspect_ratio': (0.8, 1.3), 'area': (0.3, 0.6),
                        'keep_probability': 0.4, 'attempts': 3}],
    'expand': [{'name': 'expand', 'probability': 1.0}],
    'rare flip': [FLIP | {'probability': 0.1}]}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_distributed_as_on_the_host(case):
  ours, theirs = views(CASES[case]), host_draws(CASES[case])
  assert_same_windows(ours[0], theirs[0])
  assert_same_distribution(ours[2], theirs[2])
  table = [[flips.sum(), DRAWS - flips.sum()] for flips in (ours[1], theirs[1])]
  assert np.sum(table, axis=0).min() == 0 or stats.fisher_exact(table).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('boxes', [BOXES[:0], np.float32([[0.5, 0.5, 0.501, 0.501]])],
                         ids=['no boxes', 'a box below a pixel'])
def test_images_without_boxes_to_cover(boxes):
  ours, theirs = views([CROP], boxes), host_draws([CROP], boxes)
  assert_same_windows(ours[0], theirs[0])
  assert_same_distribution(ours[2], theirs[2])


def test_the_statistics_detect_a_difference():
  ours, theirs = views([CROP]), host_draws([CROP | {'area': (0.15, 1.0)}])
  with pytest.raises(AssertionError):
    assert_same_windows(ours[0], theirs[0])


@pytest.mark.parametrize('case', [3])
def test_windows_are_distributed_as_the_reference_s(shared, case):
  with np.load(shared / 'golden' / 'ssd_random_crop_samples.npz') as golden:
    size, boxes = tuple(golden['image_hw'].tolist()), golden['boxes']
    theirs = golden['window_y_x_h_w_boxes'][case], golden['num_kept_boxes'][case]
  coverage = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)[case]
  block = CROP | {'coverages': (coverage,), 'keep_probability': 0.0}
  ours = views([block], boxes.astype(np.float32), size, 3000)
  assert_same_windows(ours[0], theirs[0])
  assert_same_distribution(ours[2], theirs[1])


def test_large_scale_jitter_is_distributed_as_on_the_host():
  """Compares boxes, since the host resizes pixels at once."""
  block = {'name': 'large_scale_jitter', 'size': 64, 'scale': (0.3, 2.0)}
  augmentation = build_augmentation([block], image_size=32, resize='area')
  view = jax.jit(jax.vmap(augmentation.view, in_axes=(None, None, 0)))(
      jnp.int32(SIZE), ground_truth_of(BOXES[1:2]), jax.random.split(jax.random.key(1), 1000))
  ours = np.asarray(view.ground_truth.boxes)[:, 0], np.asarray(view.ground_truth.valid)[:, 0]
  op, = build_transforms([block])
  boxes = [op(Example(np.zeros((*SIZE, 3), np.uint8), BOXES[1:2], np.zeros(1, int),
                      np.zeros(1, bool), 0, SIZE), np.random.default_rng(draw)).boxes
           for draw in range(1000)]
  kept = np.array([len(b) for b in boxes], bool)
  table = [[k.sum(), (~k).sum()] for k in (ours[1], kept)]
  assert np.sum(table, axis=0).min() == 0 or stats.fisher_exact(table).pvalue > 1e-4
  boxes = np.concatenate(boxes)
  ours = ours[0][ours[1]]
  for statistic in (lambda b: np.prod(b[:, 2:] - b[:, :2], axis=1), lambda b: b[:, 2]):
    # On the host, borders are rounded to half a pixel of the result.
    assert_same_distribution(*(np.round(statistic(b), 2) for b in (ours, boxes)))


def test_a_crop_keeps_and_cuts_the_boxes_that_the_host_does():
  rng = np.random.default_rng(0)
  example = Example(np.zeros((*SIZE, 3), np.uint8), BOXES, np.arange(4), np.zeros(4, bool), 0, SIZE)
  view = View(jnp.float32(SIZE), jnp.float32([0, 0, 1, 1]), jnp.bool_(False),
              ground_truth_of(BOXES))
  cropped = jax.jit(crop)
  for _ in range(200):
    y, x = rng.integers(0, SIZE[0] - 1), rng.integers(0, SIZE[1] - 1)
    height, width = rng.integers(1, SIZE[0] - y + 1), rng.integers(1, SIZE[1] - x + 1)
    coverage = rng.choice([0.0, 0.3, 0.9])
    theirs = crop_on_host(example, (y, x, height, width), coverage)
    ours = cropped(view, np.float32([y, x, y + height, x + width]), coverage).ground_truth
    np.testing.assert_array_equal(np.flatnonzero(ours.valid), theirs.labels)
    np.testing.assert_allclose(np.asarray(ours.boxes)[np.asarray(ours.valid)], theirs.boxes,
                               atol=1e-5)


def test_boxes_follow_pixels():
  """Moves a white rectangle by all ops: it stays within its box."""
  blocks = [FLIP, {'name': 'expand', 'ratio': (1.0, 2.0), 'fill': (0, 0, 0)}, CROP, FLIP]
  augmentation = build_augmentation(blocks, image_size=64, resize='area')
  box = np.float32([[0.25, 0.375, 0.625, 0.875]])
  image = np.zeros((3, 64, 64), np.uint8)
  image[:, 16:40, 24:56] = 255
  images, ground_truth = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
      image, jnp.int32([48, 96]), ground_truth_of(box), jax.random.split(jax.random.key(0), 100))
  checked = 0
  drawn = images, ground_truth.boxes, ground_truth.valid
  for pixels, boxes, valid in zip(*map(np.asarray, drawn), strict=True):
    lit = np.argwhere(pixels[..., 0] > 127)
    if valid[0] and len(lit):
      found = np.concatenate([lit.min(axis=0), lit.max(axis=0) + 1]) / 64
      np.testing.assert_allclose(found, boxes[0], atol=1.6 / 64)
      checked += 1
    assert not boxes[~valid].any()
  assert checked > 75


@pytest.mark.slow
@pytest.mark.parametrize('last', [
    {'name': 'expand', 'probability': 1.0, 'fill': (0, 0, 0)},
    {'name': 'large_scale_jitter', 'size': 64, 'scale': (0.3, 0.6), 'fill': (0, 0, 0)}])
def test_pixels_outside_a_crop_do_not_reappear(last):
  """Red and green squares are seen only if their boxes are."""
  image = np.zeros((3, 64, 64), np.uint8)
  boxes = np.float32([[3, 3, 16, 16], [40, 40, 60, 60]]) / 64
  image[0, 3:16, 3:16] = image[1, 40:60, 40:60] = 255
  blocks = [FLIP, CROP | {'coverages': (1.0,), 'keep_probability': 0.0, 'area': (0.1, 0.3),
                          'attempts': 20}, last]
  augmentation = build_augmentation(blocks, image_size=64, resize='area')
  images, ground_truth = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
      image, jnp.int32([64, 64]), ground_truth_of(boxes), jax.random.split(jax.random.key(0), 100))
  seen = np.asarray((images > 127).sum(axis=(1, 2)))[:, :2]
  labelled = np.asarray(ground_truth.valid)[:, :2]
  assert not seen[~labelled].any()
  assert (seen[labelled] > 0).mean() > 0.99 and labelled.sum() > 80


def test_hue_and_saturation_are_those_of_hsv():
  rng = np.random.default_rng(0)
  colors = rng.uniform(0, 255, (3, 20, 20)).astype(np.float32)
  colors[:, 0, :3] = [[0, 255, 90]] * 3  # Black, white, grey.
  for hue, saturation in ((40.0, 1.0), (-100.0, 1.0), (0.0, 0.5), (0.0, 1.6), (15.0, 1.2)):
    expected = np.empty_like(colors)
    for at in np.ndindex(20, 20):
      h, s, v = colorsys.rgb_to_hsv(*(colors[(slice(None), *at)] / 255))
      expected[(slice(None), *at)] = colorsys.hsv_to_rgb(
          (h + hue / 360) % 1, min(s * saturation, 1), v)
    np.testing.assert_allclose(shift_hsv(colors, hue, saturation), expected * 255, atol=0.01)


def test_colours_are_distributed_as_on_the_host():
  patch = np.uint8([[[200, 60, 90], [20, 120, 60]], [[128, 128, 128], [240, 230, 40]]])
  block, op = {'name': 'photometric_distortion'}, PhotometricDistortion()
  augmentation = build_augmentation([block], image_size=2, resize='area')
  ours, _ = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
      patch.transpose(2, 0, 1), jnp.int32([2, 2]), ground_truth_of(BOXES),
      jax.random.split(jax.random.key(2), DRAWS))
  example = Example(patch, BOXES, None, None, 0, (2, 2))
  theirs = np.stack([op(example, np.random.default_rng(i)).image for i in range(DRAWS)])
  shares = np.linspace(0.05, 0.95, 10)
  a, b = (np.quantile(x.astype(float), shares, axis=0) for x in (np.asarray(ours), theirs))
  # The host rounds to 8 bits between steps, in HSV too, and sample quantiles vary.
  assert np.abs(a - b).max() < 12 and np.abs(a - b).mean() < 1.5
  untouched = [(x == patch).all(axis=(1, 2, 3)).mean() for x in (np.asarray(ours), theirs)]
  np.testing.assert_allclose(untouched, 1 / 16, atol=0.025)


@pytest.mark.parametrize('block, message', [
    ({'name': 'mosaic', 'size': 32}, "'mosaic' is not available on the device"),
    ({'name': 'ppn_jax.data.transforms.basic:Resize', 'size': 31}, 'below model.image_size=32'),
    ({'name': f'{__name__}:Own'}, 'Own.* is not available on the device')])
def test_ops_that_are_not_available_are_named(block, message):
  with pytest.raises(InputError, match=message) as error:
    build_augmentation([FLIP, block], image_size=32, resize='area')
  assert '\n' not in str(error.value)


class Own:
  def __call__(self, example, rng):
    return example


def test_two_ops_that_add_a_border_are_rejected():
  blocks = [{'name': 'expand'}, {'name': 'large_scale_jitter', 'size': 32}]
  with pytest.raises(InputError, match="'expand' and 'large_scale_jitter' both add a border"):
    build_augmentation(blocks, image_size=32, resize='area')


@pytest.mark.slow
def test_colours_change_only_an_earlier_border():
  colours = {'name': 'photometric_distortion'}
  canvas = {'name': 'expand', 'probability': 1.0, 'ratio': (3.0, 3.0), 'fill': (9, 99, 199)}
  image = np.full((3, 16, 16), 128, np.uint8)
  for blocks, untouched in (([colours, canvas], 1.0), ([canvas, colours], 1 / 16)):
    augmentation = build_augmentation(blocks, image_size=24, resize='area')
    images, _ = jax.jit(jax.vmap(augmentation, in_axes=(None, None, None, 0)))(
        image, jnp.int32([16, 16]), ground_truth_of(BOXES),
        jax.random.split(jax.random.key(3), 200))
    fill = np.asarray((images == jnp.uint8([9, 99, 199])).all(axis=-1)).any(axis=(1, 2))
    np.testing.assert_allclose(fill.mean(), untouched, atol=0.08 * (untouched < 1))
