"""Images of a data set with their ground truth and detections."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ppn_jax.data.source import Source
from ppn_jax.detection.structures import Array, Category
from ppn_jax.errors import InputError
from ppn_jax.metrics import error_analysis, matching
from ppn_jax.metrics.error_analysis import KINDS, Errors
from ppn_jax.visualization.drawing import draw_boxes, reduced
from ppn_jax.visualization.fonts import Font

PANEL_SIDE, CROP_SIDE = 400, 200  # Smaller pictures are enlarged to these, in pixels.
_PAPER, _WEIGHT, _TYPE = 255, 1.3, 13


class CaptionedImage(NamedTuple):
  """Picture with a line of text about it."""
  image: Array  # u8 [H, W, 3].
  caption: str


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Data set with the detections on it.

  Attributes:
    source: the images, in the order of those of the ground truth.
    ground_truth: COCO instances dict of the source.
    rows: detections, see `coco.to_rows`.
    categories: in order of label.
    threshold: least score of a detection that is drawn or counted as an error.
  """
  source: Source
  ground_truth: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  categories: Sequence[Category]
  threshold: float = 0.3

  @functools.cached_property
  def errors(self) -> Errors:
    """Errors among detections that score at least `threshold`."""
    return error_analysis.classify(self.ground_truth, self.rows, min_score=self.threshold)

  @functools.cached_property
  def quality(self) -> np.ndarray:
    """Quality of the detections of each image, f64 [N], 0 to 1.

    F1 with detections weighted by their scores: 2 sum(correct scores) / (sum(scores) + ground-truth
    boxes), correct at IoU 0.5, of detections that score at least `threshold`. For an image without
    ground truth it is one minus the best score.
    """
    positions, count = self._positions, len(self._positions)
    column = lambda values, dtype: np.fromiter(values, dtype, len(self.rows))
    position = column((positions[r['image_id']] for r in self.rows), np.int64)
    score = column((r['score'] for r in self.rows), np.float64)
    matched, ignored = matching.match(self.ground_truth, self.rows)
    score = np.where(ignored | (score < self.threshold), 0, score)
    boxes = np.bincount([positions[a['image_id']] for a in self.ground_truth['annotations']
                         if not a.get('iscrowd', 0)], minlength=count)
    total, correct = (np.bincount(position, s, count) for s in (score, score * (matched >= 0)))
    best = np.zeros(count)
    np.maximum.at(best, position, score)
    return np.where(boxes > 0, 2 * correct / np.maximum(total + boxes, 1), 1 - best)

  def best(self, count: int = 6) -> list[CaptionedImage]:
    """Compares ground truth and detections of the images of highest `quality`.

    Of equal ones, those with most ground truth come first.
    """
    return self._ranked(count, -self.quality)

  def worst(self, count: int = 6) -> list[CaptionedImage]:
    """Compares ground truth and detections of the images of lowest `quality`; see `best`."""
    return self._ranked(count, self.quality)

  def _ranked(self, count: int, key: np.ndarray) -> list[CaptionedImage]:
    boxes = [len(self._annotations_of[image['id']]) for image in self.ground_truth['images']]
    order = np.lexsort((-np.array(boxes), key))
    return _first(count, (functools.partial(self.compare, int(i)) for i in order))

  def compare(self, index: int) -> CaptionedImage:
    """Draws image `index` with ground truth on the left, detections and their errors on the right.

    Raises:
      InputError: If there is no such image, or it cannot be read.
    """
    check_index(index, len(self.source))
    image, info = self.source[index].image, self.ground_truth['images'][index]
    annotations = self._annotations(info)
    found = [i for i in self._rows_of[info['id']] if self.rows[i]['score'] >= self.threshold]
    left = draw_boxes(image, *self._boxes(annotations, info), self._names,
                      min_side=PANEL_SIDE, weight=_WEIGHT)
    right = draw_boxes(
        image, *self._boxes([self.rows[i] for i in found], info), self._names,
        np.array([self.rows[i]['score'] for i in found]), notes=[self._note(i) for i in found],
        min_side=PANEL_SIDE, weight=_WEIGHT)
    name = info.get('file_name', info['id'])
    return CaptionedImage(side_by_side([left, right]),
                          f'{name}: quality {self.quality[index]:.2f}, {len(annotations)} true, '
                          f'{len(found)} found')

  def mistakes(self, kind: str, count: int = 6) -> list[CaptionedImage]:
    """Draws the worst errors of a kind: those of highest score, or the largest missed boxes."""
    number = KINDS.index(kind)
    if number == error_analysis.MISSED:
      annotations = self.ground_truth['annotations']
      area = lambda at: annotations[at]['bbox'][2] * annotations[at]['bbox'][3]
      order = sorted(self.errors.missed.tolist(), key=area, reverse=True)
      return _first(count, (functools.partial(self._crop, annotations[at]) for at in order))
    order = sorted(np.flatnonzero(self.errors.kind == number).tolist(),
                   key=lambda i: -self.rows[i]['score'])
    return _first(count, (functools.partial(self._crop, None, i) for i in order))

  def _crop(self, missed: Mapping[str, Any] | None, row: int = -1) -> CaptionedImage:
    """Draws the surroundings of an error, ground truth dashed, the detection solid."""
    subjects, caption = [missed], ''
    if missed is None:
      target = int(self.errors.target[row])
      targets = [self.ground_truth['annotations'][target]] if target >= 0 else []
      subjects = [self.rows[row], *targets]
      caption = f'{self._name_of(subjects[0])} {subjects[0]["score"]:.2f}'
      if target >= 0:
        caption += f', IoU {self.errors.iou[row]:.2f} with {self._name_of(subjects[1])}'
    else:
      caption = self._name_of(missed)
    index = self._positions[subjects[0]['image_id']]
    image, info = self.source[index].image, self.ground_truth['images'][index]
    window = _window(self._boxes(subjects, info)[0], image.shape[:2])
    top, left, bottom, right = window.tolist()
    # Tags have to be legible.
    crop = reduced(image[top:bottom, left:right], 2 * CROP_SIDE, 2 * CROP_SIDE)
    boxes, labels = self._boxes(self._annotations(info), info)
    crop = draw_boxes(crop, _within(boxes, window, image.shape), labels, self._names,
                      ground_truth=True, min_side=CROP_SIDE)
    if missed is None:
      boxes, labels = self._boxes(subjects[:1], info)
      crop = draw_boxes(crop, _within(boxes, window, image.shape), labels, self._names,
                        np.array([self.rows[row]['score']]))
    return CaptionedImage(crop, f'{caption}; {info.get("file_name", info["id"])}')

  def _note(self, row: int) -> str:
    """Returns the kind of error of a detection in parentheses, '' for none."""
    kind = int(self.errors.kind[row])
    return '' if kind < 0 else f'({KINDS[kind]})'

  def _boxes(self, entries: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
             ) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes, 0 to 1 of the image, and labels of annotations or rows."""
    size = np.array([info['height'], info['width']] * 2)
    return ((matching.corners([e['bbox'] for e in entries]) / size).astype(np.float32),
            np.array([self._labels[e['category_id']] for e in entries], np.int32))

  def _name_of(self, entry: Mapping[str, Any]) -> str:
    return self._names[self._labels[entry['category_id']]]

  @functools.cached_property
  def _names(self) -> list[str]:
    return [c.name for c in self.categories]

  @functools.cached_property
  def _labels(self) -> dict[int, int]:
    return {c.id: label for label, c in enumerate(self.categories)}

  @functools.cached_property
  def _positions(self) -> dict[int, int]:
    return {image['id']: i for i, image in enumerate(self.ground_truth['images'])}

  def _annotations(self, info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the annotations of an image."""
    return [self.ground_truth['annotations'][at] for at in self._annotations_of[info['id']]]

  @functools.cached_property
  def _annotations_of(self) -> Mapping[int, list[int]]:
    return _by_image(self.ground_truth['annotations'])

  @functools.cached_property
  def _rows_of(self) -> Mapping[int, list[int]]:
    return _by_image(self.rows)


def check_index(index: int, count: int) -> None:
  """Raises InputError unless `index` is that of one of `count` images."""
  if not 0 <= index < count:
    raise InputError(f'there is no image {index}; choose one from 0 to {count - 1}')


def draw_caption(captioned: CaptionedImage) -> np.ndarray:
  """Returns the picture with its caption below, broken into lines; u8 [H', W, 3]."""
  font = Font(_TYPE)
  width = captioned.image.shape[1]
  lines = ['']
  for word in captioned.caption.split():
    longer = f'{lines[-1]} {word}'.strip()
    lines = [*lines[:-1], longer] if font.length(longer) <= width else [*lines, word]
  lines = [line for line in lines if line] or ['']
  height = font.ascent + font.descent
  strip = Image.new('RGB', (width, height * len(lines) + 4), (_PAPER,) * 3)
  draw = ImageDraw.Draw(strip)
  for number, line in enumerate(lines):
    font.draw(draw, 0, 2 + height * number + font.ascent, line, (64, 64, 64))
  return np.concatenate([captioned.image, np.asarray(strip)])


def side_by_side(images: Sequence[Array]) -> np.ndarray:
  """Joins images of one height in a row, with white strips between them."""
  strip = np.full((images[0].shape[0], max(4, images[0].shape[1] // 50), 3), _PAPER, np.uint8)
  parts = [part for image in images for part in (strip, image)][1:]
  return np.concatenate(parts, axis=1)


def _by_image(entries: Sequence[Mapping[str, Any]]) -> Mapping[int, list[int]]:
  """Returns {image id: positions of its entries}."""
  found = collections.defaultdict(list)
  for at, entry in enumerate(entries):
    found[entry['image_id']].append(at)
  return found


def _first(count: int, makers: Iterator) -> list[CaptionedImage]:
  """Returns the first `count` pictures, without those whose image cannot be read."""
  pictures = []
  for make in makers:
    if len(pictures) == count:
      break
    try:
      pictures.append(make())
    except InputError:
      continue
  return pictures


def _window(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Returns a square window around boxes, clipped to an image of this shape, i64 [4] in pixels.

  Its side is 1.5 times that of the boxes, and at least a fifth of the image.
  """
  pixels = boxes * np.array([*shape, *shape])
  low, high = pixels[:, :2].min(axis=0), pixels[:, 2:].max(axis=0)
  half = max(0.75 * float((high - low).max()), 0.1 * max(shape), 8.0)
  middle = (low + high) / 2
  first = np.clip(np.floor(middle - half), 0, np.array(shape) - 1)
  last = np.clip(np.ceil(middle + half), first + 1, shape)
  return np.concatenate([first, last]).astype(int)


def _within(boxes: np.ndarray, window: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Converts boxes from 0 to 1 of an image of this shape to 0 to 1 of a window of it."""
  pixels = boxes * np.array([*shape[:2], *shape[:2]])
  origin, sides = window[:2], window[2:] - window[:2]
  return ((pixels - np.tile(origin, 2)) / np.tile(sides, 2)).astype(np.float32)
