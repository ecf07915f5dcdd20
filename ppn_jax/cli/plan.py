"""`ppn plan`."""

import argparse
import json
import os
import sys

from ppn_jax.cli.flags import CONFIG_HELP
from ppn_jax.errors import install_command

HELP = f"""Compile for TPU slices that you do not have: does it fit, and how fast is it.

Needs libtpu ({install_command('tpu')}) and no TPU. Each slice takes a minute or two. Cycles
are the compiler's estimate, without collectives, and tend to be too slow; the roofline, bytes
over bandwidth, is what the memory allows at best. The exit code is 1 if something does not fit.
{CONFIG_HELP}"""

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='a config, such as ppn_mobilenet_v1_coco')
  parser.add_argument('--topology', required=True, action='append', metavar='NAME',
                      help='such as v5e:2x4, in chips; may be given several times')
  parser.add_argument('--slices', type=int, default=1, metavar='N',
                      help='slices of each topology that train together (default: %(default)s)')
  parser.add_argument('--batch_per_chip', type=int, default=0, metavar='N',
                      help="images per chip (default: the config's batch size, split)")
  parser.add_argument('--resident_images', type=int, default=0, metavar='N',
                      help='compile the step that draws its batch from a training set of N images '
                           'in device memory, as data.resident.enabled=True does')
  parser.add_argument('--detect', action='store_true',
                      help='compile detection instead of the training step')
  parser.add_argument('--largest_batch', action='store_true',
                      help='search for the largest batch that fits, with a few more compilations')
  parser.add_argument('--json', action='store_true', help='print one JSON array')


def run(args: argparse.Namespace) -> int:
  # With libtpu installed, JAX would look for a TPU and warn that there is none.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from ppn_jax.config_files import load_config
  config = load_config(args.config, args.overrides)
  from ppn_jax.errors import InputError
  from ppn_jax.jobs.summary import fill_in_classes
  from ppn_jax.planning import estimation
  from ppn_jax.planning import report as planning_report
  from ppn_jax.planning import search as planning_search
  config = fill_in_classes(config)
  requests = [_request(config, topology, args) for topology in args.topology]
  images = 0 if args.detect else config.train.steps * config.train.batch_size
  estimates, failures = [], []
  for request in requests:
    try:
      estimate = estimation.plan(request)
      if args.largest_batch:
        estimate = estimate._replace(largest_batch=planning_search.largest_batch(request, estimate))
    except InputError as e:
      failures.append(str(e))
      continue
    estimates.append(estimate)
    if not args.json:
      print(planning_report.format_estimate(estimate, images), flush=True)
  if args.json:
    print(json.dumps([planning_report.as_json(e, images) for e in estimates], indent=1))
    sys.stdout.flush()
  if failures:
    raise InputError('; '.join(failures))
  return 0 if all(e.fits for e in estimates) else 1


def _request(config, topology: str, args: argparse.Namespace):
  """Returns the request for one topology, after the checks that need no compilation."""
  import math

  from ppn_jax.errors import InputError
  from ppn_jax.planning.estimation import Request, parse_topology
  if args.slices < 1:
    raise InputError(f'--slices={args.slices} must be at least 1')
  chips = math.prod(parse_topology(topology)[1]) * args.slices
  if args.batch_per_chip < 0:
    raise InputError(f'--batch_per_chip={args.batch_per_chip} must be at least 1')
  if args.resident_images < 0:
    raise InputError(f'--resident_images={args.resident_images} must be at least 1')
  if args.resident_images and args.detect:
    raise InputError('--resident_images is for the training step; leave --detect out')
  key = 'eval' if args.detect else 'train'
  batch_size = config[key].batch_size
  if not args.batch_per_chip and (batch_size < 1 or batch_size % chips):
    of = f'{args.slices} slices of {topology}' if args.slices > 1 else topology
    raise InputError(f'{key}.batch_size={batch_size} cannot be split over the {chips} chips of '
                     f'{of}; give --batch_per_chip=N')
  return Request(config.to_dict(), topology, args.batch_per_chip or batch_size // chips,
                 'detect' if args.detect else 'train', args.slices,
                 args.resident_images)
