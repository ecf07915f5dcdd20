"""Recognises the format of the data set in a folder, and what it trains and evaluates on."""

import collections
import os
import shlex
from typing import Any, NamedTuple

from ppn_jax.data.recognition.formats import FORMATS, is_yolo
from ppn_jax.data.recognition.tree import Part, Tree
from ppn_jax.errors import InputError, did_you_mean

_ANNOTATIONS = ('.json', '.xml', '.txt', '.csv', '.mat')
_HEIC = ('.heic', '.heif')
_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.xz', '.txz', '.bz2', '.tbz', '.zst', '.rar', '.7z')


class Recognised(NamedTuple):
  """A data set that was found.

  Attributes:
    source: A key of `SOURCES`.
    name: What the format is called.
    train, evaluation: Options of `data.train` and `data.eval`; `evaluation` is None if there is
      nothing to evaluate on but a part of the training images.
    lines: What was found, a line each.
  """
  source: str
  name: str
  train: dict[str, Any]
  evaluation: dict[str, Any] | None
  lines: tuple[str, ...]


def recognise(folder: str, data_format: str = '') -> Recognised:
  """Finds out which format the data set in a folder has, and where its parts are.

  Args:
    folder: The folder. Everything below it is looked at, but nothing is changed.
    data_format: A key of `FORMATS`, if there are several; '' for the only one.

  Raises:
    InputError: If nothing is found, or what to train on is ambiguous.
  """
  if data_format and data_format not in FORMATS:
    raise InputError(f'--format={data_format}: {did_you_mean(data_format, FORMATS)}')
  tree = Tree(folder)
  found, errors = {}, []
  for source, (_, find) in FORMATS.items():
    if data_format in ('', source):
      try:
        if parts := find(tree):
          found[source] = parts
      except InputError as e:  # Another format may be complete.
        errors.append(e)
  if not found:
    advice = _advice(tree)
    if errors:
      raise InputError(f'{errors[0]}; {advice}') if advice else errors[0]
    advice = advice or _advice_on_others(tree, data_format)
    raise InputError(_nothing(tree, data_format) + (f'; {advice}' if advice else ''))
  if len(found) > 1:
    listed = ', '.join(f'{FORMATS[s][0]} ({parts[0].where})' for s, parts in found.items())
    raise InputError(f'{tree.root} has annotations in {len(found)} formats, {listed}; choose one: '
                     f'{" or ".join(f"--format={s}" for s in found)}')
  (source, parts), = found.items()
  train, evaluation = _choose(tree, source, parts)
  lines = [f'{tree.root}: {FORMATS[source][0]}',
           f'train on {train.where}',
           f'evaluate on {evaluation.where}' if evaluation else
           'evaluate on a tenth of the training images, as nothing else is there']
  if heic := tree.with_suffix(*_HEIC):
    lines.append(f'left alone: {len(heic):,} HEIC pictures such as {tree.relative(heic[0])}; '
                 'convert them to JPEG')
  return Recognised(source, FORMATS[source][0], train.options,
                    evaluation.options if evaluation else None, tuple(lines))


def _choose(tree: Tree, source: str, parts: list[Part]) -> tuple[Part, Part | None]:
  """Returns the part to train on, and the one to evaluate on, None if there is no other.

  Raises:
    InputError: If several could be meant.
  """
  by_split: dict[str, list[Part]] = {}
  for part in parts:
    by_split.setdefault(part.split, []).append(part)
  if len(parts) == 1:
    return parts[0], None
  train = by_split.get('train') or by_split.get('', [])
  evaluation = by_split.get('eval') or by_split.get('test', [])
  for use, chosen in (('train', train), ('evaluate', evaluation)):
    if len(chosen) > 1 or (use == 'train' and not chosen):
      shown = ', '.join(part.where for part in (chosen or parts)[:4])
      raise InputError(
          f'{tree.root}: {len(chosen or parts)} {FORMATS[source][0]} data sets, and their names do '
          f'not say which one to {use} on: {shown}{", ..." * (len(chosen or parts) > 4)}; name '
          f'it: --config=own_data:{source} ' + ' '.join(
              f'--config.data.train.{key}=...' for key in parts[0].options))
  return train[0], evaluation[0] if evaluation else None


def _nothing(tree: Tree, data_format: str) -> str:
  """Returns the error about a folder without annotations."""
  suffixes = collections.Counter(os.path.splitext(f)[1].lower() or 'without suffix'
                                 for f in tree.others)
  others = ', '.join(f'{n:,} {suffix}' for suffix, n in suffixes.most_common(5)) or 'no other file'
  names = [name for source, (name, _) in FORMATS.items() if data_format in ('', source)]
  return (f'{tree.root}: no annotations that are known ({len(tree.images):,} images, {others}); '
          f'legal: {", ".join(names)}')


def _advice(tree: Tree) -> str:
  """Returns the next step for files that cannot be read as they are, '' if there are none."""
  if not tree.images and tree.with_suffix(*_HEIC):
    return 'HEIC pictures are not read: convert them to JPEG'
  if tree.with_suffix(*_ARCHIVES):
    return 'unpack the archive first'
  return ''


def _advice_on_others(tree: Tree, data_format: str) -> str:
  """Returns the next step for files of no format that is known, '' if there are none."""
  if any(map(is_yolo, tree.with_suffix('.txt')[:50])):
    return ('the text files look like those of YOLO, but no image has the name of one: export them '
            "with their images (Label Studio's 'YOLO with Images')")
  if not data_format and tree.images and tree.with_suffix(*_ANNOTATIONS):
    return ('if some are annotations of another tool, Datumaro may convert them: pip install '
            f"'datumaro[cli]', then datum convert -i {shlex.quote(tree.root)} -f coco_instances "
            '-o FOLDER -- --save-media')
  return ''
