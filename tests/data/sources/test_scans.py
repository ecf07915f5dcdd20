"""What is collected from all records of a TFDS data set is kept as it is."""

import numpy as np
import pytest

from ppn_jax.data.prepare import Options, prepare
from ppn_jax.data.sources import scans
from ppn_jax.data.sources.record_images import NOTHING, Record
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.data.sources.tfds import Tfds
from ppn_jax.distributed import coordination
from ppn_jax.jobs.shared_scans import SharedScans


def record(boxes, areas, **fields):
  return Record(b'', np.array(boxes, np.float32).reshape(-1, 4),
                np.arange(len(boxes)), np.ones(len(boxes), bool), areas,
                **{'image_id': 7, 'file_name': 'a.jpg', 'size': (3, 4), **fields})


@pytest.mark.parametrize('records', [
    [], [NOTHING], [record([[0, 0, 1, 1]], None), record([], None, image_id=None, size=None)],
    [record([[0, 0, .1, 1], [0, .2, 1, 1]], np.array([.5, 1 / 3])), NOTHING,
     record([], np.zeros(0), file_name='ä')]])
def test_a_scan_comes_back(records):
  found = scans.decode(scans.encode(scans.Scan(records, {1: 'broken'})))
  assert found.unreadable == {1: 'broken'} and len(found.records) == len(records)
  for ours, theirs in zip(found.records, records, strict=True):
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(a, b)
      assert type(a) is type(b) and getattr(a, 'dtype', None) == getattr(b, 'dtype', None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  pytest.importorskip('tensorflow_datasets')
  monkeypatch.setattr('ppn_jax.data.images.decoding._CLOCK_TICK', -np.inf)  # Files are old enough.
  folder = prepare({'train': SyntheticShapes(num_images=4, image_size=64)}, tmp_path / 'sets',
                   Options('toy', threads=1), progress=lambda *_: None)
  (folder / 'instances_train.json').unlink()  # As a data set of TFDS itself.
  return folder


def open_with(kept, folder, monkeypatch):
  """Builds the source; returns it and how often it read all records."""
  times, read = [], Tfds._read_all
  monkeypatch.setattr(Tfds, '_read_all', lambda *args: times.append(0) or read(*args))
  with scans.kept_by(kept):
    source = Tfds(data_dir=str(folder))
  monkeypatch.setattr(Tfds, '_read_all', read)
  return source, len(times)


def test_a_data_set_is_scanned_at_the_first_start_only(folder, tmp_path, monkeypatch):
  plain, run = Tfds(data_dir=str(folder)), tmp_path / 'run'
  first = SharedScans(run)
  source, times = open_with(first, folder, monkeypatch)
  assert times == 1 and not run.exists()
  first.save()
  again, times = open_with(SharedScans(run), folder, monkeypatch)
  assert times == 0 and len(list((run / 'scans').iterdir())) == 1
  for found in (source, again):
    assert found.ground_truth() == plain.ground_truth()
    np.testing.assert_array_equal(found[2].boxes, plain[2].boxes)
  kept, = (run / 'scans').iterdir()
  kept.write_bytes(kept.read_bytes()[:-50])
  assert open_with(SharedScans(run), folder, monkeypatch)[1] == 1


def test_changed_data_are_scanned_again(folder, tmp_path, monkeypatch):
  first = SharedScans(tmp_path / 'run')
  open_with(first, folder, monkeypatch)
  first.save()
  shard, = folder.glob('*record-*')
  data = shard.read_bytes()
  shard.unlink()
  shard.write_bytes(data)
  second = SharedScans(tmp_path / 'run')
  assert open_with(second, folder, monkeypatch)[1] == 1
  second.save()
  assert len(list((tmp_path / 'run' / 'scans').iterdir())) == 1  # The other is of no use.


def test_an_evaluation_keeps_what_training_has_scanned(folder, tmp_path, monkeypatch):
  other = prepare({'train': SyntheticShapes(num_images=3, image_size=64)}, tmp_path / 'others',
                  Options('toy', threads=1), progress=lambda *_: None)
  (other / 'instances_train.json').unlink()
  for data, replace in ((folder, True), (other, False)):
    kept = SharedScans(tmp_path / 'run')
    assert open_with(kept, data, monkeypatch)[1] == 1
    kept.save(replace=replace)
  for data in (folder, other):
    assert open_with(SharedScans(tmp_path / 'run'), data, monkeypatch)[1] == 0


def test_other_processes_take_what_the_first_has_read(folder, tmp_path, monkeypatch):
  sent = []
  monkeypatch.setattr(coordination, 'broadcast', lambda data: sent.append(data) or data)
  source, _ = open_with(SharedScans(tmp_path / 'run'), folder, monkeypatch)
  monkeypatch.setattr('jax.process_index', lambda: 1)
  monkeypatch.setattr(coordination, 'broadcast', lambda data: sent[0])
  other, times = open_with(SharedScans(tmp_path / 'run'), folder, monkeypatch)
  assert times == 0 and other.ground_truth() == source.ground_truth()
