"""Reads a weights file as weights to start from, without building its model."""

import os

from ppn_jax.export.weights_file import read_weights_file
from ppn_jax.weights.transfer import PretrainedWeights


def read_shared(path: str | os.PathLike[str]) -> PretrainedWeights:
  """Reads a file of `ppn export --format=weights`.

  Imports nothing that the file's config names.

  Raises:
    InputError: See `weights_file.read_weights_file`.
  """
  file = read_weights_file(path)
  return PretrainedWeights(file.path, file.description, file.values, file.categories)
