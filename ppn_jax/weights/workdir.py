"""Reads the weights of a run without building its model."""

import json
import math

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ppn_jax import storage
from ppn_jax.checkpoints.manager import BEST_METRIC, Checkpoints
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.telemetry import metrics
from ppn_jax.weights.transfer import PretrainedWeights

# Files and folders of a workdir, and how deep those of a checkpoint go.
_FILES = ('config.json', 'categories.json', 'metrics.jsonl', 'evaluation', 'tensorboard')
_DEPTH = 5


def is_workdir(path: storage.Path) -> bool:
  """Returns whether a folder is the workdir of a run, with or without checkpoints."""
  return (path / 'categories.json').is_file() or (path / 'checkpoints').is_dir()


def check_not_inside(path: storage.Path) -> None:
  """Raises InputError, which names the workdir and the step, if a path is inside one."""
  parents = list(path.parents)
  folders = [path, *parents[:_DEPTH]]
  for folder, below in zip(folders, [None, *folders], strict=False):
    if folder.name == 'checkpoints' and is_workdir(folder.parent):
      step = f'@{below.name}' if below is not None and below.name.isdecimal() else ''
      raise InputError(f'{path} is inside the workdir of a run; give {folder.parent}{step}')
  if path.name in _FILES and is_workdir(path.parent):
    raise InputError(f'{path} is inside the workdir of a run; give {path.parent}')


def split_step(text: str) -> tuple[str, str]:
  """Returns ('runs/a', '2000') for 'runs/a@2000', and ('runs/a', '') for 'runs/a'.

  The text after the last '@' is a step if it is a number or 'best'; otherwise it is part of the
  path.
  """
  path, at, step = text.rpartition('@')
  if not at or not path or not (step == 'best' or (step.isascii() and step.isdigit())):
    return text, ''
  return path, step


def read_workdir(workdir: storage.Path, step: str = '') -> PretrainedWeights:
  """Reads a saved step of a run: the moving average of its weights if the run keeps one.

  Imports nothing that the run's config names. All processes must call it together.

  Args:
    workdir: workdir of the run, local or in a bucket.
    step: a step number; '' is the newest intact step, 'best' the one with the highest AP.

  Raises:
    InputError: If there is no such step or none at all, or a file cannot be read.
  """
  # If one process fails here, all must, because reading a checkpoint is collective.
  categories, checkpoints = sharding.all_or_none(
      lambda: (_read_categories(workdir), _open_checkpoints(workdir)))
  notes = []
  with checkpoints:
    if step:
      number = _best_of(workdir, checkpoints.steps()) if step == 'best' else int(step)
      state = checkpoints.restore(None, number)
    elif newest := checkpoints.newest_undamaged(None):
      number, state, damaged_steps = newest
      notes = [*checkpoints.lost_metrics(), *damaged_steps.values()]
    else:
      raise InputError(f'the run in {workdir} has no checkpoint yet, so it has no weights to '
                       'start from; wait for the first, or give another run')
  values = {path: np.asarray(value) for path, value in flatten_dict(
      jax.device_get(state.best_variables())).items()}
  which = f'step {number:,}' + (', moving average' if state.average else '')
  classes = f'{len(categories)} class' + ('' if len(categories) == 1 else 'es')
  damaged = '; '.join(f' ({note})' for note in notes)
  return PretrainedWeights(
      str(storage.absolute(workdir)), f'a run of {classes}, {which}{damaged}', values, categories)


def _read_categories(workdir: storage.Path) -> tuple[Category, ...]:
  try:
    found = json.loads(storage.read_text(workdir / 'categories.json'))
    return tuple(Category(int(c['id']), str(c['name'])) for c in found)
  except FileNotFoundError as e:
    raise InputError(f'{workdir} has checkpoints but no categories.json, so their classes are '
                     'unknown; copy the whole workdir') from e
  # JSON of an unexpected structure can raise any of these.
  except (ValueError, TypeError, KeyError) as e:
    raise InputError(f'{workdir / "categories.json"} cannot be read: {e!r}') from e


def _open_checkpoints(workdir: storage.Path) -> Checkpoints:
  return Checkpoints(workdir / 'checkpoints', read_only=True)


def _best_of(workdir: storage.Path, steps: list[int]) -> int:
  """Returns the saved step with the highest AP, scored by training or by an evaluation job."""
  scores = {}
  for folder in (workdir, workdir / 'evaluation'):
    for line in metrics.read(folder / 'metrics.jsonl'):
      score = line.get(BEST_METRIC)
      if line['step'] in steps and isinstance(score, float) and math.isfinite(score):
        scores[int(line['step'])] = score
  if not scores:
    raise InputError(f'no checkpoint of {workdir} has been evaluated, so there is no best step; '
                     f'give a number, such as {workdir}@{max(steps, default=1000)}, or run '
                     '`ppn evaluate --steps=all` first')
  return max(scores, key=lambda step: (scores[step], step))
