"""Which files of a folder are images, and what else is in it."""

import os
from collections import Counter
from collections.abc import Collection, Iterable

from ppn_jax.data.images.decoding import SUFFIXES
from ppn_jax.errors import InputError

_SHOWN = 5  # How many names a sentence has.


def list_folder(folder: str | os.PathLike[str], suffixes: Collection[str] = SUFFIXES
                ) -> tuple[list[str], str]:
  """Returns the files of a folder with given suffixes, and a sentence on what else is in it.

  Links are followed. Files and folders whose names begin with a dot are not data.

  Args:
    folder: it must exist; the folders in it are not looked into.
    suffixes: in small letters, with the dot; names may have them in any case.

  Returns:
    Paths in order of name, and what `describe_others` says of the rest.

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


def has_suffix(path: str | os.PathLike[str], suffixes: Collection[str] = SUFFIXES) -> bool:
  """Returns whether a file's name ends like that of an image, or with one of `suffixes`."""
  return os.path.splitext(os.fspath(path))[1].lower() in suffixes


def describe_others(paths: Iterable[str]) -> str:
  """Says which files and folders were not looked at: '2 files not looked at: .heic, .txt'.

  '' where there are none.
  """
  paths = list(paths)
  folders = [path for path in paths if os.path.isdir(path)]
  kinds = Counter(os.path.splitext(path)[1].lower() or 'without suffix'
                  for path in paths if path not in set(folders))
  said = []
  if kinds:
    listed = ', '.join(kind if count == 1 or len(kinds) == 1 else f'{kind} ({count})'
                       for kind, count in sorted(kinds.items()))
    said.append(f'{_count(kinds.total(), "file")} not looked at: {listed}')
  if folders:
    names = sorted(os.path.basename(path) for path in folders)
    said.append(f'{_count(len(folders), "folder")} not looked into: '
                + ', '.join(names[:_SHOWN]) + ', ...' * (len(names) > _SHOWN))
  return '; '.join(said)


def _count(number: int, noun: str) -> str:
  return f'{number:,} {noun}{"s" * (number != 1)}'
