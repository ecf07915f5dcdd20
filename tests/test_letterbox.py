"""Letterboxes and inputs that are no squares: detections are in pixels of the original picture.

A stand-in for the network finds a painted rectangle in its input. Its boxes must come back to where
the rectangle was painted.
"""

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.cli.flags import _with_data
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.loader import train_batches
from ppn_jax.data.report import report
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.frame import InputFrame, sides_of
from ppn_jax.detection.structures import Category, Detections, Example
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export.formats import ExportOptions, make_metadata
from ppn_jax.export.runtimes import ExportedDetector
from ppn_jax.image_detector import ImageDetector
from ppn_jax.jobs import mediapipe_file
from ppn_jax.jobs.evaluator import Evaluator
from ppn_jax.predictor import Predictor, open_predictor

SIDE = 120
SIZES = (SIDE, (96, 160))
# (height, width) of pictures, and painted rectangles in their pixels.
PICTURES = [((200, 320), (40, 80, 120, 240)), ((320, 200), (0, 0, 160, 120)),
            ((90, 400), (30, 300, 90, 400)), ((240, 240), (60, 20, 200, 100))]


class Painted:
  """Source of the pictures, each with its rectangle as the only box."""
  categories = (Category(7, 'paint'),)
  max_boxes = 1

  def __len__(self):
    return len(PICTURES)

  def __getitem__(self, index):
    size, box = PICTURES[index]
    image = np.full((*size, 3), 128, np.uint8)
    image[box[0]:box[2], box[1]:box[3]] = (255, 0, 0)
    return Example(image, np.float32([box]) / np.float32([*size, *size]), np.zeros(1, np.int32),
                   np.zeros(1, bool), index, size)

  def ground_truth(self):
    rows = [(i, size, (x0, y0, x1 - x0, y1 - y0))
            for i, (size, (y0, x0, y1, x1)) in enumerate(PICTURES)]
    return {'images': [{'id': i, 'height': h, 'width': w} for i, (h, w), _ in rows],
            'annotations': [{'id': i + 1, 'image_id': i, 'category_id': 7, 'bbox': list(bbox),
                             'area': bbox[2] * bbox[3], 'iscrowd': 0} for i, _, bbox in rows],
            'categories': [{'id': 7, 'name': 'paint'}]}


def find_paint(images):
  """Finds the rectangle in each input, and something in the lower right corner of it."""
  images = np.asarray(images).astype(int)
  boxes = np.zeros((len(images), 2, 4), np.float32)
  for row, image in enumerate(images):
    red = np.argwhere(image[..., 0] - image[..., 1] > 127)
    if len(red):
      boxes[row, 0] = np.concatenate([red.min(axis=0), red.max(axis=0) + 1]) / np.tile(
          image.shape[:2], 2)
  boxes[:, 1] = 0.98, 0.98, 1, 1
  valid = np.zeros((len(images), 2), bool)
  valid[:, 0] = boxes[:, 0].any(axis=-1)
  valid[:, 1] = True
  zeros = np.zeros((len(images), 2), np.int32)
  return Detections(boxes, np.where(valid, np.float32([[0.9, 0.3]]), 0), zeros, zeros, valid)


@pytest.mark.parametrize('image_size', SIZES)
@pytest.mark.parametrize('mode', ['stretch', 'letterbox'])
def test_detections_of_pictures_of_any_shape(mode, image_size):
  found = ImageDetector(Predictor(Painted.categories, 3, 3, Resize(image_size, resize_mode=mode),
                                  find_paint))([example.image for example in Painted()])
  for one, (size, box) in zip(found, PICTURES, strict=True):
    # A pixel of the input.
    pixel = max(side / shown for side, shown in zip(size, sides_of(image_size), strict=True))
    np.testing.assert_allclose(one.boxes[0], box, atol=pixel)
    whole = InputFrame.of(image_size, 'letterbox').content_of(size) == sides_of(image_size)
    beside = mode == 'letterbox' and not whole
    assert len(one.boxes) == (1 if beside else 2)
    assert (one.boxes <= [*size, *size]).all()


@pytest.mark.parametrize('image_size', SIZES)
def test_evaluation_is_in_pixels_of_the_originals(image_size):
  source = Painted()
  evaluator = Evaluator(
      source, source.categories, lambda variables, images: find_paint(images),
      sharding.data_mesh(), 3, {
          'image_size': image_size, 'resize': 'area', 'resize_mode': 'letterbox',
          'reduced_decoding': True, 'threads': 1, 'max_boxes': 8},
      BadExamples('data.eval', len(source), 'raise', 0))
  evaluator.compile({})
  rows = evaluator.rows({})
  first = [row for row in rows if row['score'] > 0.5]
  for row, annotation in zip(first, source.ground_truth()['annotations'], strict=True):
    assert row['image_id'] == annotation['image_id']
    np.testing.assert_allclose(row['bbox'], annotation['bbox'], atol=2 * 400 / SIDE)
  # Only a picture that fills all of the input has its lower right corner.
  frame = InputFrame.of(image_size, 'letterbox')
  whole = sum(frame.content_of(size) == (frame.height, frame.width) for size, _ in PICTURES)
  assert len(rows) == len(first) + whole


@pytest.mark.parametrize('workers', ['threads', pytest.param('processes',
                                                             marks=pytest.mark.slow)])
def test_batches_for_training_are_letterboxed(workers):
  for image_size in SIZES:
    frame = InputFrame.of(image_size, 'letterbox')
    batch = next(train_batches(Painted(), transforms=(), image_size=image_size, max_boxes=2,
                               batch_size=4, seed=0, resize_mode='letterbox', workers=workers,
                               threads=1))
    assert batch.images.shape == (4, frame.height, frame.width, 3)
    found = find_paint(batch.images)
    np.testing.assert_allclose(batch.ground_truth.boxes[:, 0], found.boxes[:, 0],
                               atol=1 / frame.height)
    for image, image_id in zip(batch.images, batch.image_id, strict=True):
      rows, columns = frame.content_of(PICTURES[image_id][0])
      assert (image[rows:] == 128).all() and (image[:, columns:] == 128).all()


def test_objects_are_measured_where_the_network_sees_them():
  def side(mode):
    return report(Painted(), 'data.train', image_size=SIDE, resize_mode=mode).facts

  sides = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) * SIDE / max(size) for size, b in PICTURES]
  assert f'median side {np.median(sides):.3g} px at 120 px' in ' '.join(side('letterbox'))
  assert side('stretch') != side('letterbox')


def test_an_exported_file_says_how_to_resize(monkeypatch):
  made = make_metadata(ExportOptions('tflite'), image_size=SIDE, resize='area', labels=['paint'],
                       category_ids=[7], step=3, model={}, resize_mode='letterbox')
  assert made['input']['resize_mode'] == 'letterbox'
  assert 'min(120 / height, 120 / width)' in made['input']['preprocessing']
  assert 'top left of 120x120; fill the rest with 128' in made['input']['preprocessing']
  assert '0 to 1 of the input' in made['outputs']['boxes']
  monkeypatch.setattr('ppn_jax.predictor.open_export', lambda path: ExportedDetector(
      made, lambda images: find_paint(images)._asdict()))
  found, = open_predictor('file.tflite')([Painted()[0].image])
  (height, width), box = PICTURES[0]
  np.testing.assert_allclose(found.boxes[0] * [height, width, height, width], box, atol=3)
  assert len(found.boxes) == 1
  del made['input']['resize_mode']  # A file of an earlier version.
  found, = open_predictor('file.tflite')([Painted()[0].image])
  assert len(found.boxes) == 2


def test_an_exported_file_takes_inputs_of_its_size():
  made = make_metadata(ExportOptions('tflite', batch_size=2), image_size=(96, 160), resize='area',
                       labels=['paint'], category_ids=[7], step=3, model={})
  assert made['input']['shape'] == [2, 96, 160, 3]
  assert made['input']['preprocessing'].startswith('resize to 96x160 without keeping')
  exported = ExportedDetector(made, lambda images: find_paint(images)._asdict())
  assert exported(np.zeros((3, 96, 160, 3), np.uint8)).boxes.shape == (3, 2, 4)
  with pytest.raises(InputError, match=r'takes uint8 \[B, 96, 160, 3\]'):
    exported(np.zeros((3, 160, 96, 3), np.uint8))


def test_mediapipe_stretches():
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.resize_mode = 'letterbox'
  with pytest.raises(InputError, match=r"data.resize_mode='letterbox': MediaPipe stretches pictur"):
    mediapipe_file.check_supported(config, ExportOptions('tflite', layout='mediapipe'))


def test_data_of_another_config_are_resized_as_in_training():
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.resize_mode = 'letterbox'
  assert _with_data(config, 'quickstart').data.resize_mode == 'letterbox'
