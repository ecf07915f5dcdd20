"""What processes tell the first one in passing, without waiting for each other.

Unlike `coordination.gather`, a report costs each process one message, and the first process one
look. Training leaves both to a thread, `StatusExchange`, so that a report costs it the same
however many processes there are. What arrives may be that of the report before.
"""

import itertools
import json
import queue
import socket
import threading
from collections.abc import Iterable
from typing import Any, Self

import jax

from ppn_jax.distributed import coordination

_STATUS, _NOTES = 'ppn_jax/status', 'ppn_jax/notes'

# A request that fails ends by itself; until then a run that ends does not wait for it longer.
_CLOSE_SECONDS = 5

_count = itertools.count()


class StatusExchange:
  """Publishes the status of this process, and looks up that of all, in a thread of its own.

  To be used in a `with` statement; the thread works within it.
  """

  def __init__(self):
    self._found: dict[int, dict[str, Any]] = {}
    self._error: jax.errors.JaxRuntimeError | None = None
    self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._work, name='status', daemon=True)

  def __enter__(self) -> Self:
    if jax.process_count() > 1:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._thread.is_alive():
      self._outbox.put(None)
      self._thread.join(_CLOSE_SECONDS)

  def exchange(self, **status: Any) -> dict[int, dict[str, Any]]:
    """Hands a status of plain values to the thread, and returns what it has found so far.

    Returns:
      The newest known status of each process, in the first of several; {} in the others.

    Raises:
      jax.errors.JaxRuntimeError: If an earlier exchange has failed.
    """
    if self._error:
      raise self._error
    if self._thread.is_alive() and self._outbox.empty():  # A slow service delays no report.
      self._outbox.put(status)
    return self._found

  def _work(self) -> None:
    try:
      while (status := self._outbox.get()) is not None:
        publish(**status)
        if jax.process_index() == 0:
          self._found = published()
    except jax.errors.JaxRuntimeError as e:
      self._error = e


def publish(**status: Any) -> None:
  """Replaces the status of this process, plain values, which the first process can look up."""
  if jax.process_count() > 1:
    coordination.client().key_value_set(
        f'{_STATUS}/{jax.process_index()}',
        json.dumps({'host': socket.gethostname(), **status}), allow_overwrite=True)


def published() -> dict[int, dict[str, Any]]:
  """Returns the newest status of each process that has published one; {} in one that is alone."""
  if jax.process_count() == 1:
    return {}
  found = coordination.client().key_value_dir_get(f'{_STATUS}/')
  return {int(key.rpartition('/')[2]): json.loads(value) for key, value in found}


def post(lines: Iterable[str]) -> None:
  """Sends lines to the first process, which gets each of them once, by `collect`."""
  lines = list(lines)
  if lines:
    key = f'{_NOTES}/{jax.process_index()}/{next(_count):08}'
    coordination.client().key_value_set(key, json.dumps(lines))


def collect() -> list[str]:
  """Returns the lines that were posted since the last call; in the first process."""
  found = sorted(coordination.client().key_value_dir_get(f'{_NOTES}/'))
  for key, _ in found:
    coordination.client().key_value_delete(key)
  return [line for _, value in found for line in json.loads(value)]


def collect_all(lines: Iterable[str]) -> list[str]:
  """Returns posted lines and those that the processes give here, on the first; [] on the others.

  All processes call it together, and wait for each other, so that no line is missing.
  """
  gathered = coordination.gather_lines(lines)
  posted = collect() if jax.process_count() > 1 and jax.process_index() == 0 else []
  return [*posted, *gathered]
