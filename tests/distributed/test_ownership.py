"""Ownership of folders: locks that end with their process, leases that expire."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from log_lines import logged

from ppn_jax import storage
from ppn_jax.distributed import coordination, ownership
from ppn_jax.distributed.ownership import Ownership, Process, owned_by_first
from ppn_jax.errors import InputError, Stopped

HOLD = """
import pathlib, sys, time
from ppn_jax.distributed.ownership import Ownership
with Ownership(pathlib.Path(sys.argv[1]), 'training'):
  print('has it', flush=True)
  time.sleep(600)
"""


def take(folder, messages=None, **options):
  with logged(messages), Ownership(folder, 'training', **options):
    pass


def test_a_second_owner_is_refused_until_the_first_is_killed(tmp_path, monkeypatch):
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.1)
  folder = tmp_path / 'run'
  with subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE,
                        text=True) as first:
    try:
      assert first.stdout.readline() == 'has it\n'
      before = {path: path.read_bytes() for path in folder.iterdir()}
      with pytest.raises(InputError, match=f'in use by another training: process {first.pid} on'):
        take(folder)
      with pytest.raises(InputError, match=f'or end it with `kill {first.pid}` there'):
        take(folder)
      assert {path: path.read_bytes() for path in folder.iterdir()} == before
    finally:
      first.send_signal(signal.SIGKILL)
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 5)
  take(folder)  # At once: the lock has ended with the process.


def test_a_second_owner_in_the_same_process_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.1)
  with Ownership(tmp_path, 'training'):
    with pytest.raises(InputError, match='in use by another training'):
      take(tmp_path)
    with Ownership(tmp_path, 'evaluation'):  # Another task has another owner.
      pass
  take(tmp_path)


def test_a_folder_without_content_is_removed(tmp_path):
  take(tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
  with Ownership(tmp_path / 'new', 'training'):
    (tmp_path / 'new' / 'config.json').touch()
  assert (tmp_path / 'new' / 'config.json').exists()


def test_a_lock_on_a_removed_file_is_not_ownership(tmp_path, monkeypatch):
  original, tried = ownership._lock, []

  def lock(file):
    if not tried:  # Its owner has ended between opening and locking.
      (tmp_path / '.training.lock').unlink()
    tried.append(file)
    original(file)

  monkeypatch.setattr(ownership, '_lock', lock)
  take(tmp_path)
  assert len(tried) == 2 and not [*tmp_path.iterdir()]


def test_an_owner_on_another_machine_is_waited_for_up_to_a_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.05)
  monkeypatch.setattr(ownership, 'LEASE_SECONDS', 0.2)
  messages = []
  with Ownership(tmp_path, 'training') as first:
    elsewhere = first._process._replace(host='another')
    (tmp_path / '.training.lock').write_text(elsewhere.as_json())
    with pytest.raises(InputError, match=r'process \d+ on another'):
      take(tmp_path, messages)
  assert len(messages) == 1 and 'waiting up to 0 seconds' in messages[0]


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
  def no_locks(file):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(ownership, '_lock', no_locks)
  messages = []
  take(tmp_path, messages)
  assert messages == [f'{tmp_path} is on a file system without locks; make sure that there is no '
                  'second training in it']


def test_on_nfs_the_file_is_opened_for_writing(tmp_path, monkeypatch):
  original, opened = ownership._lock, []

  def lock(file):
    opened.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
    if opened[-1] == os.O_RDONLY:
      raise OSError(errno.EBADF, 'Bad file descriptor')
    original(file)

  monkeypatch.setattr(ownership, '_lock', lock)
  take(tmp_path)
  assert opened == [os.O_RDONLY, os.O_RDWR]


class Object:
  """Stands in for an object of a bucket, with generations."""

  def __init__(self):
    self.text, self.version, self.outage = None, 0, False

  def read(self, path):
    return None if self.text is None else storage.Versioned(self.text, self.version)

  def replace(self, path, text, version):
    if self.outage:
      raise OSError('out of reach')
    if version != (self.version if self.text is not None else 0):
      return None
    self.text, self.version = text, self.version + 1
    return self.version

  def delete(self, path, version):
    if version == self.version:
      self.text = None


@dataclasses.dataclass
class Clock:
  seconds: float = 1000.0
  events: list = dataclasses.field(default_factory=list)

  def sleep(self, seconds):
    self.seconds += seconds
    for event in self.events:
      event(self.seconds)


@pytest.fixture
def bucket(monkeypatch):
  """Returns (object, clock); heartbeats are sent by tests only."""
  there, clock = Object(), Clock()
  monkeypatch.setattr(storage, 'is_local', lambda path: False)
  monkeypatch.setattr(storage, 'absolute', lambda path: path)
  for name in ('read', 'replace', 'delete'):
    monkeypatch.setattr(storage, f'{name}_version{"ed" if name == "read" else ""}',
                        getattr(there, name))
  monkeypatch.setattr(ownership.time, 'monotonic', lambda: clock.seconds)
  monkeypatch.setattr(ownership.time, 'sleep', clock.sleep)
  monkeypatch.setattr(Ownership, '_send_heartbeats', lambda self: None)
  return there, clock


def process(**changes):
  return Process.this()._replace(**changes)


def test_a_lease_is_released(bucket, tmp_path):
  there, _ = bucket
  with Ownership(tmp_path, 'training'):
    assert Process.parse(there.text).pid == os.getpid()
  assert there.text is None


def test_a_lease_with_heartbeats_refuses_a_second_owner(bucket, tmp_path):
  there, clock = bucket
  there.replace(None, process(host='pod-1').as_json(beat=time.time()), 0)
  clock.events.append(lambda now: there.replace(None, there.text, there.version))
  messages, started = [], clock.seconds
  with pytest.raises(InputError, match=r'process \d+ on pod-1'):
    take(tmp_path, messages)
  assert clock.seconds - started < 5 and 'waiting up to 60 seconds' in messages[0]


def test_a_lease_without_heartbeats_is_taken_over_after_a_while(bucket, tmp_path):
  there, clock = bucket
  there.replace(None, process(host='pod-1').as_json(beat=time.time()), 0)
  started = clock.seconds
  take(tmp_path)
  assert 60 <= clock.seconds - started < 63


@pytest.mark.parametrize('dead', [
  process(pid=2**22 + 1).as_json(beat=time.time()),
  process(started=1).as_json(beat=time.time()),  # The number is another process's now.
  process(host='pod-1').as_json(beat=time.time() - 3600), 'no JSON'],
                         ids=['no such process', 'another process', 'an hour ago', 'no JSON'])
def test_the_lease_of_a_dead_process_is_taken_over_at_once(bucket, tmp_path, dead):
  there, clock = bucket
  there.replace(None, dead, 0)
  started = clock.seconds
  take(tmp_path)
  assert clock.seconds == started


def test_the_lease_of_a_living_process_on_this_machine_refuses_at_once(bucket, tmp_path):
  there, clock = bucket
  there.replace(None, process().as_json(beat=time.time()), 0)
  with pytest.raises(InputError, match=f'process {os.getpid()} on'):
    take(tmp_path)
  assert clock.seconds == 1000


def test_a_process_that_has_lost_its_lease_stops_before_it_writes(bucket, tmp_path):
  there, clock = bucket
  with Ownership(tmp_path, 'training') as first:
    first.check()
    clock.seconds += 31
    there.outage = True
    first.check()  # An outage is no loss yet.
    there.outage = False
    first.check()
    assert there.version == 2
    there.replace(None, process(host='pod-2').as_json(), there.version)
    clock.seconds += 100
    with pytest.raises(Stopped, match='has taken over'):
      first.check()
  assert Process.parse(there.text).host == 'pod-2', 'the lease of another process is not released'


def test_a_heartbeat_whose_answer_was_lost_keeps_the_lease(bucket, tmp_path):
  there, clock = bucket
  with Ownership(tmp_path, 'training') as first:
    there.replace(None, there.text, there.version)  # Written, but the answer did not arrive.
    clock.seconds += 31
    first.check()
    clock.seconds += 31
    first.check()
    assert there.version == 3


@pytest.mark.parametrize('index', [0, 1])
def test_the_first_of_several_processes_takes_ownership(tmp_path, monkeypatch, index):
  monkeypatch.setattr(ownership, '_DYING_SECONDS', 0.05)
  monkeypatch.setattr(jax, 'process_index', lambda: index)
  broadcast = []
  monkeypatch.setattr(coordination, 'broadcast',
                      lambda data: broadcast.append(data) or (b'it is taken' if index else data))
  with Ownership(tmp_path, 'training'):
    with pytest.raises(InputError, match='it is taken' if index else 'in use by another training'):
      with owned_by_first(Ownership(tmp_path, 'training')):
        pass
  assert len(broadcast) == 1


def test_processes_are_distinguished():
  assert process().is_running() is True
  assert process(pid=2**22 + 1).is_running() is False
  assert process(host='another').is_running() is None
  assert process(boot='another').is_running() is None
  assert Process.parse(json.dumps({'pid': 1})) is None
