"""Ctrl-C is received in a thread and raised where it does no harm."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

import pytest
from time_limits import HANG_SECONDS

from ppn_jax.cli import main as cli
from ppn_jax.distributed import interrupts
from ppn_jax.distributed.interrupts import InterruptWatch
from ppn_jax.distributed.preemption import Interrupted, PreemptionNotice
from ppn_jax.errors import exit_status


@pytest.fixture(autouse=True)
def heard():
  """Sets the handler of a terminal, also if the tests run in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def interrupt():
  os.kill(os.getpid(), signal.SIGINT)


def raising():
  watch = InterruptWatch(lambda count: watch.raise_in_main_thread())
  return watch


def test_an_interrupt_wakes_a_waiting_thread_and_handlers_are_restored():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
  threading.Timer(0.1, interrupt).start()
  with pytest.raises(KeyboardInterrupt), raising():
    threading.Event().wait(HANG_SECONDS)
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before


def test_no_callback_swallows_an_interrupt():
  """Exceptions in callbacks of weak references are lost, so it is raised after the callback."""
  came = []

  def callback(_):
    interrupt()
    time.sleep(0.2)
    came.append('through')

  # As by the standard library's weak dictionaries.
  callback = types.FunctionType(callback.__code__, {**globals(), '__name__': 'weakref'},
                                closure=callback.__closure__)
  with pytest.raises(KeyboardInterrupt), raising():
    held = type('Held', (), {})()
    reference = weakref.ref(held, callback)
    del held
    threading.Event().wait(HANG_SECONDS)
  assert came == ['through'] and reference() is None


def test_an_interrupt_is_not_raised_inside_jax():
  code = compile('def work():\n  time.sleep(0.3)\n  done.append(1)', 'work.py', 'exec')
  space = {'__name__': 'jax._src.somewhere', 'time': time, 'done': []}
  exec(code, space)
  threading.Timer(0.1, interrupt).start()
  with pytest.raises(KeyboardInterrupt), raising():
    space['work']()
    threading.Event().wait(HANG_SECONDS)
  assert space['done'] == [1]


def test_other_threads_are_unaffected():
  before = signal.getsignal(signal.SIGINT)
  seen = []

  def work():
    with raising():
      seen.append(signal.getsignal(signal.SIGINT))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [before]


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with raising():
      assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
      interrupt()
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_command_ends_with_130(monkeypatch, capsys):
  monkeypatch.setattr(cli, '_run', lambda argv: interrupt() or threading.Event().wait(HANG_SECONDS))
  assert cli.main(['data']) == 130
  assert capsys.readouterr().err == 'ppn: interrupted\n'


def test_training_records_the_first_and_passes_on_the_second(monkeypatch, capfd):
  monkeypatch.setattr(interrupts, 'end_at_once', lambda *_: pytest.fail('too early'))
  with pytest.raises(KeyboardInterrupt), PreemptionNotice() as notice:
    assert not notice.given()
    interrupt()
    while not notice.given():
      time.sleep(0.01)
    assert notice.reached()
    interrupt()
    threading.Event().wait(HANG_SECONDS)
  assert capfd.readouterr().err.startswith('interrupted: ending after this step')
  end = notice.end('step 3 is saved')
  assert isinstance(end, Interrupted)
  assert exit_status(end) == (130, 'ppn: interrupted: step 3 is saved')


NATIVE = """
import os, signal, sys, threading, time
from ppn_jax.cli import main as cli
from ppn_jax.distributed.preemption import PreemptionNotice

def run(argv):
  def press():
    for _ in range(2):
      time.sleep(0.3)
      os.kill(os.getpid(), signal.SIGINT)
  with PreemptionNotice():
    threading.Thread(target=press, daemon=True).start()
    import ctypes
    ctypes.CDLL(None).poll(None, 0, 300)  # As native code that runs on: its signals come late.
    ctypes.CDLL(None).sem_wait(ctypes.byref(ctypes.create_string_buffer(64)))
    while True:
      ctypes.CDLL(None).sem_wait(ctypes.byref(ctypes.create_string_buffer(64)))

signal.signal(signal.SIGINT, signal.default_int_handler)  # Whatever started the tests ignores.
cli._run = run
sys.argv = ['ppn', 'train']
sys.exit(cli.main())
"""


def test_the_second_interrupt_ends_training_inside_native_code():
  done = subprocess.run([sys.executable, '-c', NATIVE], capture_output=True, text=True,
                        timeout=HANG_SECONDS, check=False)
  assert done.returncode == 130, done.stderr
  assert done.stderr.splitlines() == [
      'interrupted: ending after this step, which is saved first; press Ctrl-C again to end at '
      'once',
      'ppn: interrupted']
