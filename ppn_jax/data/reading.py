"""Reads and augments single examples, decoding each image as late and as small as possible."""

from collections.abc import Sequence

import numpy as np

from ppn_jax.data.images.lazy import LazyImage
from ppn_jax.data.source import Source, open_example
from ppn_jax.data.transforms.basic import Transform
from ppn_jax.data.transforms.geometry import materialise
from ppn_jax.detection.structures import Example


def read_example(source: Source, index: int, transforms: Sequence[Transform],
                 rng: np.random.Generator) -> Example:
  """Reads an image of a source and applies transforms.

  The result depends on `index` and `rng` only. Its image may be a `LazyImage` if the last
  transform accepts one.

  Raises:
    InputError: If this image, or another that a transform mixes with it, cannot be read.
  """
  example = _as_lazy(open_example(source, index))
  lazy = [getattr(transform, 'takes_lazy_image', False) for transform in transforms]
  for at, (transform, lazily) in enumerate(zip(transforms, lazy, strict=True)):
    if not lazily:
      example = materialise(example)
    elif any(lazy[at + 1:at + 2]):  # Otherwise nothing can be gained by waiting.
      example = _as_lazy(example)
    arguments = [example, rng]
    if getattr(transform, 'takes_others', False):
      arguments.append(_OtherExamples(source, transforms[:at], rng, lazily))
    example = transform(*arguments)
  return example


def _as_lazy(example: Example) -> Example:
  """Makes the image lazy, so that no transform computes pixels that the next one cuts off."""
  return example._replace(image=LazyImage.of(example.image))


class _OtherExamples:
  """Function without arguments that draws a random example of a source and transforms it."""

  def __init__(self, source: Source, transforms: Sequence[Transform], rng: np.random.Generator,
               lazily: bool):
    self._source, self._transforms, self._rng, self._lazily = source, transforms, rng, lazily

  def __call__(self) -> Example:
    index = int(self._rng.integers(len(self._source)))
    example = read_example(self._source, index, self._transforms, self._rng)
    return example if self._lazily else materialise(example)
