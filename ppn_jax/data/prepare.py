"""Any data set -> one in TFDS's format: made in a folder of its own, which gets its name last.

  OUTPUT/NAME/VERSION.incomplete/   while it is made; the same call goes on with what is there
  OUTPUT/NAME/VERSION/              whole and checked
    NAME-SPLIT.array_record-*         the records
    features.json dataset_info.json   what TFDS reads
    instances_SPLIT.json              the truth in COCO's format, exact, with the data's own ids
    prepared.json                     from what and how, and the checksum of every file
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ppn_jax import files
from ppn_jax.data import shards as shard_files
from ppn_jax.data import tfds_records
from ppn_jax.data.annotations import SHOWN
from ppn_jax.data.prepare_plan import (
  Options,
  count_processes,
  first_difference,
  make_plan,
  planned_shards,
)
from ppn_jax.data.shards import Job, Shard, Storage
from ppn_jax.data.sources import Source, check_categories
from ppn_jax.errors import InputError

_PLAN, _LOCK = 'plan.json', '.lock'


def prepare(sources: Mapping[str, Source], output: str | os.PathLike, options: Options, *,
            say: Callable[[str], None], progress: Callable[[int, int], None]) -> pathlib.Path:
  """Makes a data set in TFDS's format, or checks the one that is there.

  Args:
    sources: split -> data; all with the same classes.
    output: a local folder of data sets, TFDS's data_dir.
    options: what to make.
    say: takes a line for the user.
    progress: called with images done and images in all.

  Returns:
    The folder of the data set, which TFDS and the source 'tfds' read.

  Raises:
    InputError: other data is there, images or files are bad, or something cannot be written.
      What is finished stays and the same call goes on from there.
  """
  if '://' in os.fspath(output):
    raise InputError(f'output {output}: data is prepared in a local folder; copy it from there')
  _check_sources(sources, options.name)
  target = files.local_path(output) / options.name / options.version
  truths = {split: source.ground_truth() for split, source in sources.items()}
  if target.exists():
    _tidy(target)
    plan = make_plan(sources, truths, options, planned_shards(target / 'prepared.json'))
    verify(target, plan)
    _check_images(target, sources, _jobs(target, plan, truths))
    say(f'{target} is there already, and every file has its checksum')
    _say_left_out(target, sources, truths, say)
    return target
  work = target.with_name(f'{target.name}.incomplete')
  with _claim(work):
    plan = _begin(work, sources, truths, options)
    jobs = _jobs(work, plan, truths)
    total = sum(len(job.ids) for job in jobs)
    classes = [c['name'] for c in plan['categories']]
    shards = shard_files.write_shards(
        jobs, sources, classes, Storage(options.max_side, options.quality),
        count_processes(options), lambda done: progress(done, total))
    skipped = _check_skipped(jobs, shards, options)
    _finish(work, plan, jobs, shards, truths, skipped)
    for image, reason in skipped[:SHOWN]:
      say(f'left out image {image}: {reason}')
  os.rename(work, target)
  _tidy(target)
  return target


def verify(folder: pathlib.Path, plan: Mapping[str, Any]) -> None:
  """Raises InputError unless a finished folder is of this plan and each file as it was made."""
  try:
    prepared = json.loads((folder / 'prepared.json').read_text('utf-8'))
    there, checksums = prepared['plan'], dict(prepared['sha256'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise InputError(f'{folder} is there, but not made by `ppn prepare`; give another name or '
                     'version') from e
  if there != json.loads(json.dumps(plan)):
    raise InputError(f'{folder} holds {first_difference(there, plan)}; give another name or '
                     'version, or remove it')
  for name, expected in checksums.items():
    path = folder / name
    if not path.is_file() or shard_files.checksum(path) != expected:
      raise InputError(f'{path} is missing or not as it was made; remove {folder} and prepare '
                       'again')


def _check_images(folder: pathlib.Path, sources: Mapping[str, Source], jobs: list[Job]) -> None:
  """Raises InputError unless the images are those that a finished folder was made of."""
  made_of = json.loads((folder / 'prepared.json').read_text('utf-8')).get('images')
  for job, (contents, skipped) in zip(jobs, made_of or [], strict=bool(made_of)):
    if shard_files.digest_images(sources[job.split], job, skipped) != contents:
      raise InputError(f'{folder} was made of other images than those that are there now: of split '
                       f'{job.split!r}, some of image {job.ids[0]} to image {job.ids[-1]} have '
                       f'changed; remove {folder} and prepare again, or give another version')


def _tidy(target: pathlib.Path) -> None:
  """Removes what only an unfinished folder needs; not before the folder has its name."""
  shard_files.remove_notes(target)
  (target / _PLAN).unlink(missing_ok=True)


def _check_sources(sources: Mapping[str, Source], name: str) -> None:
  tfds = tfds_records.load_tfds()
  if not sources:
    raise InputError('no data to prepare: the config names no source')
  if name in tfds.list_builders(with_community_datasets=False):
    raise InputError(f"name {name!r} is that of one of TFDS's own data sets; give another")
  (first, reference), *others = sources.items()
  for split, source in others:
    check_categories(f'split {split!r} beside {first!r}', source.categories, reference.categories)
  names = [c.name for c in reference.categories]
  if len(set(names)) < len(names):
    twice = next(n for n in names if names.count(n) > 1)
    raise InputError(f'two classes are called {twice!r}; TFDS wants different names')


def _begin(work: pathlib.Path, sources: Mapping[str, Source], truths: Mapping[str, dict],
           options: Options) -> dict[str, Any]:
  """The plan, written down first; an earlier call's if that was the same."""
  file = work / _PLAN
  plan = make_plan(sources, truths, options, planned_shards(file))
  if file.exists():
    try:
      there = json.loads(file.read_text('utf-8'))
    except ValueError as e:
      raise InputError(f'{file} is damaged; remove {work} to begin anew') from e
    if there != json.loads(json.dumps(plan)):
      raise InputError(f'{work} holds {first_difference(there, plan)}; remove it to begin anew')
  files.write_text(file, json.dumps(plan, indent=1) + '\n')
  for part in work.glob('*.part'):
    part.unlink()
  return plan


def _jobs(work: pathlib.Path, plan: Mapping[str, Any], truths: Mapping[str, dict]) -> list[Job]:
  jobs = []
  for split, entry in plan['splits'].items():
    images, number = truths[split]['images'], entry['shards']
    areas: dict[int, list[float]] = {image['id']: [] for image in images}
    for annotation in truths[split]['annotations']:
      areas[annotation['image_id']].append(annotation['area'])
    bounds = [len(images) * k // number for k in range(number + 1)]
    for k in range(number):
      part = images[bounds[k]:bounds[k + 1]]
      path = work / tfds_records.shard_name(plan['name'], split, k, number)
      jobs.append(Job(path, split, bounds[k], [image['id'] for image in part],
                      [str(image['file_name']) for image in part],
                      [np.array(areas[image['id']], np.float64) for image in part]))
  return jobs


def _check_skipped(jobs: list[Job], shards: list[Shard], options: Options) -> list[list]:
  """[image id, reason] of the images to leave out; raises if they are not to be."""
  skipped = [entry for shard in shards for entry in shard.skipped]
  total = sum(len(job.ids) for job in jobs)
  if not skipped:
    return []
  found = f'{len(skipped)} of {total} images cannot be read, such as: ' + '; '.join(
      reason for _, reason in skipped[:SHOWN])
  if options.on_bad_image == 'raise':
    raise InputError(f'{found}; all others are done: leave these out with --on_bad_image=skip')
  if len(skipped) > options.max_bad * total or not all(s.records for s in shards):
    raise InputError(f'{found}; more than a share of {options.max_bad}, which --max_bad allows')
  return skipped


def _finish(work: pathlib.Path, plan: Mapping[str, Any], jobs: list[Job], shards: list[Shard],
            truths: Mapping[str, dict], skipped: list[list]) -> None:
  """Writes all that is beside the shards and checks that TFDS counts the same."""
  splits: dict[str, tuple[list[int], int]] = {}
  for job, shard in zip(jobs, shards, strict=True):
    lengths, size = splits.setdefault(job.split, ([], 0))
    splits[job.split] = [*lengths, shard.records], size + shard.data_bytes
  left_out: dict[str, list[int]] = {}
  for split, truth in truths.items():
    gone = left_out[split] = [
        image for job, shard in zip(jobs, shards, strict=True) if job.split == split
        for image, _ in shard.skipped]
    files.write_text(work / tfds_records.truth_name(split), json.dumps(_without(truth, set(gone))))
  classes = [c['name'] for c in plan['categories']]
  tfds_records.write_metadata(work, plan['name'], plan['version'], classes, splits)
  builder = tfds_records.load_tfds().builder_from_directory(os.fspath(work))
  for split, (lengths, _) in splits.items():
    if len(builder.as_data_source(split)) != sum(lengths):
      raise RuntimeError(f'{split}: TFDS counts other records than were written')
  sums = {job.path.name: shard.sha256 for job, shard in zip(jobs, shards, strict=True)}
  sums |= {p.name: shard_files.checksum(p) for p in sorted(work.iterdir())
           if p.suffix in ('.json', '.txt') and p.name != _PLAN and '.array_record-' not in p.name}
  files.write_text(work / 'prepared.json', json.dumps(
      {'plan': plan, 'skipped': skipped, 'left_out': left_out, 'sha256': sums,
       'images': [[shard.contents, shard.skipped] for shard in shards]}, indent=1) + '\n')


def _say_left_out(target: pathlib.Path, sources: Mapping[str, Source],
                  truths: Mapping[str, dict], say: Callable[[str], None]) -> None:
  """Says how many images finished data lacks, and how many of these could be taken in by now."""
  left_out = json.loads((target / 'prepared.json').read_text('utf-8')).get('left_out', {})
  count = sum(map(len, left_out.values()))
  if not count:
    return
  say(f'{count} images were left out of it, since they could not be read')
  readable = 0
  for split, images in left_out.items():
    ids = [image['id'] for image in truths[split]['images']]
    readable += len(shard_files.readable_now(sources[split], Job(target, split, 0, ids, (), ()),
                                             images))
  if readable:
    say(f'{readable} of them can be read now; remove {target} and prepare again to take them in')


def _without(truth: dict[str, Any], gone: set[int]) -> dict[str, Any]:
  """The truth of a split less some images."""
  if not gone:
    return truth
  kept = [a for a in truth['annotations'] if a['image_id'] not in gone]
  return truth | {'images': [i for i in truth['images'] if i['id'] not in gone],
                  'annotations': [a | {'id': n} for n, a in enumerate(kept, start=1)]}


@contextlib.contextmanager
def _claim(work: pathlib.Path) -> Iterator[None]:
  """Keeps a second call off a folder while the first is at work."""
  work.mkdir(parents=True, exist_ok=True)
  with (work / _LOCK).open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise InputError(f'{work}: another `ppn prepare` is at work there') from e
    yield
    (work / _LOCK).unlink()
