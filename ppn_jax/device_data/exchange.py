"""Exchange of rows between devices: each gets its rows of a batch from those that hold them.

Device d of n holds rows [d H, (d + 1) H) of an array, and rows [d R, (d + 1) R) of a batch of
B = n R indices into it are to lie on device d. The devices form a grid of a x b, in row-major
order. A row that device (i, j) holds for (k, l) goes to (i, l) first, among the devices of a row of
the grid, and then to (k, l), among those of a column. Each device sends the same number of rows to
every other, of which some are padding, since XLA's exchanges of varying numbers do not compile for
large TPU slices, and not at all for CPUs. The indices of a shuffled data set spread evenly, so that
little padding is enough: for 128 rows a device, each sends 432 in each of the two steps on 256
devices (16 x 16), and 576 on 1,024. Few devices, with 128 rows up to 64 of them, exchange their
rows directly, in a grid of one column. More rows than expected between two devices take another
round; both steps have their own, whose numbers multiply.
"""

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ppn_jax.detection.structures import Array

Tree = TypeVar('Tree')


class Grid(NamedTuple):
  """Arrangement of devices, and how many rows they exchange in a round.

  Fields:
    height, width: a and b; n = a b.
    along_rows: number of rows from a device to each of its row of the grid; 0 if b is 1.
    along_columns: number of rows from a device to each of its column.
  """
  height: int
  width: int
  along_rows: int
  along_columns: int

  @property
  def exchanged(self) -> int:
    """Returns how many rows a device sends, and receives, in a round."""
    return self.width * self.along_rows + self.height * self.along_columns


def choose_grid(rows: int, devices: int) -> Grid:
  """Returns the grid of `devices` that exchanges few rows, for `rows` (R) on each."""
  grids = []
  for width in range(1, devices + 1):
    if devices % width == 0:
      height = devices // width
      first = _capacity(rows / width, height * rows) if width > 1 else 0
      grids.append(Grid(height, width, first, _capacity(rows / height, rows)))
  # A second step costs time of its own, so it has to save a third of the rows.
  return min(grids, key=lambda grid: grid.exchanged * (1 if grid.width == 1 else 1.5))


def _capacity(mean: float, most: int) -> int:
  """Returns a number that a Poisson variable of this mean exceeds less than once in a million."""
  return min(most, math.ceil(mean + 5 * math.sqrt(mean) + 4))


class _Routes(NamedTuple):
  """The elements of a batch, in order of the pairs of devices between which they are sent.

  Fields:
    order: i32 [B], the elements by pair.
    starts: i32 [P + 1], place in `order` of the first element of each pair.
    ranks: i32 [B], number of each element within its pair.
  """
  order: Array
  starts: Array
  ranks: Array

  @classmethod
  def by_pairs(cls, pairs: Array, number: int) -> '_Routes':
    """Returns the routes of elements that are sent between `pairs`, i32 [B], of P = `number`."""
    order = jnp.argsort(pairs, stable=True)
    starts = jnp.searchsorted(pairs[order], jnp.arange(number + 1)).astype(jnp.int32)
    places = jnp.zeros_like(pairs).at[order].set(jnp.arange(len(pairs), dtype=pairs.dtype))
    return cls(order, starts, places - starts[pairs])

  def rounds(self, capacity: int) -> Array:
    """Returns how many rounds of `capacity` elements send the largest pair's."""
    return -(-jnp.max(jnp.diff(self.starts)) // capacity)

  def sent(self, pairs: Array, capacity: int, number: Array) -> Array:
    """Returns the elements of `pairs` [K] in a round, i32 [K capacity]; arbitrary after them."""
    places = self.starts[pairs][:, None] + number * capacity + jnp.arange(capacity)
    return self.order.at[places.ravel()].get(mode='clip')


def collect_rows(data: Tree, indices: Array, rows: int, grid: Grid, axes: tuple[str, str]) -> Tree:
  """Returns this device's rows of a batch, from the parts of all devices; within `shard_map`.

  Args:
    data: arrays [H, ...], this device's part.
    indices: i32 [B], the batch: numbers of rows of all parts together, equal on all devices.
    rows: R.
    grid: result of `choose_grid`.
    axes: names of the mesh axes of size a and b.

  Returns:
    Arrays [R, ...] in place of those of `data`.
  """
  if grid.height == grid.width == 1:
    return jax.tree.map(lambda array: array[indices], data)
  height, width, along_rows, along_columns = grid
  held = len(jax.tree.leaves(data)[0])
  i, j = map(lax.axis_index, axes)
  device = i * width + j
  owners, receivers = indices // held, jnp.arange(len(indices), dtype=indices.dtype) // rows
  # By holder and column of the receiver; then by row of the holder, and receiver.
  first = _Routes.by_pairs(owners * width + receivers % width, height * width * width)
  second = _Routes.by_pairs(owners // width * height * width + receivers, height * height * width)
  first_rounds = first.rounds(along_rows) if width > 1 else 1
  own = device * rows + jnp.arange(rows)

  def look_up(elements: Array) -> list[Array]:
    at = indices[elements] - device * held
    return _pack(jax.tree.map(lambda array: array.at[at].get(mode='clip'), data))

  def pick(packed: list[Array], at: Array) -> list[Array]:
    return [array.at[at].get(mode='clip') for array in packed]

  def send(packed: list[Array], axis: str) -> list[Array]:
    return [lax.all_to_all(array, axis, 0, 0, tiled=True) for array in packed]

  def one_round(number: Array, received: list[Array]) -> list[Array]:
    one, two = number % first_rounds, number // first_rounds
    elements = second.sent((i * height + jnp.arange(height)) * width + j, along_columns, two)
    if width > 1:
      passed = send(look_up(first.sent(device * width + jnp.arange(width), along_rows, one)),
                    axes[1])
      # Where the elements are among those from the devices of this row of the grid.
      at = owners[elements] % width * along_rows + first.ranks[elements] - one * along_rows
      passed = send(pick(passed, at), axes[0])
      arrived = first.ranks[own] // along_rows == one
    else:
      passed = send(look_up(elements), axes[0])
      arrived = True
    arrived &= second.ranks[own] // along_columns == two
    at = owners[own] // width * along_columns + second.ranks[own] - two * along_columns
    return [jnp.where(arrived.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            for new, old in zip(pick(passed, at), received, strict=True)]

  blank = jax.tree.map(lambda array: jnp.zeros((rows, *array.shape[1:]), array.dtype), data)
  rounds = first_rounds * second.rounds(along_columns)
  return _unpack(lax.fori_loop(0, rounds, one_round, _pack(blank)), blank)


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
