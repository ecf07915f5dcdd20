"""Images in folders with COCO instances files, which are read and checked once."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ppn_jax.data.checks import check_bool, check_on_bad_example
from ppn_jax.data.source import check_categories, match_categories
from ppn_jax.data.sources import coco_images, coco_json
from ppn_jax.data.sources.annotations import (
  BORDER_TOLERANCE,
  AnnotatedImages,
  AnnotationTable,
  Boxes,
  Findings,
  Images,
  check_boxes,
  check_choices,
  check_paths,
  command_line_flag,
  join,
  join_findings,
  join_names,
  parse_boxes,
  quote,
)
from ppn_jax.data.sources.turned_images import with_upright_sizes
from ppn_jax.data.sources.uploaded_names import CONTRIBUTOR
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

Paths = str | Sequence[str]
_NO_BOXES = 'without annotations'  # See `contents.NO_BOXES`.


class CocoFile(NamedTuple):
  """Instances file whose annotations are not read yet."""
  file: str
  images: Images
  categories: tuple[Category, ...]
  annotations: coco_json.Table
  from_label_studio: bool
  # Id in the file -> number, if `Table.ids` numbers them; else empty.
  image_numbers: dict[str, int]
  category_numbers: dict[str, int]
  notes: tuple[str, ...]


class CocoJson(AnnotatedImages):
  """Folders of images with boxes in COCO's instances format.

  Category ids may have gaps and start anywhere; label k is the k-th in order of id. Crowds keep
  their flag, and images without boxes are kept. Boxes that overshoot the image by up to
  `annotations.BORDER_TOLERANCE` pixels are cut at its border for training and unchanged in
  `ground_truth`. Ids of annotations are not used, since some files repeat or lack them. Ids of
  images and categories that are strings stand for their numbers, or are numbered in the order of
  the file. File names may have backslashes, or begin with the folder of images. In Label Studio's
  exports they count by their last part, and may be those before the upload. Where sizes are those
  of images on their side and boxes those of upright ones, see `turned_images`, the upright image is
  used.

  Several folders with one file each form one data set, in this order. COCO's usual training set of
  2014 consists of train and val without the ids of minival, which are ids of val:

    images=('train2014', 'val2014'), annotations=(TRAIN, VAL), exclude_ids='minival_ids.txt'
    images='val2014', annotations=VAL, include_ids='minival_ids.txt'

  Args:
    images: The folder that file names are relative to, or several folders.
    annotations: The JSON file, or one for each folder, with the same categories.
    on_bad_box: For boxes that are not four finite numbers, have no area or are outside their image.
      'clip' cuts those that extend beyond the edge and keep half of their area, and raises for the
      others; 'drop' leaves the others out; 'raise' raises for all.
    categories: The classes of the run, if they are known; the file must have the same.
    exclude_ids: A text file of image ids to leave out; see `coco_json.read_ids`.
    include_ids: A text file of the image ids to keep, all of which must be in the data.
    boxes_from: 'bbox', or 'segmentation' for the box around each object's polygons or mask; an
      object without one has its bbox.
    merge_images: Whether entries of one image file, such as one for each box, become one image,
      with the id of the first.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    on_bad_example: For images that are not in the folder: 'raise', or 'skip' until they are
      indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in the file and images that are not in the folder; by
      indexing, for an image that cannot be decoded completely.
  """

  def __init__(self, images: Paths, annotations: Paths, on_bad_box: str = 'clip',
               categories: Sequence[Category] | None = None, exclude_ids: str = '',
               include_ids: str = '', boxes_from: str = 'bbox', merge_images: bool = False,
               duplicates: str = 'merge', on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_bool('coco_json.merge_images', merge_images)
    if boxes_from not in ('bbox', 'segmentation'):
      raise InputError(f"coco_json.boxes_from is {boxes_from!r}, legal: 'bbox', 'segmentation'")
    folders, files = _list_paths(images, annotations)
    parts = _renumber([read_file(file, folder, coco_json.read(file))
                       for file, folder in zip(files, folders, strict=True)])
    self.categories = parts[0].categories
    notes = [note for part in parts for note in (
        *part.notes, *match_categories(part.file, part.categories, self.categories)[1])]
    if categories is not None:
      check_categories(files[0], self.categories, categories)
    kept = np.split(
        coco_json.select_ids(_join_ids(parts), exclude=exclude_ids, include=include_ids),
        np.cumsum([len(part.images.ids) for part in parts])[:-1])
    read, missing = [], {}
    for part, folder, chosen in zip(parts, folders, kept, strict=True):
      images, absent = coco_images.find_files(
          part.images, chosen, part.file, folder, uploaded=part.from_label_studio,
          on_bad_example=on_bad_example)
      start = sum(len(columns.images.ids) for columns, _ in read)
      missing |= {start + i: why for i, why in absent.items()}
      read.append(read_boxes(part._replace(images=images), chosen, self.categories,
                             on_bad_box=on_bad_box, boxes_from=boxes_from))
    columns, findings = join([c for c, _ in read]), join_findings([f for _, f in read])
    if merge_images:
      columns, findings, missing = _merge_images(columns, findings, missing)
    else:
      notes += _note_repeated_files(columns.images)
    self._set_data(columns, findings, duplicates=duplicates, no_boxes=_NO_BOXES, unreadable=missing,
                   notes=notes)


def read_file(file: str, folder: str, tables: Mapping[str, coco_json.Table]) -> CocoFile:
  """Reads the images and classes of an instances file.

  Args:
    file: The file, for messages.
    folder: The folder of the images.
    tables: The contents of the file.

  Raises:
    InputError: If one of them is wrong.
  """
  categories, category_numbers = _read_categories(file, tables['categories'])
  from_label_studio = tables['info'].optional('contributor') == [CONTRIBUTOR]
  images, image_numbers = coco_images.read_images(file, folder, tables['images'],
                                                  uploaded=from_label_studio)
  notes = []
  for what, numbers in (('image', image_numbers), ('category', category_numbers)):
    if numbers:
      notes.append(f'{file}: {what} ids are strings such as {quote(next(iter(numbers)))}; they '
                   f'are numbered from 1 in the order of the file')
  names = [c.name for c in categories]
  for name in sorted({n for n in names if names.count(n) > 1})[:1]:
    ids = [c.id for c in categories if c.name == name]
    notes.append(f'{file}: {len(ids)} classes are called {quote(name)}, ids '
                 f'{" and ".join(map(str, ids))}; they are learned as different classes')
  return CocoFile(file, images, categories, tables['annotations'], from_label_studio,
                  image_numbers, category_numbers, tuple(notes))


def read_boxes(part: CocoFile, kept: np.ndarray, categories: Sequence[Category], *,
               on_bad_box: str, boxes_from: str = 'bbox') -> tuple[AnnotationTable, Findings]:
  """Reads the annotations of some images of one file.

  Args:
    part: The file, with N images.
    kept: bool [N], whether to read the annotations of an image.
    categories: The classes of the data set, which include those of the file.
    on_bad_box, boxes_from: See `CocoJson`.

  Raises:
    InputError: If annotations are wrong.
  """
  file, images, table = part.file, part.images, part.annotations
  owners = table.references('image_id', images.ids, part.image_numbers)
  places, _ = match_categories(file, part.categories, categories)
  labels = np.array(places)[table.references('category_id', [c.id for c in part.categories],
                                             part.category_numbers)]
  written = (table.column('bbox') if boxes_from == 'bbox' else
             [box if box is not None else given for box, given in zip(
                 map(coco_json.box_around, table.optional('segmentation')), table.optional('bbox'),
                 strict=True)])
  entries = np.flatnonzero(kept[owners])
  place = np.cumsum(kept) - 1
  images = coco_images.select(images, kept)
  given, reasons = parse_boxes([written[i] for i in entries.tolist()])
  images, notes = with_upright_sizes(images, given, reasons, place[owners[entries]],
                                     certain=part.from_label_studio, file=file)
  corners = _describe_corners(given, reasons, images.sizes[place[owners[entries]]])
  outlines = boxes_from == 'bbox' and reasons.any() and any(
      map(table.optional('segmentation').__getitem__, entries[reasons > 0].tolist()))
  boxes, findings = check_boxes(
      given, reasons, place[owners[entries]], images, on_bad_box=on_bad_box, written=given,
      show=lambda i: f'{file}: bbox {quote(written[entries[i]])} (x, y, width, height)',
      advice=f'; {coco_json.USE_SEGMENTATION}' if outlines else f'; {corners}' if corners else '')
  if findings.clipped and corners:
    notes = (*notes, f'{file}: {corners}')
  rows = entries[boxes.rows]
  cut = (boxes.bboxes != given[boxes.rows]).any(axis=-1)
  return AnnotationTable(images, boxes, labels[rows].astype(np.int32), _crowd(table, rows),
                 _areas(table, boxes.bboxes, rows, cut)), findings._replace(notes=notes)


def _list_paths(images: Paths, annotations: Paths) -> tuple[list[str], list[str]]:
  """Returns folders and JSON files, one file for each folder."""
  both = []
  for option, value in (('images', images), ('annotations', annotations)):
    paths = value if isinstance(value, (list, tuple)) else [value]
    for path in paths:
      check_paths('coco_json', **{option: path})
    both.append([os.fspath(path) for path in paths])
  folders, files = both
  if not files or len(folders) != len(files):
    raise InputError(f'coco_json.images are {len(folders)} folders and annotations {len(files)} '
                     'files; legal: one for each')
  for folder in folders:
    if not os.path.isdir(folder):
      seen_from = '' if os.path.isabs(folder) else f', seen from {os.getcwd()}'
      raise InputError(f'no folder of images at {folder!r}{seen_from}')
  return folders, files


def _describe_corners(given: np.ndarray, reasons: np.ndarray, sizes: np.ndarray) -> str:
  """Returns advice if all boxes can be two corners and not all corner and size; else ''."""
  given, sizes = given[reasons == 0], sizes[reasons == 0]
  with np.errstate(invalid='ignore', over='ignore'):
    as_corners = (given[:, 2:] > given[:, :2]).all() and (given[:, 2:] <= sizes[:, ::-1] + 1).all()
    as_given = (given[:, :2] + given[:, 2:] <= sizes[:, ::-1] + BORDER_TOLERANCE).all()
  if len(given) < 2 or not as_corners or as_given:
    return ''
  return ('all boxes fit into their images if they are corners, xmin, ymin, xmax, ymax, but '
          'must be x, y, width, height: subtract the first two numbers from the others')


def _read_categories(file: str, table: coco_json.Table
                     ) -> tuple[tuple[Category, ...], dict[str, int]]:
  """Reads the classes of a file, ordered by id, and `CocoFile.category_numbers`."""
  if not len(table):
    raise InputError(f'{file}: no categories')
  names = table.column('name', lambda v: isinstance(v, str) and v, 'a name')
  ids, numbers = table.ids()
  return tuple(sorted(map(Category, ids.tolist(), names))), numbers


def _renumber(parts: list[CocoFile]) -> list[CocoFile]:
  """Moves image ids that `Table.ids` assigned behind all others."""
  if len(parts) < 2:
    return parts
  top = max((int(p.images.ids.max()) for p in parts if not p.image_numbers), default=0)
  moved = []
  for part in parts:
    if part.image_numbers:
      images = part.images._replace(ids=part.images.ids + top)
      numbers = {name: n + top for name, n in part.image_numbers.items()}
      part = part._replace(images=images, image_numbers=numbers)
      top = int(images.ids.max())
    moved.append(part)
  return moved


def _join_ids(parts: Sequence[CocoFile]) -> np.ndarray:
  """Joins the image ids of all files, i64 [N], and checks that they are unique."""
  ids = np.concatenate([part.images.ids for part in parts])
  values, counts = np.unique(ids, return_counts=True)
  for value in values[counts > 1][:1].tolist():
    both = [part.file for part in parts if value in part.images.ids]
    raise InputError(f'image id {value} is in {" and ".join(both)}; ids must be unique')
  return ids


def _same_files(images: Images) -> np.ndarray:
  """Returns the first image that has the same file, i64 [N]."""
  first: dict[str, int] = {}
  return np.array([first.setdefault(os.path.normpath(f), i) for i, f in enumerate(images.files)],
                  np.int64)


def _note_repeated_files(images: Images) -> list[str]:
  """Returns a note if several images have the same file."""
  first = _same_files(images)
  again = np.flatnonzero(first != np.arange(len(first)))
  if not len(again):
    return []
  ids = images.ids[first == first[again[0]]]
  count = len(np.unique(first[again]))
  return [f'{count:,} {"file is" if count == 1 else "files are"} listed as several images, such as '
          f'{images.files[first[again[0]]]} with the ids {join_names([str(i) for i in ids])}: an '
          'object with a box in one is background in the other; merge_images=True joins them '
          f'({command_line_flag("merge_images", True)})']


def _merge_images(columns: AnnotationTable, findings: Findings, missing: dict[int, str]
                  ) -> tuple[AnnotationTable, Findings, dict[int, str]]:
  """Joins images that have the same file."""
  images, boxes, first = columns.images, columns.boxes, _same_files(columns.images)
  kept = first == np.arange(len(first))
  place = (np.cumsum(kept) - 1)[first]
  owners = place[np.repeat(np.arange(len(first)), boxes.counts)]
  order = np.argsort(owners, kind='stable')
  merged = Boxes(boxes.rows[order], np.bincount(owners, minlength=kept.sum()), boxes.boxes[order],
                 boxes.bboxes[order])
  emptied = (np.bincount(place, findings.emptied) > 0) & (merged.counts == 0)
  return (AnnotationTable(coco_images.select(images, kept), merged, *(column[order] for column in (
      columns.labels, columns.crowd, columns.areas))), findings._replace(emptied=emptied),
          {int(place[i]): why for i, why in missing.items()})


def _areas(table: coco_json.Table, bboxes: np.ndarray, rows: np.ndarray, cut: np.ndarray
           ) -> np.ndarray:
  """Returns the areas of entries, f64 [K]: those of the file, else width x height.

  The area of a box that was cut is at most that of the cut box.

  Args:
    table: The entries.
    bboxes: f64 [K, 4], their boxes.
    rows: int [K], their positions.
    cut: bool [K], whether a box was cut at the edge.
  """
  areas = bboxes[:, 2] * bboxes[:, 3]
  written = table.optional('area')
  for k, i in enumerate(rows.tolist()):
    if written[i] is not None:
      if type(written[i]) not in (int, float) or not 0 <= written[i] < 1e300:
        raise table.error(i, f'area is {quote(written[i])}, legal: a number of pixels, or none')
      areas[k] = min(written[i], areas[k]) if cut[k] else written[i]
  return areas


def _crowd(table: coco_json.Table, rows: np.ndarray) -> np.ndarray:
  """Returns whether the entries `rows` are crowds, bool [K]; by default they are not."""
  written = table.optional('iscrowd')
  for i in rows.tolist():
    if written[i] not in (None, 0, 1):
      raise table.error(i, f'iscrowd is {quote(written[i])}, legal: 0, 1')
  return np.array([bool(written[i]) for i in rows.tolist()], bool)
