"""Geometry of the network's input: pictures go in and boxes come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.detection.frame import InputFrame, check_image_size, show_size, sides_of
from ppn_jax.detection.structures import Detections
from ppn_jax.errors import InputError


def sizes(count=400):
  rng = np.random.default_rng(0)
  return np.concatenate([rng.integers(1, 4000, (count, 2)), [[1, 1], [1, 4000], [4000, 1], [8, 3],
                                                            [3, 8], [300, 300], [480, 640]]])


@pytest.mark.parametrize('image_size', [1, 64, 300, (240, 320), (320, 200)])
def test_a_picture_just_fits_and_its_aspect_ratio_is_kept(image_size):
  frame = InputFrame.of(image_size, 'letterbox')
  for height, width in sizes().tolist():
    rows, columns = frame.content_of((height, width))
    assert rows == frame.height or columns == frame.width
    assert 1 <= rows <= frame.height and 1 <= columns <= frame.width
    scale = min(frame.height / height, frame.width / width)
    assert abs(rows - height * scale) <= 0.5 + 1e-9 or rows == 1
    assert abs(columns - width * scale) <= 0.5 + 1e-9 or columns == 1
  assert InputFrame.of(300, 'letterbox').content_of((480, 640)) == (225, 300)
  assert InputFrame.of((240, 320), 'letterbox').content_of((480, 640)) == (240, 320)
  assert InputFrame.of((240, 320)).content_of((480, 480)) == (240, 320)


@pytest.mark.parametrize('image_size', [300, (240, 320)])
def test_devices_place_pictures_at_the_same_pixels(image_size):
  frame, all_sizes = InputFrame.of(image_size, 'letterbox'), sizes()
  found = jax.jit(frame.content)(jnp.float32(all_sizes))
  np.testing.assert_array_equal(found, frame.content(all_sizes))
  boxes = np.random.default_rng(1).random((len(all_sizes), 5, 4)).astype(np.float32)
  placed = jax.jit(frame.to_input)(boxes, jnp.float32(all_sizes))
  np.testing.assert_allclose(placed, frame.to_input(boxes, all_sizes), rtol=1e-6)


def test_boxes_come_back_clipped_to_the_picture():
  frame, size = InputFrame.of(200, 'letterbox'), np.array([100, 400])
  boxes = np.float32([[0, 0, 1, 1], [0.2, 0.1, 0.5, 0.75]])
  placed = frame.to_input(boxes, size)
  # The picture fills the upper 50 of 200 rows.
  np.testing.assert_allclose(placed, [[0, 0, 0.25, 1], [0.05, 0.1, 0.125, 0.75]], rtol=1e-6)
  np.testing.assert_allclose(frame.to_picture(placed, size), boxes, rtol=1e-6)
  np.testing.assert_allclose(
      frame.to_picture(np.float32([[0.125, 0.5, 0.75, 0.9]]), size), [[0.5, 0.5, 1, 0.9]])


def test_detections_beside_the_picture_are_not_valid():
  frame = InputFrame.of(100, 'letterbox')
  boxes = np.float32([[[0, 0, 0.5, 1], [0.6, 0, 0.9, 1], [0.4, 0.2, 0.7, 0.4]]] * 2)
  found = Detections(boxes, np.float32([[0.9, 0.8, 0.7]] * 2), np.ones((2, 3), np.int32),
                     np.ones((2, 3), np.int32), np.array([[True] * 3, [True, True, False]]))
  placed = frame.in_pictures(found, np.array([[50, 100], [100, 100]]))
  assert placed.valid.tolist() == [[True, False, True], [True, True, False]]
  np.testing.assert_allclose(placed.boxes[0], [[0, 0, 1, 1], [0] * 4, [0.8, 0.2, 1, 0.4]],
                             rtol=1e-6)
  np.testing.assert_array_equal(placed.boxes[1, :2], boxes[1, :2])
  for field, before in zip(placed, found, strict=True):
    assert field.dtype == before.dtype and not field[~placed.valid].any()
  assert InputFrame.of(100).in_pictures(found, np.array([50, 100])) is found


def test_image_sizes():
  assert sides_of(30) == (30, 30) and sides_of((20, 30)) == (20, 30)
  assert show_size(30) == '30' == show_size((30, 30)) and show_size((20, 30)) == '20x30'
  assert check_image_size('a', (30, 30)) == 30 == check_image_size('a', 30)
  assert check_image_size('a', [20, 30]) == (20, 30)
  for wrong in (0, (0, 3), (1, 2, 3), True, (True, 2), 2.5, '12', None):
    with pytest.raises(InputError, match=r'^a is .*, legal: an integer, 1 or more, or two of them'):
      check_image_size('a', wrong)


def test_unknown_modes():
  with pytest.raises(InputError, match=r"data.resize_mode='letterbx' is unknown; did you mean '"):
    InputFrame.of(100, 'letterbx')
