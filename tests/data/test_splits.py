"""Training images that are kept for evaluation."""

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.config import complete
from ppn_jax.data import splits
from ppn_jax.data.cache import CachedSource
from ppn_jax.data.source import build_source, open_example
from ppn_jax.data.splits import Subset, describe_fraction, open_splits
from ppn_jax.errors import InputError

WHOLE = {'name': 'synthetic_shapes', 'num_images': 20, 'image_size': 64, 'split': 'train'}


def config_with(fraction, **changes):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.data.train.update(WHOLE)
  config.data.eval = dict(name='coco_json', images='', annotations='')
  config.data.eval_fraction = fraction
  config.seed = changes.get('seed', 0)
  return complete(config)


def ids(source):
  return [image['id'] for image in source.ground_truth()['images']]


def test_the_parts_are_disjoint_and_whole():
  parts = open_splits(config_with(.25), ('train', 'eval'))
  train, kept = parts['train'], parts['eval']
  assert (len(train), len(kept)) == (15, 5)
  assert sorted(ids(train) + ids(kept)) == sorted(ids(build_source(WHOLE)))
  assert describe_fraction(config_with(.25), train) == (
      'data.eval_fraction=0.25: 5 of 20 training images, drawn by seed=0, are kept for evaluation '
      'and not trained on')


def test_every_call_draws_the_same_and_another_seed_others():
  drawn = lambda seed, names: ids(open_splits(config_with(.25, seed=seed), names)['eval'])
  assert drawn(0, ('eval',)) == drawn(0, ('train', 'eval')) != drawn(1, ('eval',))


@pytest.mark.parametrize('fraction, kept', [(.001, 1), (.5, 10), (.999, 19)])
def test_both_parts_have_images(fraction, kept):
  assert len(open_splits(config_with(fraction), ('eval',))['eval']) == kept


def test_images_keep_their_truth():
  whole, subset = build_source(WHOLE), Subset(build_source(WHOLE), np.array([3, 7, 8]))
  truth = subset.ground_truth()
  assert [a['id'] for a in truth['annotations']] == list(range(1, 1 + len(truth['annotations'])))
  for ours, theirs in enumerate((3, 7, 8)):
    example, expected = subset[ours], whole[theirs]
    assert example.image_id == expected.image_id == truth['images'][ours]['id']
    assert (example.image == expected.image).all() and (example.boxes == expected.boxes).all()
    assert (np.asarray(open_example(subset, ours).image) == expected.image).all()
    count = sum(a['image_id'] == expected.image_id for a in truth['annotations'])
    assert count == len(expected.boxes)
  assert subset.categories == whole.categories and subset.max_boxes == whole.max_boxes


def test_a_cache_holds_the_images_of_the_part(tmp_path):
  subset = Subset(build_source(WHOLE), np.array([3, 7]))
  cached = CachedSource(subset, str(tmp_path / 'cache'), 64)
  assert [cached[i].image_id for i in range(2)] == ids(subset)
  assert (cached[1].image == subset[1].image).all()


def test_encoded_images_are_those_of_the_part():
  class Encoded:
    categories, max_boxes = (), 0

    def __len__(self):
      return 9

    def encoded(self, index):
      return bytes([index])

  assert Subset(Encoded(), np.array([3, 7])).encoded(1) == b'\x07'
  assert not hasattr(Subset(build_source(WHOLE), np.array([3])), 'encoded')


def test_evaluation_data_has_priority_over_the_fraction():
  config = config_with(.25).copy_and_resolve_references().unlock()
  config.data.eval = dict(WHOLE, split='eval', num_images=4)
  assert len(open_splits(config, ('eval',))['eval']) == 4
  with pytest.raises(InputError, match='leave out one'):
    open_splits(config, ('train', 'eval'))


@pytest.mark.parametrize('block, said', [
    (dict(name=''), '--config.data.eval.name='),
    (dict(name='coco_json', images='', annotations=''),
     '--config.data.eval.images=... and --config.data.eval.annotations=...'),
    (dict(name='pascal_voc', folder='', images='JPEGImages'), '--config.data.eval.folder='),
    (dict(name='tfds', dataset='', data_dir=''), '--config.data.eval.dataset='),
    (dict(name='yolo_txt', data='', split='val'), '--config.data.eval.data=')])
def test_without_data_to_evaluate_on_the_ways_out_are_named(block, said):
  config = config_with(0.0).copy_and_resolve_references().unlock()
  config.data.eval = block
  with pytest.raises(InputError) as error:
    open_splits(complete(config), ('train', 'eval'))
  for part in (said, '--config.data.eval_fraction=0.1', '--config.train.evaluate_every=0'):
    assert part in str(error.value)


@pytest.mark.parametrize('fraction', [-.1, 1.0, 2.0])
def test_a_fraction_out_of_range(fraction):
  with pytest.raises(InputError, match=f'data.eval_fraction.*{fraction}'):
    open_splits(config_with(fraction), ('train',))


def test_one_image_is_not_split():
  config = config_with(.5).copy_and_resolve_references().unlock()
  config.data.train.num_images = 1
  with pytest.raises(InputError, match='needs at least 2 training images'):
    open_splits(config, ('train',))


def test_the_data_is_read_once_for_both_parts(monkeypatch):
  calls = []

  def counting(block, **options):
    calls.append(block)
    return build_source(block, **options)

  monkeypatch.setattr(splits, 'build_source', counting)
  open_splits(config_with(.25), ('train', 'eval'))
  assert len(calls) == 1
