"""Where a step's time and memory go: a trace of some steps, the compiler's figures, the peaks."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ppn_jax import storage
from ppn_jax.errors import InputError
from ppn_jax.telemetry import host_memory


def parse_steps(text: str, last: int) -> range:
  """'START:STOP' -> the steps from START to STOP, both included; '' -> none.

  Args:
    text: of the flag `--profile`.
    last: step of the run. The first is 1.

  Raises:
    InputError: not two whole numbers, or not 1 <= START <= STOP <= last.
  """
  if not text:
    return range(0)
  start, _, stop = text.partition(':')
  if not (start.isascii() and start.isdigit() and stop.isascii() and stop.isdigit()):
    raise InputError(f'--profile={text} must be START:STOP, two steps such as 10:20')
  if not 1 <= int(start) <= int(stop) <= last:
    raise InputError(f'--profile={text} must lie within the steps of the run, 1:{last}, '
                     'START not after STOP')
  return range(int(start), int(stop) + 1)


class StepTrace:
  """Traces some steps of a run for TensorBoard's profile plugin and XProf.

  A context manager around the loop, so that a trace also ends when the run does. The trace is in
  FOLDER/plugins/profile/DATE, which TensorBoard finds with --logdir=FOLDER.

  Args:
    steps: to trace, without gaps; may be empty.
    folder: to write to, local or in a bucket.
    say: told what goes on, a line at a time.
  """

  def __init__(self, steps: range, folder: storage.Path, say: Callable[[str], None]):
    self._steps, self._folder, self._say = steps, folder, say
    self._running: tempfile.TemporaryDirectory | None = None

  @contextlib.contextmanager
  def step(self, number: int, pending: list[Any]) -> Iterator[None]:
    """Around what is done for a step; the results of the last steps are in `pending`."""
    if number not in self._steps:
      yield
      return
    if not self._running:
      jax.block_until_ready(pending)  # They are no part of it.
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
      except OSError as e:  # No reason to end a run.
        self._say(f'no trace in {self._folder}: {e}')
        return
    self._say(f'wrote a trace of steps {self._steps[0]:,} to {self._steps[-1]:,} to '
              f'{self._folder}/plugins/profile')

  def __enter__(self) -> 'StepTrace':
    return self

  def __exit__(self, *_) -> None:
    if self._running:
      self._stop()


def describe(compiled: jax.stages.Compiled) -> str:
  """Memory and arithmetic of a compiled step on each device, as XLA counts them, in a line."""
  needed, costs = program_bytes(compiled), compiled.cost_analysis() or {}
  said = [f'{format_bytes(needed)} of memory'] if needed else []
  if costs.get('flops', 0) > 0:  # Of a program whose FLOPs are unknown, -1.
    said.append(f'{costs["flops"] / 1e9:,.4g} GFLOP')
  return "a step needs, on each device by XLA's count, " + (' and '.join(said) or 'it cannot tell')


def program_bytes(compiled: jax.stages.Compiled) -> int:
  """The most bytes that a compiled program holds on a device, arguments included, as XLA counts
  them; 0 if it cannot tell."""
  memory = compiled.memory_analysis()
  if memory is None:
    return 0
  whole = (memory.argument_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
  # On a CPU the peak leaves out what is temporary.
  peak = memory.peak_memory_in_bytes
  return peak if peak > memory.temp_size_in_bytes else whole


def peak_memory() -> dict[str, int]:
  """The most bytes held at a time so far: `host_peak_bytes` of this process, where the system
  tells, and `device_peak_bytes` of its fullest device, where the backend tells."""
  peaks = {'host_peak_bytes': host_memory.peak_memory()}
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks['device_peak_bytes'] = max(s.get('peak_bytes_in_use', 0) for s in stats)
  return {name: peak for name, peak in peaks.items() if peak}


def format_peaks(peaks: Mapping[str, float]) -> str:
  """What `peak_memory` gives as 'host 1.2 GB, device 3.4 GB'."""
  known = [(where, peaks.get(f'{where}_peak_bytes')) for where in ('host', 'device')]
  return ', '.join(f'{where} {format_bytes(peak)}' for where, peak in known if peak) or 'unknown'


def format_bytes(count: float) -> str:
  """1234567 -> '1.2 MB'."""
  for size, unit in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'KB')):
    if count >= size:
      return f'{count / size:,.3g} {unit}'
  return f'{count:.0f} bytes'
