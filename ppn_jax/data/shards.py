"""Shards of ArrayRecord files, written by several processes, each whole or not there."""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import cv2
import numpy as np

from ppn_jax import files
from ppn_jax.data import images as image_files
from ppn_jax.data import tfds_records
from ppn_jax.errors import InputError


class Storage(NamedTuple):
  """How images are stored.

  Attributes:
    max_side: images with a longer side of more pixels are made smaller; 0 leaves all as they are.
    quality: of the JPEG files that are made then, 1 to 100.
  """
  max_side: int
  quality: int


class Job(NamedTuple):
  """One shard: images start .. of a split, as many as there are ids."""
  path: pathlib.Path
  split: str
  start: int
  ids: Sequence[int]
  names: Sequence[str]
  areas: Sequence[np.ndarray]  # f64, of each image's boxes in pixels.


class Shard(NamedTuple):
  """What is known of a shard that is finished."""
  records: int
  data_bytes: int  # Of all records.
  file_bytes: int
  sha256: str
  skipped: list  # [image id, reason] of images that cannot be read.
  contents: str = ''  # Digest of the images' own files; see `digest_images`.


def write_shards(jobs: Sequence[Job], sources: Mapping[str, Any], classes: Sequence[str],
                 storage: Storage, processes: int, progress: Callable[[int], None]) -> list[Shard]:
  """Writes those of the shards that are not there yet, whose images have changed since, or that
  lack images that can be read by now.

  Args:
    jobs: all shards.
    sources: split -> `sources.Source`.
    classes: names in order of label.
    storage: how images are stored.
    processes: how many work; 1 works in this one.
    progress: called now and then with the images done.

  Returns:
    One for each job. Images that cannot be read are left out and listed there.

  Raises:
    InputError: a file cannot be written, or a source contradicts its own `ground_truth`.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    shards = list(pool.map(lambda job: read_finished(job.path), jobs))
    current = list(pool.map(
        lambda job, shard: shard and _is_current(sources[job.split], job, shard),
        jobs, shards))
  shards = [shard if same else None for shard, same in zip(shards, current, strict=True)]
  todo = [i for i, shard in enumerate(shards) if shard is None]
  before = sum(len(job.ids) for job, shard in zip(jobs, shards, strict=True) if shard)
  progress(before)
  run = _run_here if processes == 1 else _run_in_processes
  for at, shard in run([jobs[i] for i in todo], (dict(sources), tuple(classes), storage),
                       min(processes, len(todo)), lambda done: progress(before + done)):
    shards[todo[at]] = shard
  return shards


def read_finished(path: pathlib.Path) -> Shard | None:
  """The note beside a shard, if it is there and the shard is what it says."""
  try:
    shard = Shard(**json.loads(_note(path).read_text('utf-8')))
    same = path.stat().st_size == shard.file_bytes and checksum(path) == shard.sha256
  except (OSError, ValueError, TypeError):
    return None
  return shard if same else None


def _is_current(source: Any, job: Job, shard: Shard) -> bool:
  """Returns whether the shard holds all that it can of its images as they are now."""
  return (digest_images(source, job, shard.skipped) == shard.contents
          and not readable_now(source, job, [image for image, _ in shard.skipped]))


def digest_images(source: Any, job: Job, skipped: Sequence[Sequence[Any]]) -> str:
  """Returns a digest of the files of a shard's images, which tells whether any has changed.

  Args:
    source: of the images.
    job: which of them.
    skipped: [image id, reason] of those that are left out.

  Returns:
    The digest; '' of a source that gives neither files nor stamps.
  """
  gone, digest = {image for image, _ in skipped}, hashlib.sha256()
  for k, image in enumerate(job.ids):
    if image not in gone:
      digest.update(_digest_image(source, job.start + k))
  return digest.hexdigest() if _tells_changes(source) else ''


def _digest_image(source: Any, index: int) -> bytes:
  try:
    data = (source.encoded if hasattr(source, 'encoded') else source.stamp)(index)
  except (InputError, AttributeError):  # Of a file that is gone, or a source that cannot tell.
    return bytes(32)
  return hashlib.sha256(data).digest()


def _tells_changes(source: Any) -> bool:
  return hasattr(source, 'encoded') or hasattr(source, 'stamp')
def readable_now(source: Any, job: Job, skipped: Sequence[int]) -> list[int]:
  """Returns the ids of those images of a shard that were left out, but can be read now."""
  places = {image: job.start + k for k, image in enumerate(job.ids)}
  found = []
  for image in skipped:
    with contextlib.suppress(InputError):
      np.asarray(source[places[image]].image)
      found.append(image)
  return found


def remove_notes(folder: pathlib.Path) -> None:
  """Removes the notes beside shards, which are needed only until all are there."""
  for note in folder.glob('*.array_record-*.json'):
    note.unlink(missing_ok=True)


def checksum(path: pathlib.Path) -> str:
  """SHA-256 of a file."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _note(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.json')


class _Contradiction(Exception):
  """A source is at odds with itself, and no single image is to blame."""


class _Worker:
  """Writes shards; one in each process."""

  def __init__(self, sources: Mapping[str, Any], classes: Sequence[str], storage: Storage,
               count: Callable[[], None]):
    self._sources, self._storage, self._count = sources, storage, count
    self._to_bytes = tfds_records.Writer(classes)
    cv2.setNumThreads(1)  # The processes already fill the cores.

  def write(self, job: Job) -> Shard:
    """Writes a shard under another name, then gives it its own, then leaves a note beside it."""
    part = job.path.with_name(f'{job.path.name}.part')
    skipped = []
    with _saying_where(part):
      records, data_bytes, contents = self._write_records(job, part, skipped)
      with part.open('rb') as file:
        os.fsync(file.fileno())
      shard = Shard(records, data_bytes, part.stat().st_size, checksum(part), skipped, contents)
      os.replace(part, job.path)
      files.write_text(_note(job.path), json.dumps(shard._asdict()))
    return shard

  def _write_records(self, job: Job, part: pathlib.Path, skipped: list) -> tuple[int, int, str]:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    writer = ArrayRecordWriter(os.fspath(part), 'group_size:1')
    records = data_bytes = 0
    source, digest = self._sources[job.split], hashlib.sha256()
    try:
      for k in range(len(job.ids)):
        # Before the image is read, so that a change in between shows.
        contents = _digest_image(source, job.start + k)
        try:
          data = self._to_bytes(self._record(job, k))
        except InputError as e:
          skipped.append([job.ids[k], str(e)])
        else:
          writer.write(data)
          digest.update(contents)
          records, data_bytes = records + 1, data_bytes + len(data)
        self._count()
    finally:
      writer.close()
    reader = ArrayRecordReader(os.fspath(part))
    if reader.num_records() != records:
      raise RuntimeError(f'{reader.num_records()} records of {records} arrived')
    reader.close()
    return records, data_bytes, digest.hexdigest() if _tells_changes(source) else ''

  def _record(self, job: Job, k: int) -> tfds_records.Record:
    """Image k of a shard. Raises InputError if it cannot be read."""
    source = self._sources[job.split]
    example = source[job.start + k]
    if example.image_id != job.ids[k]:
      raise _Contradiction(f'image {job.start + k} of {job.split} has the id {example.image_id}, '
                           f'but ground_truth lists {job.ids[k]} there; they must be in one order')
    height, width = example.size
    areas = job.areas[k]
    if len(areas) != len(example.boxes):
      sides = (example.boxes[:, 2:] - example.boxes[:, :2]) * np.float32([height, width])
      areas = sides.prod(axis=-1)
    data = encode(source, job.start + k, np.asarray(example.image), self._storage)
    return tfds_records.Record(data, example.boxes, example.labels, example.crowd, areas,
                               example.image_id, job.names[k], (height, width))


def encode(source: Any, index: int, image: np.ndarray, storage: Storage) -> bytes:
  """The file to store for an image: the source's own where that will do.

  Args:
    source: a `sources.Source`; its method `encoded(index)`, if it has one, gives files.
    index: of the image.
    image: u8 [H, W, 3], its pixels.
    storage: how images are stored.
  """
  height, width = image.shape[:2]
  if 0 < storage.max_side < max(height, width):
    factor = storage.max_side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  elif hasattr(source, 'encoded'):
    return source.encoded(index)
  return image_files.encode_jpeg(image, storage.quality)


@contextlib.contextmanager
def _saying_where(path: pathlib.Path) -> Iterator[None]:
  """Turns what goes wrong with writing a file into an InputError that names it."""
  try:
    yield
  except OSError as e:
    raise InputError(f'{path}: cannot be written: {e.strerror or e}') from e
  except RuntimeError as e:  # ArrayRecord's.
    raise InputError(f'{path}: cannot be written: {" ".join(str(e).split())}') from e
  except _Contradiction as e:
    raise InputError(str(e)) from e


def _run_here(jobs: Sequence[Job], work: tuple, processes: int,
              progress: Callable[[int], None]) -> Iterator[tuple[int, Shard]]:
  del processes
  done = 0
  def count() -> None:
    nonlocal done
    done += 1
    progress(done)
  worker = _Worker(*work, count)
  for at, job in enumerate(jobs):
    yield at, worker.write(job)


def _run_in_processes(jobs: Sequence[Job], work: tuple, processes: int,
                      progress: Callable[[int], None]) -> Iterator[tuple[int, Shard]]:
  if not jobs:
    return
  try:
    pickled = pickle.dumps(work)
  except Exception as e:  # Whatever a user's own source holds.
    raise InputError(f'the data cannot be handed to other processes: {e}; '
                     'use --processes=1') from e
  context = multiprocessing.get_context('spawn')
  done, stop = context.Value('q', 0), context.Value('b', 0)
  pool = concurrent.futures.ProcessPoolExecutor(
      processes, mp_context=context, initializer=_start_worker, initargs=(pickled, done, stop))
  try:
    numbers = {pool.submit(_write, job): at for at, job in enumerate(jobs)}
    waiting = set(numbers)
    while waiting:
      finished, waiting = concurrent.futures.wait(
          waiting, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
      progress(done.value)
      for future in finished:
        yield numbers[future], future.result()
  except BrokenProcessPool as e:
    raise InputError('a process was killed, perhaps for lack of memory; shards that are finished '
                     'stay: run the same again, with fewer --processes') from e
  finally:
    stop.value = 1
    pool.shutdown(cancel_futures=True)


_worker: _Worker | None = None


class _Stopped(Exception):
  """Nobody waits for the shard any more."""


def _start_worker(pickled: bytes, done: Any, stop: Any) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears it too and sets `stop`.
  threading.Thread(target=_die_with_parent, daemon=True).start()

  def count() -> None:
    if stop.value:
      raise _Stopped
    with done.get_lock():
      done.value += 1

  global _worker
  _worker = _Worker(*pickle.loads(pickled), count)


def _die_with_parent() -> None:
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _write(job: Job) -> Shard:
  return _worker.write(job)
