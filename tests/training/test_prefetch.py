"""Prefetching of the input, and constant input."""

import threading

import pytest
from time_limits import HANG_SECONDS

from ppn_jax.training.input_pipeline import Constant, Prefetcher


def test_all_items_in_order_then_the_end():
  with Prefetcher(iter(range(50))) as items:
    assert list(items) == list(range(50))
    with pytest.raises(StopIteration):
      next(items)


def test_errors_are_raised_by_next():
  def broken():
    yield 1
    raise ValueError('bad image')

  with Prefetcher(broken()) as items:
    assert next(items) == 1
    for _ in range(2):
      with pytest.raises(ValueError, match='bad image'):
        next(items)


def test_closing_ends_an_endless_iterator_and_closes_it():
  closed = threading.Event()

  def endless():
    try:
      while True:
        yield 0
    finally:
      closed.set()

  items = Prefetcher(endless())
  next(items)
  items.close()
  assert closed.is_set() and not items._thread.is_alive()


def test_ready_tells_whether_an_item_waits():
  gate = threading.Event()

  def gated():
    gate.wait(HANG_SECONDS)
    yield 1

  with Prefetcher(gated()) as items:
    assert not items.ready()
    gate.set()
    assert next(items) == 1


def test_a_constant_is_made_once_and_released():
  made = []
  constant = Constant(lambda: made.append(object()) or made[-1])
  assert not made
  with constant as items:
    assert items.ready() and next(items) is next(items) is made[0]
  assert len(made) == 1
  with pytest.raises(AttributeError):
    next(constant)
