"""Opens the training and evaluation data of a config.

With `data.eval_fraction` a share of the images of `data.train` is kept for evaluation. The choice
depends on `seed` and the number of images, so that all commands make the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ppn_jax import registry
from ppn_jax.config import GIVEN, plain
from ppn_jax.data.checks import check_number
from ppn_jax.data.contents import Contents
from ppn_jax.data.source import SOURCES, Source, SourceView, build_source
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError

SPLITS = ('train', 'eval')

# Options that say where the images are. A block in which all of them are empty names no data.
_PLACES = {'coco_json': ('images', 'annotations'), 'cvat_xml': ('annotations',),
           'label_studio': ('annotations',), 'labelme': ('folder',),
           'open_images': ('images', 'annotations'), 'pascal_voc': ('folder',),
           'tf_records': ('records',), 'tfds': ('dataset', 'data_dir'),
           'yolo_txt': ('data', 'images')}
_DRAW = 0xE7A1  # Separates this random stream from others of the same seed.


class Subset(SourceView):
  """Some images of a source, with their ids and in its order.

  Args:
    source: The source of all images.
    indices: Ascending indices of images of the source.

  Attributes:
    total: Number of images of the source.
  """

  def __init__(self, source: Source, indices: np.ndarray):
    super().__init__(source)
    self._indices, self.total = indices, len(source)

  def _index(self, index: int) -> int:
    return int(self._indices[index])

  def __len__(self) -> int:
    return len(self._indices)

  @property
  def contents(self) -> Contents | None:
    """See `OptionalMembers`."""
    contents = self._source.contents
    return contents and contents.select(self._indices)

  def ground_truth(self) -> dict[str, Any]:
    """Returns the ground truth of these images, with annotations numbered from 1."""
    truth = self._source.ground_truth()
    images = [truth['images'][i] for i in self._indices.tolist()]
    kept = {image['id'] for image in images}
    annotations = [a for a in truth['annotations'] if a['image_id'] in kept]
    return truth | {'images': images, 'annotations': [
        a | {'id': number} for number, a in enumerate(annotations, start=1)]}


def names_data(block: Mapping[str, Any]) -> bool:
  """Returns whether a block `data.train` or `data.eval` says where its images are."""
  name = block.get('name')
  places = _PLACES.get(name)
  return bool(name) and (places is None or any(block.get(place) for place in places))


def check_data(config: ConfigDict, splits: Sequence[str] = SPLITS) -> None:
  """Checks the data blocks of `splits` as far as that is possible without opening a file.

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
      try:
        registry.check_options(f'source {name!r}', registry.resolve('source', name, SOURCES),
                               block.keys() - {'name'}, given=GIVEN)
      except InputError as e:
        raise InputError(f'data.{split}: {e}') from e


def open_split(config: ConfigDict, split: str, *, categories: Sequence[Category] | None = None
               ) -> Source:
  """Opens the training or evaluation data of a config; see `open_splits`."""
  return open_splits(config, (split,), categories=categories)[split]


def open_splits(config: ConfigDict, splits: Sequence[str], *,
                categories: Sequence[Category] | None = None, on_bad_example: str = ''
                ) -> dict[str, Source]:
  """Opens the data of one or both splits of a config.

  Args:
    config: A complete config.
    splits: Some of `SPLITS`. Training data is opened first, and its classes are used for
      evaluation.
    categories: The classes of the run, see `build_source`; None takes those of the data.
    on_bad_example: Replaces the config's `data.on_bad_example`.

  Returns:
    {split: source}.

  Raises:
    InputError: If there is no data to evaluate on, or for the reasons of `build_source`.
  """
  check_data(config, splits)
  data, sources, whole = config.data, {}, None
  policy = on_bad_example or data.on_bad_example
  if 'train' in splits and 'eval' in splits and data.eval_fraction and names_data(data.eval):
    raise InputError(f'data.eval names data to evaluate on, and data.eval_fraction='
                     f'{data.eval_fraction} would keep training images for it too; leave out one')
  for split in (s for s in SPLITS if s in splits):
    if split == 'eval' and (names_data(data.eval) or not data.eval_fraction):
      _check_names_data(config)
      sources[split] = build_source(plain(data.eval), categories=categories, key='data.eval',
                                    on_bad_example=policy)
    else:
      whole = whole or build_source(plain(data.train), key='data.train',
                                    categories=categories, on_bad_example=policy)
      sources[split] = _part(whole, split, config) if data.eval_fraction else whole
    categories = categories or sources[split].categories
  return sources


def describe_fraction(config: ConfigDict, source: Source) -> str:
  """Returns a line about the images that `data.eval_fraction` keeps for evaluation, '' for none.

  Args:
    config: A complete config.
    source: The training data, as `open_splits` returns it.
  """
  if not isinstance(source, Subset):
    return ''
  return (f'data.eval_fraction={config.data.eval_fraction:g}: '
          f'{source.total - len(source):,} of {source.total:,} training images, drawn by '
          f'seed={config.seed}, are kept for evaluation and not trained on')


def _part(whole: Source, split: str, config: ConfigDict) -> Subset:
  """Returns the images of a source that belong to a split by `data.eval_fraction`."""
  fraction, total = config.data.eval_fraction, len(whole)
  kept = min(max(round(fraction * total), 1), total - 1)
  if total < 2:
    raise InputError(f'data.eval_fraction={fraction} needs at least 2 training images, there '
                     f'{"is" if total == 1 else "are"} {total}')
  order = np.random.default_rng((config.seed, _DRAW)).permutation(total)
  return Subset(whole, np.sort(order[:kept] if split == 'eval' else order[kept:]))


def _check_names_data(config: ConfigDict) -> None:
  """Raises InputError, with the possible options, unless `data.eval` names data."""
  if names_data(config.data.eval):
    return
  name = config.data.eval.name
  places = _PLACES.get(name, ('name',))
  every = name in ('coco_json', 'open_images')  # The other sources need only one of them.
  raise InputError(
      'data.eval names no data to evaluate on: give '
      + (' and ' if every else ' or ').join(f'--config.data.eval.{place}=...' for place in places)
      + '; or, in training, --config.data.eval_fraction=0.1 to keep a tenth of the training '
      'images for it, or --config.train.evaluate_every=0 not to evaluate')
