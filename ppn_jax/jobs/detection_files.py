"""Writes detections in the formats of `ppn detect`, as they are found."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ppn_jax import storage
from ppn_jax.data.images.decoding import encode_jpeg
from ppn_jax.detection.structures import Category
from ppn_jax.image_detector import ImageDetections

FORMATS = ('pictures', 'json', 'jsonl', 'csv', 'yolo', 'crops')


class Shown(NamedTuple):
  """Detections of a picture or of a frame of a video, those of at least the threshold."""
  file: str  # As the user has named it.
  name: str  # Of files about it, without a suffix; each has its own.
  image: np.ndarray  # u8 [H, W, 3].
  found: ImageDetections
  frame: int | None = None
  seconds: float | None = None  # Since the start of the video.


class Writer(Protocol):
  """One format."""

  def write(self, shown: Shown) -> None:
    """Writes the detections of a picture or frame."""
    ...

  def close(self) -> None:
    """Completes the files."""
    ...


def rows_of(found: ImageDetections, categories: Sequence[Category]) -> list[dict[str, Any]]:
  """Returns detections as COCO rows, with the class's name in place of the image's id."""
  rows = [{'category': categories[label].name, 'category_id': categories[label].id, 'score': score,
           'bbox': [xmin, ymin, xmax - xmin, ymax - ymin]}
          for label, score, (xmin, ymin, xmax, ymax) in zip(
              found.labels, found.scores.tolist(), found.xyxy.tolist(), strict=True)]
  if found.track_ids is not None:
    for row, track_id in zip(rows, found.track_ids.tolist(), strict=True):
      row['track_id'] = track_id
  return rows


def make_writers(formats: Sequence[str], output: storage.Path | None,
                 categories: Sequence[Category], *, track: bool = False) -> list[Writer]:
  """Returns the writers of some of `FORMATS`; 'pictures' and 'json' have none.

  Args:
    formats: names of `FORMATS`.
    output: folder to write to; None if none of them writes a file.
    categories: the classes, in order of label.
    track: whether the detections have ids.
  """
  makers = {'jsonl': lambda: JsonLines(categories), 'csv': lambda: Csv(output, categories, track),
            'yolo': lambda: YoloTxt(output, categories), 'crops': lambda: Crops(output)}
  return [makers[name]() for name in formats if name in makers]


class JsonLines:
  """A line of JSON on stdout for each picture and frame, at once."""

  def __init__(self, categories: Sequence[Category]):
    self._categories = categories

  def write(self, shown: Shown) -> None:
    """See `Writer`."""
    height, width = shown.image.shape[:2]
    moment = {} if shown.frame is None else {'frame': shown.frame, 'seconds': shown.seconds}
    line = {'file': shown.file, **moment, 'width': width, 'height': height,
            'detections': rows_of(shown.found, self._categories)}
    sys.stdout.write(json.dumps(line) + '\n')
    sys.stdout.flush()

  def close(self) -> None:
    """See `Writer`."""


class Csv:
  """detections.csv, a row for each box; corners in pixels, and the id last if there are ids."""

  def __init__(self, output: storage.Path, categories: Sequence[Category], track: bool = False):
    self._path, self._categories, self._text = output / 'detections.csv', categories, io.StringIO()
    self._rows = csv.writer(self._text, lineterminator='\n')
    self._rows.writerow(('file', 'frame', 'seconds', 'category', 'category_id', 'score', 'xmin',
                         'ymin', 'xmax', 'ymax', *(['track_id'] if track else [])))

  def write(self, shown: Shown) -> None:
    """See `Writer`."""
    ids = shown.found.track_ids
    for label, score, corners, end in zip(
        shown.found.labels, shown.found.scores, shown.found.xyxy,
        [()] * len(shown.found.labels) if ids is None else ids[:, None].tolist(), strict=True):
      category = self._categories[label]
      self._rows.writerow((
          shown.file, '' if shown.frame is None else shown.frame,
          '' if shown.seconds is None else shown.seconds, category.name, category.id,
          f'{score:.6g}', *(f'{value:.6g}' for value in corners), *end))

  def close(self) -> None:
    """See `Writer`."""
    storage.write_text(self._path, self._text.getvalue())


class YoloTxt:
  """labels/NAME.txt for each picture and frame, and classes.txt; classes count from 0."""

  def __init__(self, output: storage.Path, categories: Sequence[Category]):
    self._output, self._categories = output, categories

  def write(self, shown: Shown) -> None:
    """See `Writer`."""
    height, width = shown.image.shape[:2]
    xmin, ymin, xmax, ymax = (shown.found.xyxy / np.float32([width, height] * 2)).T
    rows = np.stack([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin], axis=-1)
    storage.write_text(self._output / 'labels' / f'{shown.name}.txt', ''.join(
        f'{label} ' + ' '.join(f'{value:.6f}' for value in row) + '\n'
        for label, row in zip(shown.found.labels.tolist(), rows.tolist(), strict=True)))

  def close(self) -> None:
    """See `Writer`."""
    storage.write_text(self._output / 'classes.txt',
                       ''.join(f'{c.name}\n' for c in self._categories))


class Crops:
  """crops/CLASS/NAME_K.jpg, the pixels of each box, the best of a picture first."""

  def __init__(self, output: storage.Path):
    self._folder = output / 'crops'

  def write(self, shown: Shown) -> None:
    """See `Writer`."""
    height, width = shown.image.shape[:2]
    limits = [width, height] * 2
    for k, (name, corners) in enumerate(zip(shown.found.names, shown.found.xyxy, strict=True)):
      # At least a pixel.
      low = np.clip(np.floor(corners[:2]).astype(int), 0, np.array(limits[:2]) - 1)
      high = np.clip(np.ceil(corners[2:]).astype(int), low + 1, limits[2:])
      crop = np.ascontiguousarray(shown.image[low[1]:high[1], low[0]:high[0]])
      storage.write_bytes(self._folder / file_name(name) / f'{shown.name}_{k}.jpg',
                          encode_jpeg(crop))

  def close(self) -> None:
    """See `Writer`."""


def file_name(text: str) -> str:
  """Returns a text as the name of a file or folder on any system."""
  name = re.sub(r'[^\w.-]+', '_', text).strip('._')
  return name[:100] or 'unnamed'


def is_live(text: str) -> bool:
  """Returns whether an argument is a camera's number or the address of a stream, not a path."""
  if os.path.exists(text):
    return False
  return text.isdecimal() or bool(re.match(r'(rtsps?|https?|rtmp|udp|tcp|srt)://', text))
