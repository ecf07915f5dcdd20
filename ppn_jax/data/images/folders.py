"""Lists the image files of folders, and describes the other files."""

import os
from collections import Counter
from collections.abc import Collection, Iterable

from ppn_jax.data.images.decoding import SUFFIXES
from ppn_jax.errors import InputError

_NAME_LENGTH = 60  # Characters of a name that are shown; damaged lists have endless ones.
_SHOWN = 5  # Number of suffixes or names in a sentence.


def list_folder(folder: str | os.PathLike[str], suffixes: Collection[str] = SUFFIXES
                ) -> tuple[list[str], str]:
  """Lists the files of a folder that have one of some suffixes, and describes the others.

  Links are followed. Files and folders whose names begin with a dot are ignored.

  Args:
    folder: An existing folder; the folders in it are not searched.
    suffixes: Lower case, with the dot; file names may have them in any case.

  Returns:
    Paths in order of name, and a sentence about the other files; see `describe_others`.

  Raises:
    InputError: If the folder cannot be read.
  """
  try:
    names = sorted(os.listdir(folder))
  except OSError as e:
    raise InputError(f'folder {os.fspath(folder)} cannot be read: {e.strerror}') from e
  paths = [os.path.join(folder, name) for name in names if not name.startswith('.')]
  kept = [path for path in paths if has_suffix(path, suffixes) and os.path.isfile(path)]
  return kept, describe_others(sorted(set(paths).difference(kept)))


def list_tree(folder: str) -> tuple[list[str], list[str]]:
  """Lists the files below a folder: images by their suffix, and all others.

  Links to folders are followed, each folder once, so that a loop ends. Names that begin with a dot
  are ignored, such as macOS' `._x.jpg` and copies in `.ipynb_checkpoints`.

  Returns:
    Paths of the images and of the other files, both in order of name.
  """
  images, others = [], []
  root = os.path.realpath(folder)
  seen = {root}

  def follow(path: str) -> bool:
    target = os.path.realpath(path)
    # A folder that a link leads to inside `folder` is listed where it really is, near its labels.
    again = target in seen or (os.path.islink(path) and target.startswith(root + os.sep))
    if not again:
      seen.add(target)
    return not again

  for inside, folders, names in os.walk(folder, followlinks=True):
    folders[:] = [f for f in sorted(folders)
                  if not f.startswith('.') and follow(os.path.join(inside, f))]
    for name in names:
      if not name.startswith('.'):
        (images if has_suffix(name) else others).append(os.path.join(inside, name))
  return sorted(images), sorted(others)


def has_suffix(path: str | os.PathLike[str], suffixes: Collection[str] = SUFFIXES) -> bool:
  """Returns whether a file name has the suffix of an image, or one of `suffixes`."""
  return os.path.splitext(os.fspath(path))[1].lower() in suffixes


def describe_others(paths: Iterable[str]) -> str:
  """Describes files and folders that are ignored: '2 files not looked at: .heic, .txt'.

  Returns '' if there are none.
  """
  paths = list(paths)
  folders = {path for path in paths if os.path.isdir(path)}
  files = [path for path in paths if path not in folders]
  nameless = os.path.basename(files[0]) if len(files) == 1 else 'without suffix'
  kinds = Counter(os.path.splitext(path)[1].lower() or nameless for path in files)
  parts = []
  if kinds:
    listed = [kind if count == 1 or len(kinds) == 1 else f'{kind} ({count})'
              for kind, count in sorted(kinds.items())]
    parts.append(f'{_count(len(files), "file")} not looked at: {_join(listed)}')
  if folders:
    names = sorted(os.path.basename(path) for path in folders)
    parts.append(f'{_count(len(folders), "folder")} not looked into: {_join(names)}')
  return '; '.join(parts)


def _join(names: list[str]) -> str:
  short = [name if len(name) <= _NAME_LENGTH else f'{name[:_NAME_LENGTH]}...'
           for name in names[:_SHOWN]]
  return ', '.join(short) + ', ...' * (len(names) > _SHOWN)


def _count(number: int, noun: str) -> str:
  return f'{number:,} {noun}{"s" * (number != 1)}'
