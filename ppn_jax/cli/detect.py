"""`ppn detect`."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from ppn_jax.errors import InputError

HELP = """Find objects in pictures.

Writes each picture with its boxes drawn, and detections.json, to the output folder."""

SUFFIXES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm',
                      '.avif'})

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('images', nargs='+', metavar='IMAGE', help='picture files or folders')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='folder of a run')
  parser.add_argument('--output', required=True, metavar='DIR', help='folder to write to')
  parser.add_argument('--step', type=int, metavar='N', help='which checkpoint (default: newest)')
  parser.add_argument('--threshold', type=float, default=0.3, metavar='SCORE',
                      help='least score of a box that is drawn, 0 to 1; the json has all '
                           '(default: %(default)s)')


def run(args: argparse.Namespace) -> int:
  output = pathlib.Path(args.output)
  files = _find(args.images)
  pictures = _picture_paths(files, output)
  if not 0 <= args.threshold <= 1:
    raise InputError(f'--threshold={args.threshold} must lie between 0 and 1')
  from ppn_jax.files import write_text
  from ppn_jax.inference import load_predictor
  from ppn_jax.run import open_run
  predictor = load_predictor(open_run(args.workdir), step=args.step)
  found, broken = [], []
  for file, picture in zip(files, pictures, strict=True):
    try:
      found.append(_detect(predictor, file, picture, args.threshold))
    except InputError as e:
      broken.append(file)
      print(f'ppn: skipped: {e}', file=sys.stderr)
  write_text(output / 'detections.json', json.dumps(found, indent=1) + '\n')
  print(f'{len(found)} pictures and detections.json in {output} (step {predictor.step:,})')
  if broken:
    raise InputError(f'{len(broken)} of {len(files)} files could not be read, such as {broken[0]}')
  return 0


def _detect(predictor, file: pathlib.Path, picture: pathlib.Path, threshold: float) -> dict:
  """Draws what is found in one file; returns its entry in detections.json."""
  from ppn_jax.data.images import decode
  from ppn_jax.evaluation.drawing import draw_boxes, save_png
  try:
    data = file.read_bytes()
  except OSError as e:
    raise InputError(f'{file}: cannot be read: {e.strerror}') from e
  image = decode(data, name=str(file))
  height, width = image.shape[:2]
  detections, = predictor([image])
  drawn = detections.scores >= threshold
  save_png(picture, draw_boxes(image, detections.boxes[drawn], detections.labels[drawn],
                               [c.name for c in predictor.categories], detections.scores[drawn]))
  return {'file': str(file), 'picture': str(picture), 'width': width, 'height': height,
          'detections': _entries(predictor.categories, detections, height, width)}


def _entries(categories: Sequence, detections, height: int, width: int) -> list[dict]:
  """COCO rows, bbox [x, y, width, height] in pixels, with the class's name for the image's id."""
  from ppn_jax.detection.structures import Detections
  from ppn_jax.evaluation.coco import to_rows
  batch = Detections(*(field[None] for field in detections))
  names = {c.id: c.name for c in categories}
  rows = to_rows(batch, [0], [(height, width)], [True], categories)
  return [{'category': names[row['category_id']],
           **{key: row[key] for key in ('category_id', 'score', 'bbox')}} for row in rows]


def _find(paths: Sequence[str]) -> list[pathlib.Path]:
  """Picture files, those of folders in order of name.

  Raises:
    InputError: a path that does not exist, or a folder without pictures.
  """
  files = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
      if not inside:
        raise InputError(f'folder {path} has no pictures ({", ".join(sorted(SUFFIXES))})')
      files += inside
    elif path.is_file():
      files.append(path)
    else:
      raise InputError(f'no file or folder {path}')
  return files


def _picture_paths(files: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
  """Where to write each picture: one name each, and never over a picture that was given."""
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; give a folder')
  given, taken = {f.resolve() for f in files}, set()
  pictures = []
  for file in files:
    names = (f'{file.stem}.png', f'{file.name}.png',
             *(f'{file.stem}_{n}.png' for n in range(2, len(files) + 2)))
    picture = next(output / n for n in names if n not in taken)
    if picture.resolve() in given:
      raise InputError(f'--output={output} would overwrite {file}; give another folder')
    taken.add(picture.name)
    pictures.append(picture)
  return pictures
