"""Being told to end: SIGTERM, which is how machines announce that they are taken away."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# What a launcher takes as 'start me again' (EX_TEMPFAIL of sysexits.h).
EXIT_CODE = 75


class Preempted(RuntimeError):
  """The run was told to end and has saved what it could; the message says from where it goes on."""


class PreemptionNotice:
  """Whether this run has been told to end; a context manager around its steps.

  A process that works alone notes SIGTERM itself. Of several, JAX's preemption service hears
  SIGTERM, and a Cloud TPU's maintenance notice, in whichever process they arrive, and makes all
  agree on a step that none of them has reached. A second SIGTERM changes nothing, so that it
  cannot break the save that follows the first.
  """

  def __init__(self):
    self._told = False  # No lock: a handler may interrupt itself.
    self._before: Any = None

  def __enter__(self) -> 'PreemptionNotice':
    # Python hands out signals in the main thread only; elsewhere they are the caller's matter.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._told = True

  def given(self) -> bool:
    """Whether a process that works alone has been told; always False in one of several."""
    return self._told

  def reached(self, step: int) -> bool:
    """Whether to end after `step`: the same answer in all processes, which all ask each step.

    Args:
      step: rises with each call. It costs about a microsecond.
    """
    if jax.process_count() == 1:
      return self.given()
    return multihost_utils.reached_preemption_sync_point(step)
