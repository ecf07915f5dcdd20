"""What processes tell the first one in passing, without waiting for each other.

Unlike `coordination.gather`, a report costs each process one message, and the first process one
look, however many there are. What arrives may be that of the report before.
"""

import itertools
import json
import socket
from collections.abc import Iterable
from typing import Any

import jax

from ppn_jax.distributed import coordination

_STATUS, _NOTES = 'ppn_jax/status', 'ppn_jax/notes'

_count = itertools.count()


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
