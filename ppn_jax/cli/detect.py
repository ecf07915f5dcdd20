"""`ppn detect`."""

import argparse
import contextlib
import glob
import itertools
import logging
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ppn_jax import zoo
from ppn_jax.cli.flags import (
  add_matmul_dtype_flag,
  add_model_flags,
  allowed,
  keep_programs,
)
from ppn_jax.errors import InputError, did_you_mean

if TYPE_CHECKING:
  import numpy as np

  from ppn_jax.image_detector import ImageDetections, ImageDetector
  from ppn_jax.jobs.detection_files import Writer

logger = logging.getLogger(__name__)

HELP = """Find objects in pictures and videos.

A folder stands for the pictures and videos in it, by their suffixes; other files are reported.
Each is written with its boxes drawn to the output folder, and detections.json beside them.
Boxes in the JSON are COCO's: [x, y, width, height] in pixels. It has all detections of a
picture, and of each frame of a video those that are drawn. Videos are written as MP4,
without sound. A number is a camera, and an address such as rtsp://... a stream, which ends
with Ctrl-C or after --frames=N.

--track gives each object of a video a number that it keeps over the frames, drawn as #1 and
written as track_id. An object that is not found for a second, or as another class, gets a new one.

--format=NAME,NAME chooses what is written (default: pictures,json):
  pictures  the pictures and videos with their boxes: photographs as JPEG, others as PNG, MP4
  json      detections.json
  jsonl     a line for each picture or frame on stdout, as it is done; needs no --output
  csv       detections.csv, a row for each box
  yolo      labels/NAME.txt and classes.txt
  crops     crops/CLASS/NAME_K.jpg, the pixels of each box
All but json have the boxes of at least --threshold."""

DEFAULT_THRESHOLD = 0.3  # If none are kept with the model.
VIDEOS = frozenset({'.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv'})
WITH_IDS = frozenset({'pictures', 'json', 'jsonl', 'csv'})  # Formats that have ids of objects.

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', nargs='+', metavar='IMAGE',
                      help="pictures, videos, folders of them, or patterns such as 'photos/*.jpg'; "
                           '** matches folders of any depth; also cameras and streams')
  add_model_flags(parser, model='instead: a file that `ppn export` wrote')
  parser.add_argument('--output', metavar='DIR',
                      help='folder to write to (default: detections)')
  parser.add_argument('--format', default='pictures,json', metavar='NAMES',
                      help='what to write (default: %(default)s)')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                      help='use the moving average of the weights, or the weights themselves '
                           '(default: the average if the run keeps one)')
  parser.add_argument('--threshold', type=float, metavar='SCORE',
                      help='lowest score of a box that is drawn, 0 to 1 (default: the best of its '
                           f'class, if the model was evaluated, otherwise {DEFAULT_THRESHOLD})')
  parser.add_argument('--batch_size', type=int, metavar='N',
                      help='images at a time (default: 4, or the batch size of the exported file; '
                           '1 for cameras and streams)')
  add_matmul_dtype_flag(parser)
  parser.add_argument('--tiles', type=int, default=1, metavar='N',
                      help='also look at N overlapping tiles along the longer side, for small '
                           'objects in large pictures (default: %(default)s)')
  parser.add_argument('--overlap', type=float, default=0.2, metavar='SHARE',
                      help='share of a tile that it has in common with the next, 0 to 0.5 '
                           '(default: %(default)s)')
  parser.add_argument('--frames', type=int, metavar='N',
                      help='end a video, camera or stream after N frames')
  parser.add_argument('--track', action='store_true',
                      help='follow objects over the frames of videos, cameras and streams')


class _Options(NamedTuple):
  """Options of the detection.

  Fields:
    formats: what is written.
    tiles, overlap, frames, track: as on the command line.
    thresholds: f32 [C], lowest score of a box that is shown, by label; set once they are known.
  """
  formats: tuple[str, ...]
  tiles: int
  overlap: float
  frames: int | None
  track: bool
  thresholds: 'np.ndarray' = None  # pyright: ignore


def run(args: argparse.Namespace) -> int:
  from ppn_jax.detection.tiles import check_tiles
  from ppn_jax.jobs.detection_files import is_live, make_writers
  from ppn_jax.storage import folder_path, write_text
  options = _Options(_formats(args.format), args.tiles, args.overlap, args.frames,
                     args.track)
  if args.threshold is not None and not 0 <= args.threshold <= 1:
    raise InputError(f'--threshold={args.threshold} must be between 0 and 1')
  if args.frames is not None and args.frames < 1:
    raise InputError(f'--frames={args.frames} must be at least 1')
  check_tiles(args.tiles, args.overlap)
  writes_files = options.formats != ('jsonl',)
  output = folder_path(args.output or 'detections', '--output')
  live = [name for name in args.images if is_live(name)]
  if len(live) > 1:
    raise InputError(f'{" and ".join(live)}: one camera or stream at a time')
  files = _find([name for name in args.images if name not in live]) if live != args.images else []
  if options.track:
    _check_tracking(files, options.formats)
  drawings = _drawing_paths(files, output, live, drawn='pictures' in options.formats)
  import json

  from ppn_jax.telemetry.host_memory import keep_freed_memory
  keep_freed_memory()
  keep_programs()
  detector = _load(args, usual_batch=1 if live else 4)
  options = options._replace(
      thresholds=detector.thresholds_by_label(args.threshold, DEFAULT_THRESHOLD))
  writers = make_writers(options.formats, output, detector.categories, track=options.track)
  entries, broken, interrupted = _detect_all(detector, files, live, drawings, options, writers)
  if len(files) == 1 and broken and not live:
    raise broken[files[0]]
  for writer in writers:
    writer.close()
  # The lines of JSON have stdout for themselves.
  out = sys.stderr if 'jsonl' in options.formats else sys.stdout
  if 'json' in options.formats:
    write_text(output / 'detections.json', json.dumps(entries, indent=1) + '\n')
  if writes_files:
    written = {'json': 'detections.json', 'csv': 'detections.csv', 'yolo': 'labels',
               'crops': 'crops'}
    names = [written[name] for name in options.formats if name in written]
    step = '' if detector.step is None else f' (step {detector.step:,})'
    print(f'{_count(entries)}{"".join(f" and {name}" for name in names)} in {output}{step}',
          file=out)
  _note_if_none(detector, entries, options.thresholds, out)
  if broken:
    raise InputError(f'{len(broken)} of {len(files)} files could not be read, such as '
                     f'{next(iter(broken))}')
  if interrupted:
    raise KeyboardInterrupt(f'after {len(entries[-1]["frames"])} frames')
  return 0


def _formats(text: str) -> tuple[str, ...]:
  """Returns the formats that --format names, each once."""
  from ppn_jax.jobs.detection_files import FORMATS
  names = tuple(dict.fromkeys(name.strip() for name in text.split(',')))
  for name in names:
    if name not in FORMATS:
      raise InputError(f'--format={text}: {did_you_mean(name, FORMATS)}')
  return names


def _check_tracking(files: Sequence[pathlib.Path], formats: Sequence[str]) -> None:
  """Raises InputError if there is a picture, nothing shows ids, or the library is missing."""
  from ppn_jax.tracking import load_library
  pictures = [file for file in files if not _is_video(file)]
  if pictures:
    more = f' and {len(pictures) - 1} more' if len(pictures) > 1 else ''
    raise InputError('--track follows objects over the frames of videos, cameras and streams; '
                     f'leave it or the pictures out: {pictures[0]}{more}')
  if not WITH_IDS.intersection(formats):
    raise InputError(f'--track: {",".join(formats)} has no place for ids; add one of '
                     f'{",".join(sorted(WITH_IDS))} to --format')
  load_library()


def _load(args: argparse.Namespace, usual_batch: int) -> 'ImageDetector':
  from ppn_jax.export.runtimes import is_export
  from ppn_jax.export.weights_file import is_weights_file
  from ppn_jax.image_detector import load
  path = args.workdir if args.model is None else args.model
  if args.model is None and (is_weights_file(path) or is_export(path)):
    raise InputError(f'--workdir={path} is not the folder of a run; an exported file is given by '
                     f'--model={path}')
  if args.model is not None and not is_weights_file(path) and not is_export(path):
    raise InputError(f'--model={path}: no exported file there; the folder of a run is given '
                     f'by --workdir{zoo.suggestion(path)}')
  if args.model is not None and (args.step is not None or args.ema is not None):
    raise InputError('--step and --ema choose among the checkpoints of a run, and '
                     f'--model={path} is an exported file; leave them out')
  batch_size = args.batch_size
  if batch_size is None and (args.model is None or is_weights_file(path)):
    batch_size = usual_batch
  return load(path, step=args.step, ema=args.ema, batch_size=batch_size,
              matmul_dtype=args.matmul_dtype, allow=allowed(args))


def _count(entries: Sequence[dict]) -> str:
  videos = sum('frames' in entry for entry in entries)
  pictures = len(entries) - videos
  return (f'{pictures} picture{"s" * (pictures != 1)}'
          + (f', {videos} video{"s" * (videos != 1)}' if videos else ''))


def _note_if_none(detector: 'ImageDetector', entries: Sequence[dict], thresholds: 'np.ndarray',
                  out: TextIO) -> None:
  """Prints the best score if no box is drawn: is the detector bad, or the threshold too high?"""
  least = {c.id: t for c, t in zip(detector.categories, thresholds.tolist(), strict=True)}
  scores = [(found['score'], least[found['category_id']]) for entry in entries
            for frame in entry.get('frames', [entry]) for found in frame['detections']]
  if not any(score >= threshold for score, threshold in scores):
    low, high = thresholds.min(), thresholds.max()
    what = (f'--threshold={low:g} or more' if low == high else
            f'the threshold of its class, {low:.2g} to {high:.2g}; give a lower --threshold')
    best = f', the best has {max(scores)[0]:.2g}' if scores else ''
    print(f'no box is drawn: none scores {what}{best}', file=out)


def _detect_all(detector: 'ImageDetector', files: Sequence[pathlib.Path], live: Sequence[str],
                drawings: Sequence[pathlib.Path], options: _Options, writers: Sequence['Writer']
                ) -> tuple[list[dict], dict[pathlib.Path, InputError], bool]:
  """Detects objects in files and then in a camera or stream.

  Returns:
    The entries of detections.json in order of the files, the errors of the others, and whether
    Ctrl-C has ended the camera or stream.
  """
  entries: dict[pathlib.Path, dict] = {}
  broken: dict[pathlib.Path, InputError] = {}

  def skip(file: pathlib.Path, error: InputError) -> None:
    broken[file] = error
    if len(files) > 1:
      logger.warning(f'skipped: {error}')

  drawing_of = dict(zip([*files, *live], drawings, strict=True))
  opened = _open_pictures([f for f in files if not _is_video(f)], skip)
  for file, image, found in _detect_stream(detector, opened, options):
    entries[file] = _use_picture(detector, file, drawing_of[file], image, found, options, writers)
  for file in filter(_is_video, files):
    try:
      entries[file], _ = _use_video(detector, str(file), drawing_of[file], options, writers)
    except InputError as e:
      skip(file, e)
  done, interrupted = [entries[file] for file in files if file in entries], False
  for source in live:
    entry, interrupted = _use_video(detector, source, drawing_of[source], options, writers)
    done.append(entry)
  return done, broken, interrupted


def _is_video(file: pathlib.Path) -> bool:
  return file.suffix.lower() in VIDEOS


def _open_pictures(files: Sequence[pathlib.Path], skip) -> Iterator[tuple[pathlib.Path, Any]]:
  from ppn_jax.data.images import decoding
  for file in files:
    try:
      yield file, decoding.load(str(file))
    except InputError as e:
      skip(file, e)


def _detect_stream(detector: 'ImageDetector', images: Iterable[tuple[Any, 'np.ndarray']],
                   options: _Options) -> Iterator[tuple[Any, 'np.ndarray', 'ImageDetections']]:
  """Yields (key, image, detections) for each (key, image), with one batch in memory at a time."""
  waiting = []

  def pixels() -> Iterator['np.ndarray']:
    for key, image in images:
      waiting.append((key, image))
      yield image

  for found in detector.stream(pixels(), threshold=0.0, tiles=options.tiles,
                               overlap=options.overlap):
    yield *waiting.pop(0), found


def _use_picture(detector: 'ImageDetector', file: pathlib.Path, drawing: pathlib.Path,
                 image: 'np.ndarray', found: 'ImageDetections', options: _Options,
                 writers: Sequence['Writer']) -> dict:
  """Writes what was found in a picture, and returns its entry of detections.json."""
  from ppn_jax.data.images.decoding import MAX_JPEG_SIDE
  from ppn_jax.jobs.detection_files import Shown, rows_of
  from ppn_jax.visualization.drawing import save_picture
  height, width = image.shape[:2]
  if drawing.suffix == '.jpg' and max(height, width) > MAX_JPEG_SIDE:
    drawing = drawing.with_suffix('.png')
  drawn = {}
  if 'pictures' in options.formats:
    save_picture(drawing, _draw(detector, image, found.at_least(options.thresholds)))
    drawn = {'picture': str(drawing)}
  for writer in writers:
    writer.write(Shown(str(file), drawing.stem, image, found.at_least(options.thresholds)))
  return {'file': str(file), **drawn, 'width': width, 'height': height,
          'detections': rows_of(found, detector.categories)}


def _use_video(detector: 'ImageDetector', source: str, drawing: pathlib.Path, options: _Options,
               writers: Sequence['Writer']) -> tuple[dict, bool]:
  """Writes what was found in a video, camera or stream.

  Returns:
    Its entry of detections.json, and whether Ctrl-C has ended it; only of cameras and streams.
  """
  from rich.console import Console
  from rich.progress import track

  from ppn_jax.data.images.video import LiveReader, VideoReader, VideoWriter
  from ppn_jax.jobs.detection_files import Shown, is_live, rows_of
  from ppn_jax.tracking import Tracker
  frames, console, interrupted = [], Console(stderr=True), False
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(LiveReader(source) if is_live(source)
                                 else VideoReader(pathlib.Path(source)))
    live = isinstance(reader, LiveReader)
    rate = reader.frames_per_second
    total = options.frames if live else min(reader.stated or 0, options.frames or 2**60) or None
    drawn = stack.enter_context(VideoWriter(drawing, reader.size, rate)
                                if 'pictures' in options.formats else contextlib.nullcontext())
    tracker = Tracker(options.thresholds, rate) if options.track else None
    written = 0
    try:
      for number, image, found in track(
          _detect_stream(detector, enumerate(itertools.islice(reader, options.frames)), options),
          source, total=total, console=console, transient=True,
          disable=not console.is_terminal):
        seconds = round(reader.seconds if live else number / rate, 3)
        if tracker is not None:
          found = found.tracked_by(tracker)
        shown = found.at_least(options.thresholds)
        # A live picture stays until the next one, so that the video has the right length.
        repeats = max(1, round(seconds * rate) + 1 - written) if live else 1
        if drawn is not None:
          picture = _draw(detector, image, shown)
          for _ in range(repeats):
            drawn.write(picture)
        written += repeats
        for writer in writers:
          writer.write(Shown(source, f'{drawing.stem}_{number:06}', image, shown, number, seconds))
        frames.append({'frame': number, 'seconds': seconds,
                       'detections': rows_of(shown, detector.categories)})
    except KeyboardInterrupt:
      if not live or not frames:
        raise
      interrupted = True
    if live:
      logger.info(f'{source}: frames: {reader.count} used, {reader.dropped} left out to keep up')
    elif options.frames is None and reader.cut_short:
      logger.warning(f'{source} ends after {reader.count} of {reader.stated} frames')
    height, width = reader.size
  return {'file': source, **({'video': str(drawing)} if drawn is not None else {}), 'width': width,
          'height': height, 'frames_per_second': rate, 'frames': frames}, interrupted


def _draw(detector: 'ImageDetector', image: 'np.ndarray', shown: 'ImageDetections') -> 'np.ndarray':
  import numpy as np

  from ppn_jax.visualization.drawing import draw_boxes
  size = np.float32([*image.shape[:2]] * 2)
  notes = None if shown.track_ids is None else [f'#{track}' for track in shown.track_ids]
  return draw_boxes(image, shown.boxes / size, shown.labels,
                    [c.name for c in detector.categories], shown.scores, notes=notes)


def _find(paths: Sequence[str]) -> list[pathlib.Path]:
  """Returns picture and video files, each once; those of folders and patterns sorted by name.

  Args:
    paths: Files, folders and patterns.

  Raises:
    InputError: If a path does not exist, or a folder or pattern has no pictures or videos.
  """
  from ppn_jax.data.images import folders
  from ppn_jax.data.images.decoding import SUFFIXES
  suffixes, files = SUFFIXES | VIDEOS, []
  for path in paths:
    if glob.has_magic(path) and not os.path.exists(path):
      matches = sorted(glob.glob(path, recursive=True))
      kept = [p for p in matches if folders.has_suffix(p, suffixes) and os.path.isfile(p)]
      rest = sorted(set(matches).difference(kept))
      # With **, the contents of folders match as well.
      others = folders.describe_others(p for p in rest if '**' not in path or os.path.isfile(p))
      missing = f'no picture or video matches {path}'
    elif os.path.isdir(path):
      kept, others = folders.list_folder(path, suffixes)
      missing = f'folder {path} has no pictures or videos'
    elif os.path.isfile(path):
      kept, others = [path], ''
    else:
      raise InputError(f'no file or folder {path}')
    if not kept:
      raise InputError(f'{missing} ({others or "nothing is there"}; legal: '
                       f'{", ".join(sorted(suffixes))})')
    if others:
      logger.warning(f'{path}: {others}')
    files += map(pathlib.Path, kept)
  return list(dict.fromkeys(files))


def _drawing_paths(files: Sequence[pathlib.Path], output: pathlib.Path, live: Sequence[str] = (),
                   *, drawn: bool = True) -> list[pathlib.Path]:
  """Returns where to write each drawing: a different name each, and never that of an input.

  Cameras and streams come after the files. If nothing is `drawn`, these are just names.
  """
  from ppn_jax.jobs.detection_files import file_name
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; give a folder')
  # Some file systems do not distinguish A.png from a.png.
  given = {str(f.resolve()).lower() for f in files}
  places = {f.resolve().parent for f in files}
  taken: set[str] = set()
  drawings = []
  for file in files:
    # A photograph stays a JPEG: as PNG it would be many times larger and slower to write.
    end = ('.mp4' if _is_video(file) else
           '.jpg' if file.suffix.lower() in ('.jpg', '.jpeg', '.jpe', '.jfif') else '.png')
    stems = (file.stem, file.name, *(f'{file.stem}_{n}' for n in range(2, len(files) + 2)))
    # Labels and crops of a picture are called as its drawing without the suffix, whatever that is.
    key = (lambda stem: f'{stem}.mp4'.lower()) if end == '.mp4' else str.lower
    stem = next(s for s in stems if key(s) not in taken)
    taken.add(key(stem))
    drawing = output / f'{stem}{end}'
    if drawn and (str(drawing.resolve()).lower() in given
                  or (drawing.exists() and drawing.resolve().parent in places)):
      raise InputError(f'--output={output} would overwrite {drawing}; give another folder')
    drawings.append(drawing)
  for source in live:
    name = f'camera_{source}' if source.isdecimal() else file_name(source)
    while f'{name}.mp4'.lower() in taken:
      name += '_'
    drawings.append(output / f'{name}.mp4')
  return drawings
