"""Exchange of bytes between the processes of a run, through JAX's coordination service.

For data of unequal size, or that processes wait long for: collectives of the devices send
everything to every process, need equal shapes, and block the devices.
"""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import jax

_CHUNK_BYTES = 4 << 20  # In one message; gRPC limits its size.
_REQUEST_MS = 60_000  # Timeout of one request, which is repeated until there is an answer.
_BARRIER_MS = 3_600_000

_calls = itertools.count()
_broadcast_keys: list[str] = []


def client() -> Any:
  """Returns the client of the coordination service; None in a process that works alone."""
  from jax._src import distributed  # There is no public access to its key-value store.
  return distributed.global_state.client


def wait_for_all() -> None:
  """Waits until all processes have called this.

  Needed before a program's first collective: on CPUs that one times out after 30 s, and some hosts
  take longer to compile than others.
  """
  if jax.process_count() > 1:
    client().wait_at_barrier(f'ppn_jax/barrier/{next(_calls)}', _BARRIER_MS)


def gather(data: bytes) -> list[bytes]:
  """Returns the data of all processes, in their order, on the first; [] on the others.

  All processes call it together, each with its own data. It waits for the slowest.
  """
  if jax.process_count() == 1:
    return [data]
  name = f'ppn_jax/exchange/{next(_calls)}'
  if jax.process_index():
    _put(f'{name}/{jax.process_index()}', data)
    return []
  gathered = [data, *(_take(f'{name}/{i}') for i in range(1, jax.process_count()))]
  # Every process that has sent its data has read all earlier broadcasts.
  for key in [name, *_broadcast_keys]:
    client().key_value_delete(key)
  _broadcast_keys.clear()
  return gathered


def gather_lines(lines: Iterable[str]) -> list[str]:
  """Returns the lines of all processes on the first, [] on the others; see `gather`."""
  return [line for data in gather(json.dumps(list(lines)).encode()) for line in json.loads(data)]


def broadcast(data: bytes) -> bytes:
  """Returns the data of the first process in all of them; all processes call it together."""
  if jax.process_count() == 1:
    return data
  name = f'ppn_jax/exchange/{next(_calls)}'
  if jax.process_index():
    return _take(name)
  _put(name, data)
  _broadcast_keys.append(name)
  return data


def broadcast_json(value: Any) -> Any:
  """Returns the plain value of the first process in all of them, as JSON; see `broadcast`."""
  return json.loads(broadcast(json.dumps(value).encode()))


def publish(key: str, data: bytes) -> None:
  """Keeps a small message for `find`, for as long as the run lasts; in any thread."""
  client().key_value_set_bytes(key, data, allow_overwrite=True)


def find(key: str) -> bytes | None:
  """Returns what another process has published, or None if it has not within a minute."""
  try:
    return client().blocking_key_value_get_bytes(key, _REQUEST_MS)
  except jax.errors.JaxRuntimeError as e:
    if not str(e).startswith('DEADLINE_EXCEEDED'):
      raise
    return None


def _put(key: str, data: bytes) -> None:
  chunks = [data[i:i + _CHUNK_BYTES] for i in range(0, len(data), _CHUNK_BYTES)]
  for i, chunk in enumerate(chunks):
    client().key_value_set_bytes(f'{key}/chunk-{i}', chunk)
  client().key_value_set_bytes(f'{key}/chunks', str(len(chunks)).encode())


def _take(key: str) -> bytes:
  return b''.join(_wait_for(f'{key}/chunk-{i}') for i in range(int(_wait_for(f'{key}/chunks'))))


def _wait_for(key: str) -> bytes:
  while True:
    try:
      return client().blocking_key_value_get_bytes(key, _REQUEST_MS)
    except jax.errors.JaxRuntimeError as e:
      if not str(e).startswith('DEADLINE_EXCEEDED'):
        raise
