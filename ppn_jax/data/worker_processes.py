"""Batches that worker processes fill in shared memory.

Python runs one thread at a time, so threads end at about a thousand images a second, whatever the
number of cores. Processes do not share that limit; see `worker_server` for what they do.
"""

import os
import pickle
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.batch_memory import BatchShape, SharedBatches
from ppn_jax.data.worker_server import TASK, Failure, Load, Pipes, Result, Work
from ppn_jax.detection.structures import Batch
from ppn_jax.errors import InputError, Stopped

# The package and the user's modules are found as here.
_PROGRAM = ('import pickle, sys\n'
            'stream = sys.stdin.buffer\n'
            'sys.path[:], pipes = pickle.load(stream)\n'
            'from ppn_jax.data.worker_server import Pipes, serve\n'
            'serve(stream, Pipes(*pipes))')


def available() -> bool:
  """Returns whether this system can run worker processes."""
  return hasattr(os, 'fork')


def generate_batches(load: Load, steps: int, shape: BatchShape, *, workers: int, ahead: int,
                     bad: BadExamples | None) -> Iterator[Batch]:
  """Yields batches of load(0), load(1), ..., in order, whatever the number of workers.

  Args:
    load: see `worker_server.Work`; it is pickled.
    steps: number of batches.
    shape: sizes of the batches.
    workers: number of processes.
    ahead: number of batches that are filled at a time.
    bad: decides about examples that cannot be read; None raises.

  Yields:
    Batches in shared memory, which is used again when a batch is garbage.

  Raises:
    InputError: If an example cannot be read, or `load` cannot be pickled.
    Stopped: If a worker dies.
  """
  if not available():
    raise InputError('data.workers=processes needs a system with fork, such as Linux or macOS; use '
                     'data.workers=threads')
  try:
    work = pickle.dumps(Work(load, shape, bad is not None and bad.skips))
  except Exception as e:
    raise InputError(f'data.workers=processes: the data source or a transform cannot be sent to '
                     f'another process: {e}; use data.workers=threads') from e
  loader = _ProcessLoader(work, shape, workers, bad)
  try:
    for step in range(min(steps, ahead)):
      loader.begin(step)
    for step in range(steps):
      batch = loader.finish(step)
      if step + ahead < steps:
        loader.begin(step + ahead)
      yield batch
      del batch  # Not in use here while the next one is waited for.
  finally:
    loader.close()


class _Pending:
  """Batch that is being filled.

  Attributes:
    number: number of the shared batch.
    left: tasks that are not done.
    failures: (row, exception) of those that failed.
  """

  def __init__(self, number: int, tasks: int):
    self.number, self.left = number, tasks
    self.failures: list[tuple[int, BaseException]] = []


class _ProcessLoader:
  """Starts the processes, hands out tasks and takes the results."""

  def __init__(self, work: bytes, shape: BatchShape, workers: int, bad: BadExamples | None):
    self._shape, self._bad = shape, bad
    # Small tasks, so that no worker is busy long with the last images of a batch.
    self._task_rows = max(1, shape.rows // (4 * workers))
    self._batches = SharedBatches(shape)
    self._pending: dict[int, _Pending] = {}
    self._selector = selectors.DefaultSelector()
    tasks, self._tasks = os.pipe()
    alive, self._alive = os.pipe()
    self._deaths, deaths = os.pipe()
    pairs = [os.pipe() for _ in range(workers)]
    for number, (read, _) in enumerate(pairs):
      self._selector.register(Connection(read, writable=False), selectors.EVENT_READ, number)
    given = Pipes(self._batches.descriptor, tasks, alive, deaths, tuple(w for _, w in pairs))
    passed = [*given[:-1], *given.results]
    self._process = subprocess.Popen(
        [sys.executable, '-c', _PROGRAM], stdin=subprocess.PIPE, pass_fds=passed,
        # Ctrl-C reaches the process that reads the batches, which then ends them.
        process_group=0, env={**os.environ, 'OPENCV_FOR_THREADS_NUM': '1'})
    for descriptor in passed[1:]:
      os.close(descriptor)
    assert self._process.stdin is not None
    try:
      with self._process.stdin as stream:
        stream.write(pickle.dumps((sys.path, tuple(given))) + work)
    except BrokenPipeError:
      pass  # It has ended, which `finish` reports.

  def begin(self, step: int) -> None:
    """Hands out the rows of a batch."""
    number, rows = self._batches.take(), self._shape.rows
    starts = range(0, rows, self._task_rows)
    self._pending[step] = _Pending(number, len(starts))
    for first in starts:
      try:
        os.write(self._tasks, TASK.pack(step, number, first, min(first + self._task_rows, rows)))
      except BrokenPipeError:
        return  # All workers have ended, which `finish` reports.

  def finish(self, step: int) -> Batch:
    """Returns a batch when it is filled.

    Raises:
      The error of the first row that failed; Stopped if a worker has died.
    """
    pending = self._pending[step]
    while pending.left:
      for key, _ in self._selector.select():
        self._receive(key.fileobj, key.data)  # pyright: ignore[reportArgumentType]
    del self._pending[step]
    if pending.failures:
      raise min(pending.failures, key=lambda failure: failure[0])[1]
    return self._batches.view(pending.number)

  def _receive(self, results: Connection, worker: int) -> None:
    try:
      result: Result = results.recv()
    except (EOFError, OSError) as e:
      raise self._death(worker) from e
    if result.step < 0 and result.failure:
      raise result.failure[1].restored()
    pending = self._pending[result.step]
    pending.left -= 1
    if result.failure:
      pending.failures.append((result.failure[0], result.failure[1].restored()))
    for row, failure in result.unreadable:
      self._record(pending, row, failure)

  def _record(self, pending: _Pending, row: int, failure: Failure) -> None:
    """Lets `bad` decide about an example that another took the place of."""
    try:
      assert self._bad is not None
      self._bad.record(failure.restored())  # pyright: ignore[reportArgumentType]
    except Exception as e:
      pending.failures.append((row, e))

  def _death(self, worker: int) -> Stopped:
    """Returns the error about a worker that has ended."""
    text = os.read(self._deaths, 1 << 16).decode()  # '' if the process that forks has ended too.
    codes = dict(map(int, line.split()) for line in text.splitlines())
    worker, code = (worker, codes[worker]) if worker in codes else next(
        iter(codes.items()), (worker, None))
    if code is None:
      code = self._process.wait()
    how = (f'was killed by {signal.Signals(-code).name}' if code < 0 else f'ended with {code}')
    hint = ('; the machine may have run out of memory: use fewer data.threads'
            if code == -signal.SIGKILL else '; its output says why')
    return Stopped(f'input worker {worker} of {len(self._selector.get_map())} {how}{hint}')

  def close(self) -> None:
    """Ends all processes."""
    for descriptor in (self._tasks, self._alive):
      os.close(descriptor)
    self._process.wait()
    os.close(self._deaths)
    for key in list(self._selector.get_map().values()):
      key.fileobj.close()  # pyright: ignore[reportAttributeAccessIssue]
    self._selector.close()
    self._batches.close()
