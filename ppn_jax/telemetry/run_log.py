"""The log of each process, in the workdir of its run."""

import logging
import threading

from ppn_jax import storage
from ppn_jax.telemetry.metrics import AppendOnlyFile

FOLDER = 'logs'
_FORMAT = logging.Formatter('%(asctime)s %(message)s')


class RunLog(logging.Handler):
  """Handler that writes what the package logs to WORKDIR/logs, one file for each process and start.

  A context manager. Records are kept until `open`, so that nothing is written for a run that does
  not begin. In a bucket, the file is copied every half minute and at the end.
  """

  def __init__(self):
    super().__init__(logging.INFO)
    self.setFormatter(_FORMAT)
    self._kept: list[str] = []
    self._outbox: storage.Outbox | None = None
    self._file: AppendOnlyFile | None = None
    self._mutex = threading.Lock()

  def __enter__(self) -> 'RunLog':
    logging.getLogger('ppn_jax').addHandler(self)
    return self

  def __exit__(self, *_: object) -> None:
    logging.getLogger('ppn_jax').removeHandler(self)
    try:
      if self._outbox:
        self._outbox.close()
    except OSError:
      pass  # It only informs, and must not hide what ended the run.
    self._outbox = None
    self.close()

  def open(self, workdir: storage.Path, name: str) -> None:
    """Writes to WORKDIR/logs/NAME from now on, what was kept included."""
    self._outbox = storage.Outbox(workdir / FOLDER)
    self._file = AppendOnlyFile(self._outbox.folder / name)
    for line in self._kept:
      self._file.add(line.encode())
    self._kept.clear()
    self.write('')

  def emit(self, record: logging.LogRecord) -> None:
    self.write(f'{self.format(record)}\n')

  def write(self, text: str) -> None:
    """Writes text; a disk that fails is ignored, and what could not be written is kept."""
    with self._mutex:
      if self._file is None or self._outbox is None:
        self._kept.append(text)
        return
      self._file.add(text.encode())
      try:
        self._file.flush()
      except OSError:
        return
      self._outbox.offer()

  def flush(self) -> None:
    """Copies what is written to a bucket now, if the log is in one."""
    if self._outbox:
      self._outbox.flush()
