"""Reads a file of weights, whatever its format."""

import pathlib
import re
from typing import NamedTuple

import numpy as np
from google.protobuf import text_format

from ppn_jax.detection.frame import ImageSize
from ppn_jax.errors import InputError
from ppn_jax.storage import local_path
from ppn_jax.weights.folded_norm import unfold
from ppn_jax.weights.frozen_graph import read_frozen_graph
from ppn_jax.weights.keras import HDF5_MAGIC, read_keras_file
from ppn_jax.weights.object_graph import with_variable_names
from ppn_jax.weights.tf_bundle import MAGIC, read_tf_bundle
from ppn_jax.weights.tf_protos import CheckpointState
from ppn_jax.weights.tflite_file import MAGIC as TFLITE_MAGIC
from ppn_jax.weights.tflite_network import PostProcessing, read_tflite_network

LEGAL = ('give the PREFIX of a TensorFlow checkpoint (PREFIX.index), a frozen graph (.pb), a '
         'TFLite file (.tflite) or a Keras file (.h5, .keras)')


class WeightFile(NamedTuple):
  """Tensors of a file or checkpoint.

  Fields:
    path: path, for messages.
    kind: 'checkpoint', 'frozen graph', 'TFLite file' or 'Keras file'.
    tensors: NumPy arrays by name.
    description: the network in words, if the file tells more than its names; '' otherwise.
    image_size: side of the network's input in pixels, or (height, width); 0 if unknown.
    labels: class names of a detector in order of label, '' for unused ids; () if unknown.
    postprocessing: what follows the network of a detector in a TFLite file; None for others.
  """
  path: str
  kind: str
  tensors: dict[str, np.ndarray]
  description: str = ''
  image_size: ImageSize = 0
  labels: tuple[str, ...] = ()
  postprocessing: PostProcessing | None = None


def read_weights(path: str | pathlib.Path) -> WeightFile:
  """Reads the tensors of a file or checkpoint.

  Args:
    path: PREFIX or PREFIX.index of a checkpoint, a folder with a `checkpoint` file or exactly one
      checkpoint, the folder around such a folder `checkpoint`, a frozen graph (.pb), a TFLite file
      (.tflite), or a Keras file (.h5, .hdf5, .keras).

  Where batch norm is folded into convolutions, one that only adds the bias takes its place, see
  `folded_norm`.

  Raises:
    InputError: If there is no such file, or it has an unknown format or is damaged.
  """
  if not str(path).strip():
    raise InputError(f'the path of the weights is empty; {LEGAL}')
  path = local_path(path)
  if path.is_dir():
    path = _checkpoint_in(path)
  suffix = path.suffix.lower()
  if suffix == '.pb':
    return WeightFile(str(path), 'frozen graph', unfold(_single_scopes(read_frozen_graph(path))))
  if suffix in ('.tflite', '.lite') or _is_tflite(path):
    network = read_tflite_network(path)
    return WeightFile(str(path), 'TFLite file', unfold(network.tensors), *network[:1], *network[2:])
  if suffix in ('.h5', '.hdf5', '.keras'):
    return WeightFile(str(path), 'Keras file', read_keras_file(path))
  prefix = path.with_name(re.sub(r'\.(index|meta|data-\d{5}-of-\d{5})$', '', path.name))
  if prefix == path and path.is_file():
    raise InputError(f'{path}: {_looks_like(path)}; {LEGAL}')
  if not prefix.with_name(prefix.name + '.index').exists() and prefix != path:
    raise InputError(f'{path}: no file {prefix.name}.index beside it; {LEGAL}')
  if not prefix.with_name(prefix.name + '.index').exists():
    raise InputError(f'no checkpoint at {path}; {LEGAL}')
  tensors = with_variable_names(read_tf_bundle(prefix), str(prefix))
  return WeightFile(str(prefix), 'checkpoint', _single_scopes(tensors),
                    image_size=_image_size(prefix))


def _image_size(prefix: pathlib.Path) -> ImageSize:
  """Returns the image size in the pipeline.config beside a checkpoint; 0 if there is none.

  The zoo's archives have it in the folder of the checkpoint, or around the folder `checkpoint`.
  """
  folders = [prefix.parent, *([prefix.parent.parent] if prefix.parent.name == 'checkpoint' else [])]
  for path in (folder / 'pipeline.config' for folder in folders):
    if path.is_file():
      text = re.sub(r'#.*', '', path.read_text('utf-8', errors='replace'))
      resizer = re.search(r'\bfixed_shape_resizer\s*:?\s*\{([^{}]*)\}', text)
      sides = [re.search(rf'\b{side}\s*:\s*(\d+)', resizer[1]) if resizer else None
               for side in ('height', 'width')]
      height, width = (int(side[1]) if side else 0 for side in sides)
      return height if height == width else (height, width) if height and width else 0
  return 0


def _single_scopes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames the layers of newer detectors, in which the backbone has its scope twice."""
  return {name.replace('MobilenetV1/MobilenetV1/', 'MobilenetV1/'): tensor
          for name, tensor in tensors.items()}


def _checkpoint_in(folder: pathlib.Path) -> pathlib.Path:
  """Returns the prefix of the checkpoint in a folder."""
  if (folder / 'checkpoint').is_dir():  # As the detection zoo's archives of TensorFlow 2 have it.
    folder /= 'checkpoint'
  there = sorted(p.with_suffix('') for p in folder.glob('*.index'))
  state = folder / 'checkpoint'
  if state.is_file():
    try:
      latest = text_format.Parse(state.read_bytes(), CheckpointState(),
                                 allow_unknown_field=True).model_checkpoint_path
    except (text_format.ParseError, UnicodeDecodeError) as e:
      raise InputError(f'{state}: cannot be read as a `checkpoint` file: {e}') from e
    # Compared by name, since the path is often that of another machine.
    named = [p for p in there if p.name == pathlib.PurePosixPath(latest).name]
    if named:
      return named[0]
  if len(there) == 1:
    return there[0]
  if (folder / 'categories.json').is_file() and (folder / 'checkpoints').is_dir():
    raise InputError(f'{folder} is the workdir of a run, which needs no import; evaluate or use it '
                     f'as it is, or train from it with --config.init.weights={folder}')
  if not there and (folder / 'saved_model.pb').is_file():
    raise InputError(f'{folder} is a SavedModel, which is not read; give the checkpoint that came '
                     f'with it, such as {folder.parent / "checkpoint"}')
  names = ', '.join(p.name for p in there[:5])
  raise InputError(f'{folder}: no checkpoint in this folder; {LEGAL}' if not there else
                   f'{folder}: {len(there)} checkpoints in this folder; give one of them: {names}')


def _is_tflite(path: pathlib.Path) -> bool:
  """Returns whether a file is one of TFLite, whatever its name."""
  try:
    with path.open('rb') as file:
      return file.read(8)[4:] == TFLITE_MAGIC
  except OSError:
    return False


def _looks_like(path: pathlib.Path) -> str:
  """Describes a file whose format is not supported."""
  with path.open('rb') as file:
    start = file.read(len(HDF5_MAGIC))
    file.seek(-min(len(MAGIC), path.stat().st_size), 2)
    end = file.read()
  if end == MAGIC:
    return ("a TensorFlow V1 checkpoint, which is not supported; save it again with "
            'tf.train.Saver(write_version=tf.train.SaverDef.V2)')
  if start == HDF5_MAGIC:
    return 'an HDF5 file; rename it to .h5'
  if start[:2] == b'\x1f\x8b':
    return 'an archive; unpack it first'
  return 'empty' if not start else 'not a known format of weights'
