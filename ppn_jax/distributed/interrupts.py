"""Handles Ctrl-C: noticed at once, raised where it does no harm.

Python itself raises KeyboardInterrupt wherever the main thread happens to be. Inside a callback of
native code it is swallowed, and while it propagates through JAX's native code it can crash the
process. While native code runs, such as XLA's compiler, it is raised late.
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

EXIT_CODE = 130  # What shells report for a process that SIGINT has ended.

_SAFE_POINT_SECONDS = 5.0  # How long to wait for a point at which it does no harm.
_RETRY_SECONDS = 0.02

# Packages whose native code calls Python, and code that may run between any two instructions.
_UNSAFE = frozenset({'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'tensorstore', 'tensorflow',
                     'keras', 'ai_edge_litert', 'weakref', '_weakrefset', 'importlib'})

_requested = threading.Event()  # A KeyboardInterrupt that has not been raised yet.
_sending = threading.Lock()
_active: 'list[InterruptWatch]' = []  # Nested, the innermost last.


class InterruptWatch:
  """Receives SIGINT in a thread of its own; a context manager for the main thread.

  Does nothing in other threads, and if SIGINT is ignored.

  Args:
    on_interrupt: Called in that thread with the number of interrupts so far, from 1.
  """

  def __init__(self, on_interrupt: Callable[[int], None]):
    self._on_interrupt = on_interrupt
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'InterruptWatch':
    if (threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, 'SIGALRM')  # On Windows.
        or signal.getsignal(signal.SIGINT) == signal.SIG_IGN):  # By nohup, or `&` in a script.
      return self
    self._sender, self._receiver = socket.socketpair()
    self._sender.setblocking(False)
    # The byte is written by C code, even while Python cannot run a handler.
    self._before_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
    for number, handler in ((signal.SIGINT, _ignore), (signal.SIGALRM, self._raise)):
      self._before[number] = signal.signal(number, handler)
    _active.append(self)
    threading.Thread(target=self._listen, name='ppn interrupts', daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._before:
      _active.remove(self)
      _requested.clear()
      with _sending:  # So that no signal reaches a handler that is not ours.
        for number, handler in self._before.items():
          signal.signal(number, signal.SIG_DFL if handler is None else handler)
      signal.set_wakeup_fd(self._before_fd)
      self._sender.close()  # Ends the thread.

  def pass_on(self, count: int) -> None:
    """Passes an interrupt to the enclosing watch if there is one, else raises it."""
    enclosing = _active[:_active.index(self)] if self in _active else []
    if enclosing:
      enclosing[-1]._on_interrupt(count)
    else:
      self.raise_in_main_thread()

  def raise_in_main_thread(self) -> None:
    """Raises KeyboardInterrupt in the main thread; ends the process if no safe point comes."""
    _requested.set()
    deadline = time.monotonic() + _SAFE_POINT_SECONDS
    while _requested.is_set():
      if time.monotonic() > deadline:
        end_at_once()
      # Unlike `_thread.interrupt_main`, a signal also wakes a thread that sleeps or waits.
      with _sending, contextlib.suppress(OSError):
        if _requested.is_set():
          signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
      time.sleep(_RETRY_SECONDS)

  def _raise(self, number: int, frame: FrameType | None) -> None:
    if _requested.is_set() and _is_safe(frame):
      _requested.clear()
      raise KeyboardInterrupt

  def _listen(self) -> None:
    count = 0
    with self._receiver:
      while data := self._receiver.recv(1):
        if data[0] == signal.SIGINT:
          count += 1
          self._on_interrupt(count)


def end_at_once(line: str = 'ppn: interrupted') -> None:
  """Ends the process without unwinding; safe because files are never left half written."""
  write_line(line)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(EXIT_CODE)


def write_line(line: str) -> None:
  """Writes a line to stderr; safe from any thread, whatever others write."""
  with contextlib.suppress(OSError):
    os.write(2, f'\r{line}\n'.encode() if os.isatty(2) else f'{line}\n'.encode())


def _ignore(number: int, frame: FrameType | None) -> None:
  """Replaces Python's handler of SIGINT; the thread has received it."""


def _is_safe(frame: FrameType | None) -> bool:
  """Returns whether an exception raised in `frame` propagates to the caller of the work."""
  while frame is not None:
    package = frame.f_globals.get('__name__', '').partition('.')[0]
    if package in _UNSAFE or frame.f_code.co_name == '__del__':
      return False
    frame = frame.f_back
  return True
