"""The data sets of a config: what is trained on, and what is evaluated on.

With `data.eval_fraction` a share of the images of `data.train` is kept back for evaluation. Which
ones depends on `seed` and on how many images there are, so that every command finds the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ppn_jax import registry
from ppn_jax.config import GIVEN, plain
from ppn_jax.data.checks import check_number
from ppn_jax.data.contents import Contents
from ppn_jax.data.source import (
  SOURCES,
  Source,
  build_source,
  file_ids,
  open_example,
  split_train_block,
)
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

SPLITS = ('train', 'eval')

# Options that say where the images are; a block in which all of them are empty names no data.
_PLACES = {'coco_json': ('images', 'annotations'), 'pascal_voc': ('folder',),
           'tfds': ('dataset', 'data_dir'), 'yolo_txt': ('data', 'images')}
_DRAW = 0xE7A1  # Keeps this draw apart from others of the same seed.


class Subset:
  """Some images of a source, with their ids and in its order; a `sources.Source`.

  Args:
    source: of all images; its `ground_truth` has them in the order of their indices.
    indices: which of its images, ascending.

  Attributes:
    categories, max_boxes, bad_boxes, file_ids: the source's.
    total: how many images the source has.
  """

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.categories, self.max_boxes = source.categories, source.max_boxes
    self.bad_boxes, self.total = getattr(source, 'bad_boxes', None), len(source)
    self.file_ids = file_ids(source)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._source[self._at(index)]

  def open_example(self, index: int) -> Example:
    return open_example(self._source, self._at(index))

  @property
  def encoded(self) -> Callable[[int], bytes]:
    """As the source's own, absent where it has none; see `shards.encode`."""
    encoded = self._source.encoded
    return lambda index: encoded(self._at(index))

  @property
  def stamp(self) -> Callable[[int], bytes]:
    """As the source's own, absent where it has none."""
    stamp = self._source.stamp
    return lambda index: stamp(self._at(index))

  @property
  def contents(self) -> Contents | None:
    """The source's, of these images alone; absent where it has none."""
    contents = self._source.contents
    return contents and contents.take(self._indices)

  def ground_truth(self) -> dict[str, Any]:
    """The source's, of these images alone; annotations are numbered from 1 again."""
    truth = self._source.ground_truth()
    images = [truth['images'][i] for i in self._indices.tolist()]
    kept = {image['id'] for image in images}
    annotations = [a for a in truth['annotations'] if a['image_id'] in kept]
    return truth | {'images': images, 'annotations': [
        a | {'id': number} for number, a in enumerate(annotations, start=1)]}

  def _at(self, index: int) -> int:
    return int(self._indices[index])


def names_data(block: Mapping[str, Any]) -> bool:
  """Whether a block `data.train` or `data.eval` says where its images are."""
  name = block.get('name')
  places = _PLACES.get(name)
  return bool(name) and (places is None or any(block.get(place) for place in places))


def check_data(config: ConfigDict, splits: Sequence[str] = SPLITS) -> None:
  """Checks what can be checked of the data blocks of `splits` before a file is opened.

  Raises:
    InputError: If a known source is given an option that it does not have, or
      `data.eval_fraction` is out of range.
  """
  check_number('data.eval_fraction', config.data.eval_fraction, 0, 1)
  if config.data.eval_fraction == 1:
    raise InputError('data.eval_fraction=1.0 leaves nothing to train on; it must be below 1')
  for split in splits:
    block = plain(config.data[split])
    name = block.get('name')
    if name and isinstance(name, str) and ':' not in name:
      options = split_train_block(block)[0] if split == 'train' else block
      try:
        registry.check_options(f'source {name!r}', registry.resolve('source', name, SOURCES),
                               options.keys() - {'name'}, given=GIVEN)
      except InputError as e:
        raise InputError(f'data.{split}: {e}') from e


def open_split(config: ConfigDict, split: str, *, categories: Sequence[Category] | None = None
               ) -> Source:
  """Opens the training or evaluation data of a config; see `open_splits`."""
  return open_splits(config, (split,), categories=categories)[split]


def open_splits(config: ConfigDict, splits: Sequence[str], *,
                categories: Sequence[Category] | None = None, on_bad_example: str = ''
                ) -> dict[str, Source]:
  """Opens data of a config.

  Args:
    config: a complete one.
    splits: of `SPLITS`. That of training is opened first, and its classes are those of evaluation.
    categories: the classes of the run, see `sources.build_source`; None takes the data's own.
    on_bad_example: in place of the config's.

  Raises:
    InputError: If there is no data to evaluate on, or as `build_source`.
  """
  check_data(config, splits)
  data, sources, whole = config.data, {}, None
  policy = on_bad_example or data.on_bad_example
  if 'train' in splits and 'eval' in splits and data.eval_fraction and names_data(data.eval):
    raise InputError(f'data.eval names data to evaluate on, and data.eval_fraction='
                     f'{data.eval_fraction} would keep back training images for it; leave out one')
  for split in (s for s in SPLITS if s in splits):
    if split == 'eval' and (names_data(data.eval) or not data.eval_fraction):
      _check_names_data(config)
      sources[split] = build_source(plain(data.eval), categories=categories, key='data.eval',
                                    on_bad_example=policy)
    else:
      whole = whole or build_source(split_train_block(plain(data.train))[0], key='data.train',
                                    categories=categories, on_bad_example=policy)
      sources[split] = _part(whole, split, config) if data.eval_fraction else whole
    categories = categories or sources[split].categories
  return sources


def describe_fraction(config: ConfigDict, source: Source) -> str:
  """Returns a line on the images that `data.eval_fraction` keeps back; '' if it keeps none.

  Args:
    config: a complete one.
    source: what is trained on, as `open_splits` returns it.
  """
  if not isinstance(source, Subset):
    return ''
  return (f'data.eval_fraction={config.data.eval_fraction:g}: '
          f'{source.total - len(source):,} of {source.total:,} training images, drawn by '
          f'seed={config.seed}, are kept for evaluation and not trained on')


def _part(whole: Source, split: str, config: ConfigDict) -> Subset:
  """The images of a source that `data.eval_fraction` leaves to a split."""
  fraction, total = config.data.eval_fraction, len(whole)
  kept = min(max(round(fraction * total), 1), total - 1)
  if total < 2:
    raise InputError(f'data.eval_fraction={fraction} needs at least 2 training images, there '
                     f'{"is" if total == 1 else "are"} {total}')
  order = np.random.default_rng((config.seed, _DRAW)).permutation(total)
  return Subset(whole, np.sort(order[:kept] if split == 'eval' else order[kept:]))


def _check_names_data(config: ConfigDict) -> None:
  if names_data(config.data.eval):
    return
  name = config.data.eval.name
  places = _PLACES.get(name, ('name',))
  every = name == 'coco_json'  # Elsewhere one of them says where the images are.
  raise InputError(
      'data.eval names no data to evaluate on: give '
      + (' and ' if every else ' or ').join(f'--config.data.eval.{place}=...' for place in places)
      + '; or, in training, --config.data.eval_fraction=0.1 to keep back a tenth of the training '
      'images for it, or --config.train.evaluate_every=0 to do without')
