"""Checks the input of a training before anything is written or compiled."""

import math
import pathlib

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from ppn_jax.config import complete
from ppn_jax.data.report import check_learnable, report
from ppn_jax.data.splits import check_data, open_splits
from ppn_jax.distributed import sharding
from ppn_jax.distributed.compile_cache import parse_xla_options
from ppn_jax.errors import InputError
from ppn_jax.jobs import time_budget
from ppn_jax.run import (
  Run,
  build_detector,
  check_batch,
  create_run,
  is_run,
  open_run,
  optimizer_of,
  without_class_weights,
)
from ppn_jax.telemetry.stuck import check_limits
from ppn_jax.training.stopping import EarlyStopping
from ppn_jax.weights.initial import check_norm_images


def check_training(config: ConfigDict, workdir: str | pathlib.Path, devices: int, *,
                   slices: int = 1, with_data: bool = True) -> str:
  """Checks the input of `train` for a machine or slice that need not be present.

  Args:
    config: As for `train`.
    workdir: As for `train`.
    devices: Number of devices that share a batch.
    slices: Number of TPU slices that they are in.
    with_data: Whether the data can be opened here. Without it, only what the config says is
      checked.

  Returns:
    A line on what was checked.

  Raises:
    InputError: As `train` does.
  """
  if devices < 1:
    raise InputError(f'--check={devices} must be a number of devices, at least 1')
  if slices < 1 or devices % slices:
    raise InputError(f'--slices={slices} must be at least 1 and divide the {devices} devices of '
                     '--check')
  config = complete(config)
  check_data(config)
  check_numbers(config)
  mesh = AbstractMesh((devices,), (sharding.AXIS,))
  earlier = earlier_run(workdir)
  plan = time_budget.recorded_plan(earlier.workdir, config.train.minutes) if earlier else None
  config, found = time_budget.with_planned_steps(config, plan), 'the data are not checked'
  if earlier:
    check_fraction(earlier, config)
  if with_data:
    splits = ('train', 'eval') if config.train.evaluate_every else ('train',)
    sources = open_splits(config, splits, categories=earlier.categories if earlier else None)
    check_learnable(report(sources['train'], 'data.train', image_size=config.model.image_size,
                           resize_mode=config.data.resize_mode,
                           ignore_crowd=config.matching.ignore_crowd))
    config = create_run(workdir, config, sources['train'].categories).config
    found = ', '.join(f'{len(source):,} images to {name}' for name, source in zip(
        ('train on', 'evaluate on'), sources.values(), strict=False))
  train, optimizer = config.train, optimizer_of(config, steps=config.train.steps,
                                                batch_size=config.train.batch_size)
  check_batch(config, 'train.batch_size', train.batch_size, optimizer.micro_batches, mesh, slices)
  build_detector(without_class_weights(_with_some_class(config)))
  return (f'the config fits {devices:,} device{"s" if devices > 1 else ""}'
          f'{f" in {slices} slices" if slices > 1 else ""}, '
          f'{train.batch_size // devices:,} images each; {found}')


def _with_some_class(config: ConfigDict) -> ConfigDict:
  """Returns a config whose number of classes is not left to the data."""
  if config.model.num_classes:
    return config
  config = config.copy_and_resolve_references().unlock()
  config.model.num_classes = 1
  return config.lock()


def earlier_run(workdir: str | pathlib.Path) -> Run | None:
  """Returns the run to resume, if there is one."""
  return open_run(workdir) if is_run(workdir) else None


def check_fraction(earlier: Run, config: ConfigDict) -> None:
  """Raises InputError if images that the run was trained on would be held out from now on."""
  then, now = earlier.config, config
  if now.data.eval_fraction and (then.data.eval_fraction, then.seed) != (
      now.data.eval_fraction, now.seed):
    raise InputError(
        f'workdir {earlier.workdir} was started with data.eval_fraction={then.data.eval_fraction} '
        f'and seed={then.seed}; with data.eval_fraction={now.data.eval_fraction} and '
        f'seed={now.seed} it would be evaluated on images that it was trained on; use another '
        'workdir, or --config.train.evaluate_every=0 --config.data.eval_fraction=0')


def check_numbers(config: ConfigDict) -> None:
  """Raises InputError if an entry of `train`, or the seed, is out of range."""
  if config.train.on_save_error not in ('continue', 'stop'):
    raise InputError(f"train.on_save_error={config.train.on_save_error!r} is unknown; legal: "
                     "'continue', 'stop'")
  if not 0 <= config.seed < 2**31:
    raise InputError(f'seed={config.seed} must be at least 0 and below 2**31')
  check_norm_images(config.init.norm_images)
  train = config.train
  check_limits(train.stuck_factor, train.stuck_seconds)
  parse_xla_options(train.xla_options)
  EarlyStopping(train.stop_metric, train.patience, train.min_improvement)
  if train.patience and not train.evaluate_every:
    raise InputError(f'train.patience={train.patience} needs evaluations, but '
                     'train.evaluate_every=0; set it to the steps between two evaluations')
  if not 0 <= train.minutes < math.inf:
    raise InputError(f'train.minutes={train.minutes} must be at least 0')
  for name, least in [('steps', 0 if train.minutes else 1), ('batch_size', 1), ('log_every', 1),
                      ('checkpoint_every', 1), ('evaluate_every', 0)]:
    if not least <= train[name] < 2**31:  # Steps are counted in 32 bits.
      raise InputError(f'train.{name}={train[name]} must be at least {least} and below 2**31')
