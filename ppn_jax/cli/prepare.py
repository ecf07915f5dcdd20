"""`ppn prepare`."""

import argparse
import logging
import os

from ppn_jax.cli.flags import CONFIG_HELP
from ppn_jax.errors import InputError

logger = logging.getLogger(__name__)

HELP = f"""Store a data set in sharded ArrayRecord files, in TFDS's format.

Reads data.train and data.eval of a config, in any format, and writes them as the
splits 'train' and 'eval' of OUTPUT/NAME/VERSION. To train on them, put
  dict(name='tfds', dataset=NAME, data_dir=OUTPUT, split='train')
into a config as data.train, or use --config=own_data:tfds. A call that is stopped leaves
no data set, and starts over when it is repeated. If the data set exists, every file is
checked, and whether it was made from the same data.
{CONFIG_HELP}"""

TAKES_CONFIG = True
_SPLITS = ('train', 'eval')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='a config, such as own_data:coco_json')
  parser.add_argument('--output', required=True, metavar='DIR',
                      help='folder of data sets to write to, local or gs://BUCKET/FOLDER')
  parser.add_argument('--name', required=True, help='its name: lower-case letters, digits, _')
  parser.add_argument('--version', default='1.0.0', help='its version (default: %(default)s)')
  parser.add_argument('--splits', default='', metavar='LIST',
                      help="'train', 'eval' or 'train,eval' (default: those of the config)")
  parser.add_argument('--max_side', type=int, default=0, metavar='PIXELS',
                      help='shrink images whose longer side is larger (default: 0, store the files '
                           'as they are)')
  parser.add_argument('--quality', type=int, default=90, metavar='N',
                      help='JPEG quality of shrunk images, 1 to 100 (default: %(default)s)')
  parser.add_argument('--shards', type=int, default=0, metavar='N',
                      help='number of files per split (default: 0, up to about 128 MB each)')
  parser.add_argument('--threads', '--processes', type=int, default=0, metavar='N',
                      help='threads that read, check and encode images (default: 0, a few more '
                           'than there are processor cores)')
  parser.add_argument('--on_bad_image', metavar='POLICY',
                      help="'raise', or 'skip' to leave out images that cannot be read "
                           "(default: the config's data.on_bad_example)")
  parser.add_argument('--max_bad', type=float, metavar='SHARE',
                      help="largest share of images that 'skip' may leave out (default: the "
                           "config's data.max_bad_share)")


def run(args: argparse.Namespace) -> int:
  from ppn_jax.config_files import load_config
  config = load_config(args.config, args.overrides)
  from ppn_jax.data.prepare import Options, prepare
  from ppn_jax.data.report import report
  from ppn_jax.data.sources.tfds_records import load_tfds
  from ppn_jax.data.splits import names_data, open_splits
  on_bad_image = args.on_bad_image or config.data.on_bad_example
  max_bad = config.data.max_bad_share if args.max_bad is None else args.max_bad
  options = Options(args.name, args.version, args.max_side, args.quality, args.shards,
                    args.threads, on_bad_image, max_bad)
  names = args.splits.split(',') if args.splits else [
      s for s in _SPLITS if config.data[s].name or (s == 'eval' and config.data.eval_fraction)]
  if len(set(names)) < len(names) or not set(names) <= set(_SPLITS):
    raise InputError(f"--splits={args.splits}, legal: 'train', 'eval', 'train,eval'")
  if 'eval' in names and not args.splits and not (
      names_data(config.data.eval) or config.data.eval_fraction):
    raise InputError('data.eval names no data; give it, --config.data.eval_fraction=0.1 to keep '
                     'back a tenth of the training images for it, or --splits=train')
  try:
    opened = open_splits(config, names, on_bad_example=on_bad_image)
  except InputError as e:  # Its advice names the flag of training.
    raise InputError(str(e).replace('--config.data.on_bad_example', '--on_bad_image')) from e
  sources = {name: opened[name] for name in names}
  for line in dict.fromkeys(line for name, source in sources.items()
                            for line in report(source, f'data.{name}').warnings):
    logger.warning(line)
  with _progress_bar() as progress:
    folder = prepare(sources, args.output, options, progress=progress)
  splits, counts = load_tfds().builder_from_directory(os.fspath(folder)).info.splits, []
  for name, source in sources.items():
    stored = splits[name].num_examples
    without = f' ({len(source) - stored:,} left out)' * (len(source) > stored)
    counts.append(f'{stored:,} images in {name!r}{without}')
  print(f'{", ".join(counts)}: {folder}')
  return 0


class _progress_bar:
  """Progress bar with images done and time left on a terminal; nothing elsewhere."""

  def __enter__(self):
    from rich import progress
    from rich.console import Console
    console = Console(stderr=True)
    self._bar = progress.Progress(
        '{task.description}', progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TaskProgressColumn(show_speed=True), progress.TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal)
    self._bar.__enter__()
    self._task = self._bar.add_task('images', total=None)
    return lambda done, total: self._bar.update(self._task, completed=done, total=total)

  def __exit__(self, *error) -> None:
    self._bar.__exit__(*error)
