"""Parameters by path: what patterns of `optim.freeze` and `optim.rate_scale` select.

The path of a parameter has the names of its modules, as in 'backbone/conv2d_3/depthwise/kernel'.
"""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ppn_jax.errors import InputError

# Path in a tree of variables, without the collection: ('backbone', 'conv2d_3', ...).
Path = tuple[str, ...]


def is_kernel(path: Path) -> bool:
  """Returns whether a parameter is a kernel, which weight decay applies to.

  Kernels of convolutions, also depthwise ones, are; biases and batch norm's scales are not.
  """
  return path[-1].endswith('kernel')


def matches(path: Path, pattern: str) -> bool:
  """Returns whether a pattern matches a parameter, or a module that contains it.

  Patterns are those of `fnmatch`, where '*' also matches '/': 'backbone/conv2d_[0-5]' matches six
  blocks and everything in them, but not conv2d_10; '*/bias' matches all biases.
  """
  return any(fnmatch.fnmatchcase('/'.join(path[:n]), pattern.rstrip('/'))
             for n in range(1, len(path) + 1))


def matching(paths: Collection[Path], pattern: str, key: str) -> set[Path]:
  """Returns the paths that a pattern matches.

  Args:
    paths: paths of parameters.
    pattern: see `matches`.
    key: config key of the pattern, for the error message.

  Raises:
    InputError: If it matches none; the message names some that are near.
  """
  found = {path for path in paths if matches(path, pattern)}
  if not found:
    raise InputError(f'{key}: {pattern!r} matches no parameter that is trained; '
                     f'near it: {", ".join(_near(pattern, paths))}')
  return found


def _near(pattern: str, paths: Iterable[Path]) -> list[str]:
  """Returns the paths of modules and parameters that are most like a pattern."""
  # Shallow ones first, which are the ones that are shown if nothing is similar.
  known = sorted({'/'.join(path[:n]) for path in paths for n in range(1, len(path) + 1)},
                 key=lambda name: (name.count('/'), name))
  return difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or known[:3]


def frozen_paths(params: Mapping[str, Any], patterns: Iterable[str]) -> set[Path]:
  """Returns the paths of the parameters that the patterns of `optim.freeze` match.

  Raises:
    InputError: If a pattern matches none, or all together leave nothing to train.
  """
  paths = {*flatten_dict(params)}
  frozen: set[Path] = set().union(*(matching(paths, p, 'optim.freeze') for p in patterns))
  if paths and frozen == paths:
    raise InputError(f'optim.freeze={tuple(patterns)} matches all parameters; '
                     'leave some that are trained')
  return frozen


def trainable(params: Mapping[str, Any], patterns: Iterable[str]) -> Mapping[str, Any]:
  """Returns the tree of the parameters that are not frozen. For `patterns` see `frozen_paths`."""
  if not patterns:
    return params
  frozen = frozen_paths(params, patterns)
  return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items()
                         if path not in frozen})


def frozen_modules(params: Mapping[str, Any], patterns: Iterable[str]) -> frozenset[Path]:
  """Returns the modules that have parameters, all of which are frozen."""
  frozen, paths = frozen_paths(params, patterns), {*flatten_dict(params)}
  return frozenset(_modules(frozen)) - frozenset(_modules(paths - frozen))


def _modules(paths: Iterable[Path]) -> Iterator[Path]:
  return (path[:n] for path in paths for n in range(len(path)))


def merged(tree: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a tree with some of its leaves replaced by those of `part`."""
  return unflatten_dict({**flatten_dict(tree, keep_empty_nodes=True), **flatten_dict(part)})


def part_of(tree: Mapping[str, Any], like: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the tree of the leaves whose paths are those of `like`, which may have empty parts."""
  leaves = flatten_dict(tree)
  return unflatten_dict({path: leaves.get(path, leaf)
                         for path, leaf in flatten_dict(like, keep_empty_nodes=True).items()})


def changed(after: Mapping[str, Any], before: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the leaves of a tree that are other objects than in `before`."""
  old = flatten_dict(before)
  return unflatten_dict({path: leaf for path, leaf in flatten_dict(after).items()
                         if leaf is not old[path]})


def check_frozen(moved: Mapping[str, Any], modules: Collection[Path]) -> None:
  """Raises InputError if the batch statistics of a frozen module have changed."""
  for path in flatten_dict(moved):
    if path[:-1] in modules:
      raise InputError(f"optim.freeze: {'/'.join(path[:-1])} is frozen, but updates its {path[-1]} "
                       'in training; its module must take the keyword `train` and obey it')
