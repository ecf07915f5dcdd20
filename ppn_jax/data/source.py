"""What a data set must offer, and the data sets that configs know by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ppn_jax import registry
from ppn_jax.data.contents import Contents
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError, did_you_mean
from ppn_jax.storage import expand_home

SOURCES = {
    'coco_json': 'ppn_jax.data.sources.coco:CocoJson',
    'pascal_voc': 'ppn_jax.data.sources.voc:PascalVoc',
    'synthetic_shapes': 'ppn_jax.data.sources.synthetic:SyntheticShapes',
    'tfds': 'ppn_jax.data.sources.tfds:Tfds',
    'yolo_txt': 'ppn_jax.data.sources.yolo:YoloTxt',
}

# What `data.train` has beside the source's own options: see `training.feeds`.
_TRAIN_OPTIONS = {'cache': '', 'cache_size': 0, 'resident': False, 'resident_size': 0}


class Source(Protocol):
  """A data set with random access. Threads call `__getitem__` at the same time.

  All that can be wrong with a user's annotations is found when a source is made; only what an
  image's bytes decide is found by `__getitem__`. Both raise InputError. A source that looks at
  image files when it is made takes the argument `on_bad_example`: with 'skip', an image that is
  missing or unreadable is left for `__getitem__` to raise for.

  A source may have an attribute `contents`, a `contents.Contents`, which says more of its data
  than `ground_truth` can; None keeps a report from asking for that. See `report`.

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
                 key: str = '', on_bad_example: str = 'raise') -> Source:
  """The source of a config block; see `registry.build`.

  Args:
    block: {'name': a key of SOURCES or a dotted path, **keyword_arguments}.
    categories: the classes of the run. Those of the data must be among them, by id and name or by
      name alone, and are given the run's labels: a detector of COCO's 90 ids can be scored on a
      file that lists the 80 in use, or on one that numbers them otherwise. None takes any.
    key: where the block stands in the config, such as 'data.eval', for errors.
    on_bad_example: the config's `data.on_bad_example`, for sources that take it.

  Raises:
    InputError: no such source or option, bad data, or a class that the run does not have.
  """
  try:
    if isinstance(block, Mapping):
      if 'on_bad_example' in block:
        raise InputError('on_bad_example is no option of a source but of all data: '
                         f'data.on_bad_example={block["on_bad_example"]}')
      block = expand_home(dict(block))
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


def match_categories(what: str, found: Sequence[Category], wanted: Sequence[Category]
                     ) -> tuple[list[int], list[str]]:
  """Finds the classes of one data set among those of another, by name where their ids differ.

  Args:
    what: the data set that has `found`, for messages.
    found: classes to look for.
    wanted: classes to look among.

  Returns:
    The position in `wanted` of each that was found, and notes on those with another id.

  Raises:
    InputError: a class that `wanted` does not have, or whose name is there more than once.
  """
  exact = {tuple(c): k for k, c in enumerate(wanted)}
  by_id, names = {c.id: c for c in wanted}, [c.name for c in wanted]
  places, renumbered = [], []
  for label, category in enumerate(found):
    place = exact.get(tuple(category))
    if place is None:
      if (names.count(category.name) != 1
          or sum(c.name == category.name for c in found) != 1):
        raise _other_classes(what, label, category, by_id.get(category.id), found, wanted)
      place = names.index(category.name)
      renumbered.append(f'{category.name!r} has the id {category.id} here and '
                        f'{wanted[place].id} in the run')
    places.append(place)
  if not renumbered:
    return places, []
  more = f' ({len(renumbered)} classes in all)' if len(renumbered) > 1 else ''
  return places, [f'classes are matched by name: {renumbered[0]}{more}']


class _Relabelled:
  """A source whose classes are some of a run's, with the run's labels and ids.

  Attributes:
    file_ids: the run's category ids -> those of the data's own files, in which results are
      written; classes that the data does not have keep theirs if it is free.
  """

  def __init__(self, what: str, source: Source, categories: Sequence[Category]):
    places, self._notes = match_categories(what, source.categories, categories)
    self._source, self._labels = source, np.array(places, np.int32)
    self.categories, self.max_boxes = tuple(categories), source.max_boxes
    self.bad_boxes = getattr(source, 'bad_boxes', None)
    own = {self.categories[k].id: c.id for k, c in zip(places, source.categories, strict=True)}
    self.file_ids = _complete(own, [c.id for c in categories])
    self._run_ids = {theirs: ours for ours, theirs in own.items()}

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

  @property
  def contents(self) -> Contents | None:
    """As the source's own, absent where it has none."""
    contents = self._source.contents
    return contents and contents._replace(labels=self._labels[contents.labels],
                             notes=(*contents.notes, *self._notes))

  def ground_truth(self) -> dict[str, Any]:
    """The data's own, with all classes of the run and the run's ids: detections may be of any."""
    truth = self._source.ground_truth()
    return truth | {
        'categories': [c._asdict() for c in self.categories],
        'annotations': [a | {'category_id': self._run_ids[a['category_id']]}
                        for a in truth['annotations']]}


def file_ids(source: Source) -> dict[int, int]:
  """The category ids of `source.ground_truth()` -> those of the data's files, one to one."""
  return getattr(source, 'file_ids', None) or {c.id: c.id for c in source.categories}


def _complete(own: Mapping[int, int], ids: Sequence[int]) -> dict[int, int]:
  """`own` with the other `ids` too, each its own or, where that is taken, the next that is free."""
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
  hint = did_you_mean(ours[1], [c.name for c in wanted]) if ours and not theirs else ''
  hint = f'; {hint}' if hint.startswith('did') else ''
  return InputError(
      f'{what}: its classes are not those of the run: label {label} is {_show(ours)} here '
      f'and {_show(theirs)} in the run ({len(found)} classes here, {len(wanted)} in the run){hint}')


def _show(category: tuple[int, str] | None) -> str:
  return 'no class' if category is None else f'{category[1]!r} (id {category[0]})'
