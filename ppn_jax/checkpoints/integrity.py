"""Checksums of a state, which show that a checkpoint restores what was saved."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import jax
import numpy as np

from ppn_jax.distributed import sharding


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each array of a state, or of Orbax's metadata of one.

  Keys are paths such as 'variables/params/...'.
  """
  return {name: tuple(leaf.shape) for name, leaf in _named(tree)}


def checksums(tree: Any) -> dict[str, list]:
  """Returns [shape, CRC-32C of the values' bytes in C order] of each array, ready for JSON.

  Keys are paths such as 'variables/params/...'. Checksums are of the global values, so they are
  the same on any number of devices and processes. Arrays that are split over processes are
  gathered, so all processes have to call this together.
  """
  return {name: [list(leaf.shape), _crc(leaf)] for name, leaf in _named(tree)}


def first_difference(saved: Mapping[str, list], found: Mapping[str, list]) -> str | None:
  """Returns the first key in which two `checksums` differ, None if they are equal."""
  names = sorted(saved.keys() | found.keys())
  return next((n for n in names if saved.get(n) != found.get(n)), None)


def digest(saved: Mapping[str, list]) -> str:
  """Returns a hash of `checksums` as 16 characters."""
  return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:16]


def shapes_of_checksums(saved: Mapping[str, list]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes in `checksums`."""
  return {name: tuple(shape) for name, (shape, _) in saved.items()}


def _named(tree: Any) -> list[tuple[str, Any]]:
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _crc(leaf: jax.Array) -> int:
  local = leaf.addressable_data(0) if leaf.is_fully_replicated else sharding.to_host(leaf)
  # Viewed as uint8, since bfloat16 does not support the buffer protocol.
  return google_crc32c.value(np.ascontiguousarray(local).reshape(-1).view(np.uint8))
