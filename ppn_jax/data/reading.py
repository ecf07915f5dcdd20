"""One augmented Example of a source, its image decoded no earlier and no larger than needed."""

from collections.abc import Sequence

import numpy as np

from ppn_jax.data.geometry import materialise
from ppn_jax.data.lazy_image import LazyImage
from ppn_jax.data.sources import Source, open_example
from ppn_jax.data.transforms import Transform
from ppn_jax.detection.structures import Example


def read_example(source: Source, index: int, transforms: Sequence[Transform],
                 rng: np.random.Generator) -> Example:
  """Image `index` of a source, sent through transforms: a function of index and `rng`.

  The image may be a `LazyImage` if the last of the transforms takes one.

  Raises:
    InputError: this image, or another that a transform mixes with it, cannot be read.
  """
  example = open_example(source, index)
  example = example._replace(image=LazyImage.of(example.image))
  for at, transform in enumerate(transforms):
    lazily = getattr(transform, 'takes_lazy_image', False)
    arguments = [example if lazily else materialise(example), rng]
    if getattr(transform, 'takes_others', False):
      arguments.append(_Draw(source, transforms[:at], rng, lazily))
    example = transform(*arguments)
  return example


class _Draw:
  """Called, gives a random Example of a source, sent through transforms."""

  def __init__(self, source: Source, transforms: Sequence[Transform], rng: np.random.Generator,
               lazily: bool):
    self._source, self._transforms, self._rng, self._lazily = source, transforms, rng, lazily

  def __call__(self) -> Example:
    index = int(self._rng.integers(len(self._source)))
    example = read_example(self._source, index, self._transforms, self._rng)
    return example if self._lazily else materialise(example)
