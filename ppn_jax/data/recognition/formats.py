"""Finds the annotations of each format among the files of a folder."""

import csv
import os
import re
from collections.abc import Callable, Sequence

from ppn_jax.data.recognition.tree import (
  Part,
  Tree,
  file_names_of,
  head_of,
  is_from_label_studio,
  json_kind,
  xml_kind,
)
from ppn_jax.data.sources import open_images, yolo
from ppn_jax.data.sources.labelled_images import ImageFinder
from ppn_jax.data.sources.tf_example import index_records
from ppn_jax.data.sources.uploaded_names import original_names
from ppn_jax.errors import InputError

_CLASS_LISTS = ('classes.txt', 'obj.names', 'labels.txt', '_darknet.labels',
                'predefined_classes.txt')
_SHARD = re.compile(r'(.+?)(-[0-9]{5}-of-[0-9]{5})?$')
_RECORD_NAME = re.compile(r'.*\.(tf_?)?records?(-[0-9]+-of-[0-9]+|-[0-9]+)?$|.*tf_?record.*', re.I)


def find_coco(tree: Tree) -> list[Part]:
  """Finds instances files and the folders of their images."""
  files = tree.of_kind(json_kind, '.json').get('coco', [])
  # COCO's key points are the same images and boxes again.
  if any('instances' in os.path.basename(f) for f in files):
    files = [f for f in files if 'instances' in os.path.basename(f)]
  parts = []
  for file in files:
    split = tree.split_of(file)
    names = file_names_of(file)
    folder = tree.images_called(names, split) or (
        tree.images_near(file, split) if _has_uploads(tree, file, names) else '')
    if not folder:
      shown = f' such as {names[0]!r}' if names else ''
      raise InputError(f'{file} is a COCO file, but none of its images{shown} is in {tree.root}')
    parts.append(Part('coco_json', {'images': folder, 'annotations': file}, split,
                      tree.relative(file)))
  return parts


def _has_uploads(tree: Tree, file: str, names: Sequence[str]) -> bool:
  """Returns whether a file is Label Studio's, and images have the names from before an upload."""
  if not tree.images or not is_from_label_studio(file):
    return False
  finder = ImageFinder(tree.root)
  try:
    return any(finder.find(*original_names(name)) for name in names)
  except InputError:  # Several images may be meant; reading them says which.
    return True


def find_voc(tree: Tree) -> list[Part]:
  """Finds folders of Pascal VOC's XML files, also those with the images beside them."""
  by_folder: dict[str, list[str]] = {}
  for path in tree.of_kind(xml_kind, '.xml').get('voc', []):
    by_folder.setdefault(os.path.dirname(path), []).append(path)
  parts = []
  for folder, paths in by_folder.items():
    images = _folder_of_stems(tree, folder, {_stem(p) for p in paths})
    if not images:
      raise InputError(f'{folder} has Pascal VOC xml files, but no image in {tree.root} has the '
                       f'name of one, such as {_stem(paths[0])}')
    above = os.path.commonpath([folder, images])
    options = {'folder': above, 'split': ''}
    options |= {key: name for key, name, usual in (
        ('annotations', os.path.relpath(folder, above), 'Annotations'),
        ('images', os.path.relpath(images, above), 'JPEGImages')) if name != usual}
    lists = os.path.join(above, 'ImageSets', 'Main')
    named = [n for n in ('train', 'trainval', 'val', 'test')
             if os.path.isfile(os.path.join(lists, f'{n}.txt'))]
    where = tree.relative(folder)
    if 'train' in named or 'trainval' in named:
      if 'train' in named and 'val' not in named and 'test' not in named:
        named = ['train']
      first = 'train' if 'train' in named else 'trainval'
      parts.append(Part('pascal_voc', options | {'split': first}, 'train', f'{where}, {first}'))
      parts += [Part('pascal_voc', options | {'split': n}, 'eval' if n == 'val' else 'test',
                     f'{where}, {n}') for n in ('val', 'test')
                if n in named and not (n == 'val' and first == 'trainval')]
    else:
      parts.append(Part('pascal_voc', options, tree.split_of(folder), where))
  return parts


def _folder_of_stems(tree: Tree, folder: str, stems: set[str]) -> str:
  """Returns the folder whose images have the most names in common with `stems`; near ones first."""
  near = lambda other: len(os.path.relpath(other, folder).split(os.sep))
  hits = {other: len(stems.intersection(map(_stem, images)))
          for other, images in tree.image_folders.items()}
  best = max(hits.values(), default=0)
  return min((f for f, n in hits.items() if n == best), key=lambda f: (near(f), f)) if best else ''


def _stem(path: str) -> str:
  return os.path.splitext(os.path.basename(path))[0]


def find_yolo(tree: Tree) -> list[Part]:
  """Finds data.yaml files, or else folders of images with text files."""
  parts = []
  for file in tree.with_suffix('.yaml', '.yml'):
    try:
      content = yolo.load_yaml(file)
    except InputError:
      continue
    for split, key in (('train', 'train'), ('eval', 'val'), ('eval', 'valid'), ('test', 'test')):
      if content.get(key):
        parts.append(Part('yolo_txt', {'data': file, 'split': key}, split,
                          f'{tree.relative(file)}, {key}'))
  if parts:
    return parts
  for folder, images in tree.image_folders.items():
    files = [f for f in yolo.label_files(images) if os.path.isfile(f)]
    if any(map(is_yolo, files[:20])):
      parts.append(Part('yolo_txt', {'images': folder, 'names': _class_names(tree, folder, files)},
                        tree.split_of(folder), tree.relative(folder)))
  return parts


def is_yolo(path: str) -> bool:
  """Returns whether a text file begins with a class and at least four numbers."""
  first = next(iter(head_of(path).decode('utf-8', 'replace').split('\n')), '')
  return bool(re.fullmatch(r'\s*\d+(\.0*)?(\s+[-+.\deE]+){4,}\s*', first))


def _class_names(tree: Tree, folder: str, label_files: list[str]) -> tuple[str, ...]:
  """Returns the names in a list of classes near a folder.

  Raises:
    InputError: If there is none.
  """
  for start in (os.path.dirname(label_files[0]), folder):
    while True:
      for name in _CLASS_LISTS:
        path = os.path.join(start, name)
        if os.path.isfile(path):
          lines = [line.strip() for line in head_of(path).decode('utf-8', 'replace').split('\n')]
          return tuple(line for line in lines if line)
      if len(start) <= len(tree.root):
        break
      start = os.path.dirname(start)
  raise InputError(f'{folder} has images with YOLO text files, but nothing names their classes: '
                   'write a data.yaml, or classes.txt with a name in each line, beside them')


def find_labelme(tree: Tree) -> list[Part]:
  """Finds LabelMe's files: a part for each split, or one for all."""
  files = tree.of_kind(json_kind, '.json').get('labelme', [])
  if not files:
    return []
  if not all(tree.split_of(os.path.dirname(f)) for f in files):
    return [Part('labelme', {'folder': tree.root}, '', f'{len(files):,} files')]
  by_split: dict[str, list[str]] = {}
  for file in files:
    by_split.setdefault(tree.split_of(os.path.dirname(file)), []).append(os.path.dirname(file))
  return [Part('labelme', {'folder': (folder := os.path.commonpath(places))}
               | _images_elsewhere(tree, folder), split, f'{len(places):,} files')
          for split, places in by_split.items()]


def _images_elsewhere(tree: Tree, folder: str) -> dict[str, str]:
  """Returns the option `images` if there are none in a folder."""
  inside = any(f == folder or f.startswith(folder + os.sep) for f in tree.image_folders)
  return {} if inside else {'images': tree.root}


def find_cvat(tree: Tree) -> list[Part]:
  """Finds CVAT's XML files."""
  return _single_files(tree, 'cvat_xml', tree.of_kind(xml_kind, '.xml').get('cvat', []))


def find_label_studio(tree: Tree) -> list[Part]:
  """Finds exports of Label Studio."""
  return _single_files(tree, 'label_studio',
                       tree.of_kind(json_kind, '.json').get('label_studio', []))


def _single_files(tree: Tree, source: str, files: list[str]) -> list[Part]:
  parts = []
  for file in files:
    split = tree.split_of(file)
    parts.append(Part(source, {'annotations': file, 'images': tree.images_near(file, split)}, split,
                      tree.relative(file)))
  return parts


def find_open_images(tree: Tree) -> list[Part]:
  """Finds csv files of boxes, and that of the names of classes."""
  kinds = tree.of_kind(_csv_kind, '.csv')
  names = sorted(kinds.get('names', []), key=lambda f: ('boxable' not in f, f))
  found = {'class_descriptions': names[0]} if names else {}
  return [part._replace(options=part.options | found)
          for part in _single_files(tree, 'open_images', kinds.get('boxes', []))]


def _csv_kind(path: str) -> str:
  text = head_of(path, 4096).decode('utf-8-sig', 'replace')
  row = next(csv.reader(text.split('\n')[:1]), [])
  if set(open_images.COLUMNS) <= {field.strip() for field in row}:
    return 'boxes'
  return 'names' if len(row) == 2 and re.match('/[a-z]/', row[0]) else ''


def find_tf_records(tree: Tree) -> list[Part]:
  """Finds TFRecord files, joins their shards, and finds the label map."""
  if find_tfds(tree):
    return []
  shards: dict[str, list[str]] = {}
  for path in tree.others:
    if _RECORD_NAME.match(os.path.basename(path)) and _has_records(path):
      name = _SHARD.fullmatch(path)
      shards.setdefault(name[1] if name else path, []).append(path)
  if not shards:
    return []
  maps = tree.with_suffix('.pbtxt')
  if len(maps) > 1:
    maps = [m for m in maps if 'label' in os.path.basename(m).lower()] or maps
  if len(maps) > 1:
    raise InputError(f'{tree.root} has TFRecords and {len(maps)} label maps, '
                     f'{" and ".join(map(tree.relative, maps[:3]))}; keep one of them')
  parts = []
  for name, paths in shards.items():
    records = paths[0] if len(paths) == 1 else f'{name}-*'
    parts.append(Part('tf_records', {'records': records} | (
        {'label_map': maps[0]} if maps else {}), tree.split_of(paths[0]), tree.relative(records)))
  return parts


def _has_records(path: str) -> bool:
  """Returns whether a file begins with the length of a record, or is compressed."""
  head = head_of(path, 12)
  try:
    index_records(memoryview(head), path)
  except InputError:
    return head[:2] == b'\x1f\x8b'  # The source tells what to do.
  return len(head) == 12


def find_tfds(tree: Tree) -> list[Part]:
  """Finds data sets of TensorFlow Datasets, whose files name their splits."""
  parts = []
  for file in tree.with_suffix('.json'):
    folder = os.path.dirname(file)
    if os.path.basename(file) != 'dataset_info.json' or not os.path.isfile(
        os.path.join(folder, 'features.json')):
      continue
    names = {m[1] for entry in os.listdir(folder) if (m := re.match(
        r'.+-([A-Za-z0-9_]+)\.(?:array_record|tfrecord|riegeli)', entry))}
    parts += [Part('tfds', {'data_dir': folder, 'split': name}, tree.split_of(
        os.path.join(tree.root, name)), f'{tree.relative(folder)}, {name}')
        for name in sorted(names)]
  return parts


# Source -> what it is called, and the function that finds it.
FORMATS: dict[str, tuple[str, Callable[[Tree], list[Part]]]] = {
    'coco_json': ('COCO JSON', find_coco),
    'pascal_voc': ('Pascal VOC XML', find_voc),
    'yolo_txt': ('YOLO text files', find_yolo),
    'labelme': ('LabelMe JSON', find_labelme),
    'cvat_xml': ('CVAT XML', find_cvat),
    'label_studio': ('Label Studio JSON', find_label_studio),
    'open_images': ('Open Images csv', find_open_images),
    'tf_records': ('TFRecords of the TF Object Detection API', find_tf_records),
    'tfds': ('TensorFlow Datasets', find_tfds)}
