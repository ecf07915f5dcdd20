"""A full or read-only disk is reported in a line, nothing is lost, and the run continues."""

import gc
import json
import pathlib
import shutil
import subprocess
import time

import pytest
from tensorboardX.proto import event_pb2
from tiny import CONFIG_FILE

from ppn_jax.checkpoints import integrity
from ppn_jax.cli.main import main
from ppn_jax.telemetry.metrics import AppendOnlyFile

TESTS = pathlib.Path(__file__).resolve().parents[1]
# A smaller net than tiny's own, and room for five of its checkpoints.
SMALL = ('--config.model.backbone.last_block=3', '--config.model.neck.stride=4',
         '--config.model.neck.num_levels=2', '--config.model.head.depth=8')


@pytest.fixture
def disk(tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  try:
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)],
                             capture_output=True, check=False).returncode == 0
  except OSError:
    mounted = False
  if not mounted:
    pytest.skip('a small disk cannot be mounted here: that takes the right to, as root has it')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(disk):
  with (disk / 'filling').open('ab', buffering=0) as file:
    while shutil.disk_usage(disk).free:
      file.write(bytes(4096))


def set_writable(disk, writable):
  command = ['mount', '-o', f'remount,{"rw" if writable else "ro"}', str(disk)]
  # Refused while a file is open for writing, as metrics.jsonl is for moments.
  while subprocess.run(command, capture_output=True, check=False).returncode:
    time.sleep(0.01)


def train(disk, *overrides):
  config = disk.parent / 'config.py'
  config.write_text(CONFIG_FILE.format(folder=str(TESTS)))
  return main(['train', f'--config={config}', f'--workdir={disk / "run"}', *SMALL,
               '--config.train.steps=40', '--config.train.checkpoint_every=4',
               '--config.train.log_every=1', '--config.train.keep_last=2', *overrides])


def at_save(monkeypatch, **actions):
  """Calls the action for a step, such as `step_3`, in the thread that is about to write it."""
  original = integrity.checksums

  def checksums(state):
    actions.pop(f'step_{int(state.step)}', lambda: None)()
    return original(state)

  monkeypatch.setattr(integrity, 'checksums', checksums)


def saved(disk):
  names = (path.name for path in (disk / 'run' / 'checkpoints').iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def logged(disk):
  lines = (disk / 'run' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def steps_in_event_files(workdir):
  """Returns the steps in the event files."""
  steps = set()
  for path in (workdir / 'tensorboard').iterdir():
    data = path.read_bytes()
    # Records: length u64, crc u32, payload, crc u32.
    while data:
      end = 16 + int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12:end - 4])
      steps |= {event.step for value in event.summary.value}
      data = data[end:]
  return steps


def check_output(capfd, caplog, *lines):
  gc.collect()  # asyncio reports lost exceptions then.
  output = capfd.readouterr().err
  assert 'Traceback' not in output and not caplog.records
  for line in lines:
    assert sum(line in written for written in output.splitlines()) == 1, (line, output)


@pytest.mark.slow
def test_a_temporarily_full_disk(disk, monkeypatch, capfd, caplog):
  at_save(monkeypatch, step_8=lambda: fill(disk), step_24=(disk / 'filling').unlink)
  assert train(disk) == 0
  failed = 'could not be saved: No space left on device; the newest checkpoint in'
  kept = 'No space left on device; training continues, the metrics are kept'
  check_output(capfd, caplog, kept, *(
      f'step {step} {failed} {disk}/run/checkpoints is step 4; training continues'
      for step in (8, 12, 16, 20)))
  assert saved(disk) == [36, 40]
  assert logged(disk) == [*range(1, 41)] and steps_in_event_files(disk / 'run') == {*range(1, 41)}


@pytest.mark.slow
def test_a_full_disk_stops_the_run_on_request_and_it_resumes_with_space(
    disk, monkeypatch, capfd, caplog):
  at_save(monkeypatch, step_8=lambda: fill(disk))
  assert train(disk, '--config.train.on_save_error=stop') == 1
  check_output(capfd, caplog, 'ppn: training stopped: step 8 could not be saved: No space left on')
  assert saved(disk)[0] == 4
  assert train(disk) == 1
  check_output(capfd, caplog, 'ppn: error: ')
  (disk / 'filling').unlink()
  assert train(disk) == 0
  check_output(capfd, caplog, f'resuming {disk}/run from step 4')
  assert saved(disk) == [36, 40] and logged(disk) == [*range(1, 41)]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(disk, monkeypatch, capfd, caplog):
  at_save(monkeypatch, step_8=lambda: set_writable(disk, False),
          step_16=lambda: set_writable(disk, True))
  assert train(disk) == 0
  check_output(capfd, caplog, 'Read-only file system; training continues, the metrics are kept', *(
      f'step {step} could not be saved: Read-only file system; the newest' for step in (8, 12)))
  assert saved(disk) == [36, 40]
  assert logged(disk) == [*range(1, 41)] and steps_in_event_files(disk / 'run') == {*range(1, 41)}


def test_a_disk_that_is_read_only_from_the_start(disk, capfd, caplog):
  set_writable(disk, False)
  assert train(disk) == 2
  check_output(capfd, caplog, f'ppn: error: {disk}/run: Read-only file system')
  set_writable(disk, True)
  assert not list(disk.iterdir())


def test_an_append_only_file_writes_what_failed_once_there_is_space(disk):
  file, refused = AppendOnlyFile(disk / 'lines'), 0
  for step in range(12):
    if step == 4:
      fill(disk)
    if step == 8:
      (disk / 'filling').unlink()
    file.add(f'{step} {1500 * "."}\n'.encode())
    try:
      file.flush()
    except OSError as e:
      refused += 1
      assert 4 <= step < 8 and 'No space' in str(e)
  assert refused >= 2
  assert [line.split()[0] for line in (disk / 'lines').read_text().splitlines()] == [
      str(step) for step in range(12)]
