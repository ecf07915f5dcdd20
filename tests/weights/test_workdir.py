"""Starting from the weights of another run, also without its config."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import tiny_config, untrained_run

from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import build_detector, open_run, resolve_classes
from ppn_jax.weights.initial import initial_weights
from ppn_jax.weights.workdir import read_workdir, split_step

SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')  # Of the synthetic data.


@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
  """Returns a run with three classes, two of them in the tiny config, saved at steps 3 and 6."""
  return untrained_run(tmp_path_factory.mktemp('earlier') / 'run', (3, 6), ema_decay=0.9,
                       categories=[Category(i, name) for i, name in enumerate(
                           ('star', 'moon', 'circle'))])


def like(config=None, count=5):
  config = resolve_classes(config or tiny_config(), range(count))
  detector = build_detector(config)
  return jax.eval_shape(lambda: detector.init(jax.random.key(0)))


def saved(workdir, step):
  run = open_run(workdir)
  from ppn_jax.training.train_step import abstract_state
  state = abstract_state(run.detector(), run.optimizer(), sharding.data_mesh())
  with run.checkpoints(read_only=True) as checkpoints:
    return checkpoints.restore(state, step)


def categories(*names):
  return tuple(Category(i, name) for i, name in enumerate(names))


@pytest.mark.parametrize('text, path, step', [
    ('runs/a', 'runs/a', ''), ('runs/a@2000', 'runs/a', '2000'), ('a@best', 'a', 'best'),
    ('gs://b/me@x/run', 'gs://b/me@x/run', ''), ('me@home', 'me@home', ''), ('@3', '@3', '')])
def test_split_step(text, path, step):
  assert split_step(text) == (path, step)


@pytest.mark.slow
@pytest.mark.parametrize('step', ['', '3'])
def test_the_average_of_a_step_without_its_config(earlier, tmp_path, step):
  """The config is not read, so nothing that it names can be imported."""
  shutil.copytree(earlier, tmp_path / 'run')
  (tmp_path / 'run' / 'config.json').unlink()
  found = read_workdir(tmp_path / 'run', step)
  expected = flatten_dict(jax.device_get(saved(earlier, int(step or 6)).average))
  assert found.values.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found.values[path], value)
  assert f'step {step or 6}, moving average' in found.description
  assert [c.name for c in found.categories] == ['star', 'moon', 'circle']


def test_the_best_step(earlier, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(earlier, run)
  with pytest.raises(InputError, match='has been evaluated, so there is no best step; give'):
    read_workdir(run, 'best')
  lines = [{'step': 3, 'AP': 0.2}, {'step': 5, 'AP': 0.9}, {'step': 6, 'AP': 0.1},
           {'step': 6, 'AP': None}, {'step': 6, 'loss': 1.0}]
  (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert 'step 3' in read_workdir(run, 'best').description


def test_a_damaged_newest_step_is_skipped(earlier, tmp_path):
  shutil.copytree(earlier, tmp_path / 'run')
  (tmp_path / 'run/checkpoints/6/_CHECKPOINT_METADATA').write_text('{')
  found = read_workdir(tmp_path / 'run')
  assert 'step 3' in found.description and 'going back to step 3' in found.description
  assert (tmp_path / 'run/checkpoints/6').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('image_size, levels', [(64, 3), (96, 4), (64, 2)])
def test_other_image_sizes_and_levels(earlier, image_size, levels):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.image_size, config.model.neck.num_levels = image_size, levels
  found = initial_weights(like(config), categories(*SHAPES), weights=str(earlier))
  total, missing = (len(flatten_dict(like(config))), 4 * max(levels - 3, 0))
  lines = str(found.report).splitlines()
  assert f'used: {total - missing} of {total} variables, 2 of them in part' in lines[1]
  assert '2 of 5 by name (circle, star); random: square, triangle, cross; unused: moon' in lines[2]
  assert lines[3:] == (['  random: head/norm_3'] if levels == 4 else
                       ['  unused: head/norm_2'] if levels == 2 else [])


def test_another_backbone_gives_what_fits(earlier):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.backbone.last_block = 4
  found = initial_weights(like(config), categories(*SHAPES), backbone=str(earlier))
  assert set(found.variables['params']) == {'backbone'}
  assert 'unused: backbone/conv2d_5, head' in str(found.report)
  config.model.backbone.depth_multiplier = 0.5
  with pytest.raises(InputError, match=r'fits the backbone of this config: backbone/conv2d_0/kernel'
                     r' is \[3, 3, 3, 8\] there and \[3, 3, 3, 16\] here'):
    initial_weights(like(config), categories(*SHAPES), backbone=str(earlier))


@pytest.mark.parametrize('options, message', [
    ({'weights': '{run}@4'}, 'no checkpoint of step 4; there are 3, 6'),
    ({'weights': '{run}', 'backbone': '{run}'}, 'leave one of them out'),
    ({'weights': '/nowhere/x'}, 'init.weights=/nowhere/x: no checkpoint at /nowhere/x; .*or the '
     'workdir of a run'),
    ({'weights': '{empty}'}, 'no checkpoint in this folder; .*or the workdir of a run'),
    ({'weights': '{bare}'}, 'has no checkpoint yet, so it has no weights'),
    ({'backbone': '{bare}'}, 'has no checkpoint yet, so it has no weights'),
    ({'weights': '{unnamed}'}, 'no categories.json, so their classes are unknown'),
    ({'weights': '{odd}'}, 'categories.json cannot be read'),
    ({'weights': '{run}/checkpoints'}, 'inside the workdir .*run; give .*/run'),
    ({'weights': '{run}/checkpoints/3'}, 'inside the workdir .*run; give .*/run@3'),
    ({'backbone': '{run}/config.json'}, 'inside the workdir .*run; give .*/run'),
    ({'weights': 3}, 'init.weights=3 is not a path')])
def test_mistakes(earlier, tmp_path, options, message):
  for name in ('empty', 'bare/checkpoints', 'unnamed/checkpoints', 'odd/checkpoints'):
    (tmp_path / name).mkdir(parents=True)
  shutil.copy(earlier / 'categories.json', tmp_path / 'bare')
  (tmp_path / 'odd/categories.json').write_text('[3]')
  options = {key: value.format(run=earlier, **{p.name: p for p in tmp_path.iterdir()})
             if isinstance(value, str) else value for key, value in options.items()}
  with pytest.raises(InputError, match=message) as error:
    initial_weights(like(), categories(*SHAPES), **options)
  assert '\n' not in str(error.value)


def test_training_starts_from_a_run_and_records_it(earlier, tmp_path, steps_not_taken, log_lines):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.init.weights, config.optim.ema_decay = str(earlier), 0.9
  train_job.train(config.lock(), tmp_path / 'run')
  printed = '\n'.join(log_lines)
  assert f'starting from {earlier}: a run of 3 classes, step 6, moving average' in printed
  init = json.loads((tmp_path / 'run/config.json').read_text())['init']
  assert init['weights'] == str(earlier) and len(init['report']) <= 5
  assert init['report'][0] in printed and 'circle, star' in init['report'][2]
  old, state = saved(earlier, 6).average, steps_not_taken[0]
  for new in (state.variables, state.average):
    np.testing.assert_array_equal(new['params']['backbone']['conv2d_5']['pointwise']['kernel'],
                                  old['params']['backbone']['conv2d_5']['pointwise']['kernel'])
    np.testing.assert_array_equal(new['batch_stats']['head']['norm_1']['var'],
                                  old['batch_stats']['head']['norm_1']['var'])
    ours = new['params']['head']['class_kernel'].reshape(16, 6, 5)
    theirs = np.asarray(old['params']['head']['class_kernel']).reshape(16, 6, 3)
    np.testing.assert_array_equal(ours[..., [0, 3]], theirs[..., [2, 0]])
    assert not np.isin(ours[..., [1, 2, 4]], theirs).any()


def test_an_unknown_path_ends_before_anything_is_written(tmp_path):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.init.weights = str(tmp_path / 'typo')
  with pytest.raises(InputError, match=r'typo'):
    train_job.train(config.lock(), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
