"""Checks of the options of data sets and transforms, with the legal values in the error."""

import math
from collections.abc import Sequence
from typing import Any

from ppn_jax.errors import InputError, did_you_mean

ON_BAD_EXAMPLE = ('raise', 'skip')  # What to do if an image cannot be read.
# Advice about images that are missing or damaged.
SKIP_IMAGES = 'a few such images can be skipped (--config.data.on_bad_example=skip)'
MAX_BAD_SHARE = 0.01  # Default of `data.max_bad_share`.


def advise_skipping(count: int, total: int) -> str:
  """Returns advice about `count` of `total` images that are missing or damaged."""
  if count == total:
    return 'is this the right folder?'
  if count <= max(1, MAX_BAD_SHARE * total):
    return SKIP_IMAGES
  # Twice their share, because that in a part of the data may be larger.
  share = min(math.ceil(200 * count / total) / 100, 1)
  return ('such images can be skipped (--config.data.on_bad_example=skip '
          f'--config.data.max_bad_share={share:g})')


def check_bool(what: str, value: Any) -> None:
  """Raises InputError unless `value` is True or False."""
  if not isinstance(value, bool):
    raise InputError(f'{what} is {value!r}, legal: True, False')


def check_on_bad_example(value: Any) -> None:
  """Raises InputError unless `value` is one of ON_BAD_EXAMPLE."""
  if value not in ON_BAD_EXAMPLE:
    raise InputError(f'data.on_bad_example={value!r}; {did_you_mean(str(value), ON_BAD_EXAMPLE)}')


def check_color(what: str, value: Any) -> None:
  """Raises InputError unless `value` is three integers, 0 to 255."""
  if (not isinstance(value, Sequence) or len(value) != 3
      or not all(type(n) is int and 0 <= n <= 255 for n in value)):
    raise InputError(f'{what} is {value!r}, legal: three integers, 0 to 255')


def check_integer(what: str, value: Any, least: int) -> None:
  """Raises InputError unless `value` is an integer from `least` up."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise InputError(f'{what} is {value!r}, legal: an integer, {least} or more')


def check_number(what: str, value: Any, low: float, high: float) -> None:
  """Raises InputError unless `value` is a number within [low, high]."""
  if not isinstance(value, (int, float)) or not low <= value <= high:
    raise InputError(f'{what} is {value!r}, legal: {low} to {high}')


def check_range(what: str, value: Any, low: float, high: float) -> None:
  """Raises InputError unless `value` is two numbers in order, both within [low, high]."""
  if (not isinstance(value, Sequence) or len(value) != 2
      or not all(isinstance(n, (int, float)) for n in value)
      or not low <= value[0] <= value[1] <= high):
    raise InputError(f'{what} is {value!r}, legal: two numbers in order, {low} to {high}')
