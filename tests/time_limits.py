"""Limit of how long tests wait for the processes and threads that they start."""

import time
from collections.abc import Callable
from typing import Any

# Seconds. Only what hangs reaches it: how long work takes depends on the machine.
HANG_SECONDS = 1500


def wait_until(condition: Callable[[], Any]) -> None:
  """Returns as soon as a condition is true; fails if it hangs."""
  deadline = time.monotonic() + HANG_SECONDS
  while not condition():
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(0.01)
