"""Pascal VOC's layout: an xml file for each image, lists of names for the splits."""

import concurrent.futures
import os
from collections.abc import Sequence

import numpy as np

from ppn_jax.data import images as image_files
from ppn_jax.data.annotations import (
  AnnotatedImages,
  Columns,
  Images,
  check_boxes,
  check_on_bad_box,
  check_paths,
  number_images,
  parse_boxes,
  some,
  stays_inside,
)
from ppn_jax.data.instances import quote
from ppn_jax.data.voc_xml import CORNERS, Annotation, read_xml
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
    on_bad_box: what to do with a box that is not four finite numbers, has no area (also where
      xmax is xmin, a click without a drag) or lies outside its image: 'raise', or 'drop' it and
      list it in `bad_boxes`.
    classes: names in order of label; ids count from 1. Empty: all names in the folder's xml
      files, those of other splits too so that the splits agree, in alphabetical order.
    corners: 'pixels' are counted from 1 and both ends belong to the box, as in VOC and LabelImg,
      so its edges are xmin - 1 and xmax; 'edges' are counted from 0 and taken as they are.
    difficult_as_crowd: whether objects marked difficult count as crowds, which are neither
      trained on nor asked for in scoring; else they are objects like others.
    check_size: whether the size in an xml must be that of its image.
    annotations, images: names of the folders, '.' for `folder` itself.

  Attributes:
    categories, max_boxes: see `sources.Source`.
    bad_boxes: what was dropped.

  Raises:
    InputError: at construction, for anything wrong with the lists and xml files, and images
      that are absent or of another size; by indexing, for an image that cannot be decoded.
  """

  def __init__(self, folder: str, split: str = 'train', on_bad_box: str = 'raise',
               classes: Sequence[str] = (), corners: str = 'pixels',
               difficult_as_crowd: bool = True, check_size: bool = True,
               annotations: str = 'Annotations', images: str = 'JPEGImages'):
    check_on_bad_box(on_bad_box)
    check_paths('pascal_voc', folder=folder, annotations=annotations, images=images)
    if corners not in ('pixels', 'edges'):
      raise InputError(f"pascal_voc.corners is {corners!r}, legal: 'pixels', 'edges'")
    self._folder = os.path.join(folder, annotations)
    names = self._read_split(os.fspath(folder), split)
    files = _find_images(os.path.join(folder, images), names, self._folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      read = list(pool.map(read_xml, [self._path(n) for n in names]))
      others = () if classes else sorted(self._stems().difference(names))
      more = pool.map(read_xml, map(self._path, others))
      self.categories = _categories(classes, [*read, *more])
      stored = list(pool.map(_header_sizes, files, (a.size for a in read)))
    sizes = _sizes(read, files, stored, check_size)
    self._read_boxes(read, Images(number_images(names), [os.path.basename(f) for f in files],
                                  files, sizes), on_bad_box, corners,
                     difficult_as_crowd)

  def _path(self, name: str) -> str:
    return os.path.join(self._folder, f'{name}.xml')

  def _stems(self) -> set[str]:
    """Names of all xml files."""
    return {e[:-4] for e in _list_folder(self._folder) if e.endswith('.xml')}

  def _read_split(self, folder: str, split: str) -> list[str]:
    """Names of the images of a split, each with an xml file."""
    if not isinstance(split, str) or (split and not stays_inside(split)):
      raise InputError(f'pascal_voc.split is {split!r}, legal: the name of a list, or \'\' for all')
    if not split:
      names, file = sorted(self._stems()), self._folder
    else:
      file = os.path.join(folder, 'ImageSets', 'Main', f'{split}.txt')
      names = _read_list(file)
      missing = sorted(set(names).difference(self._stems()))
      missing = [n for n in missing if '/' not in n or not os.path.isfile(self._path(n))]
      if missing:
        raise InputError(f'{len(missing)} of the {len(names)} images that {file} lists have no '
                         f'xml file in {self._folder!r}: {some(missing)}')
    if not names:
      raise InputError(f'{file}: no images')
    return names

  def _read_boxes(self, read: list[Annotation], images: Images, on_bad_box: str, corners: str,
                  difficult_as_crowd: bool) -> None:
    owners = np.repeat(np.arange(len(read)), [len(a.classes) for a in read])
    written = [box for a in read for box in a.corners]
    ends, reasons = parse_boxes(written)
    shown = ', '.join(CORNERS)
    boxes, self.bad_boxes = check_boxes(
        _to_xywh(ends, corners), reasons, owners, images, on_bad_box=on_bad_box,
        show=lambda i: f'{read[owners[i]].file}: box {quote(written[i])} ({shown})')
    label = {c.name: i for i, c in enumerate(self.categories)}
    labels = np.array([label[name] for a in read for name in a.classes], np.int32)
    difficult = np.array([d for a in read for d in a.difficult], bool)
    self._fill(Columns(images, boxes, labels[boxes.rows], difficult[boxes.rows]
                       & difficult_as_crowd, boxes.bboxes[:, 2:].prod(axis=-1)))


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


def _find_images(folder: str, names: Sequence[str], xml_folder: str) -> list[str]:
  """The image file of every name, whatever its suffix."""
  found: dict[str, list[str]] = {}
  for inside in sorted({os.path.dirname(n) for n in names}):
    for entry in _list_folder(os.path.join(folder, inside)):
      stem, suffix = os.path.splitext(entry)
      if suffix.lower() in image_files.SUFFIXES:
        found.setdefault(os.path.join(inside, stem), []).append(entry)
  missing = [n for n in names if n not in found]
  if missing:
    raise InputError(f'{len(missing)} of the {len(names)} images with an xml file in '
                     f'{xml_folder!r} are not in {folder!r}: {some(missing)}')
  for name in names:
    if len(found[name]) > 1:
      raise InputError(f'{folder}: {quote(name)} is the name of {len(found[name])} images, '
                       f'{some(sorted(found[name]))}; keep one')
  return [os.path.join(folder, os.path.dirname(n), found[n][0]) for n in names]


def _header_sizes(file: str, stated: tuple[int, int]) -> tuple[tuple[int, int], ...]:
  """(height, width) that the image can have; empty if its header cannot be read.

  A damaged image is the reader's concern, who has a policy for it, unless its size is needed.
  """
  try:
    return image_files.read_sizes(file)
  except InputError:
    if 0 in stated:
      raise
    return ()


def _sizes(read: Sequence[Annotation], files: Sequence[str], stored: Sequence[tuple],
           check: bool) -> np.ndarray:
  """i64 [N, 2], the size in which each image's boxes are: what its xml says if that can be."""
  sizes, wrong = [], []
  for annotation, file, legal in zip(read, files, stored, strict=True):
    fits = not legal or annotation.size in legal
    sizes.append(annotation.size if fits else legal[1])
    if not fits and 0 not in annotation.size:
      wrong.append(f'{annotation.file} says {annotation.size[0]} x {annotation.size[1]}, '
                   f'{file} has {legal[1][0]} x {legal[1][1]}')
  if wrong and check:
    raise InputError(f'{len(wrong)} xml files state another size (height x width) than the image '
                     f'has: {wrong[0]}; correct them, or set check_size=False if the boxes are '
                     'in pixels of the image files')
  return np.array(sizes, np.int64)


def _categories(classes: Sequence[str], read: Sequence[Annotation]) -> tuple[Category, ...]:
  """Of the classes given, or else found in the xml files; ids from 1."""
  if isinstance(classes, str) or not all(isinstance(c, str) and c for c in classes):
    raise InputError(f'pascal_voc.classes is {quote(classes)}, legal: names of classes')
  names = list(classes) or sorted({name for a in read for name in a.classes})
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
