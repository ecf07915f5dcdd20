"""Writes a detector's weights and description as one file to share."""

import dataclasses
import importlib
import logging
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ppn_jax import storage
from ppn_jax.checkpoints.retention import read_record
from ppn_jax.config import plain
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export.formats import ExportOptions, describe_input
from ppn_jax.export.weights_file import Path, read_weights_file, write_weights_file
from ppn_jax.jobs.export import check_new
from ppn_jax.metrics.coco import DESCRIPTIONS
from ppn_jax.run import Run
from ppn_jax.storage import local_path
from ppn_jax.trained_model import SharedModel, TrainedModel

logger = logging.getLogger(__name__)

# Keys of the config that describe the detector and its input; none of them is a path. The seed and
# the share say which images were held out, so that nobody evaluates on the others by mistake.
_BLOCKS = ('model', 'matching', 'loss', 'postprocess')
_DATA_KEYS = ('resize', 'resize_mode', 'reduced_decoding', 'eval_fraction')


@dataclasses.dataclass(frozen=True)
class WeightsExport:
  """Result of an export.

  Attributes:
    path: the file that was written.
    step: step of the run.
    size: size in bytes.
    parameters: number of values in the file.
    rounding: largest change of a value, relative to the largest of its array; 0 for float32.
    provenance: where the weights come from, as the file says.
  """
  path: pathlib.Path
  step: int
  size: int
  parameters: int
  rounding: float
  provenance: Mapping[str, Any]


def export_weights(model: TrainedModel, output: pathlib.Path, options: ExportOptions, *,
                   step: int | None = None, ema: bool | None = None) -> WeightsExport:
  """Writes a weights file, which appears only after it has been read back and compared.

  The same weights give the same bytes.

  Args:
    model: the run or weights file, see `run.open_model`.
    output: a new file.
    options: options of the export.
    step: a saved step; the newest by default.
    ema: True for the moving average of the weights, False for the weights themselves; None for the
      average if the run keeps one.

  Raises:
    InputError: If `output` exists, there is no such step or average, or a value is not finite or
      too large for the precision.
  """
  check_new(output, options)
  output = local_path(output)
  model.check_average(ema, '--ema')
  detector = model.detector()
  step, variables = model.load_variables(detector, sharding.data_mesh(jax.local_devices()[:1]),
                                         step=step, ema=ema)
  values = {path: np.asarray(value)
            for path, value in flatten_dict(jax.device_get(variables)).items()}
  config = plain(model.config)
  header = {
      'config': {'seed': config['seed'], **{block: config[block] for block in _BLOCKS},
                 'data': {key: config['data'][key] for key in _DATA_KEYS}},
      'preprocessing': describe_input(None, detector.image_size, config['data']['resize'],
                                      config['data']['resize_mode']),
      'thresholds': {key: config['postprocess'][key] for key in (
          'score_threshold', 'iou_threshold') if key in config['postprocess']},
      'provenance': _provenance(model, step, ema)}
  if point := model.operating_point(step, ema=ema):
    header['operating_point'] = point.describe()
  output.parent.mkdir(parents=True, exist_ok=True)
  with storage.partial_folder(output) as temporary:
    path = temporary / output.name
    write_weights_file(path, values, precision=options.precision, step=step,
                       categories=model.categories, **header)
    rounding = _check(path, values, options.precision)
    size = path.stat().st_size
    check_new(output, options)
    shutil.move(path, output)
  return WeightsExport(output, step, size, sum(v.size for v in values.values()), rounding,
                       header['provenance'])


def _check(path: pathlib.Path, values: Mapping[Path, np.ndarray], precision: str) -> float:
  """Returns the largest relative change of a value in a written file.

  Raises:
    InputError: If the file does not hold the values to the rounding of its precision.
  """
  written = read_weights_file(path).values
  largest = 0.0
  for name, value in values.items():
    size = np.abs(value.astype(np.float64))
    change = np.abs(written[name] - value.astype(np.float64))
    # Half a unit in the last place, and of the smallest numbers.
    if (change > (np.maximum(2**-11 * size, 2**-25) if precision == 'float16' else 0)).any():
      raise InputError(f'{"/".join(name)} of the written file differs by {change.max():.2g}, so '
                       'the file was not kept; try another disk')
    largest = max(largest, float(change.max(initial=0) / (size.max(initial=0) or 1)))
  return largest


def _provenance(model: TrainedModel, step: int, ema: bool | None) -> dict[str, Any]:
  """Returns where weights come from, without folders of this machine.

  Returns:
    'ppn_jax': version; 'run': name of its folder; 'average': whether the weights are the moving
    average; 'metrics': COCO's of that step, {} if it has not been evaluated; 'images': number of
    images of the evaluation, None if unknown; 'started_from': the report of `init`. For a weights
    file, what it says.
  """
  if isinstance(model, SharedModel):
    return dict(model.provenance)
  assert isinstance(model, Run)
  average = bool(model.config.optim.ema_decay) and ema is not False
  metrics, images = _metrics(model, step, average)
  return {'ppn_jax': importlib.import_module('ppn_jax').__version__, 'run': model.name,
          'average': average, 'metrics': metrics, 'images': images,
          'started_from': _without_folders(model.config.init.report)}


def _metrics(run: Run, step: int, average: bool) -> tuple[dict[str, float | None], int | None]:
  """Returns COCO's metrics of a step, from its own folder or the curves, and number of images."""
  raw = not average and bool(run.config.optim.ema_decay)
  folder = run.workdir / ('evaluation_raw' if raw else 'evaluation')
  record = read_record(folder, step)
  if record and record.fits(run.stamp(step)):
    return record.metrics, record.about.get('images')
  for line in [] if raw else run.metrics():
    found = {name.rpartition('/')[2]: value for name, value in line.items()}
    if line['step'] == step and 'AP' in found:
      return {name: found[name] for name in DESCRIPTIONS if name in found}, None
  return {}, None


def _without_folders(report: tuple[str, ...]) -> list[str]:
  """Returns a report of `init` whose first line names a file or run without its folder."""
  first, *rest = report or ('',)
  first = re.sub(r'^.*/(?=[^/]*: )', '', first)
  return [line for line in (re.sub(r'(?<![\w/])~?/\S*/', '', first), *rest) if line]
