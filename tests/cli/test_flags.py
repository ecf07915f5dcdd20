"""Config files and overrides from the command line."""

import pytest

from ppn_jax.cli.flags import load_config, override
from ppn_jax.errors import InputError

CONFIG = """
import ml_collections
def get_config():
  config = ml_collections.ConfigDict()
  config.train = dict(steps=3, rate=.1, name='x', flag=True, ops=(dict(name='flip'),))
  return config
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return str(path)


def test_overrides_by_type(config_file):
  config = load_config(config_file, [
      '--config.train.steps=5', '--config.train.rate=1', '--config.train.flag=false',
      '--config.train.name=a=b', '--config.train.ops=({"name":"crop"},)'])
  assert config.train.to_dict() == {'steps': 5, 'rate': 1.0, 'flag': False, 'name': 'a=b',
                                    'ops': ({'name': 'crop'},)}
  assert config.is_locked


@pytest.mark.parametrize('argument, said', [
    ('--config.train.stps=5', "unknown config key config.train.stps; did you mean 'steps'"),
    ('--config.trian.steps=5', "unknown config key config.trian; did you mean 'train'"),
    ('--config.train.steps.more=5', 'unknown config key config.train.steps.more'),
    ('--config.train.steps=five', 'config.train.steps=five'),
    ('--config.train.steps=5.5', 'config.train.steps=5.5'),
    ('--config.train.flag=perhaps', 'config.train.flag=perhaps'),
    ('--config.train=3', 'config.train=3')])
def test_a_wrong_override_is_named(config_file, argument, said):
  with pytest.raises(InputError) as error:
    load_config(config_file, [argument])
  assert said in str(error.value)


def test_an_override_leaves_the_original_alone(config_file):
  config = load_config(config_file, [])
  assert override(config, ['--config.train.steps=9']).train.steps == 9
  assert config.train.steps == 3


@pytest.mark.parametrize('content, said', [
    (None, 'no file'), ('x = 1', 'get_config'), ('def get_config(', 'cannot be loaded'),
    ('def get_config(): return 1 / 0', 'division by zero')])
def test_files_that_are_no_configs(tmp_path, content, said):
  path = tmp_path / 'config.py'
  if content is not None:
    path.write_text(content)
  with pytest.raises(InputError, match=said):
    load_config(str(path), [])


def test_a_config_imports_its_neighbours_and_no_other_folders(tmp_path):
  for name in ('a', 'b'):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'common.py').write_text(CONFIG.replace("name='x'", f"name={name!r}"))
    (folder / 'config.py').write_text('from common import get_config\n')
  names = [load_config(str(tmp_path / name / 'config.py'), []).train.name for name in 'ab']
  assert names == ['a', 'b']
