"""Writes StableHLO: one file for CPU, TPU and CUDA that `jax.export` opens without this package."""

import pathlib
from collections.abc import Callable

import jax
import jax.export
import numpy as np

from ppn_jax.detection.frame import ImageSize, sides_of
from ppn_jax.errors import InputError
from ppn_jax.export.formats import companion_file, load_library

PLATFORMS = ('cpu', 'tpu', 'cuda')


def input_shape(batch_size: int | None, image_size: ImageSize) -> jax.ShapeDtypeStruct:
  """Returns the shape of the input, u8 [B, S, S, 3], for any B if `batch_size` is None."""
  batch = jax.export.symbolic_shape('b')[0] if batch_size is None else batch_size
  return jax.ShapeDtypeStruct((batch, *sides_of(image_size), 3), np.uint8)


def write(path: pathlib.Path, detect: Callable, images: jax.ShapeDtypeStruct,
          variables: dict) -> None:
  """Writes `path`, and the weights to `path`.npz.

  The weights are archived because JAX guarantees to open the file for six months only.

  Args:
    path: path of the new file.
    detect: maps (variables, images) to Detections.
    images: shape of the input, see `input_shape`.
    variables: NumPy arrays.

  Raises:
    InputError: If flatbuffers is not installed, or the model does not support a free batch size.
  """
  load_library('flatbuffers', 'stablehlo')

  def by_name(images):
    return detect(variables, images)._asdict()

  try:
    exported = jax.export.export(jax.jit(by_name), platforms=PLATFORMS)(images)
  except jax.errors.UnexpectedTracerError:
    raise
  except Exception as e:
    if jax.export.is_symbolic_dim(images.shape[0]):
      raise InputError('this model does not support a free batch size, give --batch_size=N: '
                       f'{str(e).splitlines()[0]}') from e
    raise
  path.write_bytes(exported.serialize())
  flat, _ = jax.tree_util.tree_flatten_with_path(variables)
  np.savez(companion_file(path, '.npz'),
           **{'/'.join(k.key for k in keys): value for keys, value in flat})
