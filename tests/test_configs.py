"""Every file in configs/ builds, and its train step has the right shapes."""

import pathlib

import jax
import pytest

from ppn_jax.config import plain
from ppn_jax.config_files import load_config
from ppn_jax.data.transforms.basic import build_transforms
from ppn_jax.detection.structures import Category
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.errors import InputError
from ppn_jax.run import Run, build_detector, resolve_classes
from ppn_jax.training.train_step import abstract_batch, abstract_state, train_step

FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('[!_]*.py'))


def test_there_are_configs():
  assert {'quickstart.py', 'own_data.py', 'ppn_mobilenet_v1_coco.py'} <= {f.name for f in FILES}


# Configs that always run; the others are the same at 300 px.
ALWAYS = ('quickstart', 'quickstart_ssd')


@pytest.mark.parametrize('file', [
    pytest.param(f, id=f.stem, marks=() if f.stem in ALWAYS else pytest.mark.slow) for f in FILES])
def test_builds_and_shape_evaluates_a_step(file, tmp_path):
  config = load_config(str(file), [])
  assert config.is_locked
  categories = [Category(i, f'class {i}') for i in range(1, 8)]
  config = resolve_classes(config, categories)
  run = Run(tmp_path, config, tuple(categories))
  detector, optimizer, mesh = build_detector(config), run.optimizer(), data_mesh()
  build_transforms(config.data.transforms)
  state = abstract_state(detector, optimizer, mesh)
  batch = abstract_batch(2, detector.image_size, 8, mesh)
  after, metrics = jax.eval_shape(
      lambda *arguments: train_step(detector, optimizer, *arguments), state, *batch)
  # A step must return what it takes, so that its state can be donated and looped.
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
  assert jax.tree.all(same)
  assert all(m.shape == () for m in metrics)


# All differences of each baseline from the config that it is compared with.
SSD = {
    'model.anchors.min_scale': 0.2, 'model.anchors.reduce_lowest_level': True,
    'model.backbone.last_block': 13,
    'model.head': {'name': 'per_level_box_predictor', 'side': 1, 'prior': 0.01},
    'model.neck': {'name': 'conv_pyramid', 'strides': (16, 32), 'depths': (512, 256, 256, 128)}}
REFERENCE = {
    'data.resize': 'legacy',
    'data.transforms': ({'name': 'horizontal_flip', 'probability': 0.5},
                        {'name': 'ssd_random_crop'}),
    'loss.alpha': 0.75, 'matching.ignore_crowd': False, 'model.background_column': True,
    'model.layers.dtype': 'float32'}
DIFFERENCES = [
    ('ssd_mobilenet_v1_coco', 'ppn_mobilenet_v1_coco', SSD),
    ('fpn_mobilenet_v1_coco', 'ppn_mobilenet_v1_coco', {
        'model.backbone.last_block': 13,
        'model.neck': {'name': 'feature_pyramid', 'strides': (16, 32), 'num_levels': 6,
                       'depth': 256}}),
    ('ppn_mobilenet_v1_coco_reference', 'ppn_mobilenet_v1_coco', REFERENCE | {
        'loss.localization_weight': 1.5, 'model.layers.kernel_stddev': 0.01}),
    ('ssd_mobilenet_v1_coco_reference', 'ssd_mobilenet_v1_coco', REFERENCE | {
        'model.layers.kernel_stddev': 0.03, 'optim.learning_rate': 0.9,
        'optim.rate_batch_size': 1024, 'optim.warmup_fraction': 0.05,
        'optim.warmup_factor': 0.3 / 0.9, 'train.batch_size': 1024, 'train.steps': 20_000}),
    ('ssd_mobilenet_v2_coco_reference', 'ssd_mobilenet_v1_coco_reference', {
        'model.backbone': {'name': 'mobilenet_v2', 'depth_multiplier': 1.0, 'last_stride': 32},
        'optim.learning_rate': 0.08, 'optim.rate_batch_size': 512, 'optim.warmup_fraction': 0.04,
        'optim.warmup_factor': 0.013333 / 0.08, 'train.batch_size': 512, 'train.steps': 50_000}),
    ('ssd_mobilenet_v1_coco_mined', 'ssd_mobilenet_v1_coco', {
        'loss': {'name': 'hard_negative_mining', 'negatives_per_positive': 3.0, 'group_size': 0,
                 'localization_weight': 1.0},
        'model.background_column': True, 'model.head.prior': 0.5,
        'model.score_activation': 'softmax', 'optim.learning_rate': 0.07,
        'optim.warmup_factor': 0.01 / 0.07}),
    ('quickstart_ssd', 'quickstart', {
        **{key: value for key, value in SSD.items() if key != 'model.backbone.last_block'},
        'model.neck': {'name': 'conv_pyramid', 'strides': (16,), 'depths': (256, 128, 128)}})]


def differences(config, base, prefix=''):
  """Returns {dotted key: value in `config`} of all differences; other components are whole."""
  found = {}
  for key in base.keys() | config.keys():
    ours, theirs = config.get(key), base.get(key)
    both = isinstance(ours, dict) and isinstance(theirs, dict)
    if both and ours.get('name') == theirs.get('name'):
      found |= differences(ours, theirs, f'{prefix}{key}.')
    elif ours != theirs:
      found[prefix + key] = ours
  return found


@pytest.mark.parametrize('name, base, expected', DIFFERENCES, ids=[d[0] for d in DIFFERENCES])
def test_a_baseline_is_a_named_difference(name, base, expected):
  config, base = (load_config(str(FILES[0].parent / f'{file}.py'), []).to_dict()
                  for file in (name, base))
  assert differences(config, base) == expected


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_says_how_to_use_it(file):
  assert f'--config={file.stem}' in file.read_text().split('"""')[1]


def test_the_config_for_pods_takes_statistics_by_groups_and_changes_nothing_else():
  whole, grouped = (plain(load_config(f'ppn_mobilenet_v1_coco{v}')) for v in ('', ':groups=32'))
  assert grouped['model']['layers'].pop('norm_group_size') == 32
  assert grouped['loss'].pop('group_size') == 32
  assert whole['model']['layers'].pop('norm_group_size') == whole['loss'].pop('group_size') == 0
  assert whole == grouped
  for wrong in ('groups=0', 'groups=33', 'pod'):
    with pytest.raises(InputError, match='legal: groups=N'):
      load_config(f'ppn_mobilenet_v1_coco:{wrong}')
