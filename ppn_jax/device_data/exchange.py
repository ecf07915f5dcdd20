"""Exchange of rows between devices: each gets its rows of a batch from those that hold them.

Device d of n holds rows [d H, (d + 1) H) of an array, and rows [d R, (d + 1) R) of a batch of
B = n R indices into it are to lie on device d. On TPUs of up to RAGGED_DEVICES devices each row is
sent once, from the device that holds it to the one that it is for: R rows a device on average,
whatever n is. On v5e:16x16 the compiler refuses that operation ("not supported in limited ICI
routing settings"), CPUs lack it in XLA, and GPUs are few: there all devices send B rows, of which R
are read.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection.structures import Array

Tree = TypeVar('Tree')
# The largest TPU slice for which the compiler was seen to take a ragged all-to-all (v5e:2x4).
RAGGED_DEVICES = 8


class Routes(NamedTuple):
  """Who sends what to whom; known to all devices, since all know the indices.

  Fields:
    counts: i32 [n, n], number of rows from each device (first axis) to each other.
    sent: i32 [B], numbers within the batch of the rows that this device sends, in order of their
      receivers; arbitrary behind them.
    received: i32 [R], place of each own row among those that arrive, which are in order of their
      senders.
  """
  counts: Array
  sent: Array
  received: Array


def collect_rows(data: Tree, indices: Array, rows: int, axis: str) -> Tree:
  """Returns this device's rows of a batch, from the parts of all devices; within `shard_map`.

  Args:
    data: arrays [H, ...], this device's part.
    indices: i32 [B], the batch: numbers of rows of all parts together, equal on all devices.
    rows: R.
    axis: name of the mesh axis.

  Returns:
    Arrays [R, ...] in place of those of `data`.
  """
  from_all = functools.partial(collect_from_all, rows=rows, axis=axis)
  by_receiver = functools.partial(collect_by_receiver, rows=rows, axis=axis)
  return lax.platform_dependent(
      data, indices, tpu=by_receiver if _is_ragged('tpu', len(indices) // rows) else from_all,
      default=from_all)


def exchanged_rows(rows: int, devices: int, platform: str) -> int:
  """Returns how many rows `collect_rows` has in memory on a device, sent and received."""
  return rows + send_capacity(rows) if _is_ragged(platform, devices) else 2 * rows * devices


def _is_ragged(platform: str, devices: int) -> bool:
  return platform == 'tpu' and devices <= RAGGED_DEVICES


def collect_from_all(data: Tree, indices: Array, *, rows: int, axis: str) -> Tree:
  """Implements `collect_rows` by an all-to-all of B rows."""
  held, device = len(jax.tree.leaves(data)[0]), lax.axis_index(axis)
  owners = lax.dynamic_slice(indices // held, (device * rows,), (rows,))

  def collect(array: Array) -> Array:
    # For rows that it does not hold, a device sends arbitrary ones, which are never read.
    sent = array.at[indices - device * held].get(mode='clip')
    received = lax.all_to_all(sent, axis, 0, 0, tiled=True)
    return received.reshape(-1, rows, *array.shape[1:])[owners, jnp.arange(rows)]

  return jax.tree.map(collect, data)


def send_capacity(rows: int) -> int:
  """Returns how many rows a device sends in one round, at most.

  The indices of a shuffled data set hit a device about R times; twice as often and 64 times more
  is so rare that one round is enough, and others cost time only.
  """
  return 2 * rows + 64


def collect_by_receiver(data: Tree, indices: Array, *, rows: int, axis: str) -> Tree:
  """Implements `collect_rows` by a ragged all-to-all of the rows that are needed."""
  held, device = len(jax.tree.leaves(data)[0]), lax.axis_index(axis)
  capacity = min(send_capacity(rows), len(indices))
  routes = _routes(indices // held, rows, axis)
  # Rows are sent from places `starts` of a device's list to places `ends` of what others receive.
  starts = jnp.cumsum(routes.counts, axis=1) - routes.counts
  ends = jnp.cumsum(routes.counts, axis=0) - routes.counts
  rounds = -(-jnp.max(jnp.sum(routes.counts, axis=1)) // capacity)
  # Padded, because a slice that would reach beyond the end is moved to the front.
  sent = jnp.pad(routes.sent, (0, capacity))

  def send(number: Array, received: list[Array]) -> list[Array]:
    first = number * capacity
    begin = jnp.clip(starts, first, first + capacity)
    stop = jnp.clip(starts + routes.counts, first, first + capacity)
    to = ends + begin - starts
    chosen = indices[lax.dynamic_slice(sent, (first,), (capacity,))] - device * held
    operands = _pack(jax.tree.map(lambda array: array.at[chosen].get(mode='clip'), data))
    return [lax.ragged_all_to_all(
        operand, into, begin[device] - first, (stop - begin)[device], to[device],
        (stop - begin)[:, device], axis_name=axis)
            for operand, into in zip(operands, received, strict=True)]

  blank = jax.tree.map(lambda array: jnp.zeros((rows, *array.shape[1:]), array.dtype), data)
  received = _unpack(lax.fori_loop(0, rounds, send, _pack(blank)), blank)
  return jax.tree.map(lambda array: array[routes.received], received)


def _pack(tree: Any) -> list[Array]:
  """Lays arrays [N, ...] of words or booleans side by side, so that they are sent together.

  Returns:
    The arrays of other types, and i32 [N, K], if there are any.
  """
  leaves = jax.tree.leaves(tree)
  words = [leaf.astype(jnp.int32) if leaf.dtype == bool else lax.bitcast_convert_type(
      leaf, jnp.int32) for leaf in leaves if _is_word(leaf)]
  return [*(leaf for leaf in leaves if not _is_word(leaf)),
          *([jnp.concatenate([w.reshape(len(w), -1) for w in words], axis=1)] if words else [])]


def _unpack(packed: list[Array], like: Tree) -> Tree:
  """Returns the arrays that `_pack` got, with shapes and types of `like`."""
  leaves, structure = jax.tree.flatten(like)
  others, column, found = iter(packed), 0, []
  for leaf in leaves:
    if not _is_word(leaf):
      found.append(next(others))
      continue
    width = leaf.size // len(leaf)
    words = packed[-1][:, column:column + width].reshape(leaf.shape)
    column += width
    found.append(words.astype(bool) if leaf.dtype == bool
                 else lax.bitcast_convert_type(words, leaf.dtype))
  return jax.tree.unflatten(structure, found)


def _is_word(array: Array) -> bool:
  return array.dtype == bool or array.dtype.itemsize == 4


def _routes(owners: Array, rows: int, axis: str) -> Routes:
  """Finds the routes of a batch whose rows are held by the devices `owners`, i32 [B]."""
  devices, device = lax.axis_size(axis), lax.axis_index(axis)
  receivers = jnp.arange(len(owners)) // rows
  counts = jnp.zeros((devices, devices), jnp.int32).at[owners, receivers].add(1)
  sent, = jnp.nonzero(owners == device, size=len(owners), fill_value=0)
  own = lax.dynamic_slice(owners, (device * rows,), (rows,))
  arrived = jnp.argsort(own, stable=True)  # Number of the own row at each place.
  return Routes(counts, sent, jnp.zeros_like(own).at[arrived].set(jnp.arange(rows)))
