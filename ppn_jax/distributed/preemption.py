"""Being told to end: by SIGTERM, by notice that the machine is taken away, or by Ctrl-C."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ppn_jax.distributed.interrupts import InterruptWatch, say
from ppn_jax.distributed.maintenance import MaintenanceWatch

# What a launcher takes as 'start me again' (EX_TEMPFAIL of sysexits.h).
EXIT_CODE = 75


class Preempted(RuntimeError):
  """The run was told to end and has saved what it could; the message says from where it goes on."""


class Interrupted(KeyboardInterrupt):
  """Ctrl-C has ended the run, which has saved what it could; the message says what."""


class PreemptionNotice:
  """Whether this run has been told to end; a context manager around its steps.

  A process that works alone notes SIGTERM itself. Of several, JAX's preemption service hears
  SIGTERM in whichever process it arrives, and makes all agree on a step that none of them has
  reached. A second SIGTERM changes nothing, so that it cannot break the save that follows the
  first. Notice that a VM of Google Cloud will be taken away counts as SIGTERM.

  The first Ctrl-C of a process that works alone is noted too: an exception would be swallowed, or
  crash, in callbacks of native code. The second ends `ppn` at once, also while a step is compiled;
  in other programs it raises KeyboardInterrupt.
  """

  def __init__(self):
    self._told = False  # No lock: a handler may interrupt itself.
    self._interrupted = False
    self._before: Any = None
    self._interrupts = InterruptWatch(self._on_interrupt)
    self._maintenance = MaintenanceWatch(self._on_maintenance)

  def __enter__(self) -> 'PreemptionNotice':
    # Python hands out signals in the main thread only; elsewhere they are the caller's matter.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)
      self._interrupts.__enter__()
    self._maintenance.__enter__()
    return self

  def __exit__(self, *_: Any) -> None:
    self._maintenance.__exit__()
    if self._before is not None:
      self._interrupts.__exit__()
      signal.signal(signal.SIGTERM, self._before)

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._told = True

  def _on_interrupt(self, count: int) -> None:
    self._interrupted = True
    if count == 1:
      say('interrupted: ending after this step, which is saved first; again to end at once')
    else:
      self._interrupts.pass_on(count)

  def _on_maintenance(self) -> None:
    if jax.process_count() == 1:
      self._told = True
    else:  # The only way to tell JAX's service of it, whose handler this process has.
      os.kill(os.getpid(), signal.SIGTERM)

  def given(self) -> bool:
    """Whether a process that works alone has been told; always False in one of several."""
    return self._told or self._interrupted

  def end(self, what: str) -> Preempted | Interrupted:
    """Returns what to raise once the run has ended as it was told; `what` says how it stands."""
    return Interrupted(what) if self._interrupted else Preempted(f'told to end; {what}')

  def reached(self, step: int) -> bool:
    """Whether to end after `step`: the same answer in all processes, which all ask each step.

    Args:
      step: rises with each call. It costs about a microsecond.
    """
    if jax.process_count() == 1:
      return self.given()
    return multihost_utils.reached_preemption_sync_point(step)
