"""Bytes between the processes of a run, by the service that has joined them.

For what is uneven, or awaited for long: collectives of the devices give everything to everyone,
want equal shapes, and have the devices wait.
"""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import jax

_PIECE = 4 << 20  # Bytes in one message; gRPC does not take them of any size.
_PATIENCE_MS = 60_000  # Of one request; it is asked again until there is an answer.
_MEETING_MS = 3_600_000

_calls = itertools.count()
_handed_out: list[str] = []


def client() -> Any:
  """The connection to the coordination service; None in a process that works alone."""
  from jax._src import distributed  # There is no public way to its key-value store.
  return distributed.global_state.client


def meet() -> None:
  """Waits until all processes are here, which call it together.

  Before a program's first collective: on CPUs that one gives up after 30 s, and hosts may take
  longer to compile than others.
  """
  if jax.process_count() > 1:
    client().wait_at_barrier(f'ppn_jax/meeting/{next(_calls)}', _MEETING_MS)


def gather(data: bytes) -> list[bytes]:
  """What each process has, in their order, on the first; an empty list on the others.

  All processes call it together, each with its own. It waits for the slowest.
  """
  if jax.process_count() == 1:
    return [data]
  name = f'ppn_jax/exchange/{next(_calls)}'
  if jax.process_index():
    _put(f'{name}/{jax.process_index()}', data)
    return []
  gathered = [data, *(_take(f'{name}/{i}') for i in range(1, jax.process_count()))]
  # Whoever has got here has read all that was handed out before.
  for key in [name, *_handed_out]:
    client().key_value_delete(key)
  _handed_out.clear()
  return gathered


def gather_lines(lines: Iterable[str]) -> list[str]:
  """As `gather`, of lines: those of all processes on the first, none on the others."""
  return [line for told in gather(json.dumps(list(lines)).encode()) for line in json.loads(told)]


def hand_out(data: bytes) -> bytes:
  """What the first process has, on all of them, which call it together."""
  if jax.process_count() == 1:
    return data
  name = f'ppn_jax/exchange/{next(_calls)}'
  if jax.process_index():
    return _take(name)
  _put(name, data)
  _handed_out.append(name)
  return data


def _put(key: str, data: bytes) -> None:
  pieces = [data[i:i + _PIECE] for i in range(0, len(data), _PIECE)]
  for i, piece in enumerate(pieces):
    client().key_value_set_bytes(f'{key}/piece-{i}', piece)
  client().key_value_set_bytes(f'{key}/pieces', str(len(pieces)).encode())


def _take(key: str) -> bytes:
  return b''.join(_wait_for(f'{key}/piece-{i}') for i in range(int(_wait_for(f'{key}/pieces'))))


def _wait_for(key: str) -> bytes:
  while True:
    try:
      return client().blocking_key_value_get_bytes(key, _PATIENCE_MS)
    except jax.errors.JaxRuntimeError as e:
      if not str(e).startswith('DEADLINE_EXCEEDED'):
        raise
