"""Time and memory of a step: traces, the compiler's estimates, and peak memory."""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ppn_jax import storage
from ppn_jax.errors import InputError
from ppn_jax.telemetry import host_memory

logger = logging.getLogger(__name__)


def parse_steps(text: str, last: int) -> range:
  """Parses 'START:STOP' into the range of these steps, both included; '' into an empty one.

  Args:
    text: Value of the flag `--profile`.
    last: Last step of the run. The first is 1.

  Raises:
    InputError: If `text` is not two integers with 1 <= START <= STOP <= last.
  """
  if not text:
    return range(0)
  start, _, stop = text.partition(':')
  if not (start.isascii() and start.isdigit() and stop.isascii() and stop.isdigit()):
    raise InputError(f'--profile={text} must be START:STOP, two step numbers such as 10:20')
  if not 1 <= int(start) <= int(stop) <= last:
    raise InputError(f'--profile={text} must lie within the steps of the run, 1:{last}, '
                     'and START must not be after STOP')
  return range(int(start), int(stop) + 1)


class StepTrace:
  """Traces some steps of a run for TensorBoard's profile plugin and XProf.

  A context manager around the loop, so that a trace also ends if the run does. The trace is
  written to FOLDER/plugins/profile/DATE, which TensorBoard finds with --logdir=FOLDER.

  Args:
    steps: Consecutive steps to trace; may be empty.
    folder: Where to write, local or in a bucket.
  """

  def __init__(self, steps: range, folder: storage.Path):
    self._steps, self._folder = steps, folder
    self._running: tempfile.TemporaryDirectory | None = None

  @contextlib.contextmanager
  def step(self, number: int, pending: list[Any]) -> Iterator[None]:
    """Wraps the work of one step; `pending` has the results of the steps before it."""
    if number not in self._steps:
      yield
      return
    if not self._running:
      jax.block_until_ready(pending)  # These steps are not to be traced.
      self._running = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._running.name)
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if number == self._steps[-1]:
      jax.block_until_ready(pending)
      self._stop()

  def _stop(self) -> None:
    running, self._running = self._running, None
    with running as folder:
      jax.profiler.stop_trace()
      try:
        for path in filter(pathlib.Path.is_file, pathlib.Path(folder).rglob('*')):
          storage.write_bytes(self._folder / path.relative_to(folder), path.read_bytes())
      except OSError as e:  # Not worth ending the run.
        logger.warning(f'no trace written to {self._folder}: {e}')
        return
    logger.info(f'wrote a trace of steps {self._steps[0]:,} to {self._steps[-1]:,} to '
                f'{self._folder}/plugins/profile')

  def __enter__(self) -> 'StepTrace':
    return self

  def __exit__(self, *_) -> None:
    if self._running:
      self._stop()


def describe(compiled: jax.stages.Compiled) -> str:
  """Returns a line with XLA's estimates of a compiled step's memory and FLOPs on each device."""
  needed, costs = program_bytes(compiled), compiled.cost_analysis() or {}
  parts = [f'{format_bytes(needed)} of memory'] if needed else []
  if costs.get('flops', 0) > 0:  # -1 if unknown.
    parts.append(f'{costs["flops"] / 1e9:,.4g} GFLOP')
  return "a step needs, on each device by XLA's count, " + (
      ' and '.join(parts) or 'an unknown amount of memory')


def program_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns XLA's estimate of a compiled program's peak memory on a device, arguments included.

  In bytes; 0 if the backend has no estimate.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    return 0
  whole = (memory.argument_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
  # On CPUs `peak_memory_in_bytes` leaves out temporary buffers.
  peak = memory.peak_memory_in_bytes
  return peak if peak > memory.temp_size_in_bytes else whole


def peak_memory() -> dict[str, int]:
  """Returns `host_peak_bytes` of this process and `device_peak_bytes` of its fullest device.

  What the system or the backend does not report is left out.
  """
  peaks = {'host_peak_bytes': host_memory.peak_memory()}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks['device_peak_bytes'] = max(s.get('peak_bytes_in_use', 0) for s in stats)
  return {name: peak for name, peak in peaks.items() if peak}


def format_peaks(peaks: Mapping[str, float]) -> str:
  """Formats the result of `peak_memory`, such as 'host 1.2 GB, device 3.4 GB'."""
  known = [(where, peaks.get(f'{where}_peak_bytes')) for where in ('host', 'device')]
  return ', '.join(f'{where} {format_bytes(peak)}' for where, peak in known if peak) or 'unknown'


def format_bytes(count: float) -> str:
  """Formats a number of bytes: 1234567 -> '1.23 MB'."""
  for size, unit in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'KB')):
    if count >= size:
      return f'{count / size:,.3g} {unit}'
  return f'{count:.0f} bytes'
