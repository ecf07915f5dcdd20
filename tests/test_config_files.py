"""Tests config files and overrides from the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from ppn_jax import config_values, registry
from ppn_jax.config import (
  COMPONENTS,
  FUNCTIONS,
  GIVEN,
  MAPPINGS,
  base_config,
  complete,
  component_table,
  plain,
)
from ppn_jax.config_files import config_names, load_config, override
from ppn_jax.errors import InputError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
CONFIG = """
from ppn_jax.config import base_config
def get_config():
  config = base_config()
  config.seed = 3
  {line}
  return config
"""


def from_file(tmp_path, line='pass', overrides=()):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG.format(line=line))
  return load_config(str(path), [f'--config.{entry}' for entry in overrides])


def entry(config, key):
  for part in key.split('.'):
    config = config[int(part)] if part.isdecimal() else config[part]
  return config


def test_an_image_size_is_one_number_or_two(tmp_path):
  config = from_file(tmp_path, 'config.model.image_size = (240, 320)')
  assert config.model.image_size == (240, 320)
  assert json.loads(json.dumps(plain(config)))['model']['image_size'] == [240, 320]
  assert complete({'model': {'image_size': [240, 320]}}).model.image_size == (240, 320)
  assert complete({'model': {'image_size': [240, 240]}}).model.image_size == 240
  for wrong in ((1, 2, 3), (True, 3), (2.5, 3), 'a', 2.5):
    with pytest.raises(InputError, match=r'config\.model\.image_size='):
      complete({'model': {'image_size': wrong}})


@pytest.mark.parametrize('entries, key, value', [
    (['train.steps=5'], 'train.steps', 5),
    (['train.steps=5', 'train.steps=6'], 'train.steps', 6),
    (['optim.learning_rate=1'], 'optim.learning_rate', 1.0),
    (['model.layers.dtype=a=b'], 'model.layers.dtype', 'a=b'),
    (['matching.force_match=false'], 'matching.force_match', False),
    # The type of a key whose default is None.
    (['model.layers.kernel_stddev=0.01'], 'model.layers.kernel_stddev', 0.01),
    (['model.layers.kernel_stddev=None'], 'model.layers.kernel_stddev', None),
    # Several values.
    (['model.anchors.aspect_ratios=1,2'], 'model.anchors.aspect_ratios', (1.0, 2.0)),
    (['model.anchors.aspect_ratios=(1, .5)'], 'model.anchors.aspect_ratios', (1.0, .5)),
    (['data.train.name=coco_json', 'data.train.images=a,b'], 'data.train.images', ('a', 'b')),
    (['data.train.name=coco_json', "data.train.images=['a, b']"], 'data.train.images', ('a, b',)),
    (['data.train.name=coco_json', 'data.train.images=a'], 'data.train.images', 'a'),
    # Options that the config does not list.
    (['data.train.name=yolo_txt', 'data.train.images=a'], 'data.train.images', 'a'),
    (['data.train.name=yolo_txt', "data.train.names={0: 'cat', 2: 'dog'}"], 'data.train.names',
     {0: 'cat', 2: 'dog'}),
    (['data.eval.name=pascal_voc', 'data.eval.check_size=false'], 'data.eval.check_size', False),
    (['data.eval.check_size=0', 'data.eval.name=pascal_voc'], 'data.eval.check_size', False),
    (['data.train.name=synthetic_shapes', 'data.train.image_size=48,64'], 'data.train.image_size',
     (48, 64)),
    (['data.train.name=synthetic_shapes', 'data.train.image_size=48'], 'data.train.image_size', 48),
    (['data.cache.where=memory'], 'data.cache.where', 'memory'),
    (['model.image_size=48,64'], 'model.image_size', (48, 64)),
    (['model.image_size=(48, 64)'], 'model.image_size', (48, 64)),
    (['model.image_size=48,48'], 'model.image_size', 48),
    (['model.image_size=48'], 'model.image_size', 48),
    # Keys of earlier versions.
    (['data.train.name=tfds', 'data.train.cache=memory'], 'data.cache.where', 'memory'),
    (['data.train.cache=memory', 'data.train.cache_size=400'], 'data.cache',
     {'where': 'memory', 'size': 400}),
    (['data.train.resident=True', 'data.train.resident_size=64'], 'data.resident',
     {'enabled': True, 'size': 64}),
    (['data.train.resident=True', 'data.resident.enabled=0'], 'data.resident.enabled', False),
    (["data.train=dict(name='tfds', cache='memory')"], 'data.train', {'name': 'tfds'}),
    (["data.train=dict(name='tfds', cache='memory')"], 'data.cache',
     {'where': 'memory', 'size': 0}),
    # Blocks.
    (['data.transforms=horizontal_flip,photometric_distortion'], 'data.transforms',
     ({'name': 'horizontal_flip'}, {'name': 'photometric_distortion'})),
    (['data.transforms=()'], 'data.transforms', ()),
    (["data.transforms=(dict(name='horizontal_flip', probability=.2),)"], 'data.transforms',
     ({'name': 'horizontal_flip', 'probability': .2},)),
    (['data.transforms.1.probability=0.25'], 'data.transforms.1',
     {'name': 'horizontal_flip', 'probability': .25}),
    (['data.transforms.0.keep_probability=1'], 'data.transforms.0',
     {'name': 'ssd_random_crop', 'keep_probability': 1.0}),
    (["model.neck={'name': 'conv_pyramid', 'depths': (64,)}"], 'model.neck',
     {'name': 'conv_pyramid', 'depths': (64,)}),
    # Another component takes none of the options of the previous one.
    (['model.neck.depths=64,32', 'model.neck.name=conv_pyramid'], 'model.neck',
     {'name': 'conv_pyramid', 'depths': (64, 32)}),
    (['model.neck.name=pooling_pyramid', 'model.neck.stride=8'], 'model.neck',
     {'name': 'pooling_pyramid', 'stride': 8, 'num_levels': 6, 'projection': 0}),
    (['data.train.name=coco_json'], 'data.train', {'name': 'coco_json'}),
])
def test_overrides(entries, key, value):
  config = override(base_config(), [f'--config.{e}' for e in entries])
  found = entry(config, key)
  found = found.to_dict() if hasattr(found, 'to_dict') else found
  assert found == value and type(found) is type(value)
  assert config.is_locked


@pytest.mark.parametrize('argument, message', [
    ('train.stps=5', "unknown config key config.train.stps; did you mean 'steps'"),
    ('trian.steps=5', "unknown config key config.trian; did you mean 'train'"),
    ('train.steps.more=5', 'unknown config key config.train.steps.more'),
    ('train.steps=five', '--config.train.steps=five: it must be a whole number'),
    ('train.steps=5.5', '--config.train.steps=5.5: it must be a whole number'),
    ('matching.force_match=perhaps', 'force_match=perhaps: it must be true or false'),
    ('train=3', '--config.train=3: it is a block'),
    ('model.layers.kernel_stddev=x', 'kernel_stddev=x: it must be a number or None'),
    ('model.anchors.aspect_ratios=1,x', 'each a number'),
    ('model.neck.num_level=3', "did you mean 'num_levels'"),
    ('model.neck.policy=3', 'unknown config key config.model.neck.policy'),
    ('model.neck.name=conv_pyramyd', "unknown config key|did you mean 'conv_pyramid'"),
    ('data.train.images=a', 'config.data.train names no component that could take .images.'),
    ('data.transforms.2.name=horizontal_flip', 'has 2 entries, numbered from 0'),
    ('data.transforms.1.probabilty=1', "did you mean 'probability'"),
    ("data.transforms=(dict(name=open('x')),)", 'it must be'),
    ('data.eval_fraction=1.5', 'data.eval_fraction is 1.5, legal: 0 to 1')])
def test_a_wrong_override_is_named(argument, message):
  with pytest.raises(InputError, match=message):
    config = override(base_config(), [f'--config.{argument}'])
    # Names of model components are looked up with their options, or when the model is built.
    registry.resolve('neck', config.model.neck.name, registry.load('', COMPONENTS['model.neck']))


def test_a_path_with_a_comma_that_exists_is_one(tmp_path):
  folder = tmp_path / 'Oslo, 2020'
  folder.mkdir()
  assert config_values.parse(str(folder), str | tuple[str, ...]) == str(folder)


@pytest.mark.parametrize('text, kind, value', [
    ('3', int | None, 3), ('none', int | None, None), ('1e-3', float, 1e-3), ('-2', int, -2),
    ('', tuple[str, ...], ()), ('a,', tuple[str, ...], ('a',)), ('None', str, 'None'),
    ("('a')", tuple[str, ...], ('a',)), ('(a', str | tuple[str, ...], '(a')])
def test_values(text, kind, value):
  assert config_values.parse(text, kind) == value


@pytest.mark.parametrize('text', ["__import__('os')", '[x for x in ()]', 'dict(**{})', '1 + 1', '(',
                                  'lambda: 0', "f'{1}'"])
def test_literals_compute_nothing(text):
  with pytest.raises(ValueError, match='literal'):
    config_values.literal(text)


def test_an_override_leaves_the_original_alone():
  config = complete(base_config())
  assert override(config, ['--config.train.steps=9']).train.steps == 9
  assert config.train.steps == 0


@pytest.mark.parametrize('content, message', [
    (None, 'no file'), ('x = 1', 'get_config'), ('def get_config(', 'cannot be loaded'),
    ('def get_config(): return 1 / 0', 'division by zero')])
def test_files_that_are_not_configs(tmp_path, content, message):
  path = tmp_path / 'config.py'
  if content is not None:
    path.write_text(content)
  with pytest.raises(InputError, match=message):
    load_config(str(path), [])


def test_a_config_imports_its_neighbours_and_no_other_folders(tmp_path):
  for seed, name in enumerate(('a', 'b')):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'common.py').write_text(CONFIG.format(line=f'config.seed = {seed}'))
    (folder / 'config.py').write_text('from common import get_config\n')
  assert [load_config(str(tmp_path / name / 'config.py'), []).seed for name in 'ab'] == [0, 1]


@pytest.mark.parametrize('name', ['quickstart', str(CONFIGS / 'quickstart.py')])
def test_a_bundled_config_goes_by_its_name_anywhere(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config(name, ['train.steps=7', '--config.seed=2']).train.steps == 7
  assert 'own_data' in config_names() and '__init__' not in config_names()


def test_a_file_may_import_bundled_configs(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from ppn_jax.configs import own_data\n'
      'def get_config():\n'
      "  config = own_data.get_config('pascal_voc').unlock()\n"
      "  config.data.train.folder = 'here'\n"
      '  return config.lock()\n')
  train = load_config(tmp_path / 'mine.py').data.train
  assert (train.name, train.folder) == ('pascal_voc', 'here')


def test_bundled_configs_are_found_in_a_clone_on_the_path(tmp_path):
  code = ('from ppn_jax.config_files import load_config\n'
          "print(load_config('quickstart_ssd').model.neck.name)\n"
          'import ppn_jax.configs.quickstart\n'
          'print(ppn_jax.configs.quickstart.__file__)')
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(CONFIGS.parent)}, check=True)
  assert done.stdout.split() == ['conv_pyramid', str(CONFIGS / 'quickstart.py')]


def test_an_argument_goes_to_the_config(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from ppn_jax.config import base_config\n'
      "def get_config(seed='1'):\n"
      '  config = base_config()\n'
      '  config.seed = int(seed)\n'
      '  return config\n')
  assert [load_config(f'{tmp_path}/mine.py{end}').seed for end in ('', ':5')] == [1, 5]


@pytest.mark.parametrize('data_format', ['coco_json', 'pascal_voc', 'yolo_txt', 'tfds'])
def test_formats_of_own_data_also_have_names_of_their_own(data_format):
  config = load_config(f'own_data:{data_format}')
  assert config.data.train.name == config.data.eval.name == data_format
  assert load_config(data_format).to_dict() == config.to_dict()
  build_source = registry.load('data.train', COMPONENTS['data.train'])
  options = registry.options_of(registry.resolve('data.train', data_format, build_source))
  assert {*config.data.eval} - {'name'} <= {*options.types}


@pytest.mark.parametrize('name, message', [
    ('own_data:coco', "=own_data:coco: unknown data format 'coco'; did you mean 'coco_json'"),
    ('quikstart', "no config is named 'quikstart'; did you mean 'quickstart'"),
    ('configs_of_mine/quickstart.py', '--config=quickstart is one that comes with the package'),
    ('quickstart:3', '--config=quickstart:3: .* cannot be loaded: get_config.. takes 0')])
def test_a_wrong_name_or_argument_is_named(name, message):
  with pytest.raises(InputError, match=message):
    load_config(name)


def test_loading_leaves_no_module_of_the_file_behind(tmp_path):
  path, modules = list(sys.path), set(sys.modules)
  from_file(tmp_path)
  assert sys.path == path and 'ppn_config_file' not in sys.modules
  assert not [name for name in set(sys.modules) - modules
              if str(tmp_path) in (getattr(sys.modules[name], '__file__', None) or '')]


# What a config file may leave out, and what it must not contain.


@pytest.mark.parametrize('line, expected', [
    ('config.train = dict(steps=2, batch_size=4)',
     {'train.steps': 2, 'train.keep_last': 3, 'train.on_save_error': 'continue'}),
    ('config.optim = dict(learning_rate=.7)',
     {'optim.rate_batch_size': 512, 'optim.warmup_factor': .1333 / .7}),
    ('config.model.layers = dict(dtype="bfloat16")', {'model.layers.norm_decay': .97}),
    ('config.optim = dict(momentum=.5)',
     {'optim.optimizer.momentum': .5, 'optim.optimizer.name': 'sgd'}),
    ('config.optim.momentum = .5; config.optim.rate_scale["head/*"] = 2.0',
     {'optim.optimizer.momentum': .5}),
    ('config.loss = dict(alpha=.5)', {'loss.name': 'focal', 'loss.gamma': 2.0}),
    ('config.model.head = dict(depth=64)', {'model.head.name': 'shared_box_predictor'}),
    ('config.data = dict(train=dict(name="tfds", dataset="a"))',
     {'data.cache.where': '', 'data.train.dataset': 'a', 'data.resize': 'supersample'}),
    ('config.data.train = dict(name="tfds", dataset="a", cache="memory", resident_size=9)',
     {'data.cache.where': 'memory', 'data.resident.size': 9, 'data.train.dataset': 'a'}),
    ('config = dict(seed=3)', {'seed': 3, 'train.keep_best': 1})])
def test_what_a_file_leaves_out_has_its_default(tmp_path, line, expected):
  if line.startswith('config = '):
    line = f'from ml_collections import ConfigDict; config = ConfigDict({line[9:]})'
  config = from_file(tmp_path, line)
  assert {key: entry(config, key) for key in expected} == expected


@pytest.mark.parametrize('line, message', [
    ('config.train.checkpont_every = 1', "config.train.checkpont_every; did you mean 'checkpoint"),
    ('config.optim_ = dict(learning_rate=1)', "config.optim_; did you mean 'optim'"),
    ('config.data.transform = ()', "config.data.transform; did you mean 'transforms'"),
    ('config.eval.batchsize = 1', "config.eval.batchsize; did you mean 'batch_size'"),
    ('config.model.layers.dtyp = "float32"', "config.model.layers.dtyp; did you mean 'dtype'"),
    ('config.train = dict(step=1)', "config.train.step; did you mean 'steps'"),
    ('config.data.train = dict(name="tfds", datset="a")', "no option 'datset'; did you mean"),
    ('config.data.eval = dict(name="coco_json", image="a")', "no option 'image'; did you mean"),
    ('config.data.eval = dict(name="cocojson")', "did you mean 'coco_json'"),
    ('config.train = dict(steps="2")', "config.train.steps='2' must be a whole number"),
    ('config.train = dict(steps=2.5)', 'config.train.steps=2.5 must be a whole number'),
    ('config.data.train.cache = 3', "config.data.cache.where=3 must be text"),
    ('config.data.train.cache = "a"; config.data.cache.where = "b"', 'give one of the two'),
    ('config.data = 3', 'cannot be loaded|config.data=3 must be a block')])
def test_a_wrong_entry_of_a_file_is_named(tmp_path, line, message):
  with pytest.raises(InputError, match=message):
    from_file(tmp_path, line)


def test_completing_twice_changes_nothing():
  once = complete(base_config())
  assert complete(once).to_dict() == once.to_dict()


@pytest.mark.parametrize('path', [
    *FUNCTIONS, *(path for path in COMPONENTS if not path.startswith('data.')),
    'data.transforms.0', 'data.transforms.1'])
def test_the_base_config_has_the_defaults_of_the_signatures(path):
  block = plain(entry(complete(base_config()), path))
  table = component_table(path)
  function = (registry.resolve(path, block.pop('name'), registry.load(path, table)) if table
              else registry.load(path, FUNCTIONS[path]))
  options = registry.options_of(function, given=GIVEN if table else ())
  if path == 'model.layers':
    block['dtype'] = getattr(__import__('jax').numpy, block['dtype'])
  assert {key: block[key] for key in options.defaults if key in block} == {
      key: value for key, value in options.defaults.items() if key in block}
  values_here = {key for key, value in block.items() if not isinstance(value, dict)}
  assert values_here <= set(options.types)


def test_every_block_is_known():
  blocks = [path for path, value in _entries(base_config()) if isinstance(value, ConfigDict)]
  assert {'model.neck', 'data.cache', 'data.resident'} <= set(blocks)
  # These are read by several functions, or by none that has all of them as arguments.
  assert set(blocks) - {*FUNCTIONS, *COMPONENTS, *MAPPINGS} == {
      'data', 'data.resident', 'train', 'eval'}


def _entries(block, prefix=''):
  for key, value in block.items():
    yield prefix + key, value
    if isinstance(value, ConfigDict):
      yield from _entries(value, f'{prefix}{key}.')


def _remove_later_keys(now, written, base):
  """Removes the keys that `written` lacks, which must have the defaults of `base`."""
  for key in list(now):
    if key not in written:
      assert now.pop(key) == base[key], key
    elif isinstance(now[key], dict) and isinstance(base.get(key), dict):
      _remove_later_keys(now[key], written[key], base[key])


def test_a_config_json_of_0_1_means_the_same():
  path = CONFIGS.parent / 'tests' / 'data' / 'config_of_0_1.json'
  written, unknown = json.loads(path.read_text()), []
  config = complete(written, unknown=unknown)
  assert not unknown
  held = {key: written['data']['train'].pop(key) for key in (
      'cache', 'cache_size', 'resident', 'resident_size')}
  assert config.data.cache.to_dict() == {'where': held['cache'], 'size': held['cache_size']}
  assert config.data.resident.to_dict() == {
      'enabled': held['resident'], 'size': held['resident_size']}
  assert (held['cache'], held['cache_size'], held['resident_size']) == ('~/cache', 320, 256)
  # All other keys are as they were written; keys that came later have their defaults.
  now, base = (json.loads(json.dumps(c.to_dict())) for c in (config, base_config()))
  for tree in (now, base):
    del tree['data']['cache'], tree['data']['resident']
  assert now['optim']['optimizer'] == {
      'name': 'sgd', 'momentum': written['optim'].pop('momentum'), 'nesterov': False}
  del now['optim']['optimizer']
  _remove_later_keys(now, written, base)
  assert now == written


def test_a_config_file_may_load_another(tmp_path):
  (tmp_path / 'mine.py').write_text(
      'from ppn_jax.config_files import load_config\n'
      'def get_config():\n'
      "  config = load_config('own_data:pascal_voc').copy_and_resolve_references().unlock()\n"
      '  config.train.steps = 7\n'
      '  return config\n')
  config = load_config(tmp_path / 'mine.py')
  assert (config.train.steps, config.data.train.name) == (7, 'pascal_voc')


# Blocks of the optimizer.


@pytest.mark.parametrize('entries, expected', [
    (['optim.momentum=0.5'], {'optim.optimizer.momentum': .5, 'optim.optimizer.name': 'sgd'}),
    (['optim.optimizer.name=rmsprop', 'optim.momentum=0.5', 'optim.optimizer.epsilon=0.1'],
     {'optim.optimizer': {'name': 'rmsprop', 'momentum': .5, 'epsilon': .1}}),
    (['optim.optimizer.name=optax:lion', 'optim.optimizer.b2=0.95'],
     {'optim.optimizer': {'name': 'optax:lion', 'b2': .95}}),
    (["optim.schedule=dict(name='step', boundaries=(0.5,))"],
     {'optim.schedule': {'name': 'step', 'boundaries': (.5,)}}),
    (["optim.rate_scale={'backbone/*': 1, '*/bias': 0.5}"],
     {'optim.rate_scale': {'backbone/*': 1.0, '*/bias': .5}}),
    (['optim.rate_scale.head=2', 'optim.freeze=backbone/conv2d_[0-5],neck'],
     {'optim.rate_scale': {'head': 2.0}, 'optim.freeze': ('backbone/conv2d_[0-5]', 'neck')})])
def test_the_optimizer_on_the_command_line(entries, expected):
  config = override(base_config(), [f'--config.{text}' for text in entries])
  assert {key: plain(entry(config, key)) for key in expected} == expected


@pytest.mark.parametrize('text, message', [
    ("optim.rate_scale={'head': 'much'}", r"optim.rate_scale\['head'\]='much' must be a number"),
    ("optim.rate_scale={'head.kernel': 2}", r"\['head.kernel'\] has a '.', which no param"),
    ('optim.learning_rate=inf', 'config.optim.learning_rate=inf must be a finite number'),
    ('train.minutes=nan', 'config.train.minutes=nan must be a finite number'),
    ('optim.rate_scale.head=much', 'optim.rate_scale.head=much: it must be a number'),
    ('optim.rate_scale=0.1', 'it is a block'),
    ('optim.optimizer.momentm=0.1', "momentm; did you mean 'momentum'"),
    ('optim.optimizer.learning_rate=1', 'unknown config key config.optim.optimizer.learning_rate'),
    ('optim.schedule.name=cosin', "did you mean 'cosine'")])
def test_wrong_entries_of_the_optimizer_are_named(text, message):
  with pytest.raises(InputError, match=message):
    build(override(base_config(), [f'--config.{text}']))


def build(config):
  from ppn_jax.run import optimizer_of
  return optimizer_of(config, steps=10, batch_size=1)


# The learning rate at step 0.


@pytest.mark.parametrize('rate, first', [(.7, .1333), (.1, .01), (.15, .01), (.9, .3), (.07, .01)])
def test_an_absolute_warm_up_rate_becomes_a_factor_and_stays_the_same(tmp_path, rate, first):
  optim = from_file(tmp_path, f'config.optim.update(learning_rate={rate}, '
                              f'warmup_learning_rate={first})').optim
  assert 'warmup_learning_rate' not in optim
  assert optim.learning_rate * optim.warmup_factor == first


@pytest.mark.parametrize('file, rates', [
    ('ppn_mobilenet_v1_coco', (.7, .1333)), ('ssd_mobilenet_v1_coco_reference', (.9, .3)),
    ('ssd_mobilenet_v1_coco_mined', (.07, .01)), ('quickstart', (.15, .01)),
    ('own_data', (1e-3, 1e-4))])
def test_the_warm_up_follows_the_rate(file, rates):
  path = str(CONFIGS / f'{file}.py')
  optim = load_config(path, []).optim
  assert (optim.learning_rate, np.float32(optim.learning_rate * optim.warmup_factor)) == (
      rates[0], np.float32(rates[1]))
  lower = load_config(path, ['--config.optim.learning_rate=0.01']).optim
  assert lower.warmup_factor == optim.warmup_factor < 1


def test_an_absolute_warm_up_rate_on_the_command_line():
  optim = override(base_config(), ['--config.optim.warmup_learning_rate=0.02',
                                   '--config.optim.learning_rate=0.1']).optim
  assert optim.learning_rate * optim.warmup_factor == pytest.approx(.02)
  with pytest.raises(InputError, match='give one of the two'):
    override(base_config(), ['--config.optim.warmup_learning_rate=0.02',
                             '--config.optim.warmup_factor=0.1'])
