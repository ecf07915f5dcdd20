"""Batches that worker processes fill: those of threads, whatever happens to the processes."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from time_limits import HANG_SECONDS, wait_until

from ppn_jax.data import loader
from ppn_jax.data.bad_examples import BadExamples
from ppn_jax.data.cache import CachedSource
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection.structures import Category, Example
from ppn_jax.errors import InputError, Stopped, StoreError

OPTIONS = dict(image_size=32, max_boxes=32, batch_size=4)
OPS = build_transforms([{'name': name, **({'size': 32} if name == 'mosaic' else {})} for name in (
    'mosaic', 'ssd_random_crop', 'horizontal_flip', 'photometric_distortion')])


class Faulty:
  """Source of grey images, some of which cannot be read."""
  categories, max_boxes = (Category(1, 'thing'),), 1

  def __init__(self, count, bad=(), error=None, cause=None, kills=()):
    self.count, self.bad, self.error, self.cause, self.kills = count, bad, error, cause, kills

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.kills:
      os.kill(os.getpid(), signal.SIGKILL)
    if index in self.bad:
      raise (self.error or InputError(f'{index}.jpg: truncated')) from self.cause
    image = np.full((8, 8, 3), index, np.uint8)
    return Example(image, np.zeros((1, 4), np.float32), np.zeros(1, np.int32),
                   np.zeros(1, bool), index, (8, 8))


def train(source, workers='processes', transforms=(), **options):
  return loader.train_batches(source, transforms=transforms, seed=3, workers=workers,
                              **{**OPTIONS, 'threads': 2, **options})


def arrays(batch):
  return [array.copy() for array in (batch.images, *batch.ground_truth, batch.image_id, batch.size,
                                     batch.valid)]


def take(batches, count):
  taken = [arrays(next(batches)) for _ in range(count)]
  batches.close()
  return taken


def children():
  return {p.pid for p in psutil.Process().children(recursive=True)
          if p.status() != psutil.STATUS_ZOMBIE}


def same(a, b):
  for x, y in zip(a, b, strict=True):
    for left, right in zip(x, y, strict=True):
      np.testing.assert_array_equal(left, right)


def test_batches_are_those_of_threads():
  source = SyntheticShapes(10, image_size=48)
  threads = take(train(source, 'threads', OPS), 7)
  before = children()
  same(take(train(source, transforms=OPS, threads=3), 7), threads)
  assert children() == before


@pytest.mark.slow
def test_for_any_number_of_workers_rows_and_from_any_step():
  source = SyntheticShapes(10, image_size=48)
  whole = take(train(source, 'threads', OPS), 6)
  same(take(train(source, transforms=OPS, threads=1), 6), whole)
  same(take(train(source, transforms=OPS, threads=5, start_step=2), 4), whole[2:])
  for rows in ([0, 3], [1, 2]):
    same(take(train(source, transforms=OPS, rows=rows), 6),
         [[array[rows] for array in batch] for batch in whole])


@pytest.mark.slow
def test_evaluation_pads_the_last_batch_and_ends():
  options = OPTIONS | dict(threads=2)
  batches = [arrays(b) for b in loader.eval_batches(Faulty(6), workers='processes', **options)]
  same(batches, [arrays(b) for b in loader.eval_batches(Faulty(6), **options)])
  assert batches[-1][-1].tolist() == [True, True, False, False]


def test_memory_is_used_again_only_when_a_batch_is_garbage():
  batches = train(Faulty(40), batch_size=2)
  kept = [next(batches) for _ in range(8)]
  copies = [arrays(b) for b in kept]
  for _ in range(12):
    next(batches)
  for batch, copy in zip(kept, copies, strict=True):
    same([arrays(batch)], [copy])
  shared = batches.gi_frame.f_locals['loader']._batches
  count = shared._count
  del kept, batch
  for _ in range(30):
    next(batches)
  assert shared._count == count <= 8 + loader.BATCHES_AHEAD + 1
  last = next(batches)
  batches.close()
  assert last.images.any()  # It outlives the processes.


def test_the_first_bad_row_is_raised():
  with pytest.raises(InputError, match=r'^2\.jpg: truncated'):
    list(loader.eval_batches(Faulty(9, bad=[2, 3]), workers='processes', threads=2, **OPTIONS))


@pytest.mark.slow
def test_bad_examples_are_counted_over_all_processes():
  source = Faulty(20, bad=[4, 11])
  results = []
  for workers in ('threads', 'processes'):
    bad = BadExamples('data.train', 20, 'skip', 0.1)
    results.append(take(train(source, workers, bad=bad), 5))
    assert sorted(bad.new_reasons()) == ['11.jpg: truncated', '4.jpg: truncated']
  same(*results)
  with pytest.raises(InputError, match='2 of 20 examples cannot be read'):
    take(train(source, bad=BadExamples('data.train', 20, 'skip', 0.05)), 10)


@pytest.mark.slow
def test_causes_of_errors_are_kept():
  source = Faulty(8, bad=[1], cause=OSError(5, 'Input/output error'))
  with pytest.raises(StoreError, match='truncated'):
    take(train(source, bad=BadExamples('data.train', 8, 'skip', 0.5)), 4)
  with pytest.raises(ZeroDivisionError) as caught:
    take(train(Faulty(8, bad=[1], error=ZeroDivisionError('a bug'))), 4)
  assert '__getitem__' in ''.join(caught.value.__notes__)


def test_a_worker_that_is_killed_ends_the_run_with_the_reason():
  before = children()
  with pytest.raises(Stopped, match=r'input worker \d of 2 was killed by SIGKILL; .*memory'):
    take(train(Faulty(8, kills=[5])), 4)
  assert children() == before


def test_what_cannot_be_sent_to_another_process_is_refused():
  before = children()
  source = Faulty(8)
  source.error = lambda: None
  with pytest.raises(InputError, match=r'cannot be sent to another process.*data.workers=threads'):
    next(train(source))
  assert children() == before


PROGRAM = """
import sys, time
from ppn_jax.data import loader
from ppn_jax.data.sources.synthetic import SyntheticShapes
{definition}
batches = loader.train_batches({source}, transforms=(), seed=0, image_size=32, max_boxes=8,
                               batch_size=4, threads=2, workers='processes')
next(batches)
print('started', flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_class_of_the_main_program_is_refused():
  definition = 'class Mine(SyntheticShapes): pass'
  program = PROGRAM.format(definition=definition, source='Mine(10, image_size=32)')
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                        timeout=HANG_SECONDS)
  assert 'InputError: data.workers=processes' in done.stderr
  assert 'define them in a module that can be imported' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_the_reader_ends(end):
  files = set(pathlib.Path('/dev/shm').iterdir()) if os.path.isdir('/dev/shm') else set()
  program = PROGRAM.format(definition='', source='SyntheticShapes(10, image_size=32)')
  with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL, text=True) as process:
    assert process.stdout.readline() == 'started\n'
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 3
    process.send_signal(end)
  wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE
                             for p in started))
  assert not files or not set(pathlib.Path('/dev/shm').iterdir()) - files


def test_workers_never_import_jax():
  code = ('import sys, ppn_jax.data.worker_server\n'
          'assert not [m for m in sys.modules if m.split(".")[0] in ("jax", "flax")]')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=HANG_SECONDS)


@pytest.mark.slow
def test_a_cache_on_disk_is_shared_and_one_in_memory_is_not(tmp_path):
  source = CachedSource(SyntheticShapes(10, image_size=48), str(tmp_path / 'cache'), 40)
  same(take(train(source), 4), take(train(source, 'threads'), 4))
  with pytest.raises(InputError, match='a cache in memory belongs to one process'):
    next(train(CachedSource(SyntheticShapes(10, image_size=48), 'memory', 40)))


def test_the_choice_of_workers():
  assert loader.choose_workers('auto', 2) == 'threads'
  assert loader.choose_workers('auto', 16) == 'processes'
  assert loader.choose_workers('auto', 16, cache='memory') == 'threads'
  with pytest.raises(InputError, match=r"data.workers='thread'; did you mean 'threads'"):
    loader.choose_workers('thread', 0)
  with pytest.raises(InputError, match=r"data.cache.where='memory'"):
    loader.choose_workers('processes', 0, cache='memory')
