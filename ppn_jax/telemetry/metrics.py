"""Metrics of a run on disk: `metrics.jsonl` and TensorBoard event files."""

import contextlib
import errno
import json
import math
import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from ppn_jax import storage
from ppn_jax.telemetry.loggers import Loggers

FIRST_LOSS = 'train/first_loss'  # Loss of the first step alone; only in the first line.


class MetricsWriter:
  """Writes the same scalars to `metrics.jsonl` and to TensorBoard event files.

  A line is `{"step": 120, "train/loss": 1.5, ...}`. A metric that does not exist (None) or is not
  finite is null. TensorBoard cannot represent the former, so it is left out there.

  Args:
    workdir: Folder of the run.
    step: Step that the run starts from. Lines of later steps, left by a killed run, are removed,
      since they will be written again. None keeps all lines, for steps that come in any order.
    tensorboard: Folder of the event files, by default in the workdir.
    keep: Returns whether to keep the lines of a step.
    loggers: Further loggers, which get the same scalars; closed with this one.
  """

  def __init__(self, workdir: storage.Path, step: int | None,
               tensorboard: storage.Path | None = None,
               keep: Callable[[int], bool] = lambda step: True, loggers: Loggers | None = None):
    self._loggers = loggers
    path = workdir / 'metrics.jsonl'
    lines = list(_lines_up_to(path, step)) if path.exists() else []
    lines = [line for line in lines if keep(json.loads(line)['step'])]
    self._outboxes = storage.Outbox(workdir), storage.Outbox(tensorboard or workdir / 'tensorboard')
    to_lines, to_events = (outbox.folder for outbox in self._outboxes)
    storage.write_text(to_lines / path.name, ''.join(lines))
    self.steps = {json.loads(line)['step'] for line in lines}  # Of lines that were kept.
    self._lines = AppendOnlyFile(to_lines / path.name)
    self._events = EventFile(to_events, None if step is None else step + 1)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    if self._loggers:
      self._loggers.close(failed=kind is not None)
    # An error in closing must not hide the one that ended the run.
    with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
      self.close()

  def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
    """Writes the scalars of one step.

    Raises:
      OSError: If they cannot be written. They are kept in memory and written by the next call.
    """
    known = {name: None if value is None or not math.isfinite(value) else float(value)
             for name, value in scalars.items()}
    self._lines.add(f'{json.dumps({"step": step, **known})}\n'.encode())
    self._events.add_scalars(step, {name: value for name, value in scalars.items()
                                    if value is not None})
    if self._loggers:
      self._loggers.write(step, scalars)
    self._write_out()
    for outbox in self._outboxes:
      outbox.offer()

  def flush(self) -> None:
    """Blocks until everything written would survive a kill of this process.

    Raises:
      OSError: If the disk or bucket cannot be written. The call can be repeated.
    """
    self._write_out()
    for outbox in self._outboxes:
      outbox.flush()

  def close(self) -> None:
    """Writes what is left.

    Raises:
      OSError: If the disk or bucket cannot be written.
    """
    with contextlib.ExitStack() as stack:
      for outbox in self._outboxes:
        stack.callback(outbox.close)
      self._write_out()

  def _write_out(self) -> None:
    try:
      self._lines.flush()
    finally:
      self._events.flush()


class AppendOnlyFile:
  """A file that only grows. Data that could not be written is kept in memory and written first.

  Args:
    path: The file; created if it does not exist, else its content is kept.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    self._path, self._size, self._unwritten = path, path.stat().st_size, b''

  def add(self, data: bytes) -> None:
    """Adds data for the next `flush` to write."""
    self._unwritten += data

  def flush(self) -> None:
    """Writes what was added.

    Raises:
      OSError: If not all could be written. The call can be repeated.
    """
    if not self._unwritten:
      return
    # Not held open: the disk may have been mounted again after a failure.
    with self._path.open('r+b', buffering=0) as file:
      file.truncate(self._size)  # An earlier attempt may have written a part.
      file.seek(self._size)
      if file.write(self._unwritten) < len(self._unwritten):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
    self._size += len(self._unwritten)
    self._unwritten = b''


class EventFile(AppendOnlyFile):
  """A new TensorBoard event file.

  tensorboardX's SummaryWriter is not used, since its thread ends at the first error, after which
  its queue fills up and blocks the caller for ever.

  Args:
    folder: Where TensorBoard looks for event files.
    purge_step: Makes TensorBoard discard what earlier files have of this step and later ones.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int | None = None):
    now = time.time()
    super().__init__(folder / f'events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}')
    self._add_event(Event(wall_time=now, file_version='brain.Event:2'))
    if purge_step is not None:
      self._add_event(Event(wall_time=now, step=purge_step,
                            session_log=SessionLog(status=SessionLog.START)))

  def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds the scalars of one step."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def _add_event(self, event: Event) -> None:
    """Adds a TFRecord: length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack('<Q', len(content))
    self.add(length + struct.pack('<I', masked_crc32c(length)) +
             content + struct.pack('<I', masked_crc32c(content)))


def has_evaluation(workdir: storage.Path, step: int) -> bool:
  """Returns whether metrics.jsonl has the metrics of an evaluation of `step`."""
  path = workdir / 'metrics.jsonl'
  lines = [json.loads(line) for line in _lines_up_to(path, step)] if path.exists() else []
  return any(line['step'] == step and any(name.startswith('eval/') for name in line)
             for line in lines)


def read(path: storage.Path) -> list[dict[str, float | None]]:
  """Returns the complete lines of a `metrics.jsonl`, in order of step; [] if there is no file.

  Of lines with the same metrics of the same step only the last is returned: the step was scored
  again. Metrics of an evaluation that do not exist are None, also in files of earlier versions,
  which wrote -1.
  """
  lines = [json.loads(line) for line in _lines_up_to(path, None)] if path.is_file() else []
  for line in lines:
    line.update({name: None for name, value in line.items()
                 if value == -1 and name.startswith('eval/')})
  last = {(line['step'], *line): line for line in lines}
  return sorted(last.values(), key=lambda line: line['step'])


def first_loss(workdir: storage.Path) -> float | None:
  """Returns the loss of a run's first step; None if none has been reported yet.

  Earlier versions did not record it. For their runs it is the mean loss up to the first report.
  """
  for line in read(workdir / 'metrics.jsonl'):
    if (loss := line.get(FIRST_LOSS, line.get('train/loss'))) is not None:
      return loss
  return None


def _lines_up_to(path: storage.Path, step: int | None) -> Iterator[str]:
  for line in storage.read_text(path).splitlines():
    # A killed run may leave an incomplete last line, a damaged disk anything.
    with contextlib.suppress(ValueError):
      found = json.loads(line)
      at = found.get('step') if isinstance(found, dict) else None
      if type(at) is int and (step is None or at <= step):
        yield f'{line}\n'
