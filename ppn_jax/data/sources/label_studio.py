"""Label Studio's files: exports as JSON and as JSON-MIN."""

import json
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppn_jax.data.checks import check_bool, check_on_bad_example
from ppn_jax.data.contents import counted
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.images import folders
from ppn_jax.data.sources.annotations import check_choices, check_paths, quote
from ppn_jax.data.sources.labelled_images import (
  ImageFinder,
  LabelledImage,
  LabelledImages,
  box_around_points,
  find_all,
  name_categories,
  stated_size,
  turned_box,
)
from ppn_jax.data.sources.uploaded_names import original_names
from ppn_jax.errors import InputError

_MAX_BYTES = 4 << 30
_LABELS = ('rectanglelabels', 'polygonlabels', 'ellipselabels', 'labels')  # Keys of the classes.
_OTHER_LABELS = ('brushlabels', 'keypointlabels', 'videorectangle')


class LabelStudio(LabelledImages):
  """Images with a JSON export of Label Studio.

  Rectangles are boxes; polygons, ellipses and turned rectangles count as the upright box around
  them. Masks and key points are left out and counted, as are tasks without an annotation, which
  nobody has looked at. Of several annotations of a task, the one marked as ground truth counts, or
  else the first. An uploaded image is found by the name it had before, without the eight letters
  and digits that Label Studio puts in front, and with the spaces and brackets that it takes out.
  Image ids are those of `annotations.number_images`.

  Args:
    annotations: The JSON file, exported as JSON or JSON-MIN.
    images: The folder of the images; '' is the file's own.
    image_key: The entry of a task's data that is the image; '' finds it.
    classes: Names in order of label; ids count from 1. By default all names that occur, in
      alphabetical order.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    check_size: Whether the size of an image in the file must be that of the image.
    on_bad_example: For images that are missing, or whose header cannot be read while no size is
      stated: 'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the file and images that are missing; by indexing,
      for an image that cannot be decoded.
  """

  def __init__(self, annotations: str, images: str = '', image_key: str = '',
               classes: Sequence[str] = (), on_bad_box: str = 'clip', duplicates: str = 'merge',
               check_size: bool = True, on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_bool('label_studio.check_size', check_size)
    check_paths('label_studio', annotations=annotations, images=images or annotations)
    file = os.fspath(annotations)
    tasks = _read_tasks(file)
    finder = ImageFinder(os.fspath(images) or os.path.dirname(file) or '.')
    read, names, unlabelled, several, shapes = [], {}, 0, 0, 0
    for number, task in enumerate(tasks):
      where = f'{file}: task {task.get("id", number)}'
      results = list(_annotations(task, where))
      if not results:
        unlabelled += 1
        continue
      several += len(results) > 1
      url = _image_of(task, where, image_key)
      image, others = _read_image(where, url, results[0])
      names[len(read)] = _names_of(url, task)
      shapes += others
      read.append(image)
    if not read:
      raise InputError(f'{file}: none of its {len(tasks)} tasks has an annotation')
    notes = [text for count, text in (
        (unlabelled, f'{counted(unlabelled, "task")} left out: without an annotation'),
        (several, f'{counted(several, "task")} with several annotations, of which one is used'),
        (shapes, f'{counted(shapes, "shape")} left out: masks, key points')) if count]
    self._take(read, find_all(finder, read, names), finder.folder, shares=True, notes=notes,
               categories=name_categories('label_studio', classes, (), read),
               on_bad_box=on_bad_box, duplicates=duplicates, on_bad_example=on_bad_example,
               check_size=check_size)


def _read_tasks(file: str) -> list[dict]:
  """Reads the tasks of a file.

  Raises:
    InputError: If it is not an export of Label Studio.
  """
  data = image_files.read(file)
  if len(data) > _MAX_BYTES:
    raise InputError(f'{file}: {len(data):,} bytes, legal: up to {_MAX_BYTES:,}')
  try:
    tasks = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise InputError(f'{file}: not valid JSON: {e}') from e
  if not isinstance(tasks, list) or not tasks or not all(isinstance(t, dict) for t in tasks):
    raise InputError(f'{file}: not an export of Label Studio, which is a list of tasks; export as '
                     'JSON or JSON-MIN')
  return tasks


def _annotations(task: Mapping[str, Any], where: str) -> Iterator[list[dict]]:
  """Yields the regions of each annotation of a task, the one to use first."""
  written = task.get('annotations', task.get('completions'))
  if written is None:  # JSON-MIN has the regions of one annotation in an entry of its own.
    if 'data' not in task:
      yield [region for value in task.values() if isinstance(value, list)
             for region in value if isinstance(region, dict) and ('x' in region or _kinds(region))]
    return
  if not isinstance(written, list) or not all(
      isinstance(a, dict) and isinstance(a.get('result'), list) for a in written):
    raise InputError(f'{where}: annotations is {quote(written)}, legal: a list, each with a result')
  done = [a for a in written if not a.get('was_cancelled')]
  for annotation in sorted(done, key=lambda a: not a.get('ground_truth')):
    yield [{**region['value'], **{k: region.get(k) for k in (
        'original_width', 'original_height', 'image_rotation', 'id')}}
           for region in annotation['result']
           if isinstance(region, dict) and isinstance(region.get('value'), dict)]


def _kinds(region: Mapping[str, Any]) -> list[str]:
  return [key for key in (*_LABELS, *_OTHER_LABELS) if key in region]


def _image_of(task: Mapping[str, Any], where: str, key: str) -> str:
  """Returns the path or address of a task's image."""
  data = task.get('data', task)
  data = data if isinstance(data, dict) else {}
  if not key:
    texts = [k for k, v in data.items() if isinstance(v, str)
             and (k == 'image' or folders.has_suffix(urllib.parse.urlsplit(v).path)
                  or folders.has_suffix(v))]
    key = 'image' if 'image' in texts else texts[0] if len(texts) == 1 else ''
    if not key:
      raise InputError(f'{where}: {len(texts)} entries of its data can be the image '
                       f'({quote(sorted(data))}); name it by label_studio.image_key')
  url = data.get(key)
  if not isinstance(url, str) or not url:
    raise InputError(f'{where}: {key} is {quote(url)}, legal: the path or address of an image')
  return url


def _names_of(url: str, task: Mapping[str, Any]) -> list[str]:
  """Returns the paths that an image may have on this machine."""
  parts = urllib.parse.urlsplit(url)
  local = urllib.parse.parse_qs(parts.query).get('d', [])
  paths = [*local, urllib.parse.unquote(parts.path), url, str(task.get('file_upload') or '')]
  return [name for path in paths if path for name in original_names(path)]


def _read_image(where: str, url: str, regions: Sequence[Mapping[str, Any]]
                ) -> tuple[LabelledImage, int]:
  """Reads the regions of an annotation: its boxes, and the number of shapes without one."""
  size, left_out = (0, 0), 0
  classes, boxes = [], []
  labelled = {r.get('id') for r in regions if any(key in r for key in _LABELS)}
  for region in regions:
    if region.get('image_rotation') not in (None, 0):
      raise InputError(f'{where}: the image was turned by {quote(region["image_rotation"])} '
                       'degrees while it was labelled; export again after turning it back')
    size = stated_size(region.get('original_height'), region.get('original_width'))
    key = next((key for key in _LABELS if key in region), '')
    box = _box(region, size)
    if box is None:
      left_out += bool(_kinds(region))
      continue
    if not key:
      # A drawn shape comes as two regions of one id, the second with its label.
      if region.get('id') is None or region['id'] not in labelled:
        raise InputError(f'{where}: a shape has no label: {quote(dict(region))}')
      continue
    names = region[key]
    if not isinstance(names, list) or not names or not all(
        isinstance(name, str) and name for name in names):
      raise InputError(f'{where}: {key} is {quote(names)}, legal: names of classes')
    classes += names
    boxes += [box] * len(names)
  return LabelledImage(where, url, size, classes, boxes, [False] * len(boxes)), left_out


def _box(region: Mapping[str, Any], size: tuple[int, int]) -> list | None:
  """Returns x, y, width, height as shares of the image; None for a shape that is none.

  What is written is returned if numbers are wrong.
  """
  if 'points' in region:
    points = region['points'] if isinstance(region['points'], list) else []
    return [n / 100 for n in box_around_points(points)] or [region['points']]
  radii = 'radiusX' in region
  keys = ('x', 'y', 'radiusX', 'radiusY') if radii else ('x', 'y', 'width', 'height')
  # A key point has a width, the size of its dot.
  if 'x' not in region or 'keypointlabels' in region or keys[3] not in region:
    return None
  written = [region.get(key) for key in keys]
  if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in written):
    return written
  a, b, c, d = (n / 100 for n in written)
  box = [a - c, b - d, 2 * c, 2 * d] if radii else [a, b, c, d]
  degrees = region.get('rotation') or 0
  if not isinstance(degrees, (int, float)):
    return written
  if not degrees or not all(size):
    return box
  height, width = size
  # A rectangle is turned about its first corner, in pixels; an ellipse about its centre.
  pixels = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
  pivot = (a * width, b * height)
  x, y, w, h = turned_box(pixels, degrees, pivot)
  return [x / width, y / height, w / width, h / height]
