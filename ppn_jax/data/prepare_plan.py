"""What `ppn prepare` is to make, written down before it begins."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppn_jax.data import shards as shard_files
from ppn_jax.data.checks import check_integer
from ppn_jax.data.shards import Storage
from ppn_jax.data.sources import Source
from ppn_jax.errors import InputError

_SHARD_BYTES = 128 << 20
_LEAST_IMAGES = 500  # Of a shard, unless they are large.
_SAMPLE = 20  # Images that tell how many bytes all will take.


@dataclasses.dataclass(frozen=True)
class Options:
  """What to make of the data.

  Attributes:
    name: of the data set; small letters, digits and _, and not one of TFDS's own.
    version: three numbers.
    max_side: images with a longer side of more pixels are stored smaller; 0 leaves the files as
      they are. The original size stays known, and scoring goes by it.
    quality: of JPEG files that are made then, 1 to 100.
    shards: files for each split; 0 for up to about 128 MB each, and enough of them for all
      processes to work. What is begun keeps its number.
    processes: that work; 0 is one for each processor core.
    on_bad_image: what to do when all is done but some images cannot be read: 'raise', after
      which the same call with 'skip' leaves them out and has little left to do.
    max_bad: the share of bad images of a split above which 'skip' raises too.
  """
  name: str
  version: str = '1.0.0'
  max_side: int = 0
  quality: int = 90
  shards: int = 0
  processes: int = 0
  on_bad_image: str = 'raise'
  max_bad: float = 0.01

  def __post_init__(self):
    if not re.fullmatch('[a-z][a-z0-9_]*', self.name):
      raise InputError(f'name is {self.name!r}, legal: small letters, digits and _')
    if not re.fullmatch(r'\d+\.\d+\.\d+', self.version):
      raise InputError(f'version is {self.version!r}, legal: three numbers such as 1.0.0')
    for option in ('max_side', 'shards', 'processes'):
      check_integer(option, getattr(self, option), 0)
    check_integer('quality', self.quality, 1)
    if self.quality > 100:
      raise InputError(f'quality is {self.quality}, legal: 1 to 100')
    if self.on_bad_image not in ('raise', 'skip'):
      raise InputError(f"on_bad_image is {self.on_bad_image!r}, legal: 'raise', 'skip'")
    if not 0 <= self.max_bad <= 1:
      raise InputError(f'max_bad is {self.max_bad}, legal: 0 to 1')


def make_plan(sources: Mapping[str, Source], truths: Mapping[str, dict], options: Options,
          shards: Mapping[str, int]) -> dict[str, Any]:
  """All that decides what is in the files; as it is written to plan.json."""
  categories = next(iter(sources.values())).categories
  splits = {}
  for split, truth in truths.items():
    text = json.dumps(truth, sort_keys=True)
    splits[split] = {'images': len(truth['images']),
                     'shards': shards.get(split) or _number_of_shards(sources[split], options),
                     'truth_sha256': hashlib.sha256(text.encode()).hexdigest()}
  return {'name': options.name, 'version': options.version, 'max_side': options.max_side,
          'quality': options.quality, 'categories': [c._asdict() for c in categories],
          'splits': splits}


def _number_of_shards(source: Source, options: Options) -> int:
  """By the size of some images, unless it is given."""
  if options.shards:
    return min(options.shards, len(source))
  sizes, storage = [], Storage(options.max_side, options.quality)
  for index in np.linspace(0, len(source) - 1, min(_SAMPLE, len(source)), dtype=int).tolist():
    with contextlib.suppress(InputError):
      image = np.asarray(source[index].image)
      sizes.append(len(shard_files.encode(source, index, image, storage)))
  if not sizes:
    raise InputError(f'none of {_SAMPLE} images looked at can be read')
  by_bytes = -int(-np.mean(sizes) * len(source) // _SHARD_BYTES)
  for_all_to_work = min(2 * count_processes(options), len(source) // _LEAST_IMAGES)
  return min(len(source), max(1, by_bytes, for_all_to_work))


def planned_shards(file: pathlib.Path) -> dict[str, int]:
  """split -> shards of an earlier call, whose files are to be recognised."""
  try:
    content = json.loads(file.read_text('utf-8'))
    splits = content.get('plan', content)['splits']
    return {split: int(entry['shards']) for split, entry in splits.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """In what a plan that is there differs from another one."""
  for key in here:
    if there.get(key) != json.loads(json.dumps(here[key])):
      if key in ('splits', 'categories'):
        return f'other data ({key} differ)'
      return f'data made with {key}={there.get(key)}, not {here[key]}'
  return 'other data'


def count_processes(options: Options) -> int:
  """How many work."""
  if options.processes:
    return options.processes
  if hasattr(os, 'sched_getaffinity'):  # Linux: a container may own fewer cores than there are.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
