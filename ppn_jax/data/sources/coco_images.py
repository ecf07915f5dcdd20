"""Reads the images that a COCO file lists, and finds their files."""

import itertools
import os

import numpy as np

from ppn_jax.data.checks import advise_skipping
from ppn_jax.data.sources import coco_json
from ppn_jax.data.sources.annotations import Images, join_names, quote, stays_inside
from ppn_jax.data.sources.labelled_images import ImageFinder
from ppn_jax.data.sources.uploaded_names import original_names
from ppn_jax.errors import InputError


def read_images(file: str, folder: str, table: coco_json.Table, *, uploaded: bool
                ) -> tuple[Images, dict[str, int]]:
  """Reads the images of a file.

  Args:
    file: The file, for messages.
    folder: The folder of the images.
    table: Its images.
    uploaded: Whether names may be those after an upload to Label Studio, which lead out of the
      folder and count by their last part then.

  Returns:
    The images, and the numbers of their ids if those are strings, see `Table.ids`.

  Raises:
    InputError: If an entry is wrong, or a name leads out of the folder.
  """
  if not len(table):
    raise InputError(f'{file}: no images')
  ids, numbers = table.ids()
  names = table.column('file_name', lambda v: isinstance(v, str), 'a path')
  names = [_inside(name, folder) if os.path.isabs(name) else name for name in names]
  for i, name in enumerate(names):
    if not stays_inside(name):
      last = name.replace('\\', '/').rpartition('/')[2]
      if not uploaded or not stays_inside(last):
        raise table.error(i, f'file_name is {quote(name)}, legal: a path inside the folder of '
                             f'images{_suggest(name, folder)}')
      names[i] = last
  sizes = np.stack([table.integers('height'), table.integers('width')], axis=-1)
  for i in np.flatnonzero((sizes < 1).any(axis=-1))[:1]:
    raise table.error(i, f'height and width are {sizes[i].tolist()}, legal: 1 and more')
  return Images(ids, names, [os.path.join(folder, name) for name in names], sizes), numbers


def select(images: Images, kept: np.ndarray) -> Images:
  """Returns the images whose entry in `kept`, bool [N], is True."""
  return Images(images.ids[kept], list(itertools.compress(images.names, kept)),
                list(itertools.compress(images.files, kept)), images.sizes[kept])


def find_files(images: Images, kept: np.ndarray, file: str, folder: str, *, uploaded: bool,
               on_bad_example: str) -> tuple[Images, dict[int, str]]:
  """Finds the images that are used.

  Folders are listed, which is cheaper than checking every file. File names may come from Windows,
  or begin with the folder of images itself.

  Args:
    images: N images that a file lists.
    kept: bool [N], which of them are used.
    file: The file, for messages.
    folder: The folder of the images.
    uploaded: Whether names may be those after an upload to Label Studio.
    on_bad_example: For missing images: 'raise' or 'skip'.

  Returns:
    The images with the paths of their files, and image -> reason for those that are missing,
    counted among the kept ones.

  Raises:
    InputError: If images are missing, unless they are skipped.
  """
  listed: dict[str, frozenset[str]] = {}

  def exists(name: str) -> bool:
    inside, base = os.path.split(name)
    if inside not in listed:
      try:
        listed[inside] = frozenset(os.listdir(os.path.join(folder, inside)))
      except (OSError, ValueError):
        listed[inside] = frozenset()
    return base in listed[inside]

  finder, owners = None, {}
  names, files, missing = images.names, list(images.files), {}
  for number, i in enumerate(np.flatnonzero(kept).tolist()):
    found = next((n for n in itertools.chain([names[i]], _readings(names[i], folder))
                  if exists(n)), None)
    if found is None and uploaded:
      finder = finder or ImageFinder(folder)
      path = finder.find(*original_names(names[i]))
      if path and owners.setdefault(path, names[i]) != names[i]:
        raise InputError(f'{file}: {quote(owners[path])} and {quote(names[i])} can both be {path}; '
                         'export again with the images')
      found = path and os.path.relpath(path, folder)
    files[i] = os.path.join(folder, found or names[i])
    if found is None:
      missing[number] = f'{join_names([files[i]])}: no such image'
  if missing and on_bad_example == 'raise':
    absent = list(itertools.compress(names, kept))
    absent = [absent[number] for number in missing]
    raise InputError(f'{len(missing)} of the {kept.sum()} images that {file} lists are not '
                     f'in {folder!r}: {join_names(absent)}{_suggest(absent[0], folder)}; '
                     f'{advise_skipping(len(missing), kept.sum())}')
  return images._replace(files=files), missing


def _readings(name: str, folder: str) -> list[str]:
  """Returns other interpretations of a file name: with slashes, without the folder of images."""
  parts = [p for p in name.replace('\\', '/').split('/') if p not in ('', '.')]
  around = os.path.abspath(folder).split(os.sep)
  return ['/'.join(parts), *('/'.join(parts[n:]) for n in range(1, len(parts))
                             if parts[:n] == around[-n:])]


def _inside(path: str, folder: str) -> str:
  """Makes an absolute path relative to the folder, if it is in it."""
  start = os.path.join(os.path.abspath(folder), '')
  return path[len(start):] if path.startswith(start) else path


def _suggest(name: str, folder: str) -> str:
  """Returns a hint about similar file names, for the end of an error about a missing image."""
  try:
    entries = os.listdir(folder)
  except OSError:
    return ''
  base = name.replace('\\', '/').rpartition('/')[2]
  # The same name in another case or with another suffix; other similar names mean nothing.
  for part in (lambda name: name.casefold(), lambda name: os.path.splitext(name)[0].casefold()):
    for entry in entries:
      if part(entry) == part(base):
        return f'; did you mean {entry!r}?'
  return ''
