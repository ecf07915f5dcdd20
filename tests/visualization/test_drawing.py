"""Tests drawn boxes, tags that stay inside the image, and distinct colours."""

import numpy as np
import pytest
from PIL import Image

from ppn_jax.visualization import drawing

NAMES = [f'class {i}' for i in range(8)]
GREY = 128


def blank(height, width):
  return np.full((height, width, 3), GREY, np.uint8)


def changed(image):
  return (image != GREY).any(axis=-1)


def draw(image, boxes, labels=None, scores=None, names=NAMES, **style):
  labels = np.zeros(len(boxes), int) if labels is None else labels
  return drawing.draw_boxes(image, np.array(boxes, np.float32), labels, names, scores, **style)


@pytest.mark.parametrize('size', [(20, 30), (100, 60), (480, 640), (1500, 1100)])
def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_class(size):
  height, width = size
  image = blank(height, width)
  out = draw(image, [[0.2, 0.1, 0.8, 0.9]], [3], names=[''] * 8)
  assert out.shape == image.shape and out.dtype == np.uint8
  assert (image == GREY).all()
  top, left = round(0.2 * height), round(0.1 * width)
  bottom, right = round(0.8 * height) - 1, round(0.9 * width) - 1
  for y, x in ((top, left), (top, right), (bottom, left), (bottom, right),
               (top, width // 2), (height // 2, left)):
    assert tuple(out[y, x]) == drawing.class_colour(3)
  rim = max(3, round(0.02 * min(size)))
  assert not changed(out)[top + rim:bottom - rim, left + rim:right - rim].any()
  assert not changed(out)[:top - rim].any() and not changed(out)[:, right + rim + 1:].any()


def test_line_and_type_grow_with_the_image():
  def shares(side):
    box = [[0.3, 0.3, 0.7, 0.7]]
    return [changed(draw(blank(side, side), box, names=names)).mean()
            for names in ([''] * 8, NAMES)]
  small, large = shares(800), shares(2400)
  np.testing.assert_allclose(large, small, rtol=0.3)


@pytest.mark.parametrize('box', [
    [0.0, 0.0, 0.1, 0.1], [0.0, 0.9, 0.05, 1.0], [0.95, 0.9, 1.0, 1.0], [0.9, 0.0, 1.0, 0.05],
    [-0.5, -0.5, 1.5, 1.5], [0.4, 0.97, 0.6, 1.2]])
@pytest.mark.parametrize('ground_truth', [False, True])
def test_tags_stay_inside_the_image(box, ground_truth):
  image = blank(200, 300)
  style = drawing._Style.of((300, 200), 1, ground_truth)
  text = 'a name of medium length 0.87'
  corners = drawing._to_pixels(np.array(box, np.float32), (300, 200))
  left, top, right, bottom = drawing._place_tag(corners, text, style, (300, 200), [])
  assert 0 <= left < right < 300 and 0 <= top < bottom < 200
  assert style.font.length(text) <= right - left
  with_tag = draw(image, [box], names=['a name of medium length'] * 8, ground_truth=ground_truth)
  without = draw(image, [box], names=[''] * 8, ground_truth=ground_truth)
  assert (with_tag != without).any(axis=-1).sum() > 100


def test_tags_avoid_one_another():
  style = drawing._Style.of((300, 300), 1, False)
  occupied = []
  for _ in range(4):
    drawing._place_tag((100, 100, 200, 200), 'thing', style, (300, 300), occupied)
  assert len(occupied) == 4
  assert sum(drawing._overlap(a, b) for i, a in enumerate(occupied) for b in occupied[:i]) == 0


def test_better_scores_are_on_top():
  boxes = [[0.2, 0.2, 0.6, 0.6], [0.2, 0.4, 0.6, 0.8]]
  for scores, top in (([0.9, 0.3], 0), ([0.3, 0.9], 1)):
    out = draw(blank(200, 200), boxes, [0, 1], scores, names=[''] * 8)
    assert tuple(out[40, 100]) == drawing.class_colour(top)


def test_ground_truth_is_drawn_unlike_detections():
  box = [[0.2, 0.2, 0.8, 0.8]]
  out = draw(blank(300, 300), box, [4], names=[''] * 8, ground_truth=True)
  line = out[60, 60:240]
  dashes = (line == 255).all(axis=-1)
  assert 0.3 < dashes.mean() < 0.7 and (np.diff(dashes.astype(int)) == 1).sum() > 5
  assert not (out == drawing.class_colour(4)).all(axis=-1).any()


def test_no_boxes_and_invisible_boxes_change_nothing():
  image = blank(50, 60)
  np.testing.assert_array_equal(draw(image, np.zeros((0, 4))), image)
  unseen = [[np.nan] * 4, [0, 0, np.inf, 1], [0.5, 0.5, 0.5, 0.9], [1.1, 0, 1.3, 1],
            [0.8, 0.8, 0.2, 0.2]]
  np.testing.assert_array_equal(draw(image, unseen), image)


@pytest.mark.parametrize('size', [(1, 1), (3, 500), (500, 3)])
def test_extreme_sizes_are_drawn(size):
  assert draw(blank(*size), [[0, 0, 1, 1]], scores=[0.5]).shape == (*size, 3)


def test_small_images_are_enlarged_on_request_only():
  assert draw(blank(30, 60), [[0, 0, 1, 1]]).shape == (30, 60, 3)
  assert draw(blank(30, 60), [[0, 0, 1, 1]], min_side=600).shape == (300, 600, 3)
  assert draw(blank(700, 60), [[0, 0, 1, 1]], min_side=600).shape == (700, 60, 3)


def test_colours_are_stable_and_well_apart():
  colours = [drawing.class_colour(i) for i in range(24)]
  assert colours[0] == (230, 159, 0) and colours == [drawing.class_colour(i) for i in range(24)]
  apart = np.linalg.norm(np.array(colours)[:, None] - colours, axis=-1) + 1000 * np.eye(24)
  assert apart[:10, :10].min() > 50  # Of 441.
  assert np.diagonal(apart, 1).min() > 60 and apart.min() > 15
  assert all(0 <= c <= 255 for i in range(200) for c in drawing.class_colour(i))


@pytest.mark.parametrize('label', range(40))
def test_ink_is_legible_on_every_colour(label):
  def luminance(colour):
    return drawing._to_linear(np.array(colour) / 255) @ (0.2126, 0.7152, 0.0722) + 0.05
  colour = drawing.class_colour(label)
  pair = sorted((luminance(colour), luminance(drawing._legible_on(colour))))
  assert pair[1] / pair[0] > 4


def test_contact_sheet_shows_every_image_once():
  colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
  images = [np.full((40 + 10 * i, 60, 3), c, np.uint8) for i, c in enumerate(colours)]
  sheet = drawing.contact_sheet(images, 3)
  middle = [tuple(sheet[sheet.shape[0] * (1 + 2 * row) // 4,
                        sheet.shape[1] * (1 + 2 * column) // 6])
            for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
  assert middle == colours
  assert drawing.contact_sheet(images[:1]).shape[1] < drawing.contact_sheet(images).shape[1]


def test_png_holds_the_pixels(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  drawing.save_picture(tmp_path / 'new' / 'a.png', image)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.png')), image)


def test_jpg_holds_a_jpeg(tmp_path):
  image = np.full((20, 30, 3), (200, 90, 30), np.uint8)
  drawing.save_picture(tmp_path / 'new' / 'a.jpg', image)
  picture = Image.open(tmp_path / 'new' / 'a.jpg')
  assert picture.format == 'JPEG'
  np.testing.assert_allclose(np.asarray(picture), image, atol=3)


@pytest.mark.parametrize('image', [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
                                   np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_other_arrays_than_rgb_images_are_refused(image):
  with pytest.raises(ValueError, match='an image is u8'):
    draw(image, [[0, 0, 1, 1]])


def test_type_shrinks_with_small_boxes_in_large_pictures():
  def height(size, side, weight=1.0):
    boxes = np.float32([[.1, .1, .1 + side, .1 + side]] * 3)
    return drawing._Style.of(size, weight, False, boxes).font.ascent

  usual = drawing._Style.of((2000, 1500), 1, False).font.ascent
  assert height((2000, 1500), 0.5) == usual
  assert usual > 2 * height((2000, 1500), 0.02) > usual / 2
  assert height((4000, 3000), 0.001) == height((600, 600), 0.9) == height((600, 600), 0.001)
  assert height((4000, 3000), 0.001, weight=2) > height((4000, 3000), 0.001)
