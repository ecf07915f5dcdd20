"""Damaged images raise an error or are skipped and named, never silently."""

import errno
import os
import pathlib

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax import storage
from ppn_jax.data.bad_examples import BadExamples, WithSubstitutes, evenly_spaced_examples
from ppn_jax.data.checks import MAX_BAD_SHARE, advise_skipping
from ppn_jax.data.images import decoding
from ppn_jax.data.loader import eval_batches, train_batches
from ppn_jax.data.sources.synthetic import SyntheticShapes
from ppn_jax.errors import InputError, StoreError
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run

SHAPES = dict(num_images=10, image_size=64)
OPTIONS = dict(image_size=32, max_boxes=8, batch_size=5)


class Damaged(SyntheticShapes):
  """Source in which every `step`-th image cannot be read."""

  def __init__(self, step=5, split='train', **options):
    super().__init__(split=split, **{**SHAPES, **options})
    self._step = step

  def __getitem__(self, index):
    if index % self._step == 0:
      raise InputError(f'{index}.jpg: damaged')
    return super().__getitem__(index)


def skipping(most=0.5):
  return BadExamples('data.train', 10, 'skip', most)


def test_by_default_a_damaged_image_stops_the_run():
  for bad in (None, BadExamples('data.train', 10)):
    batches = train_batches(Damaged(), transforms=(), seed=0, bad=bad, **OPTIONS)
    with pytest.raises(InputError, match=r'\d\.jpg: damaged'):
      for _ in range(2):
        next(batches)


@pytest.mark.parametrize('policy', ['raise', 'skip'])
@pytest.mark.parametrize('cause, bad', [
    (OSError(errno.EIO, 'Input/output error'), False), (OSError(errno.ESTALE, 'Stale'), False),
    (FileNotFoundError(errno.ENOENT, 'No such file'), True), (OSError('no JPEG'), True),
    (PermissionError(errno.EACCES, 'Permission denied'), True), (None, True)])
def test_a_disk_in_trouble_makes_no_image_a_bad_one(policy, cause, bad):
  error = InputError('5.jpg: cannot be read')
  error.__cause__ = cause
  examples = BadExamples('data.train', 10, policy, 0.5)
  if bad and policy == 'skip':
    examples.record(error)
    assert examples.new_reasons() == ['5.jpg: cannot be read']
  else:
    with pytest.raises(InputError if bad else StoreError, match=r'5\.jpg: cannot be read'):
      examples.record(error)
    assert not examples.new_reasons()


def test_an_image_is_read_again_when_the_disk_is_in_trouble(tmp_path, monkeypatch):
  path, tried = tmp_path / 'a.jpg', []
  path.write_bytes(b'pixels')
  original = pathlib.Path.read_bytes

  def read(self):
    tried.append(self)
    if len(tried) < 3:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return original(self)

  monkeypatch.setattr(pathlib.Path, 'read_bytes', read)
  monkeypatch.setattr(storage, 'RETRY_SECONDS', (0, 0))
  assert decoding.read(str(path)) == b'pixels' and len(tried) == 3


def test_skipped_images_are_named_once_and_replaced_by_the_next_of_the_order():
  bad = skipping()
  batches = train_batches(Damaged(), transforms=(), seed=0, bad=bad, **OPTIONS)
  whole = train_batches(SyntheticShapes(**SHAPES), transforms=(), seed=0, **OPTIONS)
  seen, order = [], []
  for _ in range(4):
    seen += next(batches).image_id.tolist()
    order += next(whole).image_id.tolist()
  ids = [SyntheticShapes(**SHAPES)[i].image_id for i in range(10)]
  gone = {ids[0], ids[5]}
  for epoch in (slice(0, 10), slice(10, 20)):
    then = order[epoch]
    expected = []
    for at in range(10):
      while then[at % 10] in gone:
        at += 1
      expected.append(then[at % 10])
    assert seen[epoch] == expected
  assert sorted(bad.new_reasons()) == ['0.jpg: damaged', '5.jpg: damaged']
  assert bad.new_reasons() == []


@pytest.mark.parametrize('threads', [1, 4])
def test_the_same_batches_for_any_number_of_threads(threads):
  def stream(threads):
    batches = train_batches(Damaged(), transforms=(), seed=3, threads=threads, bad=skipping(),
                            **OPTIONS)
    return [next(batches).images for _ in range(4)]
  np.testing.assert_array_equal(stream(threads), stream(2))


def test_too_many_are_an_error_that_counts_them():
  batches = train_batches(Damaged(step=2), transforms=(), seed=0, bad=skipping(0.2), **OPTIONS)
  with pytest.raises(InputError, match=r'data.train: 3 of 10 examples cannot be read, which is '
                                       r'more than data.max_bad_share=0.2 allows; the first: \d'):
    next(batches)
    next(batches)


def test_no_image_at_all_ends_too():
  batches = train_batches(Damaged(step=1), transforms=(), seed=0, bad=skipping(1.0), **OPTIONS)
  with pytest.raises(InputError, match='none of the 10 images'):
    next(batches)
  with pytest.raises(InputError, match='none of the 10 images'):
    WithSubstitutes(Damaged(step=1), skipping(1.0))[3]


def test_in_evaluation_the_place_stays_empty():
  bad = skipping()
  batches = list(eval_batches(Damaged(), bad=bad, **OPTIONS))
  assert np.concatenate([b.valid for b in batches]).tolist() == [i % 5 != 0 for i in range(10)]
  assert len(bad.new_reasons()) == 2


def test_substitutes_are_the_next_images():
  source = WithSubstitutes(Damaged(), skipping())
  np.testing.assert_array_equal(source[5].image, Damaged()[6].image)
  np.testing.assert_array_equal(source[4].image, Damaged()[4].image)


@pytest.mark.parametrize('options, words', [
    ({'policy': 'skp'}, "did you mean 'skip'"), ({'most': 1.5}, 'max_bad_share')])
def test_options_out_of_range(options, words):
  with pytest.raises(InputError, match=words):
    BadExamples('data.train', 10, **options)


@pytest.mark.slow
@pytest.mark.parametrize('resident', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_and_says_which(tmp_path, log_lines, resident):
  config = tiny_config(evaluate_every=6)
  with config.unlocked():
    for split in ('train', 'eval'):
      config.data[split] = dict(name='test_bad_examples:Damaged', split=split)
    config.data.resident.enabled = resident
    config.data.on_bad_example, config.data.max_bad_share = 'skip', 0.5
  scores = train(config, tmp_path / 'w')
  assert scores.num_images == 10
  assert log_lines.count('skipped: 5.jpg: damaged') >= 1
  noted = pathlib.Path(open_run(tmp_path / 'w').workdir / 'bad_examples.txt').read_text()
  assert sorted(noted.splitlines()) == ['0.jpg: damaged', '5.jpg: damaged']


@pytest.mark.parametrize('step, count, expected', [
    (5, 3, [1, 4, 9]), (5, 10, [1, 2, 3, 4, 6, 7, 8, 9]), (2, 4, [1, 3, 7, 9]), (1, 3, []),
    (11, 1, [1])])
def test_samples_are_spread_and_others_take_the_place_of_bad_ones(step, count, expected):
  reasons = []
  found = list(evenly_spaced_examples(Damaged(step), count, reasons.append))
  assert sorted(index for index, _ in found) == expected
  ids = [SyntheticShapes(**SHAPES)[index].image_id for index, _ in found]
  assert [example.image_id for _, example in found] == ids
  assert len({str(reason) for reason in reasons}) == len(reasons) > 0


def test_samples_of_a_set_that_must_be_whole():
  with pytest.raises(InputError, match=r'0\.jpg: damaged'):
    list(evenly_spaced_examples(Damaged(), 3, BadExamples('data.eval', 10).record))


def test_the_default_share_is_that_of_the_config():
  assert tiny_config().data.max_bad_share == MAX_BAD_SHARE


def test_one_image_of_a_small_data_set_may_be_damaged():
  small = skipping(most=0.01)
  small.record(InputError('a.jpg: damaged'))
  with pytest.raises(InputError, match=r'2 of 10 examples .*max_bad_share=0.01'):
    small.record(InputError('b.jpg: damaged'))
  with pytest.raises(InputError, match='1 of 10'):
    skipping(most=0).record(InputError('a.jpg: damaged'))


@pytest.mark.parametrize('count, total, share', [
    (1, 10, None), (1, 1000, None), (10, 1000, None), (11, 1000, 0.03), (4, 61, 0.14), (8, 9, 1)])
def test_advice_names_a_share_that_is_enough(count, total, share):
  advice = advise_skipping(count, total)
  assert ('max_bad_share' in advice) == (share is not None)
  if share:
    assert f'max_bad_share={share:g})' in advice and share * total >= count
