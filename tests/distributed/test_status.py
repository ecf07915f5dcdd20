"""Tests the thread by which processes exchange their status."""

import threading

import jax
import pytest
from time_limits import HANG_SECONDS

from ppn_jax.distributed import status


@pytest.fixture
def two_processes(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 0)


def test_a_slow_service_delays_no_report(two_processes, monkeypatch):
  asked, answer = threading.Event(), threading.Event()
  told = []

  def publish(**values):
    told.append(values)
    asked.set()
    assert answer.wait(HANG_SECONDS)

  monkeypatch.setattr(status, 'publish', publish)
  monkeypatch.setattr(status, 'published', lambda: {0: told[-1]})
  with status.StatusExchange() as statuses:
    assert statuses.exchange(data_wait=.1) == {}
    assert asked.wait(HANG_SECONDS)  # The service has the first one and does not answer.
    for data_wait in (.2, .3, .4):
      assert statuses.exchange(data_wait=data_wait) == {}
    answer.set()
  assert [values['data_wait'] for values in told] == [.1, .2]  # Those after it would queue up.
  assert statuses.exchange(data_wait=.5) == {0: {'data_wait': .2}}


def test_a_service_that_is_gone_is_reported_by_the_next_report(two_processes, monkeypatch):
  def publish(**values):
    raise jax.errors.JaxRuntimeError('UNAVAILABLE: gone')

  monkeypatch.setattr(status, 'publish', publish)
  with status.StatusExchange() as statuses:
    assert statuses.exchange(data_wait=.1) == {}
  with pytest.raises(jax.errors.JaxRuntimeError, match='gone'):
    statuses.exchange(data_wait=.2)


def test_a_process_that_works_alone_starts_no_thread():
  with status.StatusExchange() as statuses:
    assert statuses.exchange(data_wait=.1) == {}
    assert not any(thread.name == 'status' for thread in threading.enumerate())
