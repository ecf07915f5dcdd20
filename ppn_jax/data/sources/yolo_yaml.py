"""The data.yaml of a YOLO data set: names of the classes, and where the images are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.sources.annotations import list_files, note_others, some
from ppn_jax.data.sources.coco_json import quote
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError, did_you_mean

_MAX_BYTES = 64 << 20  # Of one text file.
_MAX_YAML_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
  """Without aliases, by which a short file can grow without bounds."""

  def compose_node(self, parent: Any, index: Any) -> Any:
    if self.check_event(yaml.AliasEvent):
      raise yaml.YAMLError('it has aliases, which no data.yaml needs')
    return super().compose_node(parent, index)


class Found(NamedTuple):
  """The images of a split."""
  files: list[str]
  others: tuple[str, ...] = ()  # Files beside them that are no images by their names.
  missing: str = ''  # An error about files that are listed and absent; '' if there are none.

  def describe_others(self, label_files: Sequence[str]) -> list[str]:
    """A line on the files that were not looked at, the label files not among them."""
    labels = set(label_files)
    return note_others([f for f in self.others if f not in labels])


def read_yaml(file: str, split: str) -> tuple[Any, Found]:
  """`names` of a data.yaml and the images of one of its splits."""
  text = read_text(file, _MAX_YAML_BYTES)
  try:
    content = yaml.load(text, _Loader)
  except (yaml.YAMLError, ValueError, RecursionError) as e:
    raise InputError(f'{file}: not valid yaml: {" ".join(str(e).split())}') from e
  if not isinstance(content, dict) or 'names' not in content:
    raise InputError(f"{file}: not a data.yaml: it has no 'names'")
  places = content.get(split) if isinstance(split, str) else None
  if not places:
    there = [k for k in content if isinstance(content[k], (str, list)) and k != 'names']
    raise InputError(f'{file}: no split {split!r}; {did_you_mean(str(split), map(str, there))}')
  places = places if isinstance(places, list) else [places]
  root = content.get('path') or ''
  if not all(isinstance(p, str) and p for p in (*places, root or '.')):
    raise InputError(f'{file}: {split} and path must be paths, not {quote(places)}')
  _check_count(file, content)
  root = os.path.normpath(os.path.join(os.path.dirname(file), os.path.expanduser(root)))
  parts = [find_images(_locate(root, os.path.expanduser(place)), root) for place in places]
  files = [f for part in parts for f in part.files]
  seen = set()
  for path in files:
    if path in seen:
      raise InputError(f'{file}: {split} has an image twice: {path}')
    seen.add(path)
  return content['names'], Found(files, tuple(f for part in parts for f in part.others),
                                 next((part.missing for part in parts if part.missing), ''))


def _check_count(file: str, content: Mapping[str, Any]) -> None:
  """Raises InputError if `nc` is there and not the number of `names`."""
  count, names = content.get('nc'), content['names']
  if count is None or not isinstance(names, (list, dict)):
    return
  legal = {len(names)}
  if isinstance(names, dict):  # Numbers without a name may count, too.
    legal |= {n + 1 for n in [max((k for k in names if type(k) is int), default=-1)]}
  if count not in legal or isinstance(count, bool):
    shown = ', '.join(map(str, names.values() if isinstance(names, dict) else names))
    raise InputError(f'{file}: nc is {quote(count)}, but names has {len(names)}: {shown[:200]}; '
                     'correct one of them')


def _locate(root: str, place: str) -> str:
  """Where a split of a data.yaml is."""
  path = os.path.normpath(os.path.join(root, place))
  if place.startswith('../') and not os.path.exists(path):
    # Exports that are meant for a program's own folder layout have one step too many.
    return os.path.normpath(os.path.join(root, place[3:]))
  return path


def find_images(place: str, root: str = '') -> Found:
  """The image files below a folder, in order of name, or in a list as it has them."""
  if os.path.isdir(place):
    files, others = list_files(place)
    found = Found(files, tuple(others))
  elif os.path.isfile(place) and place.endswith('.txt'):
    found = _read_list(place, root)
  else:
    raise InputError(f'no folder of images at {quote(place)}')
  if not found.files:
    raise InputError('; '.join([f'no images in {quote(place)}', *note_others(found.others)]))
  return found


def _read_list(file: str, root: str) -> Found:
  """The images that a text file lists, a path each line.

  They start at the list's folder, or else at the data set's; both are usual. Hidden files are
  passed over.
  """
  files, others = [], []
  for number, line in enumerate(read_text(file).splitlines(), start=1):
    written = line.strip()
    if not written or written.replace('\\', '/').rpartition('/')[2].startswith('.'):
      continue
    if '\0' in written:
      raise InputError(f'{file}:{number}: {quote(written)}, legal: a path')
    path = _resolve(written, os.path.dirname(file), root)
    known = os.path.splitext(path)[1].lower() in image_files.SUFFIXES
    (files if known else others).append(path)
  missing = [f for f in files if not os.path.isfile(f)]
  return Found(files, tuple(others), '' if not missing else
               f'{len(missing)} of the {len(files)} images that {file} lists are absent: '
               f'{some(missing)}')


def _resolve(written: str, folder: str, root: str) -> str:
  """Where a path of a list leads, read in the ways that are usual; in the first if in none."""
  written = os.path.expanduser(written)
  paths = [os.path.normpath(os.path.join(start, text))
           for text in dict.fromkeys((written, written.replace('\\', '/')))
           for start in (folder, root)]
  return next((path for path in paths if os.path.isfile(path)), paths[0])


def read_text(file: str, max_bytes: int = _MAX_BYTES) -> str:
  """What a text file says; InputError if it cannot be read or is no text."""
  data = image_files.read(file)
  if len(data) > max_bytes:
    raise InputError(f'{file}: {len(data):,} bytes, legal: up to {max_bytes:,}')
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise InputError(f'{file}: not a text file: {e}') from e


def name_categories(names: Any, where: str) -> tuple[Category, ...]:
  """Of a list of names, or of a dictionary by number."""
  try:
    numbered = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
  except TypeError:
    numbered = {}
  for number, name in numbered.items():
    if type(number) is not int or number < 0 or type(name) not in (str, int) or name == '':
      raise InputError(f'{where}: names has {quote(name)} for class {quote(number)}, '
                       'legal: a name for a number (in yaml, quote names like no and yes)')
  if not numbered or isinstance(names, str):
    raise InputError(f'{where}: names is {quote(names)}, legal: names of classes in order')
  first: dict[str, int] = {}
  for number, name in sorted(numbered.items()):
    if first.setdefault(str(name), number) != number:
      raise InputError(f'{where}: names has {quote(str(name))} for class {first[str(name)]} and '
                       f'for class {number}; legal: different names')
  return tuple(Category(number, str(name)) for number, name in sorted(numbered.items()))
