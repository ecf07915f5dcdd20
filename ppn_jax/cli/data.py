"""`ppn data`."""

import argparse
import json
import os
import shlex
import sys

from ppn_jax.cli.flags import CONFIG_HELP

HELP = f"""Look at a data set before training: boxes, classes, and their anchors.

With a FOLDER instead of --config, finds out which format the data in it has and writes a config
file that trains on it.
Prints sizes, classes and how many boxes get an anchor on which level, with the share that no
anchor fits. --output adds data.html, with images as training will see them, and data.json.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('folder', nargs='?', metavar='FOLDER',
                      help='a folder with images and annotations of any known format')
  parser.add_argument('--config', metavar='FILE', help='a config, such as own_data:coco_json')
  parser.add_argument('--format', default='', metavar='NAME',
                      help='the format to use if FOLDER has annotations in several, such as '
                           'coco_json')
  parser.add_argument('--write', metavar='FILE',
                      help='the config file to write for FOLDER (default: its name and '
                           '_config.py, in the current folder)')
  parser.add_argument('--split', choices=('train', 'eval'), default='train',
                      help='data.train, augmented, or data.eval (default: %(default)s)')
  parser.add_argument('--samples', type=int, default=1000, metavar='N',
                      help='how many images to look at (default: %(default)s)')
  parser.add_argument('--output', metavar='DIR', help='folder for data.html and data.json')


def run(args: argparse.Namespace) -> int:
  from ppn_jax.config_files import load_config
  from ppn_jax.errors import InputError
  if bool(args.config) == bool(args.folder):
    raise InputError('ppn data needs either a FOLDER, or --config=NAME, such as '
                     '--config=own_data:coco_json')
  if args.folder and not os.path.isdir(args.folder):
    from ppn_jax.config_files import config_names
    name = args.folder.partition(':')[0]
    meant = name.endswith('.py') or name in config_names()
    advice = ''
    if args.folder.startswith('gs://'):
      advice = ('; a format is recognised on this machine only: copy the folder, or give '
                '--config=own_data:FORMAT with paths in the bucket')
    elif meant:
      advice = f'; did you mean --config={args.folder}?'
    elif os.path.exists(args.folder):
      advice = '; it is a file: give the folder that it is in, and unpack an archive first'
    raise InputError(f'no folder {args.folder!r}{advice}')
  if args.config and (args.format or args.write):
    raise InputError('--format and --write go with a FOLDER, not with --config')
  from ppn_jax import storage
  from ppn_jax.jobs import data_statistics
  output = storage.folder_path(args.output, '--output') if args.output else None
  if output and output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; give a folder')
  path = _write_config(args) if args.folder else args.config
  config = load_config(path, args.overrides)
  found = data_statistics.collect_statistics(config, split=args.split, samples=args.samples)
  numbers = data_statistics.summarize(found)
  for line in found.skipped:
    print(f'left out: {line}', file=sys.stderr)
  print('\n'.join((*found.report.lines, '', data_statistics.format_table(numbers))))
  if output:
    from ppn_jax.jobs.data_page import data_page
    name = config.data[args.split].name
    storage.write_text(output / 'data.json', json.dumps(numbers, indent=2, allow_nan=False) + '\n')
    storage.write_text(output / 'data.html',
                     data_page(f'{name}, {args.split}', found, numbers))
    print(f'data.html and data.json in {output}')
  else:
    print('--output=DIR shows images and plots')
  if args.folder:
    # The flags are not in the file.
    print(f'to train: ppn train {shlex.join([f"--config={path}", *args.overrides])} --workdir=DIR\n'
          'for as many steps as fit into an hour, add --config.train.minutes=60')
  return 0


def _write_config(args: argparse.Namespace) -> str:
  """Finds the data of a folder, prints what it is, and writes a config file; returns its path."""
  from ppn_jax.data.recognition.recognise import recognise
  from ppn_jax.jobs.folder_config import check_writable, config_name, config_text
  found = recognise(args.folder, args.format)
  text, path = config_text(found, args.folder), args.write or config_name(args.folder)
  if check_writable(path, text):
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  print('\n'.join(found.lines))
  print(f'config file: {path}\n')
  return path
