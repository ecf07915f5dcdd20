"""The data.yaml of a YOLO data set: names of the classes, and where the images are."""

import os
from collections.abc import Mapping
from typing import Any

import yaml

from ppn_jax.data import images as image_files
from ppn_jax.data.annotations import some
from ppn_jax.data.instances import quote
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


def read_yaml(file: str, split: str) -> tuple[Any, list[str]]:
  """`names` of a data.yaml and the image files of one of its splits."""
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
  root = os.path.normpath(os.path.join(os.path.dirname(file), root))
  files = [f for place in places for f in find_images(_locate(root, place), root)]
  if len(set(files)) < len(files):
    raise InputError(f'{file}: {split} has an image twice')
  return content['names'], files


def _locate(root: str, place: str) -> str:
  """Where a split of a data.yaml is."""
  path = os.path.normpath(os.path.join(root, place))
  if place.startswith('../') and not os.path.exists(path):
    # Exports that are meant for a program's own folder layout have one step too many.
    return os.path.normpath(os.path.join(root, place[3:]))
  return path


def find_images(place: str, root: str = '') -> list[str]:
  """The image files below a folder, in order of name, or in a list as it has them."""
  if os.path.isdir(place):
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(place)
                   for name in names
                   if os.path.splitext(name)[1].lower() in image_files.SUFFIXES)
  elif os.path.isfile(place) and place.endswith('.txt'):
    files = _read_list(place, root)
  else:
    raise InputError(f'no folder of images at {quote(place)}')
  if not files:
    raise InputError(f'no images in {quote(place)}')
  return files


def _read_list(file: str, root: str) -> list[str]:
  """The images that a text file lists, a path each line, relative to the file."""
  folder, files = os.path.dirname(file), []
  for number, line in enumerate(read_text(file).splitlines(), start=1):
    if not line.strip():
      continue
    path = os.path.normpath(os.path.join(folder, line.strip()))
    if '\0' in path or os.path.commonpath([os.path.abspath(root), os.path.abspath(path)]
                                          ) != os.path.abspath(root):
      raise InputError(f'{file}:{number}: {quote(line.strip())} is not inside {quote(root)}')
    files.append(path)
  missing = [f for f in files if not os.path.isfile(f)]
  if missing:
    raise InputError(f'{len(missing)} of the {len(files)} images that {file} lists are absent: '
                     f'{some(missing)}')
  return files


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
  return tuple(Category(number, str(name)) for number, name in sorted(numbered.items()))
