"""Order of examples in an endless shuffled stream, computed on the device."""

import math

import jax
import jax.numpy as jnp

from ppn_jax.data.repeats import Repeats
from ppn_jax.detection.structures import Array

_ROUNDS = 8


def example_at(positions: Array, num_examples: int, key: Array) -> tuple[Array, Array]:
  """Returns the examples at positions of the stream; each epoch has every example exactly once.

  Args:
    positions: u32 [B], positions in the endless stream.
    num_examples: N, 1 to 2**31.
    key: random key from which every epoch's permutation is made.

  Returns:
    Epochs and indices of the examples, 0 .. N-1; u32 [B] each.
  """
  epochs, offsets = positions // jnp.uint32(num_examples), positions % jnp.uint32(num_examples)
  round_keys = jax.vmap(lambda e: jax.random.bits(jax.random.fold_in(key, e), (_ROUNDS,)))(epochs)
  side = math.isqrt(num_examples - 1) + 1
  return epochs, permute(offsets, num_examples, side, round_keys)


def repeated_images(epochs: Array, places: Array, repeats: Repeats, key: Array) -> Array:
  """Returns the images that are shown at places of epochs, u32 [B].

  Args:
    epochs: u32 [B].
    places: u32 [B], 0 .. M-1.
    repeats: how often an epoch shows each image.
    key: random key from which each epoch decides what it repeats.
  """
  bits = jax.vmap(lambda e: jax.random.bits(jax.random.fold_in(key, e)))(epochs)
  first = bits & jnp.uint32(repeats.unit - 1)  # A power of two.
  return repeats.image_at(places, first, jnp).astype(jnp.uint32)


def permute(indices: Array, num_examples: Array | int, side: Array | int, round_keys: Array
            ) -> Array:
  """Permutes 0 .. N-1 by a Feistel network (Black and Rogaway, 2002).

  The network permutes the pairs (left, right) of digits to the base `side`, which are the numbers
  below side**2; results of N or more are permuted again until they are below N (cycle walking).

  Args:
    indices: u32 [B], below N.
    num_examples: N.
    side: least integer whose square is N or more, at most 2**16.
    round_keys: u32 [B, rounds] or [rounds]; they determine the permutation.

  Returns:
    Permuted indices, u32 [B].
  """
  num_examples, side = jnp.uint32(num_examples), jnp.uint32(side)

  def shuffle(number: Array) -> Array:
    left, right = number // side, number % side
    for r in range(_ROUNDS):
      left, right = right, (left + _mix(right ^ round_keys[..., r]) % side) % side
    return left * side + right

  return jax.lax.while_loop(
      lambda numbers: jnp.any(numbers >= num_examples),
      lambda numbers: jnp.where(numbers >= num_examples, shuffle(numbers), numbers),
      shuffle(indices))


def _mix(x: Array) -> Array:
  """Hashes u32 so that every bit depends on every other (MurmurHash3's finaliser)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)
