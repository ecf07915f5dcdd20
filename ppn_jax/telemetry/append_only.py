"""Files that grow while a run goes on, on a disk that may be full for a while."""

import errno
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class GrowingFile:
  """A file that is added to. What it does not take is kept in memory, and written first thereafter.

  Args:
    path: made if need be; what it holds stays.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    self._path, self._size, self._kept = path, path.stat().st_size, b''

  def add(self, data: bytes) -> None:
    """Takes what `flush` writes."""
    self._kept += data

  def flush(self) -> None:
    """Raises OSError if not all could be written; it can be tried again."""
    if not self._kept:
      return
    # Not held open: a disk that comes back may have been mounted anew.
    with self._path.open('r+b', buffering=0) as file:
      file.truncate(self._size)  # A disk that fills up takes a part.
      file.seek(self._size)
      if file.write(self._kept) < len(self._kept):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
    self._size += len(self._kept)
    self._kept = b''


class EventFile(GrowingFile):
  """A new TensorBoard event file.

  Not tensorboardX's SummaryWriter: its thread ends at the first error, after which the queue to
  it fills up and holds up the caller for ever.

  Args:
    folder: where TensorBoard looks for it.
    purge_step: TensorBoard is to forget what earlier files say of this step and later ones.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int | None = None):
    now = time.time()
    super().__init__(folder / f'events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}')
    self._add(Event(wall_time=now, file_version='brain.Event:2'))
    if purge_step is not None:
      self._add(Event(wall_time=now, step=purge_step,
                      session_log=SessionLog(status=SessionLog.START)))

  def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Takes the scalars of one step."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def _add(self, event: Event) -> None:
    """As a TFRecord: length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack('<Q', len(content))
    self.add(length + struct.pack('<I', masked_crc32c(length)) +
             content + struct.pack('<I', masked_crc32c(content)))
