"""Writes data sets in TFDS's format, with a TFDS builder that reads from a source.

  OUTPUT/NAME/VERSION/
    NAME-SPLIT.array_record-*         the records
    features.json dataset_info.json   what TFDS reads
    instances_SPLIT.json              the ground truth in COCO's format, exact, with the data's ids
    prepared.json                     the options, images left out, and checksums of all files

TFDS writes into OUTPUT/NAME/incomplete.XXXXXX_VERSION, which is renamed at the end; for a bucket
see `prepared_files`. The builder is a ShardBasedBuilder because a GeneratorBasedBuilder sorts each
split, for which it needs memory for the whole split, and TensorFlow from 1 GB on.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from ppn_jax import storage
from ppn_jax.data import prepared_files
from ppn_jax.data.checks import check_integer
from ppn_jax.data.contents import SHOWN
from ppn_jax.data.images import decoding as image_files
from ppn_jax.data.source import (
  Source,
  check_categories,
  encoded_of,
  evenly_spaced,
  stamp_of,
)
from ppn_jax.data.sources import tfds_records
from ppn_jax.errors import InputError, is_outage

logger = logging.getLogger(__name__)

_SHARD_BYTES = 128 << 20
_SAMPLE = 20  # Images from which the size of all is estimated.
_READ_AHEAD = 64  # Images that may be read before they are written.


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `prepare`.

  Attributes:
    name: Name of the data set: lower-case letters, digits and _, and not one of TFDS's own.
    version: Three numbers.
    max_side: Images with a longer side of more pixels are stored smaller; 0 leaves the files as
      they are. The original size is kept and used for scoring.
    quality: Quality of the smaller JPEG files, 1 to 100.
    shards: Number of files for each split; 0 makes files of about 128 MB.
    threads: Threads that read, check and encode images; 0 for a few more than there are cores.
    on_bad_image: 'raise' if images cannot be read, after all have been tried, or 'skip' them.
    max_bad: The share of bad images above which 'skip' raises too.
  """
  name: str
  version: str = '1.0.0'
  max_side: int = 0
  quality: int = 90
  shards: int = 0
  threads: int = 0
  on_bad_image: str = 'raise'
  max_bad: float = 0.01

  def __post_init__(self):
    if not re.fullmatch('[a-z][a-z0-9_]*', self.name):
      raise InputError(f'name is {self.name!r}, legal: small letters, digits and _')
    if not re.fullmatch(r'\d+\.\d+\.\d+', self.version):
      raise InputError(f'version is {self.version!r}, legal: three numbers such as 1.0.0')
    for option in ('max_side', 'shards', 'threads'):
      check_integer(option, getattr(self, option), 0)
    check_integer('quality', self.quality, 1)
    if self.quality > 100:
      raise InputError(f'quality is {self.quality}, legal: 1 to 100')
    if self.on_bad_image not in ('raise', 'skip'):
      raise InputError(f"on_bad_image is {self.on_bad_image!r}, legal: 'raise', 'skip'")
    if not 0 <= self.max_bad <= 1:
      raise InputError(f'max_bad is {self.max_bad}, legal: 0 to 1')


class _Shard(NamedTuple):
  """Part of a split that one file holds."""
  split: str
  indices: range
  skipped: list[list]  # [image id, reason] of images that could not be read.
  digests: list[bytes]  # Digests of the other images' own files.

  @property
  def contents(self) -> str:
    """Digest of the images' own files, '' if the source gives no access to them."""
    return hashlib.sha256(b''.join(self.digests)).hexdigest() if any(self.digests) else ''


def prepare(sources: Mapping[str, Source], output: str | os.PathLike, options: Options, *,
            progress: Callable[[int, int], None]) -> pathlib.Path:
  """Writes a data set in TFDS's format, or checks an existing one.

  Args:
    sources: The data of each split; all with the same classes.
    output: A folder of data sets, TFDS's data_dir; local or gs://BUCKET/FOLDER.
    options: See `Options`.
    progress: Called with the number of images done and of all images.

  Returns:
    The folder of the data set, which TFDS and the source 'tfds' read.

  Raises:
    InputError: If the folder has other data, images or files are bad, or writing fails. Existing
      data is unchanged then, and nothing new is left in a local folder. What is left in a bucket
      is no data set, and the next call continues with it.
    OSError: If a bucket cannot be used.
  """
  _check_sources(sources, options.name)
  target = storage.folder_path(output, 'output') / options.name / options.version
  truths = {split: source.ground_truth() for split, source in sources.items()}
  if storage.is_local(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  pool = concurrent.futures.ThreadPoolExecutor(options.threads or None)
  with prepared_files.locked(target.parent) as locked, contextlib.ExitStack() as closing:
    closing.callback(pool.shutdown, cancel_futures=True)
    if locked and storage.is_local(target):
      for left in target.parent.glob(f'incomplete.*_{target.name}'):
        shutil.rmtree(left)
        logger.info(f'removed {left}, left by a call that was stopped')
    if prepared_files.exists(target):
      _check_finished(target, sources, truths, options, pool)
      return target
    plan = _make_plan(sources, truths, options, {})
    shards = _make_shards(plan)
    if isinstance(target, pathlib.Path):
      made, upload = target, None
    else:
      folder = closing.enter_context(tempfile.TemporaryDirectory(prefix='ppn_prepare_'))
      made = pathlib.Path(folder) / options.name / options.version
      upload = closing.enter_context(prepared_files.Upload(target))
    _build(made, plan, sources, truths, shards, options, pool, progress, upload)
    if upload:
      upload.finish(made)
  for image, reason in [entry for shard in shards for entry in shard.skipped][:SHOWN]:
    logger.warning(f'left out image {image}: {reason}')
  return target


def _check_sources(sources: Mapping[str, Source], name: str) -> None:
  """Raises InputError unless there are sources with the same, distinct classes, and a new name."""
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
    raise InputError(f'two classes are called {twice!r}; TFDS needs different names')


def _make_plan(sources: Mapping[str, Source], truths: Mapping[str, dict], options: Options,
               shards: Mapping[str, int]) -> dict[str, Any]:
  """Returns everything that decides what is in the files, for prepared.json.

  Args:
    sources, options: As in `prepare`.
    truths: Ground truth of each split.
    shards: Number of files of a split, if it is known already.
  """
  splits = {}
  for split, truth in truths.items():
    text = json.dumps(truth, sort_keys=True)
    splits[split] = {'images': len(truth['images']),
                     'shards': shards.get(split) or _number_of_shards(sources[split], options),
                     'truth_sha256': hashlib.sha256(text.encode()).hexdigest()}
  categories = next(iter(sources.values())).categories
  return {'name': options.name, 'version': options.version, 'max_side': options.max_side,
          'quality': options.quality, 'categories': [c._asdict() for c in categories],
          'splits': splits}


def _number_of_shards(source: Source, options: Options) -> int:
  """Returns the number of files of a split, estimated from a sample unless it is an option."""
  if options.shards:
    return min(options.shards, len(source))
  sizes = []
  for index in evenly_spaced(len(source), _SAMPLE):
    with contextlib.suppress(InputError):
      sizes.append(len(_encode(source, index, np.asarray(source[index].image), options)))
  if not sizes:
    raise InputError(f'none of {_SAMPLE} sampled images can be read')
  return min(len(source), max(1, -int(-np.mean(sizes) * len(source) // _SHARD_BYTES)))


def _make_shards(plan: Mapping[str, Any]) -> list[_Shard]:
  shards = []
  for split, entry in plan['splits'].items():
    bounds = [entry['images'] * k // entry['shards'] for k in range(entry['shards'] + 1)]
    shards += [_Shard(split, range(*pair), [], []) for pair in itertools.pairwise(bounds)]
  return shards


def _build(target: pathlib.Path, plan: Mapping[str, Any], sources: Mapping[str, Source],
           truths: Mapping[str, dict], shards: Sequence[_Shard], options: Options,
           pool: concurrent.futures.Executor, progress: Callable[[int, int], None],
           upload: prepared_files.Upload | None) -> None:
  """Writes the data set with TFDS, and fills in `skipped` and `digests` of the shards."""
  tfds = tfds_records.load_tfds()
  from array_record.python.array_record_module import ArrayRecordReader
  from tensorflow_datasets.core import writer
  counts: dict[str, int] = {}  # Records of each file.
  checksums: dict[str, concurrent.futures.Future[str]] = {}
  done, total = 0, sum(len(shard.indices) for shard in shards)
  areas = collections.defaultdict(list)
  for split, truth in truths.items():
    for annotation in truth['annotations']:
      areas[split, annotation['image_id']].append(annotation['area'])

  def generate(shard: _Shard) -> Iterator[tuple[int, dict]]:
    nonlocal done
    source, images = sources[shard.split], truths[shard.split]['images']

    def read(index: int) -> tuple[bytes, dict | InputError]:
      # The digest comes first, so that a change in between is noticed.
      return _digest(source, index), _read_example(
          source, index, images[index], areas.get((shard.split, images[index]['id']), ()),
          shard.split, options)

    for index, (digest, example) in zip(shard.indices, _map_ahead(pool, read, shard.indices),
                                        strict=True):
      if isinstance(example, InputError):
        shard.skipped.append([images[index]['id'], str(example)])
      else:
        shard.digests.append(digest)
        yield index, example
        example.clear()  # Saves memory, since TFDS keeps all examples of a shard for counting.
      done += 1
      progress(done, total)

  class Writer(writer.ExampleWriter):
    """Writes shards that are the same in every process, and flushes them to disk."""

    def write(self, path: os.PathLike, examples: Iterable[tuple[int, bytes]]) -> None:
      try:
        super().write(path, ((key, tfds_records.sort_features(data)) for key, data in examples))
        with open(path, 'rb') as file:
          os.fsync(file.fileno())
      except (OSError, RuntimeError) as e:  # ArrayRecord raises RuntimeError.
        reason = getattr(e, 'strerror', None) or ' '.join(str(e).split())
        raise InputError(f'{os.fspath(path)}: cannot be written: {reason}') from e
      file = pathlib.Path(path)
      counts[file.name] = ArrayRecordReader(os.fspath(path)).num_records()
      checksums[file.name] = pool.submit(prepared_files.sha256_of, file)
      if upload:
        checksums[file.name].result()  # Uploading leaves no content.
        upload.add_shard(file)

  class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Builds the data set."""
    name, VERSION = plan['name'], tfds.core.Version(plan['version'])
    code_path = None  # There are no checksums of downloads beside this module.

    def _info(self):
      info = tfds.core.DatasetInfo(
          builder=self, disable_shuffling=True,
          features=_detection_features([c['name'] for c in plan['categories']]))
      # Otherwise TFDS may ask Google for a data set of this name and leave a folder in /tmp.
      info.initialize_from_bucket = lambda: None
      return info

    def _shard_iterators_per_split(self, dl_manager):
      return {split: [lambda shard=shard: generate(shard) for shard in shards
                      if shard.split == split] for split in sources}

    def _example_writer(self):
      return Writer(self.info.file_format)

    def _download_and_prepare(self, dl_manager, download_config=None):
      super()._download_and_prepare(dl_manager, download_config)
      _check_skipped(shards, total, options)
      self.info.write_to_directory(self.data_dir)  # TFDS would do so after the checksums.
      _check_counts(self.info.splits, counts, shards)
      _finish(pathlib.Path(self.data_dir), plan, truths, shards, checksums, upload)

    def _log_download_bytes(self):
      """Prints nothing, whereas TFDS prints on stdout."""

    _log_download_done = _log_download_bytes

  with tempfile.TemporaryDirectory() as downloads:
    Builder(data_dir=target.parents[1], file_format='array_record').download_and_prepare(
        download_dir=downloads,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _detection_features(classes: Sequence[str]) -> Any:
  """Returns TFDS's features of COCO and the size of the original image."""
  features = tfds_records.load_tfds().features
  return features.FeaturesDict({
      'image': features.Image(),
      'image/filename': features.Text(),
      'image/id': np.int64,
      'image/height': np.int64,
      'image/width': np.int64,
      'objects': features.Sequence({
          'area': np.float32,
          'bbox': features.BBoxFeature(),
          'is_crowd': np.bool_,
          'label': features.ClassLabel(names=list(classes))})})


def _map_ahead(pool: concurrent.futures.Executor, function: Callable[[int], Any],
               indices: Iterable[int]) -> Iterator[Any]:
  """Yields results in order, while a limited number of them are computed ahead."""
  waiting = collections.deque()
  for index in indices:
    waiting.append(pool.submit(function, index))
    if len(waiting) > _READ_AHEAD:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def _read_example(source: Source, index: int, image: Mapping[str, Any], areas: Sequence[float],
                  split: str, options: Options) -> dict[str, Any] | InputError:
  """Returns the features of an image for TFDS, or the error if it cannot be read.

  Raises:
    InputError: If the source contradicts its own ground truth.
  """
  try:
    example = source[index]
    data = _encode(source, index, np.asarray(example.image), options)
  except InputError as e:
    return e
  if example.image_id != image['id']:
    raise InputError(f'image {index} of {split} has the id {example.image_id}, but ground_truth '
                     f'lists {image["id"]} there; they must be in the same order')
  height, width = example.size
  if len(areas) != len(example.boxes):
    sides = (example.boxes[:, 2:] - example.boxes[:, :2]) * np.float32([height, width])
    areas = sides.prod(axis=-1)
  box = tfds_records.load_tfds().features.BBox
  objects = [{'area': area, 'bbox': box(*corners), 'is_crowd': crowd, 'label': label}
             for area, corners, crowd, label in zip(
                 areas, example.boxes.astype(float).tolist(), example.crowd.tolist(),
                 example.labels.tolist(), strict=True)]
  return {'image': io.BytesIO(data), 'image/filename': str(image['file_name']),
          'image/id': example.image_id, 'image/height': height, 'image/width': width,
          'objects': objects}


def _encode(source: Source, index: int, image: np.ndarray, options: Options) -> bytes:
  """Returns the file to store for an image, the source's own if its size is not changed."""
  height, width = image.shape[:2]
  if 0 < options.max_side < max(height, width):
    factor = options.max_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  elif encoded := encoded_of(source):
    return encoded(index)
  return image_files.encode_jpeg(image, options.quality)


def _check_skipped(shards: Sequence[_Shard], total: int, options: Options) -> None:
  """Raises InputError if more images cannot be read than may be left out."""
  reasons = [reason for shard in shards for _, reason in shard.skipped]
  if not reasons:
    return
  found = f'{len(reasons)} of {total} images cannot be read, such as: ' + '; '.join(reasons[:SHOWN])
  if options.on_bad_image == 'raise':
    raise InputError(f'{found}; leave these out with --on_bad_image=skip')
  if len(reasons) > options.max_bad * total or any(
      len(shard.skipped) == len(shard.indices) for shard in shards):
    raise InputError(f'{found}; more than the share {options.max_bad} that --max_bad allows')


def _check_counts(splits: Mapping[str, Any], counts: Mapping[str, int],
                  shards: Sequence[_Shard]) -> None:
  """Raises RuntimeError unless the files hold as many records as were written."""
  for split, info in splits.items():
    found = [counts[os.path.basename(path)] for path in info.filepaths]
    if not found == info.shard_lengths == [len(s.digests) for s in shards if s.split == split]:
      raise RuntimeError(f'{split}: the records of TFDS are not those that were written')


def _finish(folder: pathlib.Path, plan: Mapping[str, Any], truths: Mapping[str, dict],
            shards: Sequence[_Shard], checksums: Mapping[str, concurrent.futures.Future[str]],
            upload: prepared_files.Upload | None) -> None:
  """Writes the ground truth and prepared.json beside the records."""
  left_out = {}
  for split, truth in truths.items():
    skipped = left_out[split] = [image for shard in shards if shard.split == split
                                 for image, _ in shard.skipped]
    storage.write_text(folder / tfds_records.truth_name(split),
                       json.dumps(_without(truth, set(skipped))))
  sha256s = {path.name: checksums[path.name].result() if path.name in checksums
             else prepared_files.sha256_of(path) for path in sorted(folder.iterdir())}
  storage.write_text(folder / 'prepared.json', json.dumps({
      'plan': plan, 'skipped': [entry for shard in shards for entry in shard.skipped],
      'left_out': left_out, 'sha256': sha256s, **({'md5': upload.wait()} if upload else {}),
      'images': [[shard.contents, shard.skipped] for shard in shards]}, indent=1) + '\n')


def _without(truth: dict[str, Any], skipped: set[int]) -> dict[str, Any]:
  """Returns the ground truth of a split without some images."""
  if not skipped:
    return truth
  kept = [a for a in truth['annotations'] if a['image_id'] not in skipped]
  return truth | {'images': [i for i in truth['images'] if i['id'] not in skipped],
                  'annotations': [a | {'id': n} for n, a in enumerate(kept, start=1)]}


def _check_finished(folder: storage.Path, sources: Mapping[str, Source],
                    truths: Mapping[str, dict], options: Options,
                    pool: concurrent.futures.Executor) -> None:
  """Raises InputError unless finished data is complete and what this call would make."""
  try:
    prepared = prepared_files.read_prepared(folder)
    made, _ = prepared['plan'], dict(prepared['sha256'])
    plan = _make_plan(sources, truths, options,
                      {split: int(entry['shards']) for split, entry in made['splits'].items()})
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    if isinstance(e, InputError) or is_outage(e):
      raise
    raise InputError(f'{folder} exists, but was not made by `ppn prepare`; give another name or '
                     'version') from e
  for key, value in json.loads(json.dumps(plan)).items():
    if made.get(key) != value:
      other = (f'other data ({key} differ)' if key in ('splits', 'categories') else
               f'data made with {key}={made.get(key)}, not {value}')
      raise InputError(f'{folder} holds {other}; give another name or version, or remove it')
  if changed := prepared_files.find_changed(folder, prepared, pool):
    raise InputError(f'{changed} is missing or has changed; remove {folder} and prepare again')
  images_of_shards = prepared.get('images') or []
  for shard, (contents, skipped) in zip(_make_shards(plan), images_of_shards,
                                       strict=bool(images_of_shards)):
    source, images = sources[shard.split], truths[shard.split]['images']
    skipped_ids = {image for image, _ in skipped}
    kept = [i for i in shard.indices if images[i]['id'] not in skipped_ids]
    shard.digests.extend(pool.map(lambda i, source=source: _digest(source, i), kept))
    if shard.contents != contents:
      first, last = (images[i]['id'] for i in (shard.indices[0], shard.indices[-1]))
      raise InputError(f'{folder} was made from other images than the present ones: of split '
                       f'{shard.split!r}, some from image {first} to image {last} have changed; '
                       f'remove {folder} and prepare again, or give another version')
  logger.info(f'{folder} exists already, and every file has its checksum')
  left_out = {split: set(ids) for split, ids in prepared.get('left_out', {}).items() if ids}
  if left_out:
    logger.info(f'{sum(map(len, left_out.values()))} images were left out because they could not '
                'be read')
  if readable := sum(_is_readable(sources[split], i) for split, ids in left_out.items()
                     for i, image in enumerate(truths[split]['images']) if image['id'] in ids):
    logger.info(f'{readable} of them can be read now; remove {folder} and prepare again to add '
                'them')


def _digest(source: Source, index: int) -> bytes:
  """Returns a digest that changes with an image's own file; b'' if the source has none."""
  identify = encoded_of(source) or stamp_of(source)
  if identify is None:
    return b''
  try:
    return hashlib.sha256(identify(index)).digest()
  except InputError:  # The file cannot be read any more.
    return bytes(32)


def _is_readable(source: Source, index: int) -> bool:
  with contextlib.suppress(InputError):
    return np.asarray(source[index].image).size > 0
  return False
