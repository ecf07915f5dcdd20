"""`ppn data`."""

import argparse
import json
import sys

from ppn_jax.cli.flags import CONFIG_HELP

HELP = f"""Look at a data set before training: boxes, classes, and their anchors.

Prints sizes, classes and how many boxes get an anchor on which level, with the share that no
anchor fits. --output adds data.html, with images as training will see them, and data.json.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='a config, such as own_data:coco_json')
  parser.add_argument('--split', choices=('train', 'eval'), default='train',
                      help='data.train, augmented, or data.eval (default: %(default)s)')
  parser.add_argument('--samples', type=int, default=1000, metavar='N',
                      help='how many images to look at (default: %(default)s)')
  parser.add_argument('--output', metavar='DIR', help='folder for data.html and data.json')


def run(args: argparse.Namespace) -> int:
  from ppn_jax.config_files import load_config
  config = load_config(args.config, args.overrides)
  from ppn_jax import storage
  from ppn_jax.errors import InputError
  from ppn_jax.jobs import data_statistics
  output = storage.folder_path(args.output, '--output') if args.output else None
  if output and output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; give a folder')
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
  return 0
