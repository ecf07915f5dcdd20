"""The processes that fill the batches of `worker_processes.generate_batches`.

One process, started afresh, reads the description of the work and forks the workers, which
therefore share the annotations. It never imports JAX, whose threads would not survive a fork. All
end as soon as the process that reads the batches ends, however it does: the pipes that they read
are closed then.
"""

import contextlib
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

from ppn_jax.data.batch_memory import BatchShape, SharedBatches, clear_row, fill_row
from ppn_jax.detection.structures import Batch, Example
from ppn_jax.errors import InputError

# A piece of work: step, number of the shared batch, first row, row after the last. Reads and writes
# of so few bytes are atomic, so workers need no lock, which a killed one could hold for ever.
TASK = struct.Struct('=qqqq')

# Called with an example that cannot be read; raises unless another may take its place.
Record = Callable[[InputError], None]
Load = Callable[[int, Record], Example | None]


class Work(NamedTuple):
  """What the workers do.

  Fields:
    load: maps the number of a row, step * rows + row, to its example, None for a row of zeros.
    shape: sizes of the batches.
    skip: whether other examples may take the place of those that cannot be read.
  """
  load: Load
  shape: BatchShape
  skip: bool


class Pipes(NamedTuple):
  """File descriptors that the processes are given.

  Fields:
    memory: of the shared batches.
    tasks: to read tasks from.
    alive: nothing can be read from it as long as the reader of the batches lives.
    deaths: to write a line to for each worker that ends.
    results: for each worker, to write a Result to for each task.
  """
  memory: int
  tasks: int
  alive: int
  deaths: int
  results: tuple[int, ...]


class Failure(NamedTuple):
  """Exception that crosses processes, which lose its cause otherwise."""
  error: BaseException
  cause: BaseException | None

  @classmethod
  def of(cls, error: BaseException) -> 'Failure':
    """Returns an exception as what can be pickled."""
    cause = error.__cause__ or error.__context__
    if not isinstance(error, InputError):
      error.add_note('In an input worker:\n' + ''.join(traceback.format_exception(error)))
    return cls(_picklable(error), cause and _picklable(cause))

  def restored(self) -> BaseException:
    """Returns the exception with its cause."""
    self.error.__cause__ = self.cause
    return self.error


class Result(NamedTuple):
  """What came of a task.

  Fields:
    step: of the task.
    unreadable: (row, failure) of examples that others took the place of.
    failure: (row, failure) at which the work on the task ended, None if it was done.
  """
  step: int
  unreadable: list[tuple[int, Failure]]
  failure: tuple[int, Failure] | None


def serve(stream, pipes: Pipes) -> NoReturn:
  """Forks workers and waits until they have ended; runs in a process of its own.

  Args:
    stream: binary stream with the pickled `Work`.
    pipes: the descriptors; not used otherwise.
  """
  try:
    work: Work = pickle.load(stream)
  except BaseException as e:
    _report(pipes.results, Failure.of(InputError(
        'data.workers=processes: the data source and its transforms cannot be loaded in another '
        f'process: {type(e).__name__}: {e}; define them in a module that can be imported, or use '
        'data.workers=threads')))
    os._exit(1)
  children = {}
  for number, result in enumerate(pipes.results):
    pid = os.fork()
    if not pid:
      _work(work, pipes, result)
    children[pid] = number
    os.close(result)  # So that the reader notices the end of that worker.
  os.close(pipes.tasks)
  # The reader's end is the only one left, so reading returns when it is closed.
  threading.Thread(target=_end_with_the_reader, args=(pipes.alive,), daemon=True).start()
  while children:
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(BrokenPipeError):
      os.write(pipes.deaths, f'{children.pop(pid)} {code}\n'.encode())
  os._exit(0)


def _end_with_the_reader(alive: int) -> None:
  os.read(alive, 1)
  os.killpg(os.getpgid(0), signal.SIGKILL)


def _report(results: Sequence[int], failure: Failure) -> None:
  """Sends a failure that concerns no task as that of step -1."""
  for result in results[:1]:
    Connection(result, readable=False).send(Result(-1, [], (0, failure)))


def _work(work: Work, pipes: Pipes, result: int) -> NoReturn:
  """Fills rows until there are no more tasks."""
  try:
    for other in pipes.results:
      if other != result:
        _close(other)
    for other in (pipes.alive, pipes.deaths):
      _close(other)
    batches, answers = SharedBatches(work.shape, pipes.memory), Connection(result, readable=False)
    while task := os.read(pipes.tasks, TASK.size):
      step, number, first, end = TASK.unpack(task)
      answers.send(_fill(work, step, batches.permanent_view(number), range(first, end)))
  except (BrokenPipeError, KeyboardInterrupt):  # The reader has gone.
    os._exit(0)
  except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
  os._exit(0)


def _fill(work: Work, step: int, batch: Batch, rows: range) -> Result:
  unreadable: list[tuple[int, Failure]] = []
  for row in rows:
    def record(error: InputError, row=row) -> None:
      if not work.skip:
        raise error
      unreadable.append((row, Failure.of(error)))

    try:
      example = work.load(step * work.shape.rows + row, record)
      clear_row(batch, row, image=example is None)
      if example is not None:
        fill_row(batch, row, example)
    except Exception as e:
      return Result(step, unreadable, (row, Failure.of(e)))
  return Result(step, unreadable, None)


def _picklable(error: BaseException) -> BaseException:
  """Returns an exception, or one of the same text if it cannot be pickled."""
  try:
    pickle.loads(pickle.dumps(error))
    return error
  except Exception:
    plain = RuntimeError(f'{type(error).__name__}: {error}')
    for note in getattr(error, '__notes__', ()):
      plain.add_note(note)
    return plain


def _close(descriptor: int) -> None:
  with contextlib.suppress(OSError):  # Closed before the fork.
    os.close(descriptor)
