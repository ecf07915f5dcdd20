"""Interface of a data source, and the sources that configs select by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from ppn_jax import registry
from ppn_jax.data.bucket_copy import with_local_paths
from ppn_jax.data.contents import Contents, contents_from_ground_truth
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.storage import expand_home

SOURCES = {
    'coco_json': 'ppn_jax.data.sources.coco:CocoJson',
    'cvat_xml': 'ppn_jax.data.sources.cvat:Cvat',
    'label_studio': 'ppn_jax.data.sources.label_studio:LabelStudio',
    'labelme': 'ppn_jax.data.sources.labelme:LabelMe',
    'open_images': 'ppn_jax.data.sources.open_images:OpenImages',
    'pascal_voc': 'ppn_jax.data.sources.voc:PascalVoc',
    'synthetic_shapes': 'ppn_jax.data.sources.synthetic:SyntheticShapes',
    'tf_records': 'ppn_jax.data.sources.tf_records:TfRecords',
    'tfds': 'ppn_jax.data.sources.tfds:Tfds',
    'yolo_txt': 'ppn_jax.data.sources.yolo:YoloTxt',
}


class Source(Protocol):
  """Data set with random access, whose `__getitem__` is called by several threads at a time.

  The constructor finds every error in the annotations; `__getitem__` finds only those that depend
  on the bytes of an image. Both raise InputError. A constructor that looks at image files takes the
  argument `on_bad_example`: with 'skip', it accepts missing and unreadable images, and
  `__getitem__` raises for them.

  `OptionalMembers` lists what a source may have in addition.

  Attributes:
    categories: The C classes, ordered by id; label k stands for categories[k].
    max_boxes: The largest number of boxes of an image.
  """
  categories: tuple[Category, ...]
  max_boxes: int

  def __len__(self) -> int:
    """Returns the number of images, including those without boxes."""
    ...

  def __getitem__(self, index: int) -> Example:
    """Returns image `index`, 0 to len - 1, with its annotations; always the same for an index."""
    ...

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth for scoring, a COCO instances dict.

    'images' has every image in the order of the indices (id, height, width, file_name),
    'categories' every class, and 'annotations' every box: id from 1 without gaps, image_id,
    category_id, bbox [x, y, width, height] in pixels of the original image, area and iscrowd.
    """
    ...


class OptionalMembers(Source, Protocol):
  """Members that a source may have or lack; only the functions of this module look for them.

  Attributes:
    contents: A summary of the data with more detail than `ground_truth`, for reports; None if
      nothing is to be reported. See `contents_of`.
    file_ids: Maps category ids of `ground_truth` to those of the data's files. See `file_ids`.
  """
  contents: Contents | None
  file_ids: Mapping[int, int]

  def open_example(self, index: int) -> Example:
    """Returns `self[index]`, in which the image may be a `LazyImage`. See `open_example`."""
    ...

  def encoded(self, index: int) -> bytes:
    """Returns the image file. `ppn prepare` stores it and a cache on disk compares it."""
    ...

  def stamp(self, index: int) -> bytes:
    """Returns bytes that differ if the image may have changed, b'' if that is not known.

    A cache on disk compares them. For a drawn image, they name everything that it depends on.
    """
    ...


def open_example(source: Source, index: int) -> Example:
  """Returns `source[index]`, not decoded yet if the source supports that.

  The image may then be a `LazyImage`, which saves time if only a part of it is needed.
  """
  return getattr(source, 'open_example', source.__getitem__)(index)


def encoded_of(source: Source) -> Callable[[int], bytes] | None:
  """Returns the method `encoded` of a source, None if it has none."""
  return getattr(source, 'encoded', None)


def stamp_of(source: Source) -> Callable[[int], bytes] | None:
  """Returns the method `stamp` of a source, None if it has none."""
  return getattr(source, 'stamp', None)


def contents_of(source: Source) -> Contents | None:
  """Returns the summary of a source, computed from its ground truth if it has no `contents`.

  Returns None if `contents` is None, or if there is no ground truth either.

  Raises:
    InputError: If the ground truth is not what `Source.ground_truth` describes.
  """
  if hasattr(source, 'contents'):
    return source.contents
  if not hasattr(source, 'ground_truth'):
    return None
  return contents_from_ground_truth(source.ground_truth(), source.categories, len(source),
                                    name=type(source).__name__)


def known_unreadable(source: Source) -> tuple[tuple[int, str], ...]:
  """Returns (image, reason) for the images that a source has found to be unreadable."""
  contents = getattr(source, 'contents', None)
  return () if contents is None else contents.unreadable


def file_ids(source: Source) -> dict[int, int]:
  """Returns a one-to-one map from category ids of the ground truth to those of the data's files."""
  return getattr(source, 'file_ids', None) or {c.id: c.id for c in source.categories}


def evenly_spaced(total: int, count: int) -> list[int]:
  """Returns at most `count` ascending indices below `total`, with the first and the last."""
  return sorted({round(i) for i in np.linspace(0, total - 1, count)})


def build_source(block: Mapping[str, Any], *, categories: Sequence[Category] | None = None,
                 key: str = '', on_bad_example: str = 'raise') -> Source:
  """Builds the source of a config block.

  Args:
    block: {'name': a key of SOURCES or a dotted path, **keyword_arguments}. What is in a bucket is
      copied to this machine first, see `bucket_copy`.
    categories: Classes of the run. Those of the data must be among them, by id and name or by name
      alone, and get the run's labels: a detector of COCO's 90 ids can be scored on a file that
      lists the 80 in use, or on one that numbers them differently. None accepts any classes.
    key: The place of the block in the config, such as 'data.eval', for error messages.
    on_bad_example: The config's `data.on_bad_example`, for sources that take it.

  Raises:
    InputError: If there is no such source or option, the data is wrong, or has a class that the run
      does not have.
  """
  try:
    if isinstance(block, Mapping):
      if 'on_bad_example' in block:
        raise InputError('on_bad_example is no option of a source but of all data: '
                         f'data.on_bad_example={block["on_bad_example"]}')
      block = with_local_paths(expand_home(dict(block)))
    make = registry.select('source', block, SOURCES, given=['on_bad_example'])
    takes = 'on_bad_example' in inspect.signature(make).parameters
    source = make(**({'on_bad_example': on_bad_example} if takes else {}))
    if categories is None or tuple(source.categories) == tuple(categories):
      return source
    return _Relabelled(f"source {block['name']!r}", source, categories)
  except InputError as e:
    # Advice names the options of training, the block that most users set.
    text = str(e).replace('--config.data.train.', f'--config.{key or "data.train"}.')
    raise InputError(f'{key}: {text}' if key else text) from e


class SourceView:
  """Base of sources that show another source differently.

  Sub-classes override `_index` and `_change`. An optional member that the other source lacks raises
  AttributeError, so this one lacks it too.
  """

  def __init__(self, source: Source):
    self._source = cast(OptionalMembers, source)
    self.categories, self.max_boxes = source.categories, source.max_boxes
    self.file_ids: Mapping[int, int] = file_ids(source)

  def _index(self, index: int) -> int:
    """Maps an index of this source to one of the other source."""
    return index

  def _change(self, example: Example) -> Example:
    """Maps an example of the other source to one of this source."""
    return example

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    return self._change(self._source[self._index(index)])

  def open_example(self, index: int) -> Example:
    """See `OptionalMembers`."""
    return self._change(open_example(self._source, self._index(index)))

  @property
  def encoded(self) -> Callable[[int], bytes]:
    """See `OptionalMembers`."""
    encoded = self._source.encoded
    return lambda index: encoded(self._index(index))

  @property
  def stamp(self) -> Callable[[int], bytes]:
    """See `OptionalMembers`."""
    stamp = self._source.stamp
    return lambda index: stamp(self._index(index))


class _Relabelled(SourceView):
  """Source with the labels and category ids of a run, whose classes include those of the data.

  Attributes:
    file_ids: See `OptionalMembers`. Classes that the data lacks keep their id if it is not in use.
  """

  def __init__(self, what: str, source: Source, categories: Sequence[Category]):
    super().__init__(source)
    places, self._notes = match_categories(what, source.categories, categories)
    self._labels = np.array(places, np.int32)
    self.categories = tuple(categories)
    own = {self.categories[k].id: c.id for k, c in zip(places, source.categories, strict=True)}
    self.file_ids = _complete_ids(own, [c.id for c in categories])
    self._run_ids = {theirs: ours for ours, theirs in own.items()}

  def _change(self, example: Example) -> Example:
    return example._replace(labels=self._labels[example.labels])

  @property
  def contents(self) -> Contents | None:
    """See `OptionalMembers`."""
    contents = self._source.contents
    return contents and contents._replace(labels=self._labels[contents.labels],
                                          notes=(*contents.notes, *self._notes))

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth with the run's ids and all its classes, which may be detected."""
    truth = self._source.ground_truth()
    return truth | {
        'categories': [c._asdict() for c in self.categories],
        'annotations': [a | {'category_id': self._run_ids[a['category_id']]}
                        for a in truth['annotations']]}


def _complete_ids(own: Mapping[int, int], ids: Sequence[int]) -> dict[int, int]:
  """Adds `ids` that `own` lacks: each maps to itself or, if in use, to the next free id."""
  taken, result = set(own.values()), dict(own)
  free = max([*taken, *ids], default=0)
  for i in ids:
    if i not in result:
      if i in taken:
        free += 1
        result[i] = free
      else:
        result[i] = i
      taken.add(result[i])
  return result


def match_categories(what: str, found: Sequence[Category], expected: Sequence[Category]
                     ) -> tuple[list[int], list[str]]:
  """Finds the classes of one data set among those of another, by name where their ids differ.

  Args:
    what: The data set with the classes `found`, for messages.
    found: Classes to look up.
    expected: Classes to look among.

  Returns:
    The position in `expected` of each class, and notes about those with another id.

  Raises:
    InputError: If `expected` lacks a class, or a class to be matched by name has a name that
      occurs more than once.
  """
  exact = {tuple(c): k for k, c in enumerate(expected)}
  by_id, names = {c.id: c for c in expected}, [c.name for c in expected]
  places, renumbered = [], []
  for label, category in enumerate(found):
    place = exact.get(tuple(category))
    if place is None:
      if (names.count(category.name) != 1
          or sum(c.name == category.name for c in found) != 1):
        raise _other_classes(what, label, category, by_id.get(category.id), found, expected)
      place = names.index(category.name)
      renumbered.append(f'{category.name!r} has the id {category.id} here and '
                        f'{expected[place].id} in the run')
    places.append(place)
  if not renumbered:
    return places, []
  more = f' ({len(renumbered)} classes in all)' if len(renumbered) > 1 else ''
  return places, [f'classes are matched by name: {renumbered[0]}{more}']


def check_categories(what: str, found: Sequence[Category], expected: Sequence[Category]) -> None:
  """Checks that two lists of classes have the same ids and names.

  Raises:
    InputError: If they differ, with the first difference.
  """
  for label in range(max(len(found), len(expected))):
    ours = tuple(found[label]) if label < len(found) else None
    theirs = tuple(expected[label]) if label < len(expected) else None
    if ours != theirs:
      raise _other_classes(what, label, ours, theirs, found, expected)


def _other_classes(what: str, label: int, ours: tuple[int, str] | None,
                   theirs: tuple[int, str] | None, found: Sequence[Category],
                   expected: Sequence[Category]) -> InputError:
  """Makes the error about a class that differs from the run's."""
  hint = did_you_mean(ours[1], [c.name for c in expected]) if ours and not theirs else ''
  hint = f'; {hint}' if hint.startswith('did') else ''
  return InputError(
      f'{what}: its classes are not those of the run: label {label} is {_show(ours)} here and '
      f'{_show(theirs)} in the run ({len(found)} classes here, {len(expected)} in the run){hint}')


def _show(category: tuple[int, str] | None) -> str:
  return 'no class' if category is None else f'{category[1]!r} (id {category[0]})'
