"""One augmented Example of a source, its image decoded no earlier and no larger than needed."""

from collections.abc import Sequence

import numpy as np

from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.data.source import Source, open_example
from ppn_jax.data.transforms.basic import Transform
from ppn_jax.data.transforms.geometry import materialise
from ppn_jax.detection.structures import Example


def read_example(source: Source, index: int, transforms: Sequence[Transform],
                 rng: np.random.Generator) -> Example:
  """Image `index` of a source, sent through transforms: a function of index and `rng`.

  The image may be a `LazyImage` if the last of the transforms takes one.

  Raises:
    InputError: this image, or another that a transform mixes with it, cannot be read.
  """
  example = _undrawn(open_example(source, index))
  lazy = [getattr(transform, 'takes_lazy_image', False) for transform in transforms]
  for at, (transform, lazily) in enumerate(zip(transforms, lazy, strict=True)):
    if not lazily:
      example = materialise(example)
    elif any(lazy[at + 1:at + 2]):  # Else nothing that it draws can be cut off.
      example = _undrawn(example)
    arguments = [example, rng]
    if getattr(transform, 'takes_others', False):
      arguments.append(_Draw(source, transforms[:at], rng, lazily))
    example = transform(*arguments)
  return example


def _undrawn(example: Example) -> Example:
  """The Example with a lazy image, so that no op draws what the next one cuts off."""
  return example._replace(image=LazyImage.of(example.image))


class _Draw:
  """Called, gives a random Example of a source, sent through transforms."""

  def __init__(self, source: Source, transforms: Sequence[Transform], rng: np.random.Generator,
               lazily: bool):
    self._source, self._transforms, self._rng, self._lazily = source, transforms, rng, lazily

  def __call__(self) -> Example:
    index = int(self._rng.integers(len(self._source)))
    example = read_example(self._source, index, self._transforms, self._rng)
    return example if self._lazily else materialise(example)
