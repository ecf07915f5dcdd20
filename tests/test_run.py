"""What a workdir says of its run."""

import json

import pytest
from tiny import tiny_config

from ppn_jax.detection.structures import Category
from ppn_jax.errors import InputError
from ppn_jax.run import create_run, open_run

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


def test_checkpoints_without_a_config_are_not_guessed_at(tmp_path):
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


def test_json_keeps_what_it_was_given(tmp_path):
  create_run(tmp_path, tiny_config(), CATEGORIES).save()
  assert json.loads((tmp_path / 'categories.json').read_text()) == [
      {'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}]


def test_a_run_of_before_a_key_existed_opens(tmp_path):
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
