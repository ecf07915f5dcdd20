"""Pascal VOC's layout: an XML file for each image and a list of names for each split."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ppn_jax.data.checks import SKIP_IMAGES, advise_skipping, check_bool, check_on_bad_example
from ppn_jax.data.contents import counted
from ppn_jax.data.images import folders
from ppn_jax.data.sources.annotations import (
  AnnotatedImages,
  AnnotationTable,
  HeaderSizes,
  Images,
  check_boxes,
  check_choices,
  check_paths,
  command_line_flag,
  fill_in_sizes,
  join_names,
  number_images,
  parse_boxes,
  quote,
  read_header_sizes,
  reader_pool,
  sizes_of_boxes,
  stays_inside,
)
from ppn_jax.data.sources.xml_file import parse_xml
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean

_VOC = re.compile(r'voc[\s_-]*(20)?(0[5-9]|1[0-2])(?!\d)', re.I)  # VOC2005 to VOC2012.
_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


class _Annotation(NamedTuple):
  """Contents of an XML file."""
  file: str
  size: tuple[int, int]  # (height, width); zeros if it states none.
  classes: list[str]
  corners: list  # [xmin, ymin, xmax, ymax] as floats; shorter if some are not numbers.
  difficult: list[bool]
  of_voc: bool  # Whether it says to be of the VOC challenges.

  @property
  def counts_from_1(self) -> bool:
    """Whether its pixels are counted from 1: not if one has the number 0, whatever it says."""
    return self.of_voc and min((n for box in self.corners for n in box[:2]), default=1) >= 1


class PascalVoc(AnnotatedImages):
  """Folder in Pascal VOC's layout.

  Image NAME of a split has its annotations in Annotations/NAME.xml and its pixels in
  JPEGImages/NAME.jpg, or a file with another suffix of an image. File names and paths in the XML
  are often outdated and are not used. Image ids are the digits of the names if all names have
  digits and no two the same, else positions in the split from 1.

  Boxes are in pixels of the image file. An XML file may state no size, or 0 x 0. One that states
  another size than that of the image may belong to a scaled copy, whose boxes would be elsewhere,
  so it is an error unless `check_size` is False.

  Args:
    folder: Contains Annotations, JPEGImages and ImageSets.
    split: Name of a list, ImageSets/Main/<split>.txt; '' takes all XML files.
    on_bad_box: For boxes that are not four finite numbers, have no area (also if xmax is xmin, a
      click without a drag) or are outside their image. 'clip' cuts those that extend beyond the
      edge and keep half of their area, and raises for the others; 'drop' leaves the others out;
      'raise' raises for all.
    classes: Names in order of label; ids count from 1. By default all names in the XML files of the
      split and of the other lists in ImageSets/Main, so that the splits agree, in alphabetical
      order.
    corners: 'pixels' are counted from 1 and both ends belong to the box, as in VOC, so its edges
      are xmin - 1 and xmax; 'edges' are counted from 0 and used as they are, as LabelImg, CVAT and
      Label Studio write them; 'auto' takes as pixels the files whose <database> is VOC's, and the
      others as edges.
    difficult_as_crowd: Whether objects marked difficult count as crowds, which are ignored in
      training and scoring, or as objects like any other.
    check_size: Whether the size in an XML file must be that of its image.
    annotations, images: Names of the folders, '.' for `folder` itself.
    duplicates: 'merge' counts repeated boxes once (same image, class and coordinates); 'keep'
      leaves all.
    unlabelled_as_empty: Whether images without an XML file count as images without objects, for
      which some tools write no file. Otherwise they are an error if a list names them, and not used
      with split=''.
    on_bad_example: For images that are missing, or whose header cannot be read while their XML
      states no size: 'raise', or 'skip' until they are indexed.

  Attributes:
    categories, max_boxes: See `Source`.
    contents: See `OptionalMembers`.

  Raises:
    InputError: At construction, for errors in lists and XML files and for images that are missing
      or have another size; by indexing, for an image that cannot be decoded.
  """

  def __init__(self, folder: str, split: str = 'train', on_bad_box: str = 'clip',
               classes: Sequence[str] = (), corners: str = 'auto',
               difficult_as_crowd: bool = True, check_size: bool = True,
               annotations: str = 'Annotations', images: str = 'JPEGImages',
               duplicates: str = 'merge', unlabelled_as_empty: bool = False,
               on_bad_example: str = 'raise'):
    check_choices(on_bad_box, duplicates)
    check_bool('pascal_voc.unlabelled_as_empty', unlabelled_as_empty)
    check_on_bad_example(on_bad_example)
    check_paths('pascal_voc', folder=folder, annotations=annotations, images=images)
    if corners not in ('auto', 'pixels', 'edges'):
      raise InputError(f"pascal_voc.corners is {corners!r}, legal: 'auto', 'pixels', 'edges'")
    self._folder = os.path.join(folder, annotations)
    place, lists = os.path.join(folder, images), os.path.join(folder, 'ImageSets', 'Main')
    self._files: dict[str, dict[str, str]] = {}
    names, file = self._read_split(lists, split)
    found, others = _list_images(place, names)
    # Without a list, images in folders below are not used; with one, it says what is.
    known = {os.path.realpath(path) for path in (self._folder, os.path.dirname(lists))}
    others = [path for path in others if not os.path.isdir(path)
              or (not split and os.path.realpath(path) not in known)]
    skip = on_bad_example == 'skip'
    if unlabelled_as_empty and not split:
      names = sorted({*names, *found})
    self._check_names(names, file, found, unlabelled_as_empty, skip)
    with reader_pool() as pool:
      read = list(pool.map(self._read_xml, names))
      notes = [folders.describe_others(others)] if others else []
      if not split:
        names, read, strays = _without_strays(names, read, found)
        notes += strays
      for error in (a for a in read if isinstance(a, InputError)):
        raise error
      more = () if classes else sorted(_listed(lists) & self._stems() - set(names))
      more = list(pool.map(self._read_xml, more))
      files, missing = _find_images(place, names, found, file, on_bad_example)
      stored = list(pool.map(read_header_sizes, files))
    broken = [a for a in more if isinstance(a, InputError)]
    if broken:
      notes.append(f'{len(broken)} xml files of other lists cannot be read, so their classes are '
                   f'not known: {broken[0]}')
    self.categories = _categories(classes, [
        *read, *(a for a in more if isinstance(a, _Annotation))], read)
    unreadable = {i: str(e) for i, e in enumerate(stored) if isinstance(e, InputError)} | missing
    if not skip:
      # Reading deals with damaged images by its own policy, unless their size is needed here.
      for i in (i for i in unreadable if 0 in read[i].size):
        raise InputError(f'{unreadable[i]}; {SKIP_IMAGES}')
    sizes = fill_in_sizes(_sizes(read, files, stored, check_size), unreadable)
    if not split and (unused := sorted(set(found).difference(names))):
      first = os.path.join(place, os.path.dirname(unused[0]), found[unused[0]][0])
      notes.append(f'{counted(len(unused), "image")} without an xml file not used, such as '
                   f'{os.path.normpath(first)}; unlabelled_as_empty=True takes them as images '
                   f'without objects ({command_line_flag("unlabelled_as_empty", True)})')
    kinds = [a.counts_from_1 for a in read if a.corners]
    if corners == 'auto' and 0 < sum(kinds) < len(kinds):
      notes.append(f'{sum(kinds):,} of {len(kinds):,} xml files say in <database> that they are of '
                   'VOC, so their pixels are counted from 1, those of the others from 0; '
                   f"corners='pixels' or 'edges' reads all alike")
    self._read_boxes(read, Images(number_images(names), [os.path.basename(f) for f in files],
                                  files, sizes), on_bad_box, corners, difficult_as_crowd,
                     duplicates=duplicates, notes=notes, unreadable=unreadable if skip else {})

  def _path(self, name: str) -> str:
    """Returns the path of an image's XML file, or where it would be if there is none."""
    place, stem = os.path.split(name)
    return os.path.join(self._folder, place, self._listed_in(place).get(stem, f'{stem}.xml'))

  def _has_xml(self, name: str) -> bool:
    place, stem = os.path.split(name)
    return stem in self._listed_in(place)

  def _listed_in(self, place: str) -> dict[str, str]:
    """Returns name without suffix -> name of the XML files in a folder that are not hidden."""
    if place not in self._files:
      try:
        entries = sorted(_list_folder(os.path.join(self._folder, place)), reverse=True)
      except InputError:
        if not place:
          raise
        entries = []
      self._files[place] = {e[:-4]: e for e in entries
                            if e.lower().endswith('.xml') and not e.startswith('.')}
    return self._files[place]

  def _read_xml(self, name: str) -> _Annotation | InputError:
    """Reads the XML file of an image; returns the error if it is wrong."""
    path = self._path(name)
    if not self._has_xml(name):  # An image without objects, or one that is missing itself.
      return _Annotation(path, (0, 0), [], [], [], False)
    try:
      return _read_xml(path)
    except InputError as e:
      return e

  def _stems(self) -> set[str]:
    """Returns the names of all XML files that are not hidden."""
    return set(self._listed_in(''))

  def _read_split(self, lists: str, split: str) -> tuple[list[str], str]:
    """Returns the names of the images of a split, and the file or folder that lists them."""
    if not isinstance(split, str) or (split and not stays_inside(split)):
      raise InputError(f"pascal_voc.split is {split!r}, legal: the name of a list, or "
                       "'' for all")
    file = os.path.join(lists, f'{split}.txt') if split else self._folder
    names = _read_list(file) if split else sorted(self._stems())
    if not names:
      raise InputError(f'{file}: no images')
    return names, file

  def _check_names(self, names: Sequence[str], file: str, found: Mapping[str, Any],
                   unlabelled_as_empty: bool, skip: bool) -> None:
    """Raises InputError if names have suffixes, or images have no XML file and have to have one.

    With `skip`, images that are missing themselves need none.
    """
    missing = sorted(n for n in names if not self._has_xml(n))
    wrong, advice = [n for n in missing if n not in found and folders.has_suffix(n)], ''
    if wrong:
      advice = f'; names in lists have no suffix, so write {os.path.splitext(wrong[0])[0]!r}'
    elif not unlabelled_as_empty:
      wrong = [n for n in missing if n in found or not skip]
      if found.keys() >= set(wrong):
        advice = ('; if these are images without objects, set unlabelled_as_empty=True '
                  f'({command_line_flag("unlabelled_as_empty", True)})')
    if wrong:
      raise InputError(f'{len(wrong)} of the {len(names)} images that {file} lists have no xml '
                       f'file in {self._folder!r}: {join_names(wrong)}{advice}')

  def _read_boxes(self, read: list[_Annotation], images: Images, on_bad_box: str, corners: str,
                  difficult_as_crowd: bool, **options: Any) -> None:
    """Checks the boxes of all images and sets the annotations."""
    owners = np.repeat(np.arange(len(read)), [len(a.classes) for a in read])
    written = [box for a in read for box in a.corners]
    from_1 = np.array([a.counts_from_1 if corners == 'auto' else corners == 'pixels'
                       for a in read], bool)
    ends, reasons = parse_boxes(written)
    shown = ', '.join(_CORNERS)
    boxes, findings = check_boxes(
        _to_xywh(ends, from_1[owners]), reasons, owners, images, on_bad_box=on_bad_box,
        written=ends,
        show=lambda i: f'{read[owners[i]].file}: box {quote(written[i])} ({shown})')
    label = {c.name: i for i, c in enumerate(self.categories)}
    labels = np.array([label[name] for a in read for name in a.classes], np.int32)
    difficult = np.array([d for a in read for d in a.difficult], bool)
    table = AnnotationTable(images, boxes, labels[boxes.rows],
                            difficult[boxes.rows] & difficult_as_crowd,
                            boxes.bboxes[:, 2:].prod(axis=-1))
    self._set_data(table, findings, no_boxes='without objects', **options)


def _list_folder(folder: str) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError as e:
    raise InputError(f'no folder {folder!r}: {e.strerror}') from e


def _read_list(file: str) -> list[str]:
  """Reads a list of ImageSets: one name per line, all different."""
  try:
    with open(file, encoding='utf-8-sig') as f:
      names = [line.strip() for line in f if line.strip()]
      names = [name for name in names if not re.match(r'\.[^./]', name)]  # Hidden files.
  except FileNotFoundError as e:
    folder = os.path.dirname(file)
    known = sorted(n[:-4] for n in os.listdir(folder) if n.endswith('.txt')
                   ) if os.path.isdir(folder) else []
    hint = did_you_mean(os.path.basename(file)[:-4], known) if known else "split='' takes all"
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
  """Returns all names in the lists of a folder; in those of single classes, 1 or -1 follows."""
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
  """Lists the folders of `names`: image files by name without suffix, and other entries."""
  found: dict[str, list[str]] = {}
  others = []
  for inside in sorted({os.path.dirname(n) for n in names}):
    for entry in sorted(_list_folder(os.path.join(folder, inside))):
      stem, suffix = os.path.splitext(entry)
      if entry.startswith('.'):
        continue
      if folders.has_suffix(entry):
        found.setdefault(os.path.join(inside, stem), []).append(entry)
      elif suffix.lower() != '.xml':
        others.append(os.path.join(folder, inside, entry))
  return found, others


def _without_strays(names: list[str], read: list[_Annotation | InputError],
                    found: Mapping[str, Any]
                    ) -> tuple[list[str], list[_Annotation | InputError], list[str]]:
  """Leaves out XML files without an image that are no annotations, and returns notes on them."""
  strays = [isinstance(a, InputError) and name not in found
            for name, a in zip(names, read, strict=True)]
  if all(strays):
    return names, read, []
  first = [str(a) for a, stray in zip(read, strays, strict=True) if stray]
  notes = [f'{len(first)} xml files without an image are ignored: {first[0]}'] if first else []
  return ([n for n, stray in zip(names, strays, strict=True) if not stray],
          [a for a, stray in zip(read, strays, strict=True) if not stray], notes)


def _find_images(folder: str, names: Sequence[str], found: Mapping[str, list[str]],
                 listed: str, on_bad_example: str) -> tuple[list[str], dict[int, str]]:
  """Returns the image file of every name, with any suffix, and image -> reason if it is missing."""
  absent = [n for n in names if n not in found]
  if absent and on_bad_example == 'raise':
    raise InputError(f'{len(absent)} of the {len(names)} images that {listed!r} names are not in '
                     f'{folder!r}: {join_names(absent)}; '
                     f'{advise_skipping(len(absent), len(names))}')
  files, missing = [], {}
  for i, name in enumerate(names):
    entries = found.get(name, ())
    if len(entries) > 1:
      raise InputError(f'{folder}: {quote(name)} is the name of {len(entries)} images, '
                       f'{join_names(entries)}; keep one')
    files.append(os.path.join(folder, os.path.dirname(name), entries[0]) if entries else
                 os.path.join(folder, f'{name}.jpg'))
    if not entries:
      missing[i] = f'{join_names([os.path.join(folder, name)])}: no such image, with any suffix'
  return files, missing


def _sizes(read: Sequence[_Annotation], files: Sequence[str],
           stored: Sequence[HeaderSizes], check: bool) -> list[tuple[int, int] | None]:
  """Returns the size that each image's boxes refer to: that of its XML file, if it is possible.

  It is None if the image cannot be read and the XML file states no size.
  """
  sizes, wrong = sizes_of_boxes([a.size for a in read], [a.file for a in read], files, stored)
  if wrong and check:
    raise InputError(f'{len(wrong)} xml files state another size (height x width) than the image '
                     f'has: {wrong[0]}; correct them, or set check_size=False if the boxes are '
                     'in pixels of the image files '
                     f'({command_line_flag("check_size", False)})')
  return sizes


def _categories(classes: Sequence[str], every: Sequence[_Annotation], read: Sequence[_Annotation]
                ) -> tuple[Category, ...]:
  """Returns `classes`, or those of `every` XML file, with ids from 1, after checking `read`."""
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


def _to_xywh(ends: np.ndarray, from_1: np.ndarray) -> np.ndarray:
  """Converts xmin, ymin, xmax, ymax, f64 [M, 4], to x, y, width, height of the edges.

  Args:
    ends: The numbers as they are written.
    from_1: bool [M], whether they are pixels counted from 1, of which both ends belong to the box.
  """
  sides = ends[:, 2:] - ends[:, :2]
  more = from_1[:, None]
  return np.concatenate([ends[:, :2] - more, sides + (more & (sides > 0))], axis=-1)


def _read_xml(file: str) -> _Annotation:
  """Reads an XML file.

  Raises:
    InputError: If it is not XML or not an annotation, or has an object without a name.
  """
  root = parse_xml(file)
  if root.tag != 'annotation':
    raise InputError(f'{file}: its outermost element is <{root.tag[:100]}>, legal: <annotation>')
  of_voc = _VOC.search(root.findtext('source/database') or '') is not None
  result = _Annotation(file, _stated_size(root), [], [], [], of_voc)
  for number, found in enumerate(root.findall('object'), start=1):
    name = (found.findtext('name') or '').strip()
    if not name:
      raise InputError(f'{file}: object {number} has no name')
    if found.find('polygon') is not None and found.find('bndbox') is None:
      raise InputError(f'{file}: object {number} has a polygon and no bndbox, as LabelMe on the '
                       'web writes it; convert such files as docs/data.md shows, or take them away')
    difficult = (found.findtext('difficult') or '0').strip()
    if difficult not in ('0', '1'):
      raise InputError(f'{file}: object {number}: difficult is {quote(difficult)}, legal: 0, 1')
    result.classes.append(name)
    result.difficult.append(difficult == '1')
    box = found.find('bndbox')
    texts = () if box is None else [box.findtext(corner) for corner in _CORNERS]
    result.corners.append([n for n in map(_number, texts) if n is not None])
  return result


def _stated_size(root: ElementTree.Element) -> tuple[int, int]:
  """Returns (height, width) of an annotation's <size>; 0 for all but positive whole numbers."""
  numbers = [_number(root.findtext(f'size/{side}')) for side in ('height', 'width')]
  height, width = (n if n and 1 <= n < 1e9 and n.is_integer() else 0 for n in numbers)
  return int(height), int(width)


def _number(text: str | None) -> float | None:
  try:
    return float(text) if text else None
  except ValueError:
    return None
