"""Ctrl-C, heard at once and answered where it does no harm.

Python's own answer is a KeyboardInterrupt wherever the main thread happens to be. Inside a callback
it is swallowed, and on its way through JAX's native code it can crash the process. While native
code runs, such as XLA's compiler, it comes late.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 130  # As shells report a process that SIGINT has ended.

_PATIENCE_SECONDS = 5.0  # For a moment at which it does no harm.
_RETRY_SECONDS = 0.02

# Packages whose native code calls Python, and what runs between any two instructions.
_UNSAFE = frozenset({'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'tensorstore', 'tensorflow',
                     'keras', 'ai_edge_litert', 'weakref', '_weakrefset', 'importlib'})

_wanted = threading.Event()  # A KeyboardInterrupt that has not been raised yet.
_sending = threading.Lock()
_active: 'list[InterruptWatch]' = []  # One within the other.


class InterruptWatch:
  """Hears SIGINT in a thread of its own; a context manager for the main thread.

  It does nothing elsewhere, and where SIGINT is ignored.

  Args:
    on_interrupt: called in that thread with how many there have been, from 1.
  """

  def __init__(self, on_interrupt: Callable[[int], None]):
    self._on_interrupt = on_interrupt
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'InterruptWatch':
    if (threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, 'SIGALRM')  # On Windows.
        or signal.getsignal(signal.SIGINT) == signal.SIG_IGN):  # As by nohup, or `&` in a script.
      return self
    self._heard, self._hear = socket.socketpair()
    self._heard.setblocking(False)
    # The byte is written by C, also while Python cannot run a handler.
    self._before_fd = signal.set_wakeup_fd(self._heard.fileno(), warn_on_full_buffer=False)
    for number, handler in ((signal.SIGINT, _ignore), (signal.SIGALRM, self._raise)):
      self._before[number] = signal.signal(number, handler)
    _active.append(self)
    threading.Thread(target=self._listen, name='ppn interrupts', daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._before:
      _active.remove(self)
      _wanted.clear()
      with _sending:  # No signal is on its way to a handler that is none of ours.
        for number, handler in self._before.items():
          signal.signal(number, signal.SIG_DFL if handler is None else handler)
      signal.set_wakeup_fd(self._before_fd)
      self._heard.close()  # Which ends the thread.

  def pass_on(self, count: int) -> None:
    """Leaves an interrupt to the watch around this one, if there is one, else raises it."""
    around = _active[:_active.index(self)] if self in _active else []
    if around:
      around[-1]._on_interrupt(count)
    else:
      self.raise_in_main_thread()

  def raise_in_main_thread(self) -> None:
    """Raises KeyboardInterrupt in the main thread; ends a process that gives no good moment."""
    _wanted.set()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while _wanted.is_set():
      if time.monotonic() > deadline:
        end_at_once()
      # A signal, unlike `_thread.interrupt_main`, also wakes who sleeps or waits for a lock.
      with _sending, contextlib.suppress(OSError):
        if _wanted.is_set():
          signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
      time.sleep(_RETRY_SECONDS)

  def _raise(self, number: int, frame: FrameType | None) -> None:
    if _wanted.is_set() and _is_safe(frame):
      _wanted.clear()
      raise KeyboardInterrupt

  def _listen(self) -> None:
    count = 0
    with self._hear:
      while data := self._hear.recv(1):
        if data[0] == signal.SIGINT:
          count += 1
          self._on_interrupt(count)


def end_at_once(line: str = 'ppn: interrupted') -> None:
  """Ends the process without leaving what it is in: no file is ever left half written."""
  say(line)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(EXIT_CODE)


def say(line: str) -> None:
  """Writes a line to stderr, from any thread, whatever the others are doing with it."""
  with contextlib.suppress(OSError):
    os.write(2, f'\r{line}\n'.encode() if os.isatty(2) else f'{line}\n'.encode())


def _ignore(number: int, frame: FrameType | None) -> None:
  """Keeps SIGINT from its default; the thread has heard it."""


def _is_safe(frame: FrameType | None) -> bool:
  """Returns whether an exception raised in `frame` gets to those who called for the work."""
  while frame is not None:
    package = frame.f_globals.get('__name__', '').partition('.')[0]
    if package in _UNSAFE or frame.f_code.co_name == '__del__':
      return False
    frame = frame.f_back
  return True
