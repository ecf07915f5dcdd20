"""Trained detectors that come with the package.

Each is a file in this folder, with a model card beside it. Wherever a path of a weights file or an
exported file may stand, the name of a model may stand as well: `ppn_jax.load('ppn_voc')`,
`--model=ppn_voc`, `init.weights='ppn_voc'`.
"""

import difflib
import os
import pathlib

from ppn_jax import storage

SUFFIXES = ('.safetensors', '.tflite')
_FOLDER = pathlib.Path(__file__).parent


def names() -> tuple[str, ...]:
  """Returns the names of the models, sorted."""
  return tuple(sorted(path.stem for path in _FOLDER.iterdir() if path.suffix in SUFFIXES))


def find(path: str | os.PathLike[str]) -> str:
  """Returns the path of a model's file for its name, and any other path as it is.

  A file or folder of that name, relative to the working directory, takes precedence.
  """
  text = os.fspath(path)
  return model_file(text) if text in names() and not storage.local_path(text).exists() else text


def model_file(name: str) -> str:
  """Returns the path of the file of a model, one of `names`."""
  return str(next(_FOLDER / f'{name}{s}' for s in SUFFIXES if (_FOLDER / f'{name}{s}').exists()))


def suggestion(path: str | os.PathLike[str]) -> str:
  """Returns the end of an error message for a path that does not exist.

  It names the models, the nearest alone if there is one; '' if the path cannot be meant as a name.
  """
  text = os.fspath(path)
  if '/' in text or os.sep in text or '.' in text:
    return ''
  near = difflib.get_close_matches(text, names(), n=1)
  if near:
    return f'; did you mean {near[0]!r}, a model that comes with the package?'
  return f'; models that come with the package: {", ".join(names())}'
