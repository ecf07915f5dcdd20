"""Damaged checkpoints are detected, reported, and skipped for the one before."""

import errno
import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
import tensorstore
from log_lines import logged

from ppn_jax import storage
from ppn_jax.checkpoints import integrity, manager
from ppn_jax.checkpoints.manager import Checkpoints, DamagedCheckpoint, SaveFailed
from ppn_jax.cli.libraries import quiet_libraries
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError, StoreError
from ppn_jax.training.state import TrainState


def make_state(step, width=300):
  values = np.random.default_rng(step).normal(size=(4, width)).astype(np.float32)
  params = {'kernel': jax.numpy.asarray(values), 'half': jax.numpy.bfloat16(values[0])}
  return TrainState(step=jax.numpy.int32(step), variables={'params': params, 'batch_stats': {}},
                    opt_state=(jax.numpy.asarray(values / 3),), average={})


def like():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      make_state(0))


def same(a, b):
  return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope='module', autouse=True)
def quiet():
  """Hides what Orbax writes about damaged files, as commands do."""
  quiet_libraries()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), {'AP': step / 10})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


def restore_newest(folder, *, read_only=True):
  with logged() as messages, Checkpoints(folder, read_only=read_only) as checkpoints:
    step, state = checkpoints.restore_newest(like())
  return step, state, messages


def kinds(folder):
  """Returns one file of each kind; data files have random names."""
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file():
      name = path.relative_to(folder)
      found[str(name.parent / '*' if name.parent.name == 'd' else name)] = path
  return found.values()


def truncate(path, _):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def empty(path, _):
  path.write_bytes(b'')


def remove(path, _):
  path.unlink()


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, empty, remove, flip, flip])
def test_a_damaged_file_never_gives_other_values(folder, damage, request):
  rng = np.random.default_rng(len(request.node.name))
  passed_over = 0
  for path in kinds(folder / '2'):
    original = path.read_bytes()
    if not original and damage is flip:
      continue
    damage(path, rng)
    step, state, messages = restore_newest(folder)
    assert same(state, make_state(step)), path
    assert all('\n' not in line for line in messages)
    if step == 1:
      passed_over += 1
      assert f'{folder}/2 is damaged: ' in messages[0] and 'going back to step 1' in messages[0]
    path.write_bytes(original)
  # The arrays, the manifest, their metadata, and the metadata of the step.
  assert passed_over >= 4


def test_every_bit_of_the_arrays_counts(folder):
  path = max((folder / '2' / 'state' / 'd').iterdir(), key=lambda p: p.stat().st_size)
  original = path.read_bytes()
  for at in np.random.default_rng(0).choice(len(original), 12, replace=False):
    content = bytearray(original)
    content[at] ^= 0x10
    path.write_bytes(content)
    step, state, _ = restore_newest(folder)
    assert same(state, make_state(step)), at


def change_checksum(folder, name):
  file = folder / '_CHECKPOINT_METADATA'
  description = json.loads(file.read_text())
  description['custom_metadata']['checksums'][name][1] ^= 1
  file.write_text(json.dumps(description))


def test_a_wrong_checksum_is_damage(folder):
  assert integrity.checksums(make_state(1)) != integrity.checksums(make_state(2))
  change_checksum(folder / '2', 'opt_state/0')
  with Checkpoints(folder, read_only=True) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match='opt_state/0 is not what was saved'):
      checkpoints.restore(like(), 2)


def variables_only():
  return like()._replace(opt_state=None)


def bytes_read():
  found = tensorstore.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
  return sum(value['value'] for metric in found for value in metric['values'])


def test_restoring_variables_neither_reads_nor_checks_the_optimizer(tmp_path):
  state = make_state(1, width=100_000)
  abstract = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding),
                          state, like())
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    change_checksum(tmp_path / 'checkpoints' / '1', 'opt_state/0')
    read = []
    for wanted in (abstract, abstract._replace(opt_state=None), None):
      before = bytes_read()
      try:
        restored = checkpoints.restore(wanted, 1)
        assert restored.opt_state is None and same(restored, state._replace(opt_state=None))
      except DamagedCheckpoint:
        assert wanted is abstract
      read.append(bytes_read() - before)
  assert max(read[1:]) < 0.7 * read[0]


def test_damaged_variables_are_refused_without_the_optimizer_too(folder):
  change_checksum(folder / '2', 'variables/params/half')
  with Checkpoints(folder, read_only=True) as checkpoints:
    for wanted in (variables_only(), None):
      with pytest.raises(DamagedCheckpoint, match='variables/params/half is not what was saved'):
        checkpoints.restore(wanted, 2)


@pytest.mark.parametrize('damage', [truncate, remove, flip])
def test_damage_anywhere_never_gives_other_variables(folder, damage):
  rng = np.random.default_rng(0)
  refused = 0
  for path in kinds(folder / '2'):
    original = path.read_bytes()
    damage(path, rng)
    with Checkpoints(folder, read_only=True) as checkpoints:
      try:
        restored = checkpoints.restore(variables_only(), 2)
        assert same(restored, make_state(2)._replace(opt_state=None)), path
      except InputError:
        refused += 1
    path.write_bytes(original)
  assert refused >= 3


def test_variables_of_another_model_are_refused(folder):
  other = make_state(0, width=7)
  with Checkpoints(folder, read_only=True) as checkpoints:
    with pytest.raises(InputError, match=r'another model: variables/params/\S+ is \(\S*300'):
      checkpoints.restore(other._replace(opt_state=None), 2)


def test_a_checkpoint_without_checksums_is_restored(folder):
  file = folder / '2' / '_CHECKPOINT_METADATA'
  description = json.loads(file.read_text())
  description['custom_metadata'] = {}
  file.write_text(json.dumps(description))
  step, state, messages = restore_newest(folder)
  assert step == 2 and same(state, make_state(2)) and not messages


@pytest.mark.parametrize('part', ['state', 'state/d', '.'])
def test_a_partly_deleted_checkpoint_is_skipped(folder, part):
  shutil.rmtree(folder / '2' / part)
  (folder / '2').mkdir(exist_ok=True)
  step, state, messages = restore_newest(folder)
  assert step == 1 and same(state, make_state(1)) and len(messages) == 1


def test_the_trainer_moves_a_damaged_step_aside_and_saves_it_again(folder):
  remove(folder / '2' / 'state' / 'manifest.ocdbt', None)
  with Checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
    step, _ = checkpoints.restore_newest(like())
    assert step == 1 and checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2))
  step, state, messages = restore_newest(folder)
  assert step == 2 and same(state, make_state(2)) and not messages
  assert (folder.parent / manager.DAMAGED_FOLDER / '2' / 'state').is_dir()


def test_a_read_error_is_shared_with_other_processes(folder, monkeypatch):
  agreed = []
  monkeypatch.setattr(sharding, 'all_true', lambda yes: bool(agreed.append(yes)) or yes)
  with Checkpoints(folder, read_only=True) as checkpoints:
    monkeypatch.setattr(checkpoints, '_read', lambda *_: (_ for _ in ()).throw(StoreError('gone')))
    with pytest.raises(StoreError, match='gone'):
      checkpoints.restore(like(), 1)
  assert agreed == [False]


def test_nothing_is_moved_if_all_are_damaged(folder):
  for step in (1, 2):
    remove(folder / str(step) / 'state' / '_METADATA', None)
  for read_only in (True, False):
    with pytest.raises(InputError, match=r'every checkpoint in .* is damaged: .*/2 is damaged'
                       r'.*/1 is damaged') as error:
      restore_newest(folder, read_only=read_only)
    assert '\n' not in str(error.value)
  assert sorted(p.name for p in folder.iterdir()) == ['1', '2']


def test_damaged_metrics_do_not_affect_the_state(folder):
  (folder / '2' / 'metrics' / 'metrics').write_text('{"AP": ')
  for read_only in (True, False):
    step, state, messages = restore_newest(folder, read_only=read_only)
    assert step == 2 and same(state, make_state(2))
    assert messages == [f'the metrics of {folder}/2 are damaged; it counts as not evaluated']


TRANSIENT = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT]

# By which call of whom each part is read.
READERS = [
    (pathlib.Path, 'read_bytes'),  # Orbax's description of the step.
    (manager.ocp.PyTreeCheckpointHandler, 'metadata'),
    (manager.ocp.PyTreeCheckpointHandler, 'restore'),
]


def in_trouble(monkeypatch, owner, name, error, times):
  """Makes a method fail `times` times; returns a list that grows with each call."""
  asked, original = [], getattr(owner, name)

  def method(*args, **options):
    asked.append(name)
    if len(asked) <= times:
      raise error
    return original(*args, **options)

  monkeypatch.setattr(owner, name, method)
  monkeypatch.setattr(storage, 'RETRY_SECONDS', (0, 0))
  return asked


def errors_of(number):
  """Returns the error as Python and as TensorStore raise it."""
  text = os.strerror(number)
  return [OSError(number, text, 'file'),
          ValueError(f"UNKNOWN: Error reading file [os_error_code='{number}' {text}]")]


@pytest.mark.parametrize('number', TRANSIENT)
@pytest.mark.parametrize('owner, name', READERS)
def test_an_outage_is_not_damage(folder, monkeypatch, owner, name, number):
  for error in errors_of(number)[:1 if owner is pathlib.Path else 2]:
    with monkeypatch.context() as patch:
      in_trouble(patch, owner, name, error, times=2)
      assert restore_newest(folder, read_only=False)[0] == 2
    with monkeypatch.context() as patch:
      in_trouble(patch, owner, name, error, times=99)
      with pytest.raises(StoreError, match=rf'/2 cannot be read now: {os.strerror(number)}; it is'):
        restore_newest(folder, read_only=False)
  assert not folder.with_name(manager.DAMAGED_FOLDER).exists()


@pytest.mark.parametrize('number', TRANSIENT)
def test_reading_metrics_is_retried(folder, monkeypatch, number):
  asked = in_trouble(monkeypatch, manager.ocp.CheckpointManager, 'metrics',
                     OSError(number, os.strerror(number)), times=2)
  assert restore_newest(folder)[2] == [] and len(asked) >= 3


def test_undecodable_content_is_damage_without_retries(folder, monkeypatch):
  asked = in_trouble(monkeypatch, manager.ocp.PyTreeCheckpointHandler, 'restore',
                     ValueError('DATA_LOSS: Error decompressing'), times=1)
  step, _, messages = restore_newest(folder)
  assert step == 1 and len(messages) == 1 and len(asked) == 2


def test_a_checkpoint_is_identified_without_its_arrays(folder, monkeypatch):
  for path in (folder / '2' / 'state').rglob('*'):
    if path.is_file():
      path.unlink()
  stamps = [manager.read_stamp(folder / step) for step in '12']
  assert stamps[0].checkpoint != stamps[1].checkpoint and stamps[0].saved < stamps[1].saved
  assert stamps[0].checkpoint == integrity.digest(integrity.checksums(make_state(1)))
  file = folder / '2' / '_CHECKPOINT_METADATA'
  description = json.loads(file.read_text())
  description['custom_metadata'] = {}
  file.write_text(json.dumps(description))
  assert manager.read_stamp(folder / '2').checkpoint.startswith('saved at ')
  file.write_text('{')
  assert manager.read_stamp(folder / '2') is None is manager.read_stamp(folder / '3')


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(disk)],
                           capture_output=True, check=False)
  if mounted.returncode:
    pytest.skip('no right to mount a small disk')
  yield disk
  subprocess.run(['umount', '-l', str(disk)], check=True)


def test_a_full_disk_keeps_earlier_checkpoints_and_a_later_save_succeeds(small_disk):
  folder = small_disk / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    (small_disk / 'other').write_bytes(bytes(_free(small_disk) - 12_000))
    for failures in (1, 2):
      with pytest.raises(SaveFailed, match=r'the newest checkpoint in \S+ is step 1') as error:
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
      assert '\n' not in str(error.value) and checkpoints.failures == failures
    assert checkpoints.steps() == [1]
    (small_disk / 'other').unlink()
    checkpoints.save(3, make_state(3))
    checkpoints.wait()
    assert checkpoints.failures == 0 and checkpoints.steps() == [1, 3]
  for step in (1, 3):
    with Checkpoints(folder, read_only=True) as checkpoints:
      assert same(checkpoints.restore(like(), step), make_state(step))


def test_a_read_only_store(small_disk):
  folder = small_disk / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match='ead-only'):
      checkpoints.save(2, make_state(2))
      checkpoints.wait()
    assert checkpoints.steps() == [1]
    subprocess.run(['mount', '-o', 'remount,rw', str(small_disk)], check=True)
    checkpoints.save(2, make_state(2))
  assert restore_newest(folder)[0] == 2


def _free(disk: pathlib.Path) -> int:
  return shutil.disk_usage(disk).free
