"""What a TPU slice would make of a config: the real programs, compiled by the real compiler.

libtpu compiles for slices that are not at hand, on any Linux machine. Some slices make it abort,
and its lock and settings are those of a process, so each is compiled in a process of its own.
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
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.planning import hlo
from ppn_jax.run import build_detector, check_batch, optimizer_of
from ppn_jax.training.train_step import abstract_batch, abstract_state, jit_train_step


class Chip(NamedTuple):
  """Of one chip."""
  hbm: int  # Bytes.
  bandwidth: float  # Of HBM, bytes/s.
  peak: float  # FLOP/s, bfloat16.
  clock: float  # Hz.


# Memory, bandwidth and peak: the system architecture pages of the Cloud TPU documentation
# (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Clock: peak / (2 x matrix units x side^2), with
# 8, 4 and 8 units of 128 x 128, and for v6e 4 of 256 x 256: its page says 2, which would mean
# 3.5 GHz. At these clocks the compiler's cycles for a matmul of 8192^3 take 1.11 (v4, v5p), 1.14
# (v5e) and 1.42 (v6e) times what the peak allows.
CHIPS = {
    'v4': Chip(32 * 2**30, 1200e9, 275e12, 1.05e9),
    'v5e': Chip(16 * 2**30, 819e9, 197e12, 1.5e9),
    'v5p': Chip(95 * 2**30, 2765e9, 459e12, 1.75e9),
    'v6e': Chip(32 * 2**30, 1638e9, 918e12, 1.75e9),
}
_TOPOLOGY = re.compile(r'(v\d+[a-z]*):(\d+(?:x\d+){1,2})')
# Boxes of an image that the program is compiled for, where the config leaves it to the data.
MAX_BOXES = 100
_ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    # The cache stores such programs but cannot read them.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    # Without these libtpu asks for a metadata server; they serve for every generation.
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
    # Its lock would make a second process abort.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3',
}


class Request(NamedTuple):
  """What to compile."""
  config: dict[str, Any]  # With `model.num_classes` set.
  topology: str  # 'v5e:2x4'
  batch_per_chip: int  # Images.
  program: str  # 'train' or 'detect'.


class Estimate(NamedTuple):
  """What came of it. Of each chip, unless it says otherwise; sizes in bytes."""
  topology: str
  program: str
  chips: int
  hosts: int
  devices_per_chip: int
  batch_per_chip: int
  fits: bool
  hbm: int  # That the chip has.
  peak_hbm: int  # That the program needs.
  flops: float = 0.0
  bytes_accessed: float = 0.0  # By XLA's cost analysis: VMEM included, padding left out.
  hbm_bytes: int = 0  # See hlo.Costs.
  cycles: int = 0  # Of a device.
  unestimated_sorts: int = 0
  unknown_loops: int = 0  # See hlo.Costs.
  clock: float = 0.0
  bandwidth: float = 0.0
  images_per_second_by_cycles: float = 0.0  # Pessimistic.
  images_per_second_by_bytes: float = 0.0  # Optimistic; by FLOPs, if they take longer.
  collectives: Mapping[str, tuple[int, int]] | None = None  # {kind: (how many, bytes)}, a device.
  compile_seconds: float = 0.0
  host_memory: int = 0  # Peak of the compiling process.
  largest_batch: int | None = None  # Images, where `planning_search` has looked for it.
  jax_version: str = ''
  libtpu_version: str = ''


def chip_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """'v5e:2x4' -> its chip and (2, 4).

  Raises:
    InputError: not such a name, or a generation without data in `CHIPS`.
  """
  match = _TOPOLOGY.fullmatch(topology)
  if not match or match[1] not in CHIPS:
    raise InputError(f'--topology={topology} must be GENERATION:SHAPE in chips, such as v5e:2x4 '
                     f'or v5p:2x2x1; generations: {", ".join(CHIPS)}')
  return CHIPS[match[1]], tuple(map(int, match[2].split('x')))


def plan(request: Request) -> Estimate:
  """Compiles in a process of its own, which takes a minute or two and 1.5 GB.

  Raises:
    InputError: libtpu is missing; the topology does not exist or the compiler cannot take it; the
      batch cannot be split; or what building the config raises.
  """
  chip_of(request.topology)
  if importlib.util.find_spec('libtpu') is None:
    raise InputError("ppn plan needs the TPU compiler: pip install 'ppn_jax[tpu]' (Linux, no TPU "
                     'needed)')
  with tempfile.TemporaryDirectory() as folder:
    asked, answer = pathlib.Path(folder, 'request'), pathlib.Path(folder, 'answer')
    asked.write_bytes(pickle.dumps(request))
    code = ('from ppn_jax.planning import estimation; '
            f'estimation._answer({str(asked)!r}, {str(answer)!r})')
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
                     f'{signal.Signals(-process.returncode).name}; it cannot take this topology, '
                     'or the machine ran out of memory')
  raise RuntimeError(f'the compiling process failed:\n{process.stderr[-4000:]}')


def _search_path() -> str:
  """Where this process finds modules, the user's own among them."""
  return os.pathsep.join(os.path.abspath(p) for p in sys.path)


def _answer(request_file: str, answer_file: str) -> None:
  """The compiling process: leaves an Estimate, or what was wrong as text."""
  request = pickle.loads(pathlib.Path(request_file).read_bytes())
  try:
    answer = compile_program(request)
  except InputError as e:
    answer = str(e)
  # Whole or not at all: the process may abort at any time.
  partial = pathlib.Path(answer_file + '.partial')
  partial.write_bytes(pickle.dumps(answer))
  partial.rename(answer_file)


def compile_program(request: Request) -> Estimate:
  """As `plan`, in this process, whose environment has to be right for libtpu."""
  chip, shape = chip_of(request.topology)
  devices = _devices(request.topology, shape)
  chips = math.prod(shape)
  per_chip = len(devices) // chips
  if request.batch_per_chip < 1 or request.batch_per_chip % per_chip:
    raise InputError(f'--batch_per_chip={request.batch_per_chip} must be a multiple of the '
                     f'{per_chip} device{"s" if per_chip > 1 else ""} of a chip of '
                     f'{request.topology}')
  estimate = Estimate(
      request.topology, request.program, chips, len({d.process_index for d in devices}), per_chip,
      request.batch_per_chip, fits=True, hbm=chip.hbm, peak_hbm=0, clock=chip.clock,
      bandwidth=chip.bandwidth, jax_version=jax.__version__,
      libtpu_version=importlib.metadata.version('libtpu'))
  mesh = sharding.data_mesh(devices)
  lowered = _lower(request, mesh, chips)
  started = time.perf_counter()
  try:
    compiled = lowered.compile()
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
  return _filled_in(estimate, compiled)


def _devices(topology: str, shape: tuple[int, ...]) -> list[Any]:
  # Hosts have four chips and more, unless told so.
  few = math.prod(shape) < 4
  options = {'chips_per_host_bounds': (*shape, 1)[:3]} if few else {}
  if topology.startswith('v4:'):  # As JAX has them on a v4, where two cores are one device.
    options['chip_config_name'] = 'megacore'
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology,
                                             **options).devices)
  except jax.errors.JaxRuntimeError as e:
    raise InputError(f'{topology} is no topology that the compiler knows: {_first_line(e)}') from e


def _lower(request: Request, mesh: jax.sharding.Mesh, chips: int) -> jax.stages.Lowered:
  config, batch_size = ConfigDict(request.config), request.batch_per_chip * chips
  detector = build_detector(config)
  optimizer = optimizer_of(config, steps=max(config.train.steps, 1), batch_size=batch_size)
  if request.program == 'train':
    check_batch(config, 'the batch of all chips', batch_size, optimizer.micro_batches, mesh)
  state = abstract_state(detector, optimizer, mesh)
  images, truth = abstract_batch(batch_size, detector.image_size,
                                 config.data.max_boxes or MAX_BOXES, mesh)
  if request.program == 'detect':
    return jit_detect(detector, mesh).lower(state.variables, images)
  return jit_train_step(detector, optimizer, mesh).lower(state, images, truth)


def _filled_in(estimate: Estimate, compiled: jax.stages.Compiled) -> Estimate:
  """With what the compiled program says of itself."""
  devices, analysis = estimate.devices_per_chip, compiled.cost_analysis()
  costs = hlo.costs(hlo.parse(compiled.as_text()))
  flops, hbm_bytes = devices * analysis['flops'], devices * costs.hbm_bytes
  # The roofline: nothing is faster than its memory traffic or its arithmetic.
  roofline = max(hbm_bytes / estimate.bandwidth, flops / chip_of(estimate.topology)[0].peak)
  rates = [estimate.batch_per_chip / s if s else 0.0
           for s in (costs.cycles / estimate.clock, roofline)]
  return estimate._replace(
      peak_hbm=devices * compiled.memory_analysis().peak_memory_in_bytes,
      flops=flops, bytes_accessed=devices * analysis['bytes accessed'], hbm_bytes=hbm_bytes,
      cycles=costs.cycles, unestimated_sorts=costs.unestimated_sorts,
      unknown_loops=costs.unknown_loops,
      images_per_second_by_cycles=rates[0], images_per_second_by_bytes=rates[1],
      collectives=costs.collectives)


_SIZE = re.compile(
    r'(?:[Uu]sed |\()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)')


def _needed_hbm(message: str) -> int | None:
  """Bytes that a device would need, from the compiler's message that it has not so many."""
  match = _SIZE.search(message)
  return int(float(match[1]) * 1024 ** ' KMGT'.index(match[2] or ' ')) if match else None


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0][:300]
