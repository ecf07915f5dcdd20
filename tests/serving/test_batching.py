"""Batches of pictures from several threads, and room for decoded ones."""

import asyncio
import threading

import numpy as np
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.errors import InputError
from ppn_jax.serving.batching import Batcher
from ppn_jax.serving.limits import Limits, PixelBudget


def test_pictures_are_collected_while_the_detector_is_busy():
  sizes, started, go = [], threading.Event(), threading.Event()

  def detect(images):
    started.set()
    go.wait(HANG_SECONDS)
    return [int(image[0]) for image in images]

  batcher = Batcher(detect, 3, 0.0, sizes.append)
  futures = [batcher.submit(np.array([0]))]
  assert started.wait(HANG_SECONDS)
  futures += [batcher.submit(np.array([i])) for i in range(1, 6)]
  futures[2].cancel()
  go.set()
  assert [f.result(30) for f in futures if not f.cancelled()] == [0, 1, 3, 4, 5]
  batcher.close()
  assert sizes[0] == 1 and sum(sizes) == 5 and max(sizes) <= 3 and len(sizes) == 3


def test_failures_reach_those_who_wait():
  def detect(images):
    if any(image.size > 1 for image in images):
      raise ValueError('bad picture')
    return [len(images)] * len(images)

  batcher = Batcher(detect, 2, 0.0)
  with pytest.raises(ValueError, match='bad picture'):
    batcher.submit(np.zeros(2)).result(30)
  assert batcher.submit(np.zeros(1)).result(30) == 1
  batcher.close()


def test_pixels_in_memory_are_limited():
  async def run():
    budget, most, now = PixelBudget(10), [0], [0]

    async def use(pixels):
      async with budget.take(pixels):
        now[0] += pixels
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0)
        now[0] -= pixels

    await asyncio.gather(*(use(n) for n in (4, 4, 4, 10, 1, 9, 3)))
    return most[0], now[0]

  assert asyncio.run(run()) == (10, 0)


@pytest.mark.parametrize('name', ['max_bytes', 'max_pixels', 'max_requests', 'timeout'])
def test_limits_must_be_above_0(name):
  with pytest.raises(InputError, match=f'{name} is 0'):
    Limits(**{name: 0})
