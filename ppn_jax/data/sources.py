"""What a data set must offer, and the data sets that configs know by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ppn_jax import registry
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError
from ppn_jax.files import expand_home

SOURCES = {
    'coco_json': 'ppn_jax.data.coco:CocoJson',
    'pascal_voc': 'ppn_jax.data.voc:PascalVoc',
    'synthetic_shapes': 'ppn_jax.data.synthetic:SyntheticShapes',
    'tfds': 'ppn_jax.data.tfds:Tfds',
    'yolo_txt': 'ppn_jax.data.yolo:YoloTxt',
}

# What `data.train` has beside the source's own options: see `training.feeds`.
_TRAIN_OPTIONS = {'cache': '', 'cache_size': 0, 'resident': False, 'resident_size': 0}


class Source(Protocol):
  """A data set with random access. Threads call `__getitem__` at the same time.

  All that can be wrong with a user's annotations is found when a source is made; only what an
  image's bytes decide is found by `__getitem__`. Both raise InputError.

  Three more methods are of use to some and needed by none:

    open_example(index)  as source[index], but the image may be a `LazyImage`: see `open_example`.
    encoded(index)       bytes, the file of the image: `ppn prepare` stores it as it is, and a cache
                         on disk compares it.
    stamp(index)         bytes that are others once the image may have changed, b'' if that cannot
                         be told; a cache on disk goes by them. Of an image that is drawn, all that
                         it depends on.

  Attributes:
    categories: the classes; label k stands for categories[k]. Ordered by id.
    max_boxes: the most boxes that one image has.
  """
  categories: tuple[Category, ...]
  max_boxes: int

  def __len__(self) -> int:
    """The number of images, those without boxes included."""

  def __getitem__(self, index: int) -> Example:
    """Image `index` of 0 .. len-1 with its truth: always the same."""

  def ground_truth(self) -> dict[str, Any]:
    """The truth to score against, a COCO instances dict.

    'images' has every image (id, height, width, file_name), 'categories' every class, and
    'annotations' each box: id from 1 without gaps, image_id, category_id, bbox [x, y, width,
    height] in pixels of the original image, area and iscrowd.
    """


def split_train_block(block: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The config block `data.train` -> that of `build_source`, and how training holds the images.

  The latter are the keys of `_TRAIN_OPTIONS`, with its values where they are absent. In paths `~`
  stands for the home folder.
  """
  block = expand_home(dict(block))
  return ({key: value for key, value in block.items() if key not in _TRAIN_OPTIONS},
          {key: block.get(key, default) for key, default in _TRAIN_OPTIONS.items()})


def open_example(source: Source, index: int) -> Example:
  """As source[index], but the image may be a `LazyImage`, for those who want less than all of it.

  A source that can put off decoding has a method `open_example(index)` for it.
  """
  return getattr(source, 'open_example', source.__getitem__)(index)


def spread(total: int, count: int) -> list[int]:
  """At most `count` indices of `total`, ascending and evenly apart, the first and last among
  them."""
  return sorted({round(i) for i in np.linspace(0, total - 1, count)})


def build_source(block: Mapping[str, Any], *, categories: Sequence[Category] | None = None,
                 key: str = '') -> Source:
  """The source of a config block; see `registry.build`.

  Args:
    block: {'name': a key of SOURCES or a dotted path, **keyword_arguments}.
    categories: the classes of the run. Those of the data must be among them, with the same ids
      and names, and are given the run's labels: a detector of COCO's 90 ids can be scored on a
      file that lists the 80 in use. None takes any.
    key: where the block stands in the config, such as 'data.eval', for errors.

  Raises:
    InputError: no such source or option, bad data, or a class that the run does not have.
  """
  try:
    source = registry.build('source', expand_home(dict(block)), SOURCES)
    if categories is None or tuple(source.categories) == tuple(categories):
      return source
    return _Relabelled(f"source {block['name']!r}", source, categories)
  except InputError as e:
    raise InputError(f'{key}: {e}' if key else str(e)) from e


class _Relabelled:
  """A source whose classes are some of a run's, with the run's labels."""

  def __init__(self, what: str, source: Source, categories: Sequence[Category]):
    label_of = {tuple(c): label for label, c in enumerate(categories)}
    by_id = {c.id: c for c in categories}
    for label, found in enumerate(source.categories):
      if tuple(found) not in label_of:
        raise _other_classes(what, label, found, by_id.get(found.id), source.categories, categories)
    self._source, self._labels = source, np.array(
        [label_of[tuple(c)] for c in source.categories], np.int32)
    self.categories, self.max_boxes = tuple(categories), source.max_boxes
    self.bad_boxes = getattr(source, 'bad_boxes', None)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    return self._relabel(self._source[index])

  def open_example(self, index: int) -> Example:
    return self._relabel(open_example(self._source, index))

  @property
  def encoded(self) -> Callable[[int], bytes]:
    """As the source's own, absent where it has none; see `shards.encode`."""
    return self._source.encoded

  @property
  def stamp(self) -> Callable[[int], bytes]:
    """The source's own, absent where it has none."""
    return self._source.stamp

  def _relabel(self, example: Example) -> Example:
    return example._replace(labels=self._labels[example.labels])

  def ground_truth(self) -> dict[str, Any]:
    """The data's own, with all classes of the run: detections may be of any."""
    return self._source.ground_truth() | {'categories': [c._asdict() for c in self.categories]}


def check_categories(what: str, found: Sequence[Category], wanted: Sequence[Category]) -> None:
  """Raises InputError, with the first difference, unless both have the same ids and names."""
  for label in range(max(len(found), len(wanted))):
    ours = tuple(found[label]) if label < len(found) else None
    theirs = tuple(wanted[label]) if label < len(wanted) else None
    if ours != theirs:
      raise _other_classes(what, label, ours, theirs, found, wanted)


def _other_classes(what: str, label: int, ours: tuple[int, str] | None,
                   theirs: tuple[int, str] | None, found: Sequence[Category],
                   wanted: Sequence[Category]) -> InputError:
  return InputError(
      f'{what}: its classes are not those of the run: label {label} is {_show(ours)} here '
      f'and {_show(theirs)} in the run ({len(found)} classes here, {len(wanted)} in the run)')


def _show(category: tuple[int, str] | None) -> str:
  return 'no class' if category is None else f'{category[1]!r} (id {category[0]})'
