"""Compares PPN and SSD on real photographs: a small version of the paper's Table 1.

  python benchmarks/voc300/run.py --profile=imagenet --workdir=runs/voc300

trains both from the same backbone trained on ImageNet (--backbone: any file or workdir that
`init.backbone` reads; by default weights/mobilenet_v1_1.0_224_quant_embedding_extractor.tflite in
the folder PPN_SHARED), at 160, 224 and at last 300 px. A run takes more than an hour on two CPU
cores. --profile=coco starts from the backbone of a detector that was trained on COCO. From random
weights,

  python benchmarks/voc300/run.py --profile=gpu --workdir=runs/voc300_random --minutes=9

runs on one GPU. Repeat the command until it ends with 0 instead of 75, or leave out --minutes to
run everything in one call. There are six runs of 1.28 million images each; --epochs=N shortens
them, and the report says so. A much reduced version takes about 25 minutes on two idle CPU cores:

  python benchmarks/voc300/run.py --profile=cpu --workdir=runs/voc300_cpu

The script trains each model on 3,200 photographs of Pascal VOC 2007 (--data: a folder with train/,
val/ and instances_{train,val}.json; by default data/voc300 in the folder PPN_SHARED) with the same
recipe, budget and seeds, and evaluates on all 800 of val: COCO's metrics, VOC's AP50 (which ignores
difficult objects), calibration by level and its cost. Metrics are means over seeds; differences are
paired by seed, with 95% intervals over seeds and over images. It writes report.json, table.md,
curves.png and report.html on the runs that are finished so far to the workdir.

It may be killed at any time and repeated: training resumes from its checkpoints, and finished work
is not repeated. --minutes stops it in time, with its state saved. Seeds and models may be added
later in the same workdir; another recipe, budget or data set needs another workdir.

All runs are trained before the first is scored. Scoring takes a minute per run on one core and no
accelerator. --train_only leaves it to the same command on another machine, to which setting.json
and trained/ (about 2 MB per run) must be copied. An unfinished run has its checkpoints in runs/: at
300 px 24 MB for PPN, 70 for SSD and 89 for FPN, and twice that during a save. They are removed once
the run is trained, unless --keep_runs is given.

  python benchmarks/voc300/run.py --profile=gpu --workdir=runs/voc300_tune --minutes=9 --tune

compares the recipes in recipes.py with the same effort for all models, on an eighth of the training
images and a seed that is not reported; --recipe=NAME then trains the best one. With --json the last
line is JSON.
"""

import argparse
import hashlib
import json
import logging
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from voc300 import recipes
from voc300.pieces import Folder, Piece, RunKey, work

from ppn_jax.errors import InputError, did_you_mean, exit_status

INCOMPLETE = 75  # As `ppn train` when it is stopped: the same command continues.


def main(argv: list[str] | None = None) -> int:
  """Runs a command line and returns its exit code: 0, 2 for a mistake, 75 if incomplete."""
  try:
    return _run(_parser().parse_args(argv))
  except (Exception, KeyboardInterrupt) as e:
    code, line = exit_status(e)
    if line is None:
      raise
    print(line.replace('ppn: ', 'voc300: ', 1), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
  """Parser that raises InputErrors of one line."""

  def error(self, message: str):
    raise InputError(f'{message}; see --help')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True, type=pathlib.Path,
                      help='new, or from an earlier call')
  parser.add_argument('--data', type=pathlib.Path, metavar='FOLDER',
                      default=_shared() / 'data' / 'voc300')
  parser.add_argument('--backbone', metavar='PATH', help="what the backbone starts "
                      "from (default: the profile's)")
  parser.add_argument('--profile', default='gpu', help=f'{", ".join(recipes.PROFILES)} '
                      '(default: gpu)')
  parser.add_argument('--recipe', help=f'{", ".join(recipes.RECIPES)} (default: the '
                      "profile's; with --tune several, all by default)")
  parser.add_argument('--models', default='ppn,ssd', help='of ppn, ssd, fpn (default: ppn,ssd)')
  parser.add_argument('--seeds', help="default: the profile's")
  parser.add_argument('--epochs', type=int, default=0, help="default: the profile's")
  parser.add_argument('--batch_size', type=int, default=0, help="default: the profile's")
  parser.add_argument('--conv_form', default='auto', choices=('auto', 'native', 'shifted', 'dense'),
                      help='form of the convolutions; all are equal up to rounding (default: auto)')
  parser.add_argument('--minutes', type=float, default=0, help='time limit; 0: none')
  parser.add_argument('--tune', action='store_true', help='compare recipes')
  parser.add_argument('--keep_runs', action='store_true',
                      help='keep the checkpoints of trained runs in the workdir')
  parser.add_argument('--train_only', action='store_true',
                      help='leave scoring, which needs no accelerator, to another call')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  return parser


def _shared() -> pathlib.Path:
  default = pathlib.Path(__file__).resolve().parents[3] / 'shared'
  return pathlib.Path(os.environ.get('PPN_SHARED', default))


def _backbone(args: argparse.Namespace, profile: recipes.Profile) -> str:
  """Returns the path that the backbone starts from, '' for random weights."""
  if args.backbone is not None:
    return args.backbone
  if not profile.backbone:
    return ''
  path = _shared() / 'weights' / profile.backbone
  if not path.is_file():
    raise InputError(f'no {path}; give another backbone with --backbone=PATH, or set PPN_SHARED to '
                     f'the folder that contains weights/{profile.backbone}')
  return str(path)


def _run(args: argparse.Namespace) -> int:
  profile, keys, setting = _setup(args)
  backbone = _backbone(args, profile)
  with Piece(args.minutes) as piece:
    folder = Folder(args.workdir, keep_runs=args.keep_runs)
    folder.check_setting(setting)
    # Imported late, so that mistakes in the flags are reported before heavy libraries are loaded.
    from voc300 import report, runs

    logging.basicConfig(format='%(message)s')
    logging.getLogger('ppn_jax').setLevel(logging.INFO)
    from ppn_jax.distributed.compile_cache import keep_compiled_programs
    keep_compiled_programs()

    def workdirs(key: RunKey):
      return [folder.run(key) / f'phase_{i}' for i in range(len(profile.phases))]

    def configs(key: RunKey):
      starts = [{'backbone': backbone},
                *({'weights': str(workdir)} for workdir in workdirs(key))]
      return [recipes.make_config(
          args.data, profile, key.model, recipes.RECIPES[key.recipe], seed=key.seed,
          images=setting['train_images'], epochs=setting['epochs'],
          batch_size=setting['batch_size'], conv_form=setting['conv_form'], tune=setting['tune'],
          phase=i, **starts[i]) for i in range(len(profile.phases))]

    score = lambda key, rows: runs.score(configs(key)[-1], rows, train_images=profile.train_images)
    complete = work(
        keys, folder, piece, say=lambda text: print(text, flush=True),
        train=lambda key: runs.advance(configs(key), workdirs(key)),
        detect=lambda key: runs.detect(workdirs(key)),
        score=None if args.train_only else score)
    found = report.write(folder, keys, setting, profile.note(setting['epochs']), profile.aim)
  print(f'{folder.path}: {folder.megabytes():.1f} MB' +
        ('' if complete else '; incomplete, repeat the same command'))
  if args.json:
    print(json.dumps(found))
  return 0 if complete else INCOMPLETE


def _setup(args: argparse.Namespace) -> tuple[recipes.Profile, list[RunKey], dict[str, Any]]:
  """Returns the profile, all runs in order, and the settings that they share."""
  if args.profile not in recipes.PROFILES:
    raise InputError(f'unknown --profile={args.profile}; '
                     f'{did_you_mean(args.profile, recipes.PROFILES)}')
  profile = recipes.PROFILES[args.profile]
  if args.tune:
    profile = profile.for_tuning()
  models = sorted(_listed('--models', args.models, recipes.MODELS), key=recipes.MODELS.index)
  names = _listed('--recipe', args.recipe, recipes.RECIPES) if args.recipe else (
      list(recipes.RECIPES) if args.tune else [profile.recipe])
  if len(names) > 1 and not args.tune:
    raise InputError(f'--recipe={args.recipe}: give one at a time, or several with --tune')
  seeds = _seeds(args, profile)
  for name, value in (('epochs', args.epochs), ('batch_size', args.batch_size),
                      ('minutes', args.minutes)):
    if value < 0:
      raise InputError(f'--{name}={value} must be at least 0')
  for file in ('instances_train.json', 'instances_val.json', 'train', 'val'):
    if not (args.data / file).exists():
      raise InputError(f'--data={args.data} has no {file}; give the folder of voc300, or set '
                       'PPN_SHARED to the folder that contains data/voc300')
  epochs = args.epochs or profile.epochs
  setting = {'profile': args.profile, 'image_size': profile.image_size, 'epochs': epochs,
             'batch_size': args.batch_size or profile.batch_size, 'conv_form': args.conv_form,
             'tune': args.tune, 'backbone': pathlib.PurePath(_backbone(args, profile)).name,
             'configs': {name: _checksum(profile, name) for name in names},
             **_describe(args.data)}
  if args.tune:
    held_out = round(recipes.TUNING_FRACTION * setting['train_images'])
    setting |= {'held_out_images': held_out}
  else:
    setting['recipe'] = names[0]
  # Seeds are outermost, so that the finished runs are always a fair comparison.
  keys = [RunKey(model, name, seed) for seed in seeds for name in names for model in models]
  return profile, keys, setting


def _listed(flag: str, text: str, legal) -> list[str]:
  names = list(dict.fromkeys(text.split(',')))
  for name in names:
    if name not in legal:
      raise InputError(f'unknown {flag}={name}; {did_you_mean(name, legal)}')
  return names


def _seeds(args: argparse.Namespace, profile: recipes.Profile) -> list[int]:
  if args.seeds is None:
    return [recipes.TUNING_SEED] if args.tune else list(profile.seeds)
  try:
    seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(',')))
  except ValueError:
    raise InputError(f'--seeds={args.seeds} must be whole numbers, such as 0,1,2') from None
  if min(seeds) < 0 or max(seeds) >= 2**31:
    raise InputError(f'--seeds={args.seeds} must be at least 0 and below 2**31')
  if not args.tune and recipes.TUNING_SEED in seeds:
    raise InputError(f'--seeds={args.seeds}: {recipes.TUNING_SEED} is the seed on which '
                     'recipes are compared; give others')
  return seeds


def _checksum(profile: recipes.Profile, name: str) -> str:
  """Returns a checksum of a recipe's configs, so that changed recipes are not mixed."""
  made = [recipes.make_config(pathlib.Path(), profile, model, recipes.RECIPES[name], seed=0,
                              images=1, epochs=100, batch_size=1, phase=i).to_json()
          for model in recipes.MODELS for i in range(len(profile.phases))]
  return hashlib.sha256(''.join(made).encode()).hexdigest()[:16]


def _describe(data: pathlib.Path) -> dict[str, Any]:
  """Returns the numbers of images and a checksum of the ground truth, independent of its path."""
  texts = {split: (data / f'instances_{split}.json').read_bytes() for split in ('train', 'val')}
  found = {'data': hashlib.sha256(b''.join(texts.values())).hexdigest()[:16]}
  for split, text in texts.items():
    try:
      found[f'{split}_images'] = len(json.loads(text)['images'])
    except (ValueError, TypeError, KeyError) as e:
      raise InputError(f'--data: {data / f"instances_{split}.json"} is not JSON in COCO\'s '
                       f'instances format: {e!r}') from e
  return found


if __name__ == '__main__':
  sys.exit(main())
