"""Runs on disk: config, classes and what may change."""

import json

import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.config_files import override
from ppn_jax.data.splits import open_splits
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.run import Run, create_run, open_run

CATEGORIES = (Category(3, 'cat'), Category(7, 'dog'))


def test_saved_and_opened(tmp_path):
  run = create_run(tmp_path / 'w', tiny_config(), CATEGORIES)
  assert not (tmp_path / 'w').exists()  # Until it is saved.
  run.save()
  opened = open_run(tmp_path / 'w')
  assert opened.config.to_dict() == run.config.to_dict()
  assert opened.config.is_locked and opened.config.model.num_classes == 2
  assert opened.categories == CATEGORIES


def test_schedule_may_change_but_not_model_or_classes(tmp_path):
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  create_run(tmp_path, tiny_config(steps=99), CATEGORIES)
  with pytest.raises(InputError, match=r"label 1 is 'cow' \(id 7\) here and 'dog' \(id 7\) in"):
    create_run(tmp_path, tiny_config(), (Category(3, 'cat'), Category(7, 'cow')))
  with pytest.raises(InputError, match=r'model.num_classes is 2 there and 3 in this config'):
    create_run(tmp_path, tiny_config(), (*CATEGORIES, Category(9, 'eel')))


def test_checkpoints_without_a_config_are_refused(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  create_run(tmp_path, tiny_config(), CATEGORIES)  # A start that broke off early.
  (tmp_path / 'checkpoints' / '100').mkdir()
  with pytest.raises(InputError, match=r'has checkpoints but no config.json'):
    create_run(tmp_path, tiny_config(), CATEGORIES)


@pytest.mark.parametrize('name, content', [
    ('config.json', '{'), ('config.json', '[1]'), ('categories.json', '{}x'),
    ('categories.json', '[{"id": 1}]'), ('categories.json', None)])
def test_files_that_cannot_be_read(tmp_path, name, content):
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  if content is None:
    (tmp_path / name).unlink()
  else:
    (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match='cannot be read as a run'):
    open_run(tmp_path)


def test_a_config_of_another_number_of_classes(tmp_path):
  config = tiny_config().copy_and_resolve_references()
  config.model.num_classes = 5
  with pytest.raises(InputError, match=r'model.num_classes=5, but the training data has 2'):
    create_run(tmp_path, config, CATEGORIES)


def test_categories_are_written_as_json(tmp_path):
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  assert json.loads((tmp_path / 'categories.json').read_text()) == [
      {'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}]


def test_a_run_from_before_a_key_existed_opens(tmp_path):
  config = tiny_config()
  create_run(tmp_path, config, CATEGORIES).save()
  written = json.loads((tmp_path / 'config.json').read_text())
  del written['loss']['name'], written['init'], written['model']['background_column']
  written['model']['neck'] = {'name': 'my.code:Neck', 'width': 3}
  (tmp_path / 'config.json').write_text(json.dumps(written))
  opened = open_run(tmp_path).config
  assert opened.loss.name == 'focal' and opened.init.backbone == ''
  assert opened.model.background_column is False
  assert opened.model.neck.to_dict() == {'name': 'my.code:Neck', 'width': 3}


def written_by(tmp_path, change):
  """Returns a run whose config.json was changed, as if by an earlier version or somebody else."""
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  written = json.loads((tmp_path / 'config.json').read_text())
  change(written)
  (tmp_path / 'config.json').write_text(json.dumps(written))
  return tmp_path


def test_a_run_with_an_absolute_warm_up_rate_opens(tmp_path):
  def change(written):
    del written['optim']['warmup_factor']
    written['optim'].update(learning_rate=.01, warmup_learning_rate=.1333, warmup_fraction=.5)

  optim = open_run(written_by(tmp_path, change)).optimizer()
  assert float(optim.schedule(0)) == np.float32(.1333)


def test_keys_of_another_version_are_ignored_and_listed(tmp_path):
  def change(written):
    written['train']['checkpont_every'] = 1
    written['optim_'] = {}

  run = open_run(written_by(tmp_path, change))
  assert set(run.unknown_keys) == {'train.checkpont_every', 'optim_'}
  assert 'optim_' not in run.config and run.config.train.checkpoint_every == 3


USES = {
    **dict.fromkeys(('model.backbone', 'model.neck', 'model.head', 'loss'), Run.detector),
    'data.transforms.0': lambda run: build_transforms(run.config.data.transforms),
    'data.train': lambda run: open_splits(run.config, ['train']),
    'data.eval': lambda run: open_splits(run.config, ['eval'])}


@pytest.mark.parametrize('place', USES)
def test_opening_a_run_imports_nothing_that_its_files_name(tmp_path, place, import_from):
  package = tmp_path / 'planted'
  package.mkdir()
  (package / '__init__.py').write_text('raise RuntimeError("imported")')
  import_from(tmp_path)

  def change(written):
    *blocks, last = [int(key) if key.isdecimal() else key for key in place.split('.')]
    block = written
    for key in blocks:
      block = block[key]
    block[last] = {'name': 'planted.deep:run', 'command': 'x'}

  run = open_run(written_by(tmp_path / 'w', change))
  with pytest.raises(InputError, match=r"'planted.deep:run' in .*config.json is code from"):
    USES[place](run)
  with pytest.raises(InputError, match=r'planted.deep:run'):  # Nor do entries of a command line.
    override(run.config, [f'--config.{place}.depth=3'])
  with pytest.raises(RuntimeError, match='imported'):  # Once allowed it is looked for.
    USES[place](open_run(tmp_path / 'w', allow='planted'))


@pytest.mark.parametrize('image_size, levels', [(64, 4), (40, 4), (8, 1)])
def test_the_number_of_levels_is_recorded(tmp_path, image_size, levels):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.image_size, config.model.neck.num_levels = image_size, 0
  run = create_run(tmp_path, config, CATEGORIES)
  assert run.config.model.neck.num_levels == levels
  run.save()
  create_run(tmp_path, config, CATEGORIES)  # The same model.


def test_omitting_a_default_is_the_same_model(tmp_path):
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.neck = dict(name='pooling_pyramid', stride=8, num_levels=3)
  config.model.head.norm_per_level = True
  create_run(tmp_path, config, CATEGORIES)
