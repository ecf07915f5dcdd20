"""Images of a data set with their truth and what a detector found in them."""

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
from ppn_jax.visualization.drawing import draw_boxes
from ppn_jax.visualization.fonts import Font

PANEL_SIDE, CROP_SIDE = 400, 200  # Smaller pictures are enlarged to these, in pixels.
_PAPER, _WEIGHT, _TYPE = 255, 1.3, 13


class Shown(NamedTuple):
  """A picture and a line about it."""
  image: Array  # u8 [H, W, 3].
  caption: str


@dataclasses.dataclass(frozen=True)
class Gallery:
  """A data set beside the detections on it.

  Attributes:
    source: the images, in the order of the truth's.
    truth: COCO instances dict of the source.
    rows: detections, as of `coco.to_rows`.
    categories: in order of label.
    threshold: least score that is drawn or counted as a mistake.
  """
  source: Source
  truth: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  categories: Sequence[Category]
  threshold: float = 0.3

  @functools.cached_property
  def errors(self) -> Errors:
    """The mistakes among detections of `threshold` and more."""
    return error_analysis.classify(self.truth, self.rows, floor=self.threshold)

  @functools.cached_property
  def quality(self) -> np.ndarray:
    """How good the detections of each image are, f64 [N], 0 to 1.

    F1 with detections counted by their scores: 2 sum(right scores) / (sum(scores) + truth boxes),
    right at IoU 0.5, scores of `threshold` and more. Of an image without truth, one less the
    best score.
    """
    places = {image['id']: i for i, image in enumerate(self.truth['images'])}
    count = len(places)
    column = lambda values, dtype: np.fromiter(values, dtype, len(self.rows))
    place = column((places[r['image_id']] for r in self.rows), np.int64)
    score = column((r['score'] for r in self.rows), np.float64)
    correct, ignored = matching.match(self.truth, self.rows)
    score = np.where(ignored | (score < self.threshold), 0, score)
    boxes = np.bincount([places[a['image_id']] for a in self.truth['annotations']
                         if not a.get('iscrowd', 0)], minlength=count)
    found, right = (np.bincount(place, s, count) for s in (score, score * correct))
    best = np.zeros(count)
    np.maximum.at(best, place, score)
    return np.where(boxes > 0, 2 * right / np.maximum(found + boxes, 1), 1 - best)

  def best(self, count: int = 6) -> list[Shown]:
    """Truth beside detections of the images of highest `quality`; of equals those of most truth."""
    return self._ranked(count, -self.quality)

  def worst(self, count: int = 6) -> list[Shown]:
    """The same of those of lowest quality."""
    return self._ranked(count, self.quality)

  def _ranked(self, count: int, key: np.ndarray) -> list[Shown]:
    boxes = [len(self._truth_of[image['id']]) for image in self.truth['images']]
    order = np.lexsort((-np.array(boxes), key))
    return _first(count, (functools.partial(self.beside, int(i)) for i in order))

  def beside(self, index: int) -> Shown:
    """Image `index`: its truth on the left, what was found on the right, mistakes named.

    Raises:
      InputError: no such image, or one that cannot be read.
    """
    if not 0 <= index < len(self.source):
      raise InputError(f'image {index} of {len(self.source)}: legal are 0 to '
                       f'{len(self.source) - 1}')
    image, info = self.source[index].image, self.truth['images'][index]
    wanted = [self.truth['annotations'][at] for at in self._truth_of[info['id']]]
    found = [i for i in self._rows_of[info['id']] if self.rows[i]['score'] >= self.threshold]
    left = draw_boxes(image, *self._boxes(wanted, info), self._names,
                      min_side=PANEL_SIDE, weight=_WEIGHT)
    right = draw_boxes(
        image, *self._boxes([self.rows[i] for i in found], info), self._names,
        np.array([self.rows[i]['score'] for i in found]), notes=[self._note(i) for i in found],
        min_side=PANEL_SIDE, weight=_WEIGHT)
    name = info.get('file_name', info['id'])
    return Shown(side_by_side([left, right]),
                 f'{name}: quality {self.quality[index]:.2f}, {len(wanted)} true, '
                 f'{len(found)} found')

  def mistakes(self, kind: str, count: int = 6) -> list[Shown]:
    """The worst mistakes of a kind: highest scores, or the largest boxes that were missed."""
    number = KINDS.index(kind)
    if number == error_analysis.MISSED:
      annotations = self.truth['annotations']
      area = lambda at: annotations[at]['bbox'][2] * annotations[at]['bbox'][3]
      order = sorted(self.errors.missed.tolist(), key=area, reverse=True)
      return _first(count, (functools.partial(self._crop, annotations[at]) for at in order))
    order = sorted(np.flatnonzero(self.errors.kind == number).tolist(),
                   key=lambda i: -self.rows[i]['score'])
    return _first(count, (functools.partial(self._crop, None, i) for i in order))

  def _crop(self, missed: Mapping[str, Any] | None, row: int = -1) -> Shown:
    """The surroundings of a mistake, all truth dashed, the detection solid."""
    subjects, caption = [missed], ''
    if missed is None:
      target = int(self.errors.target[row])
      subjects = [self.rows[row], *([self.truth['annotations'][target]] if target >= 0 else [])]
      caption = f'{self._name_of(subjects[0])} {subjects[0]["score"]:.2f}'
      if target >= 0:
        caption += f', IoU {self.errors.iou[row]:.2f} with {self._name_of(subjects[1])}'
    else:
      caption = self._name_of(missed)
    index = self._places[subjects[0]['image_id']]
    image, info = self.source[index].image, self.truth['images'][index]
    wanted = [self.truth['annotations'][at] for at in self._truth_of[info['id']]]
    window = _window(self._boxes(subjects, info)[0], image.shape[:2])
    top, left, bottom, right = window.tolist()
    crop = image[top:bottom, left:right]
    boxes, labels = self._boxes(wanted, info)
    crop = draw_boxes(crop, _within(boxes, window, image.shape), labels, self._names, truth=True,
                      min_side=CROP_SIDE)
    if missed is None:
      boxes, labels = self._boxes(subjects[:1], info)
      crop = draw_boxes(crop, _within(boxes, window, image.shape), labels, self._names,
                        np.array([self.rows[row]['score']]))
    return Shown(crop, f'{caption}; {info.get("file_name", info["id"])}')

  def _note(self, row: int) -> str:
    kind = int(self.errors.kind[row])
    return '' if kind < 0 else f'({KINDS[kind]})'

  def _boxes(self, entries: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
             ) -> tuple[np.ndarray, np.ndarray]:
    """Boxes 0 to 1 of the image, and labels, of annotations or rows."""
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
  def _places(self) -> dict[int, int]:
    return {image['id']: i for i, image in enumerate(self.truth['images'])}

  @functools.cached_property
  def _truth_of(self) -> Mapping[int, list[int]]:
    return _by_image(self.truth['annotations'])

  @functools.cached_property
  def _rows_of(self) -> Mapping[int, list[int]]:
    return _by_image(self.rows)


def captioned(shown: Shown) -> np.ndarray:
  """The picture with its caption below, u8 [H', W, 3]; words that do not fit start new lines."""
  font = Font(_TYPE)
  width = shown.image.shape[1]
  lines = ['']
  for word in shown.caption.split():
    longer = f'{lines[-1]} {word}'.strip()
    lines = [*lines[:-1], longer] if font.length(longer) <= width else [*lines, word]
  lines = [line for line in lines if line] or ['']
  height = font.ascent + font.descent
  strip = Image.new('RGB', (width, height * len(lines) + 4), (_PAPER,) * 3)
  draw = ImageDraw.Draw(strip)
  for number, line in enumerate(lines):
    font.draw(draw, 0, 2 + height * number + font.ascent, line, (64, 64, 64))
  return np.concatenate([shown.image, np.asarray(strip)])


def side_by_side(images: Sequence[Array]) -> np.ndarray:
  """Images of one height in a row, a white strip between."""
  strip = np.full((images[0].shape[0], max(4, images[0].shape[1] // 50), 3), _PAPER, np.uint8)
  parts = [part for image in images for part in (strip, image)][1:]
  return np.concatenate(parts, axis=1)


def _by_image(entries: Sequence[Mapping[str, Any]]) -> Mapping[int, list[int]]:
  found = collections.defaultdict(list)
  for at, entry in enumerate(entries):
    found[entry['image_id']].append(at)
  return found


def _first(count: int, makers: Iterator) -> list[Shown]:
  """The first pictures that can be made: an image that cannot be read is left out."""
  shown = []
  for make in makers:
    if len(shown) == count:
      break
    try:
      shown.append(make())
    except InputError:
      continue
  return shown


def _window(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """A square around boxes, cut at the image, i64 [4] in pixels of an image of this shape.

  Half as much again as the boxes, a fifth of the image at least.
  """
  pixels = boxes * np.array([*shape, *shape])
  low, high = pixels[:, :2].min(axis=0), pixels[:, 2:].max(axis=0)
  half = max(0.75 * float((high - low).max()), 0.1 * max(shape), 8.0)
  middle = (low + high) / 2
  first = np.clip(np.floor(middle - half), 0, np.array(shape) - 1)
  last = np.clip(np.ceil(middle + half), first + 1, shape)
  return np.concatenate([first, last]).astype(int)


def _within(boxes: np.ndarray, window: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Boxes 0 to 1 of an image of this shape -> 0 to 1 of a window of it."""
  pixels = boxes * np.array([*shape[:2], *shape[:2]])
  origin, sides = window[:2], window[2:] - window[:2]
  return ((pixels - np.tile(origin, 2)) / np.tile(sides, 2)).astype(np.float32)
