"""Limits of the HTTP server, and a budget for decoded pictures."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from ppn_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server accepts.

  Attributes:
    max_bytes: largest picture file.
    max_pixels: largest height x width of a picture.
    max_requests: number of pictures that are received, waiting or detected at a time; further ones
      are refused.
    timeout: seconds for a picture to arrive, and then again for its detections.
  """
  max_bytes: int = 10_000_000
  max_pixels: int = 50_000_000
  max_requests: int = 32
  timeout: float = 30.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        raise InputError(f'serve: {field.name} is {value!r}, legal: above 0')


class PixelBudget:
  """Lets as many pictures be in memory as have a number of pixels together; for one event loop.

  Pictures take their turns in the order in which they came.

  Args:
    total: The number of pixels. A single picture may have at most as many.
  """

  def __init__(self, total: int):
    self._total, self._used, self._changed = total, 0, asyncio.Condition()
    self._turn = asyncio.Lock()

  @contextlib.asynccontextmanager
  async def take(self, pixels: int) -> AsyncIterator[None]:
    """Waits until there is room for a picture, which is then taken within the context."""
    async with self._turn, self._changed:
      await self._changed.wait_for(lambda: self._used + pixels <= self._total)
      self._used += pixels
    try:
      yield
    finally:
      async with self._changed:
        self._used -= pixels
        self._changed.notify_all()
