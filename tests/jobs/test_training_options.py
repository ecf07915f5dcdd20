"""Runs with all options of loss and data at once; killed ones end with the same bits."""

import json

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.jobs import train as train_job
from ppn_jax.run import open_run
from ppn_jax.training.train_step import abstract_state


def config_with(resident):
  config = tiny_config().unlock()
  config.loss.update(localization='ciou', label_smoothing=0.1, class_weights={'star': 3.0})
  config.data.repeat_threshold = 1.0
  config.data.transforms = (
      {'name': 'horizontal_flip'}, {'name': 'copy_paste', 'size': 64},
      {'name': 'mosaic', 'size': 64}, {'name': 'mixup', 'size': 64})[::3 if resident else 1]
  config.data.resident.update(enabled=resident, size=64)
  config.optim.update(micro_batches=2, shard_state=True)
  return config.lock()


def final_state(workdir):
  run = open_run(workdir)
  with run.checkpoints(read_only=True) as checkpoints:
    state = checkpoints.restore(
        abstract_state(run.detector(), run.optimizer(), sharding.data_mesh()), 6)
  return jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize('resident', [False, True])
def test_a_killed_run_ends_with_the_same_bits(resident, tmp_path, interrupted_after):
  train_job.train(config_with(resident), tmp_path / 'whole')
  with interrupted_after(4):
    train_job.train(config_with(resident), tmp_path / 'killed')
  train_job.train(config_with(resident), tmp_path / 'killed')
  jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / 'killed'),
               final_state(tmp_path / 'whole'))
  lines = [json.loads(line) for line in (tmp_path / 'whole/metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(line['train/loss']) for line in lines)
  names = [category.name for category in open_run(tmp_path / 'whole').categories]
  assert open_run(tmp_path / 'whole').config.loss.class_weights == tuple(
      3.0 if name == 'star' else 1.0 for name in names)


@pytest.mark.parametrize('change, message', [
    ({'loss.class_weights': {'stars': 2.0}}, "named 'stars'; did you mean 'star'"),
    ({'loss.localization': 'iou'}, "localization='iou' is unknown"),
    ({'loss.label_smoothing': 1.5}, 'label_smoothing=1.5'),
    ({'data.repeat_threshold': -0.5}, 'data.repeat_threshold is -0.5'),
    ({'data.resident.enabled': True, 'data.transforms': ({'name': 'copy_paste', 'size': 64},)},
     "'copy_paste' is not available on the device"),
    ({'data.transforms': ({'name': 'mixup', 'size': 64},), 'data.max_boxes': 4},
     'max_boxes is 4, but 2 images in one can have')])
def test_wrong_options_end_before_anything_is_written(change, message, tmp_path):
  config = tiny_config().unlock()
  for key, value in change.items():
    block, last = key.rsplit('.', 1)
    target = config
    for part in block.split('.'):
      target = target[part]
    target[last] = value
  with pytest.raises(InputError, match=message):
    train_job.train(config.lock(), tmp_path)
  assert not list(tmp_path.iterdir())
