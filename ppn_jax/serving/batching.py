"""Collects the pictures of several requests into batches for the detector."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Batcher:
  """Calls a function on batches of pictures that come one at a time, in a thread of its own.

  A batch waits for further pictures for a short time, and for no longer than it takes to fill it.

  Args:
    detect: Maps a list of pictures, u8 [H, W, 3], to a list of results.
    batch_size: Largest number of pictures in a call.
    wait: Longest time in seconds that a picture waits for others.
    observe: Called with the number of pictures of each batch.
  """

  def __init__(self, detect: Callable[[Sequence[np.ndarray]], Sequence[Any]], batch_size: int,
               wait: float, observe: Callable[[int], None] = lambda count: None):
    self._detect, self._batch_size, self._wait, self._observe = detect, batch_size, wait, observe
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name='ppn batches', daemon=True)
    self._thread.start()

  def submit(self, image: np.ndarray) -> concurrent.futures.Future:
    """Returns a future of the result for a picture; cancelling it takes the picture out."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    self._waiting.put((image, future))
    return future

  def close(self) -> None:
    """Ends after the pictures that are waiting."""
    self._waiting.put(None)
    self._thread.join()

  def _run(self) -> None:
    open_ = True
    while open_:
      batch, open_ = self._next()
      batch = [(image, f) for image, f in batch if f.set_running_or_notify_cancel()]
      if batch:
        self._answer(batch)

  def _next(self) -> tuple[list[tuple[np.ndarray, concurrent.futures.Future]], bool]:
    """Returns the next pictures, and whether more can follow."""
    first = self._waiting.get()
    if first is None:
      return [], False
    batch, end = [first], time.monotonic() + self._wait
    while len(batch) < self._batch_size:
      try:
        more = self._waiting.get(timeout=max(end - time.monotonic(), 0))
      except queue.Empty:
        break
      if more is None:
        return batch, False
      batch.append(more)
    return batch, True

  def _answer(self, batch: list[tuple[np.ndarray, concurrent.futures.Future]]) -> None:
    self._observe(len(batch))
    try:
      results = self._detect([image for image, _ in batch])
    except Exception as e:  # A picture must not end the server.
      for _, future in batch:
        future.set_exception(e)
      return
    for (_, future), result in zip(batch, results, strict=True):
      future.set_result(result)
