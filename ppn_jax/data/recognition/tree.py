"""The files below a folder, and what their beginnings say about them."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ppn_jax.data.images import folders
from ppn_jax.data.sources.uploaded_names import CONTRIBUTOR
from ppn_jax.errors import InputError

_HEAD = 1 << 16  # Bytes of a large file that are looked at, at its beginning and end.
_PARSED_BYTES = 32 << 20  # Size up to which a JSON file is parsed to tell its kind.
_SNIFFED = 50  # Files of a folder that are looked at; the others are taken to be like them.

# Words in names of files and folders -> the split that they stand for.
_SPLITS = {'train': 'train', 'training': 'train', 'trainval': 'train', 'val': 'eval',
           'valid': 'eval', 'validation': 'eval', 'eval': 'eval', 'dev': 'eval', 'test': 'test',
           'testing': 'test', 'minival': 'eval'}


class Part(NamedTuple):
  """Annotations of one split.

  Attributes:
    source: A key of `SOURCES`.
    options: Its options, with absolute paths.
    split: 'train', 'eval' or 'test'; '' if its name says nothing.
    where: The file or folder, relative to the data set's folder, for messages.
  """
  source: str
  options: dict[str, Any]
  split: str
  where: str


class Tree:
  """Files below a folder, as `folders.list_tree` lists them.

  Attributes:
    root: The folder, absolute.
    images, others: Paths of images and of other files.
    image_folders: Folders that contain images, with their number.
  """

  def __init__(self, root: str):
    if not os.path.isdir(root):
      raise InputError(f'no folder {root!r}')
    self.root = os.path.abspath(root)
    self.images, self.others = folders.list_tree(self.root)
    self.image_folders: dict[str, list[str]] = {}
    for path in self.images:
      self.image_folders.setdefault(os.path.dirname(path), []).append(path)

  def relative(self, path: str) -> str:
    """Returns a path relative to the root."""
    return os.path.relpath(path, self.root)

  def with_suffix(self, *suffixes: str) -> list[str]:
    """Returns the other files that have one of some suffixes."""
    return [path for path in self.others if folders.has_suffix(path, suffixes)]

  def of_kind(self, kind_of: Callable[[str], str], *suffixes: str) -> dict[str, list[str]]:
    """Returns kind -> files. Of each folder only the first files are looked at.

    Args:
      kind_of: Returns the kind of a file, '' for none.
      suffixes: Of the files.
    """
    found: dict[str, list[str]] = {}
    by_folder: dict[str, list[str]] = {}
    for path in self.with_suffix(*suffixes):
      by_folder.setdefault(os.path.dirname(path), []).append(path)
    for paths in by_folder.values():
      kinds = [kind_of(path) for path in paths[:_SNIFFED]]
      for path, kind in zip(paths, kinds, strict=False):
        found.setdefault(kind, []).append(path)
      if len(paths) > _SNIFFED:
        usual = max(set(kinds), key=kinds.count)
        found.setdefault(usual, []).extend(paths[_SNIFFED:])
    found.pop('', None)
    return found

  def split_of(self, path: str) -> str:
    """Returns the split that the last word in a path stands for, '' if none does."""
    words = re.findall('[a-z]+', self.relative(path).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), '')

  def images_near(self, path: str, split: str) -> str:
    """Returns the folder where the images of a file of annotations are, by their places alone."""
    same = [f for f in self.image_folders if split and self.split_of(f) == split]
    if same:
      return os.path.commonpath(same)
    folder = os.path.dirname(path)
    while folder != self.root and not any(
        f == folder or f.startswith(folder + os.sep) for f in self.image_folders):
      folder = os.path.dirname(folder)
    return folder

  def images_called(self, names: Sequence[str], split: str) -> str:
    """Returns the folder that most of some relative file names lead to images from, '' if none."""
    candidates = dict.fromkeys(above for folder in self.image_folders
                               for above in self._and_above(folder))
    hits = {folder: sum(os.path.isfile(os.path.join(folder, name.replace('\\', '/')))
                        for name in names) for folder in candidates}
    best = max(hits.values(), default=0)
    if not best:
      return ''
    # Copies of one name in several folders: that of the same split.
    return min((f for f, n in hits.items() if n == best),
               key=lambda f: (self.split_of(f) != split, len(f), f))

  def _and_above(self, folder: str) -> Iterable[str]:
    while True:
      yield folder
      if folder == self.root:
        return
      folder = os.path.dirname(folder)


def head_of(path: str, count: int = _HEAD) -> bytes:
  """Returns the first bytes of a file, b'' if it cannot be read."""
  try:
    with open(path, 'rb') as file:
      return file.read(count)
  except OSError:
    return b''


def json_kind(path: str) -> str:
  """Returns 'coco', 'labelme' or 'label_studio' for a JSON file, '' for any other."""
  try:
    if os.path.getsize(path) > _PARSED_BYTES:
      return _kind_of_text(_ends_of(path))
    content = json.loads(head_of(path, _PARSED_BYTES))
  except (OSError, ValueError, RecursionError):
    return ''
  if isinstance(content, dict):
    if isinstance(content.get('shapes'), list) and 'imagePath' in content:
      return 'labelme'
    if all(isinstance(content.get(key), list) for key in ('images', 'annotations', 'categories')):
      first = next((a for a in content['annotations'] if isinstance(a, dict)), {})
      return '' if {'caption', 'segments_info'} & first.keys() else 'coco'
  if isinstance(content, list) and content and isinstance(content[0], dict):
    task = content[0]
    regions = [region for value in task.values() if isinstance(value, list)
               for region in value if isinstance(region, dict)]
    if ('data' in task and ('annotations' in task or 'completions' in task)) or any(
        key.endswith('labels') for region in regions for key in region):
      return 'label_studio'
  return ''


def _ends_of(path: str) -> str:
  """Returns the beginning and the end of a large file."""
  with open(path, 'rb') as file:
    start = file.read(_HEAD)
    file.seek(-_HEAD, os.SEEK_END)
    return (start + file.read()).decode('utf-8', 'replace')


def _kind_of_text(text: str) -> str:
  """Returns the kind of a large JSON file from its beginning and end."""
  has = lambda key: re.search(rf'"{key}"\s*:', text)
  if text.lstrip()[:1] == '[':
    return 'label_studio' if has('data') and (has('annotations') or has('result')) else ''
  if has('shapes') and has('imagePath'):
    return 'labelme'
  if has('caption') or has('segments_info'):
    return ''
  return 'coco' if has('images') or has('file_name') or has('bbox') else ''


def file_names_of(path: str) -> list[str]:
  """Returns a few file names of images that a COCO file lists."""
  if os.path.getsize(path) <= _PARSED_BYTES:
    content = json.loads(head_of(path, _PARSED_BYTES))
    names = [i.get('file_name') for i in content['images'] if isinstance(i, dict)]
  else:
    names = re.findall(r'"file_name"\s*:\s*"((?:[^"\\]|\\.)+)"', _ends_of(path))
    names = [json.loads(f'"{name}"') for name in names]
  names = [name for name in names if isinstance(name, str) and '\0' not in name]
  return names[:: max(1, len(names) // 20)][:20]


def is_from_label_studio(path: str) -> bool:
  """Returns whether a COCO file says that Label Studio wrote it, at its beginning or end."""
  text = _ends_of(path) if os.path.getsize(path) > 2 * _HEAD else head_of(path, 2 * _HEAD).decode(
      'utf-8', 'replace')
  return bool(re.search(rf'"contributor"\s*:\s*"{CONTRIBUTOR}"', text))


def xml_kind(path: str) -> str:
  """Returns 'voc' or 'cvat' for an XML file, '' for any other.

  LabelMe on the web, and CVAT's export of its name, begin as VOC's do but have polygons.
  """
  text = head_of(path, 4096).replace(b'\0', b'')  # Encodings of two bytes.
  root = re.search(rb'<([A-Za-z_][\w.-]*)', re.sub(rb'<[?!][^>]*>', b'', text))
  if b'<sourceImage' in text:
    return ''
  return {b'annotation': 'voc', b'annotations': 'cvat'}.get(root[1] if root else b'', '')
