"""The next batches, fetched and placed on the devices while a step runs."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar('T')

# How often a full queue looks whether anybody still wants its items, in seconds.
_POLL_SECONDS = 0.1


class Prefetcher(Generic[T]):
  """An iterator run ahead in a thread of its own. Close it, or use it as a context manager.

  Args:
    items: what to run ahead; nobody else may use it any more.
    depth: how many items to hold.
  """

  def __init__(self, items: Iterator[T], depth: int = 2):
    self._queue = queue.Queue(maxsize=depth)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._fetch, args=(items,), daemon=True)
    self._thread.start()

  def __enter__(self) -> 'Prefetcher[T]':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> 'Prefetcher[T]':
    return self

  def __next__(self) -> T:
    """The next item; raises what the iterator raised."""
    item, error = self._queue.get()
    if error is not None:
      self._queue.put((None, error))  # For whoever asks again.
      raise error
    return item

  def ready(self) -> bool:
    """Whether the next item is there already."""
    return not self._queue.empty()

  def close(self) -> None:
    """Stops fetching and waits for the thread to end."""
    self._closed.set()
    self._thread.join()

  def _fetch(self, items: Iterator[T]) -> None:
    try:
      for item in items:
        self._put((item, None))
        if self._closed.is_set():
          break
      else:
        self._put((None, StopIteration()))
    except BaseException as e:
      self._put((None, e))
    finally:
      if hasattr(items, 'close'):
        items.close()

  def _put(self, entry) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(entry, timeout=_POLL_SECONDS)
      except queue.Full:
        continue


class Unchanging(Generic[T]):
  """In the place of a `Prefetcher` where every step takes the same item: it is always there.

  Args:
    make: makes the item, when the context is entered.
  """

  def __init__(self, make: Callable[[], T]):
    self._make = make

  def __enter__(self) -> 'Unchanging[T]':
    self._item = self._make()
    return self

  def __exit__(self, *_) -> None:
    del self._item

  def __iter__(self) -> 'Unchanging[T]':
    return self

  def __next__(self) -> T:
    return self._item

  def ready(self) -> bool:
    return True
