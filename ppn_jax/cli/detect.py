"""`ppn detect`."""

import argparse
import glob
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ppn_jax import zoo
from ppn_jax.cli.flags import add_model_flags, allowed, keep_programs
from ppn_jax.errors import InputError

if TYPE_CHECKING:
  import numpy as np

  from ppn_jax.image_detector import ImageDetections, ImageDetector

logger = logging.getLogger(__name__)

HELP = """Find objects in pictures and videos.

A folder stands for the pictures and videos in it, by their suffixes; other files are reported.
Each is written with its boxes drawn to the output folder, and detections.json beside them.
Boxes in the JSON are COCO's: [x, y, width, height] in pixels. It has all detections of a
picture, and of each frame of a video those that are drawn. Videos are written as MP4,
without sound."""

DEFAULT_THRESHOLD = 0.3  # If none are kept with the model.
VIDEOS = frozenset({'.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv'})

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', nargs='+', metavar='IMAGE',
                      help="pictures, videos, folders of them, or patterns such as 'photos/*.jpg'; "
                           '** matches folders of any depth')
  add_model_flags(parser, model='instead: a file that `ppn export` wrote')
  parser.add_argument('--output', required=True, metavar='DIR', help='folder to write to')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                      help='use the moving average of the weights, or the weights themselves '
                           '(default: the average if the run keeps one)')
  parser.add_argument('--threshold', type=float, metavar='SCORE',
                      help='lowest score of a box that is drawn, 0 to 1 (default: the best of its '
                           f'class, if the model was evaluated, otherwise {DEFAULT_THRESHOLD})')
  parser.add_argument('--batch_size', type=int, metavar='N',
                      help='images at a time (default: 4, or the batch size of the exported file)')


def run(args: argparse.Namespace) -> int:
  from ppn_jax.storage import folder_path, write_text
  output = folder_path(args.output, '--output')
  files = _find(args.images)
  drawings = _drawing_paths(files, output)
  if args.threshold is not None and not 0 <= args.threshold <= 1:
    raise InputError(f'--threshold={args.threshold} must be between 0 and 1')
  import json

  from ppn_jax.telemetry.host_memory import keep_freed_memory
  keep_freed_memory()
  keep_programs()
  detector = _load(args)
  thresholds = detector.thresholds_by_label(args.threshold, DEFAULT_THRESHOLD)
  entries, broken = _detect_all(detector, files, drawings, thresholds)
  if len(files) == 1 and broken:
    raise broken[files[0]]
  write_text(output / 'detections.json', json.dumps(entries, indent=1) + '\n')
  print(f'{_count(entries)} and detections.json in {output} (step {detector.step:,})')
  _note_if_none(detector, entries, thresholds)
  if broken:
    raise InputError(f'{len(broken)} of {len(files)} files could not be read, such as '
                     f'{next(iter(broken))}')
  return 0


def _load(args: argparse.Namespace) -> 'ImageDetector':
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
    batch_size = 4
  return load(path, step=args.step, ema=args.ema, batch_size=batch_size, allow=allowed(args))


def _count(entries: Sequence[dict]) -> str:
  videos = sum('frames' in entry for entry in entries)
  pictures = len(entries) - videos
  return (f'{pictures} picture{"s" * (pictures != 1)}'
          + (f', {videos} video{"s" * (videos != 1)}' if videos else ''))


def _note_if_none(detector: 'ImageDetector', entries: Sequence[dict], thresholds: 'np.ndarray'
                  ) -> None:
  """Prints the best score if no box is drawn: is the detector bad, or the threshold too high?"""
  least = {c.id: t for c, t in zip(detector.categories, thresholds.tolist(), strict=True)}
  scores = [(found['score'], least[found['category_id']]) for entry in entries
            for frame in entry.get('frames', [entry]) for found in frame['detections']]
  if not any(score >= threshold for score, threshold in scores):
    low, high = thresholds.min(), thresholds.max()
    what = (f'--threshold={low:g} or more' if low == high else
            f'the threshold of its class, {low:.2g} to {high:.2g}; give a lower --threshold')
    best = f', the best has {max(scores)[0]:.2g}' if scores else ''
    print(f'no box is drawn: none scores {what}{best}')


def _detect_all(detector: 'ImageDetector', files: Sequence[pathlib.Path],
                drawings: Sequence[pathlib.Path], thresholds: 'np.ndarray'
                ) -> tuple[list[dict], dict[pathlib.Path, InputError]]:
  """Returns the entries of detections.json in order of the files, and the errors of the others."""
  entries: dict[pathlib.Path, dict] = {}
  broken: dict[pathlib.Path, InputError] = {}

  def skip(file: pathlib.Path, error: InputError) -> None:
    broken[file] = error
    if len(files) > 1:
      logger.warning(f'skipped: {error}')

  drawing_of = dict(zip(files, drawings, strict=True))
  opened = _open_pictures([f for f in files if not _is_video(f)], skip)
  for file, image, found in _detect_stream(detector, opened):
    entries[file] = _draw_picture(detector, file, drawing_of[file], image, found, thresholds)
  for file in filter(_is_video, files):
    try:
      entries[file] = _draw_video(detector, file, drawing_of[file], thresholds)
    except InputError as e:
      skip(file, e)
  return [entries[file] for file in files if file in entries], broken


def _is_video(file: pathlib.Path) -> bool:
  return file.suffix.lower() in VIDEOS


def _open_pictures(files: Sequence[pathlib.Path], skip) -> Iterator[tuple[pathlib.Path, Any]]:
  from ppn_jax.data.images import decoding
  for file in files:
    try:
      yield file, decoding.load(str(file))
    except InputError as e:
      skip(file, e)


def _detect_stream(detector: 'ImageDetector', images: Iterator[tuple[Any, 'np.ndarray']]
                   ) -> Iterator[tuple[Any, 'np.ndarray', 'ImageDetections']]:
  """Yields (key, image, detections) for each (key, image), with one batch in memory at a time."""
  waiting = []

  def pixels() -> Iterator['np.ndarray']:
    for key, image in images:
      waiting.append((key, image))
      yield image

  for found in detector.stream(pixels(), threshold=0.0):
    yield *waiting.pop(0), found


def _draw_picture(detector: 'ImageDetector', file: pathlib.Path, drawing: pathlib.Path,
                  image: 'np.ndarray', found: 'ImageDetections', thresholds: 'np.ndarray') -> dict:
  from ppn_jax.visualization.drawing import save_png
  height, width = image.shape[:2]
  save_png(drawing, _draw(detector, image, found, thresholds))
  return {'file': str(file), 'picture': str(drawing), 'width': width, 'height': height,
          'detections': _entries(detector, found)}


def _draw_video(detector: 'ImageDetector', file: pathlib.Path, drawing: pathlib.Path,
                thresholds: 'np.ndarray') -> dict:
  from rich.console import Console
  from rich.progress import track

  from ppn_jax.data.images.video import VideoReader, VideoWriter
  frames, console = [], Console(stderr=True)
  with VideoReader(file) as reader:
    rate = reader.frames_per_second
    with VideoWriter(drawing, reader.size, rate) as writer:
      for number, image, found in track(
          _detect_stream(detector, enumerate(reader)), str(file), total=reader.stated or None,
          console=console, transient=True, disable=not console.is_terminal):
        writer.write(_draw(detector, image, found, thresholds))
        frames.append({'frame': number, 'seconds': round(number / rate, 3),
                       'detections': _entries(detector, found, thresholds)})
    if reader.cut_short:
      logger.warning(f'{file} ends after {reader.count} of {reader.stated} frames')
    height, width = reader.size
  return {'file': str(file), 'video': str(drawing), 'width': width, 'height': height,
          'frames_per_second': rate, 'frames': frames}


def _draw(detector: 'ImageDetector', image: 'np.ndarray', found: 'ImageDetections',
          thresholds: 'np.ndarray') -> 'np.ndarray':
  import numpy as np

  from ppn_jax.visualization.drawing import draw_boxes
  shown = found.scores >= thresholds[found.labels]
  size = np.float32([*image.shape[:2]] * 2)
  return draw_boxes(image, found.boxes[shown] / size, found.labels[shown],
                    [c.name for c in detector.categories], found.scores[shown])


def _entries(detector: 'ImageDetector', found: 'ImageDetections',
             thresholds: 'np.ndarray | None' = None) -> list[dict]:
  """Returns detections as COCO rows, with the class's name in place of the image's id."""
  shown = slice(None) if thresholds is None else found.scores >= thresholds[found.labels]
  return [{'category': detector.categories[label].name,
           'category_id': detector.categories[label].id, 'score': score,
           'bbox': [xmin, ymin, xmax - xmin, ymax - ymin]}
          for label, score, (ymin, xmin, ymax, xmax) in zip(
              found.labels[shown], found.scores[shown].tolist(), found.boxes[shown].tolist(),
              strict=True)]


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


def _drawing_paths(files: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
  """Returns where to write each drawing: a different name each, and never that of an input."""
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; give a folder')
  given, taken = {f.resolve() for f in files}, set()
  drawings = []
  for file in files:
    end = '.mp4' if _is_video(file) else '.png'
    names = (f'{file.stem}{end}', f'{file.name}{end}',
             *(f'{file.stem}_{n}{end}' for n in range(2, len(files) + 2)))
    # Some file systems do not distinguish A.png from a.png.
    drawing = next(output / n for n in names if n.lower() not in taken)
    if drawing.resolve() in given:
      raise InputError(f'--output={output} would overwrite {file}; give another folder')
    taken.add(drawing.name.lower())
    drawings.append(drawing)
  return drawings
