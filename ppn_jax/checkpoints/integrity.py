"""Checksums of a state, by which a checkpoint is known to give back what was saved."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import jax
import numpy as np

from ppn_jax.distributed import sharding


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """'variables/params/...' -> shape; the same for a state and for Orbax's description of one."""
  return {name: tuple(leaf.shape) for name, leaf in _named(tree)}


def checksums(tree: Any) -> dict[str, list]:
  """'variables/params/...' -> [shape, CRC-32C of the values' bytes in C order], fit for JSON.

  Of global values, so that it holds on other numbers of devices and processes too. Arrays that
  are split over processes are gathered, so all of them have to call it.
  """
  return {name: [list(leaf.shape), _crc(leaf)] for name, leaf in _named(tree)}


def difference(saved: Mapping[str, list], found: Mapping[str, list]) -> str | None:
  """A name in which two `checksums` differ, None when they are the same."""
  names = sorted(saved.keys() | found.keys())
  return next((n for n in names if saved.get(n) != found.get(n)), None)


def digest(saved: Mapping[str, list]) -> str:
  """Returns what stands for all of `checksums`, as 16 characters."""
  return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:16]


def described(saved: Mapping[str, list]) -> dict[str, tuple[int, ...]]:
  """The shapes in `checksums`."""
  return {name: tuple(shape) for name, (shape, _) in saved.items()}


def _named(tree: Any) -> list[tuple[str, Any]]:
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _crc(leaf: jax.Array) -> int:
  local = leaf.addressable_data(0) if leaf.is_fully_replicated else sharding.to_host(leaf)
  # Bytes by way of uint8, since bfloat16 has no buffer of its own.
  return google_crc32c.value(np.ascontiguousarray(local).reshape(-1).view(np.uint8))
