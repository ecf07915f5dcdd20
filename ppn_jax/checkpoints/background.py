"""Work beside the running step: a copy of what it will overwrite, and a thread that uses it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


class Background:
  """A thread that does one task at a time."""

  def __init__(self):
    self._pool = ThreadPoolExecutor(1, thread_name_prefix='background')
    self._task: Future | None = None

  def start(self, task: Callable[[], None]) -> None:
    """Has the thread do `task`; call `wait` before."""
    self._task = self._pool.submit(task)

  def wait(self) -> None:
    """Blocks until the task, if there is one, is done, and raises what it raised."""
    if self._task is None:
      return
    try:
      self._task.result()
    finally:  # An interrupt leaves it running.
      if self._task.done():
        self._task = None

  def close(self) -> None:
    self._pool.shutdown()


def copied(tree: Any) -> Any:
  """A copy of a tree of arrays in device memory, which a step that donates them cannot overwrite.

  It is dispatched and not waited for. Arrays that are split over processes become whole on each,
  so that a thread can read them without taking part in a collective; all processes must call it
  at the same place in their program.
  """
  return jax.jit(_copies, out_shardings=jax.tree.map(_readable, tree))(tree)


def _copies(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def _readable(leaf: jax.Array) -> jax.sharding.Sharding:
  if leaf.is_fully_addressable or leaf.is_fully_replicated:
    return leaf.sharding
  return NamedSharding(leaf.sharding.mesh, PartitionSpec())  # pyright: ignore
