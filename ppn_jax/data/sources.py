"""What a data set must offer, and the data sets that configs know by name."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ppn_jax import registry
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError

SOURCES = {
    'coco_json': 'ppn_jax.data.coco:CocoJson',
    'synthetic_shapes': 'ppn_jax.data.synthetic:SyntheticShapes',
}


class Source(Protocol):
  """A data set with random access. Threads call `__getitem__` at the same time.

  All that can be wrong with a user's annotations is found when a source is made; only what an
  image's bytes decide is found by `__getitem__`. Both raise InputError.

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


def build_source(block: Mapping[str, Any], *, categories: Sequence[Category] | None = None
                 ) -> Source:
  """The source of a config block; see `registry.build`.

  Args:
    block: {'name': a key of SOURCES or a dotted path, **keyword_arguments}.
    categories: the classes of the run, which the source must have too; None takes any.

  Raises:
    InputError: no such source or option, bad data, or other classes than the run's.
  """
  source = registry.build('source', block, SOURCES)
  if categories is not None:
    check_categories(f"source {block['name']!r}", source.categories, categories)
  return source


def check_categories(what: str, found: Sequence[Category], wanted: Sequence[Category]) -> None:
  """Raises InputError, with the first difference, unless both have the same ids and names."""
  for label in range(max(len(found), len(wanted))):
    ours = tuple(found[label]) if label < len(found) else None
    theirs = tuple(wanted[label]) if label < len(wanted) else None
    if ours != theirs:
      raise InputError(
          f'{what}: its classes are not those of the run: label {label} is {_show(ours)} here '
          f'and {_show(theirs)} in the run ({len(found)} classes here, {len(wanted)} in the run)')


def _show(category: tuple[int, str] | None) -> str:
  return 'no class' if category is None else f'{category[1]!r} (id {category[0]})'
