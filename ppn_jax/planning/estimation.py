"""Estimates how a config would run on a TPU slice, by compiling the real programs for it.

libtpu compiles for slices that are not present, on any Linux machine. Each slice is compiled in a
separate process, because some slices make libtpu abort, and because its lock and settings belong to
a process.
"""

import importlib.metadata
import importlib.util
import math
import os
import pathlib
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from ppn_jax.detector import jit_detect
from ppn_jax.device_data.dataset import abstract_data
from ppn_jax.distributed import sharding
from ppn_jax.distributed.compile_cache import compile_with
from ppn_jax.errors import InputError, install_command
from ppn_jax.planning import hlo
from ppn_jax.run import build_detector, check_batch, optimizer_of, without_class_weights
from ppn_jax.training.input_pipeline import resident_spec
from ppn_jax.training.train_step import (
  abstract_batch,
  abstract_state,
  jit_resident_step,
  jit_train_step,
)


class Chip(NamedTuple):
  """Data of a TPU chip.

  Fields:
    hbm: memory, bytes.
    bandwidth: bandwidth of the memory, bytes/s.
    peak: peak performance in bfloat16, FLOP/s.
    clock: clock frequency, Hz.
  """
  hbm: int
  bandwidth: float
  peak: float
  clock: float


# Memory, bandwidth and peak are from the system architecture pages of the Cloud TPU documentation
# (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). The clock is peak / (2 x matrix units x side^2),
# with 8, 4 and 8 units of 128 x 128, and for v6e 4 of 256 x 256. The page of v6e says 2, which
# would mean 3.5 GHz. At these clocks, the compiler's cycles for a matmul of 8192^3 take 1.11 (v4,
# v5p), 1.14 (v5e) and 1.42 (v6e) times as long as at peak performance.
CHIPS = {
    'v4': Chip(32 * 2**30, 1200e9, 275e12, 1.05e9),
    'v5e': Chip(16 * 2**30, 819e9, 197e12, 1.5e9),
    'v5p': Chip(95 * 2**30, 2765e9, 459e12, 1.75e9),
    'v6e': Chip(32 * 2**30, 1638e9, 918e12, 1.75e9),
}
_TOPOLOGY = re.compile(r'(v\d+[a-z]*):(\d+(?:x\d+){1,2})')
# Boxes per image that the program is compiled for, if the config leaves the number to the data.
MAX_BOXES = 100
_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    # The cache stores these programs but cannot read them.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    # Without these, libtpu asks a metadata server. The values work for every generation.
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
    # Without this, libtpu's lock makes a second process abort.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3',
}


class Request(NamedTuple):
  """Program to compile, and the slice to compile it for.

  Fields:
    config: the config as a dict, with `model.num_classes` set.
    topology: generation and shape of a slice, such as 'v5e:2x4'.
    batch_per_chip: images per chip.
    program: 'train' or 'detect'.
    slices: number of slices that run it together.
    resident_images: number of images of a training set in device memory, from which the step draws
      its batch; 0: the batch comes from the host.
  """
  config: dict[str, Any]
  topology: str
  batch_per_chip: int
  program: str
  slices: int = 1
  resident_images: int = 0


class Estimate(NamedTuple):
  """Estimate of a program on a slice, per chip unless stated otherwise; sizes are in bytes."""
  topology: str
  program: str
  chips: int
  hosts: int
  devices_per_chip: int
  batch_per_chip: int
  fits: bool
  hbm: int  # Memory of the chip.
  peak_hbm: int  # Memory that the program needs.
  flops: float = 0.0
  bytes_accessed: float = 0.0  # From XLA's cost analysis, which includes VMEM but no padding.
  hbm_bytes: int = 0  # See hlo.Costs.
  cycles: int = 0  # Per device.
  unestimated_sorts: int = 0
  unknown_loops: int = 0  # See hlo.Costs.
  clock: float = 0.0
  bandwidth: float = 0.0
  images_per_second_by_cycles: float = 0.0  # Pessimistic.
  images_per_second_by_bytes: float = 0.0  # Optimistic; by FLOPs if they take longer.
  # {kind: (count, bytes)} per device, within a slice.
  collectives: Mapping[str, tuple[int, int]] | None = None
  compile_seconds: float = 0.0
  host_memory: int = 0  # Peak of the compiling process.
  largest_batch: int | None = None  # Images, if `search.largest_batch` was called.
  jax_version: str = ''
  libtpu_version: str = ''
  slices: int = 1
  across_slices: tuple[int, int] = (0, 0)  # (count, bytes) that a device sends to other slices.


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """Returns the chip of a topology and its shape in chips, (2, 4) for 'v5e:2x4'.

  Raises:
    InputError: If the name is malformed, or its generation is not in `CHIPS`.
  """
  match = _TOPOLOGY.fullmatch(topology)
  if not match or match[1] not in CHIPS:
    raise InputError(f'--topology={topology} must be GENERATION:SHAPE in chips, such as v5e:2x4 '
                     f'or v5p:2x2x1; generations: {", ".join(CHIPS)}')
  return CHIPS[match[1]], tuple(map(int, match[2].split('x')))


def plan(request: Request) -> Estimate:
  """Compiles a program in a separate process, which takes a minute or two and 1.5 GB.

  Raises:
    InputError: If libtpu is missing, the topology does not exist or the compiler does not support
      it, the batch cannot be split, or the config is wrong.
  """
  parse_topology(request.topology)
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(f"ppn plan needs the TPU compiler: {install_command('tpu')} (Linux, no TPU "
                     'needed)')
  with tempfile.TemporaryDirectory() as folder:
    question, answer = pathlib.Path(folder, 'request'), pathlib.Path(folder, 'answer')
    question.write_bytes(pickle.dumps(request))
    code = ('from ppn_jax.planning import estimation; '
            f'estimation._answer({str(question)!r}, {str(answer)!r})')
    process = subprocess.run([sys.executable, '-c', code], stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, **_ENVIRONMENT, 'PYTHONPATH': _search_path()},
                             errors='replace', check=False)
    result = pickle.loads(answer.read_bytes()) if answer.exists() else None
  if isinstance(result, Estimate):
    return result
  if isinstance(result, str):
    raise InputError(result)
  if process.returncode < 0:
    raise InputError(f'{request.topology}: the compiler ended with '
                     f'{signal.Signals(-process.returncode).name}; it does not support this '
                     'topology, or the machine ran out of memory')
  raise RuntimeError(f'the compiling process failed:\n{process.stderr[-4000:]}')


def _search_path() -> str:
  """Returns the module path of this process as PYTHONPATH, including the user's own modules."""
  return os.pathsep.join(os.path.abspath(p) for p in sys.path)


def _answer(request_file: str, answer_file: str) -> None:
  """Runs in the compiling process: writes an Estimate, or an error message as a string."""
  request = pickle.loads(pathlib.Path(request_file).read_bytes())
  try:
    answer = compile_program(request)
  except InputError as e:
    answer = str(e)
  # Written atomically, because the process may abort at any time.
  partial = pathlib.Path(answer_file + '.partial')
  partial.write_bytes(pickle.dumps(answer))
  partial.rename(answer_file)


def compile_program(request: Request) -> Estimate:
  """Compiles a program in this process, whose environment must be set for libtpu; see `plan`."""
  chip, shape = parse_topology(request.topology)
  devices = _devices(request.topology, shape, request.slices)
  chips = math.prod(shape) * request.slices
  per_chip = len(devices) // chips
  if request.batch_per_chip < 1 or request.batch_per_chip % per_chip:
    raise InputError(f'--batch_per_chip={request.batch_per_chip} must be a multiple of the '
                     f'{per_chip} device{"s" if per_chip > 1 else ""} on a chip of '
                     f'{request.topology}')
  estimate = Estimate(
      request.topology, request.program, chips, len({d.process_index for d in devices}), per_chip,
      request.batch_per_chip, fits=True, hbm=chip.hbm, peak_hbm=0, clock=chip.clock,
      bandwidth=chip.bandwidth, jax_version=jax.__version__,
      libtpu_version=importlib.metadata.version('libtpu'), slices=request.slices)
  mesh = sharding.data_mesh(devices)
  lowered = _lower(request, mesh, chips)
  started = time.perf_counter()
  try:
    options = request.config.get('train', {}).get('xla_options', ())
    compiled = compile_with(lowered, options if request.program == 'train' else ())
  except jax.errors.JaxRuntimeError as e:
    compiled, needed = None, _needed_hbm(str(e))
    if needed is None:
      raise InputError(f'{request.topology}: the compiler fails: {_first_line(e)}') from e
    estimate = estimate._replace(fits=False, peak_hbm=needed * per_chip)
  estimate = estimate._replace(
      compile_seconds=time.perf_counter() - started,
      host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
  if compiled is None:
    return estimate
  return _with_costs(estimate, compiled)


def _devices(topology: str, shape: tuple[int, ...], slices: int) -> list[Any]:
  """Returns the devices of slices of a topology, which need not be present."""
  # By default hosts have four chips or more.
  few = math.prod(shape) < 4
  options = {'chips_per_host_bounds': (*shape, 1)[:3]} if few else {}
  if topology.startswith('v4:'):  # On a v4, JAX uses the two cores of a chip as one device.
    options['chip_config_name'] = 'megacore'
  if slices > 1:
    options['num_slices'] = slices
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology,
                                             **options).devices)
  except jax.errors.JaxRuntimeError as e:
    raise InputError(f'{topology} is not a topology that the compiler knows: {_first_line(e)}'
                     ) from e


def _lower(request: Request, mesh: jax.sharding.Mesh, chips: int) -> jax.stages.Lowered:
  """Lowers the requested program for a mesh."""
  config, batch_size = ConfigDict(request.config), request.batch_per_chip * chips
  # A plan knows no names of classes; the weights are constants of the program, whatever they are.
  detector = build_detector(without_class_weights(config))
  optimizer = optimizer_of(config, steps=max(config.train.steps, 1), batch_size=batch_size)
  if request.program == 'train':
    check_batch(config, 'the batch of all chips', batch_size, optimizer.micro_batches, mesh)
  state = abstract_state(detector, optimizer, mesh)
  max_boxes = config.data.max_boxes or MAX_BOXES
  if request.resident_images:
    spec = resident_spec(config, request.resident_images, batch_size=batch_size,
                         max_boxes=max_boxes)
    return jit_resident_step(detector, optimizer, mesh, spec).lower(
        state, abstract_data(spec, mesh))
  images, ground_truth = abstract_batch(batch_size, detector.image_size, max_boxes, mesh)
  if request.program == 'detect':
    return jit_detect(detector, mesh).lower(state.variables, images)
  return jit_train_step(detector, optimizer, mesh).lower(state, images, ground_truth)


def _with_costs(estimate: Estimate, compiled: jax.stages.Compiled) -> Estimate:
  """Adds the costs of a compiled program to an estimate."""
  devices, analysis = estimate.devices_per_chip, compiled.cost_analysis()
  costs = hlo.costs(hlo.parse(compiled.as_text()))
  flops, hbm_bytes = devices * analysis['flops'], devices * costs.hbm_bytes
  # Roofline: a program is limited by its memory traffic or its arithmetic.
  roofline = max(hbm_bytes / estimate.bandwidth, flops / parse_topology(estimate.topology)[0].peak)
  rates = [estimate.batch_per_chip / s if s else 0.0
           for s in (costs.cycles / estimate.clock, roofline)]
  return estimate._replace(
      peak_hbm=devices * compiled.memory_analysis().peak_memory_in_bytes,
      flops=flops, bytes_accessed=devices * analysis['bytes accessed'], hbm_bytes=hbm_bytes,
      cycles=costs.cycles, unestimated_sorts=costs.unestimated_sorts,
      unknown_loops=costs.unknown_loops,
      images_per_second_by_cycles=rates[0], images_per_second_by_bytes=rates[1],
      collectives=costs.collectives, across_slices=costs.across_slices)


_SIZE = re.compile(
    r'(?:[Uu]sed |\()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)')


def _needed_hbm(message: str) -> int | None:
  """Returns the bytes that a device would need, from the compiler's out-of-memory message."""
  match = _SIZE.search(message)
  return int(float(match[1]) * 1024 ** ' KMGT'.index(match[2] or ' ')) if match else None


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0][:300]
