"""Pascal VOC's layout: an xml file for each image, lists of names for the splits."""

import concurrent.futures
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, check_on_bad_example
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  Columns,
  Images,
  check_boxes,
  check_choices,
  check_paths,
  fill_in_sizes,
  note_others,
  number_images,
  option_on_the_command_line,
  parse_boxes,
  some,
  stays_inside,
)
from ppn_jax.data.sources.coco_json import quote
from ppn_jax.data.sources.voc_xml import CORNERS, Annotation, read_xml
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean

_THREADS = 16  # They wait for files, on a network file system above all.


class PascalVoc(AnnotatedImages):
  """A folder in Pascal VOC's layout; a `sources.Source`.

  Image NAME of a split has its truth in Annotations/NAME.xml and its pixels in
  JPEGImages/NAME.jpg, or with another suffix of an image: what the xml says of file names and
  paths is often stale and not used. Image ids are the digits of the names, if all have some and
  no two the same, else positions in the split from 1.

  The boxes are in pixels of the image file. An xml that states no size, or 0 x 0, is taken at
  that; one that states another size than the file has may belong to a copy of other size, whose
  boxes would be elsewhere, and is an error unless `check_size` is off.

  Args:
    folder: has Annotations, JPEGImages and ImageSets.
    split: reads ImageSets/Main/<split>.txt; '' takes every xml file.
    on_bad_box: what to do with boxes that are not four finite numbers, have no area (also where
      xmax is xmin, a click without a drag) or lie outside their image. 'clip' cuts those that
      reach over the edge and keep half of their area, and raises for the others; 'drop' leaves
      the others out; 'raise' raises for all.
    classes: names in order of label; ids count from 1. Empty: all names in the xml files of the
      split and of the other lists in ImageSets/Main, so that the splits agree, in alphabetical
      order.
    corners: 'pixels' are counted from 1 and both ends belong to the box, as in VOC and LabelImg,
      so its edges are xmin - 1 and xmax; 'edges' are counted from 0 and taken as they are.
    difficult_as_crowd: whether objects marked difficult count as crowds, which are neither
      trained on nor asked for in scoring; else they are objects like others.
    check_size: whether the size in an xml must be that of its image.
    annotations, images: names of the folders, '.' for `folder` itself.
    duplicates: 'merge' counts a box once that is there twice: same image, class and coordinates;
      'keep' leaves both.
    on_bad_example: what to do about images that are missing, or whose header cannot be read
      though their xml states no size: 'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: see `sources.Source`.
    bad_boxes: what was dropped.
    contents: what the data set holds and what was done to its boxes.

  Raises:
    InputError: at construction, for anything wrong with the lists and xml files, and images
      that are absent or of another size; by indexing, for an image that cannot be decoded.
  """

  def __init__(self, folder: str, split: str = 'train', on_bad_box: str = 'clip',
               classes: Sequence[str] = (), corners: str = 'pixels',
               difficult_as_crowd: bool = True, check_size: bool = True,
               annotations: str = 'Annotations', images: str = 'JPEGImages',
               duplicates: str = 'merge', on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_on_bad_example(on_bad_example)
    check_paths('pascal_voc', folder=folder, annotations=annotations, images=images)
    if corners not in ('pixels', 'edges'):
      raise InputError(f"pascal_voc.corners is {corners!r}, legal: 'pixels', 'edges'")
    self._folder = os.path.join(folder, annotations)
    place, lists = os.path.join(folder, images), os.path.join(folder, 'ImageSets', 'Main')
    names, file = self._read_split(lists, split)
    found, others = _list_images(place, names)
    skip = on_bad_example == 'skip'
    self._check_xml(names, file, found if skip else None)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      read = list(pool.map(self._read_xml, names))
      notes = note_others(others)
      if not split:
        names, read, strays = _without_strays(names, read, found)
        notes += strays
      for error in (a for a in read if isinstance(a, InputError)):
        raise error
      more = () if classes else sorted(_listed(lists) & self._stems() - set(names))
      more = list(pool.map(self._read_xml, more))
      files, missing = _find_images(place, names, found, self._folder, on_bad_example)
      stored = list(pool.map(_header_sizes, files))
    broken = [a for a in more if isinstance(a, InputError)]
    if broken:
      notes.append(f'{len(broken)} xml files of other lists cannot be read, so their classes are '
                   f'not known: {broken[0]}')
    self.categories = _categories(classes, [
        *read, *(a for a in more if isinstance(a, Annotation))], read)
    unreadable = {i: str(e) for i, e in enumerate(stored) if isinstance(e, InputError)} | missing
    if not skip:
      # A damaged image is the reader's concern, who has a policy for it, unless its size is needed.
      for i in (i for i in unreadable if 0 in read[i].size):
        raise InputError(f'{unreadable[i]}; {SKIP_IMAGES}')
    sizes = fill_in_sizes(_sizes(read, files, stored, check_size), unreadable)
    if not split and (unused := sorted(set(found).difference(names))):
      notes.append(f'{len(unused):,} images have no xml file and are not used, such as '
                   f'{os.path.join(place, found[unused[0]][0])}')
    self._read_boxes(read, Images(number_images(names), [os.path.basename(f) for f in files],
                                  files, sizes), on_bad_box, corners, difficult_as_crowd,
                     duplicates=duplicates, notes=notes, unreadable=unreadable if skip else {})

  def _path(self, name: str) -> str:
    return os.path.join(self._folder, f'{name}.xml')

  def _read_xml(self, name: str) -> Annotation | InputError:
    """What the xml file of an image says, or what is wrong with it."""
    path = self._path(name)
    if not os.path.exists(path):  # `_check_xml` let it pass.
      return Annotation(path, (0, 0), [], [], [])
    try:
      return read_xml(path)
    except InputError as e:
      return e

  def _stems(self) -> set[str]:
    """Names of all xml files that are not hidden."""
    return {e[:-4] for e in _list_folder(self._folder)
            if e.endswith('.xml') and not e.startswith('.')}

  def _read_split(self, lists: str, split: str) -> tuple[list[str], str]:
    """Names of the images of a split, and the file or folder that has them."""
    if not isinstance(split, str) or (split and not stays_inside(split)):
      raise InputError(f'pascal_voc.split is {split!r}, legal: the name of a list, or '' for all')
    file = os.path.join(lists, f'{split}.txt') if split else self._folder
    names = _read_list(file) if split else sorted(self._stems())
    if not names:
      raise InputError(f'{file}: no images')
    return names, file

  def _check_xml(self, names: Sequence[str], file: str, found: Mapping[str, Any] | None) -> None:
    """Raises InputError if xml files are missing; those without an image too, unless `found`."""
    missing = sorted(set(names).difference(self._stems()))
    missing = [n for n in missing if '/' not in n or not os.path.isfile(self._path(n))]
    missing = [n for n in missing if found is None or n in found]
    if missing:
      raise InputError(f'{len(missing)} of the {len(names)} images that {file} lists have no '
                       f'xml file in {self._folder!r}: {some(missing)}')

  def _read_boxes(self, read: list[Annotation], images: Images, on_bad_box: str, corners: str,
                  difficult_as_crowd: bool, **options: Any) -> None:
    owners = np.repeat(np.arange(len(read)), [len(a.classes) for a in read])
    written = [box for a in read for box in a.corners]
    ends, reasons = parse_boxes(written)
    shown = ', '.join(CORNERS)
    boxes, findings = check_boxes(
        _to_xywh(ends, corners), reasons, owners, images, on_bad_box=on_bad_box, written=ends,
        show=lambda i: f'{read[owners[i]].file}: box {quote(written[i])} ({shown})')
    label = {c.name: i for i, c in enumerate(self.categories)}
    labels = np.array([label[name] for a in read for name in a.classes], np.int32)
    difficult = np.array([d for a in read for d in a.difficult], bool)
    self._fill(Columns(images, boxes, labels[boxes.rows], difficult[boxes.rows]
                       & difficult_as_crowd, boxes.bboxes[:, 2:].prod(axis=-1)),
               findings, without='without objects', **options)


def _list_folder(folder: str) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError as e:
    raise InputError(f'no folder {folder!r}: {e.strerror}') from e


def _read_list(file: str) -> list[str]:
  """The names in a list of ImageSets, one a line, all different."""
  try:
    with open(file, encoding='utf-8-sig') as f:
      names = [line.strip() for line in f if line.strip()]
      names = [name for name in names if not re.match(r'\.[^./]', name)]  # Hidden files.
  except FileNotFoundError as e:
    folder = os.path.dirname(file)
    there = sorted(n[:-4] for n in os.listdir(folder) if n.endswith('.txt')
                   ) if os.path.isdir(folder) else []
    hint = did_you_mean(os.path.basename(file)[:-4], there) if there else "split='' takes all"
    raise InputError(f'no list of images at {file!r}; {hint}') from e
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f'{file}: cannot be read: {getattr(e, "strerror", None) or e}') from e
  seen = set()
  for number, name in enumerate(names, start=1):
    if not stays_inside(name):
      raise InputError(f'{file}: entry {number} is {quote(name)}, legal: a name of an image')
    if name in seen:
      raise InputError(f'{file}: {quote(name)} is listed twice')
    seen.add(name)
  return names


def _listed(lists: str) -> set[str]:
  """All names in the lists of a folder, those of single classes too, whose lines end in 1 or -1."""
  if not os.path.isdir(lists):
    return set()
  names = set()
  for entry in os.listdir(lists):
    if entry.endswith('.txt') and not entry.startswith('.'):
      try:
        with open(os.path.join(lists, entry), encoding='utf-8-sig') as file:
          lines = [line.strip() for line in file]
      except (OSError, UnicodeDecodeError):
        continue  # It is not the list of this split.
      names.update(lines, (line.split()[0] for line in lines if line))
  return names


def _list_images(folder: str, names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
  """The image files in the folders that `names` are in, by name without suffix, and the others."""
  found: dict[str, list[str]] = {}
  others = []
  for inside in sorted({os.path.dirname(n) for n in names}):
    for entry in sorted(_list_folder(os.path.join(folder, inside))):
      stem, suffix = os.path.splitext(entry)
      if entry.startswith('.'):
        continue
      if suffix.lower() in image_files.SUFFIXES:
        found.setdefault(os.path.join(inside, stem), []).append(entry)
      elif suffix != '.xml' and not os.path.isdir(os.path.join(folder, inside, entry)):
        others.append(os.path.join(folder, inside, entry))
  return found, others


def _without_strays(names: list[str], read: list[Annotation | InputError],
                    found: Mapping[str, Any]
                    ) -> tuple[list[str], list[Annotation | InputError], list[str]]:
  """Leaves out xml files that belong to no image and are no annotations; the notes say which."""
  strays = [isinstance(a, InputError) and name not in found
            for name, a in zip(names, read, strict=True)]
  if all(strays):
    return names, read, []
  first = [str(a) for a, stray in zip(read, strays, strict=True) if stray]
  notes = [f'{len(first)} xml files without an image are passed over: {first[0]}'] if first else []
  return ([n for n, stray in zip(names, strays, strict=True) if not stray],
          [a for a, stray in zip(read, strays, strict=True) if not stray], notes)


def _find_images(folder: str, names: Sequence[str], found: Mapping[str, list[str]],
                 xml_folder: str, on_bad_example: str) -> tuple[list[str], dict[int, str]]:
  """The image file of every name, whatever its suffix, and why there is none for some."""
  absent = [n for n in names if n not in found]
  if absent and on_bad_example == 'raise':
    raise InputError(f'{len(absent)} of the {len(names)} images with an xml file in '
                     f'{xml_folder!r} are not in {folder!r}: {some(absent)}; {SKIP_IMAGES}')
  files, missing = [], {}
  for i, name in enumerate(names):
    entries = found.get(name, ())
    if len(entries) > 1:
      raise InputError(f'{folder}: {quote(name)} is the name of {len(entries)} images, '
                       f'{some(entries)}; keep one')
    files.append(os.path.join(folder, os.path.dirname(name), entries[0]) if entries else
                 os.path.join(folder, f'{name}.jpg'))
    if not entries:
      missing[i] = f'{some([os.path.join(folder, name)])}: no such image, with any suffix'
  return files, missing


def _header_sizes(file: str) -> tuple[tuple[int, int], ...] | InputError:
  """(height, width) that the image can have; what is wrong if its header cannot be read."""
  try:
    return image_files.read_sizes(file)
  except InputError as e:
    return e


def _sizes(read: Sequence[Annotation], files: Sequence[str],
           stored: Sequence[tuple | InputError], check: bool) -> list[tuple[int, int] | None]:
  """The size in which each image's boxes are: what its xml says if that can be.

  None where the xml says nothing of an image that cannot be read.
  """
  sizes, wrong = [], []
  for annotation, file, legal in zip(read, files, stored, strict=True):
    stated = None if 0 in annotation.size else annotation.size
    if isinstance(legal, InputError) or stated in legal:
      sizes.append(stated)
      continue
    sizes.append(legal[1])
    if stated:
      wrong.append(f'{annotation.file} says {stated[0]} x {stated[1]}, '
                   f'{file} has {legal[1][0]} x {legal[1][1]}')
  if wrong and check:
    raise InputError(f'{len(wrong)} xml files state another size (height x width) than the image '
                     f'has: {wrong[0]}; correct them, or set check_size=False if the boxes are '
                     'in pixels of the image files '
                     f'({option_on_the_command_line("check_size", False)})')
  return sizes


def _categories(classes: Sequence[str], every: Sequence[Annotation], read: Sequence[Annotation]
                ) -> tuple[Category, ...]:
  """Of the classes given, or else found in `every` xml file; ids from 1. `read` uses them."""
  if isinstance(classes, str) or not all(isinstance(c, str) and c for c in classes):
    raise InputError(f'pascal_voc.classes is {quote(classes)}, legal: names of classes')
  names = list(classes) or sorted({name for a in every for name in a.classes})
  if not names:
    raise InputError('the xml files have no objects; name the classes by pascal_voc.classes')
  if len(set(names)) < len(names):
    raise InputError(f'pascal_voc.classes names one class twice: {quote(names)}')
  for annotation in read:
    for name in annotation.classes:
      if name not in names:
        raise InputError(f'{annotation.file}: unknown class {quote(name)}; '
                         f'{did_you_mean(name, names)}')
  return tuple(Category(i, name) for i, name in enumerate(names, start=1))


def _to_xywh(ends: np.ndarray, corners: str) -> np.ndarray:
  """xmin, ymin, xmax, ymax f64 [M, 4] -> x, y, width, height of edges."""
  sides = ends[:, 2:] - ends[:, :2]
  if corners == 'edges':
    return np.concatenate([ends[:, :2], sides], axis=-1)
  return np.concatenate([ends[:, :2] - 1, np.where(sides > 0, sides + 1, sides)], axis=-1)
