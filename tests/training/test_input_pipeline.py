"""The input pipeline: cached images give the same run as decoded ones."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.errors import InputError
from ppn_jax.jobs.train import train
from ppn_jax.run import open_run
from ppn_jax.training.train_step import abstract_state


def trained(workdir, cache='', **options):
  """Returns parameters after a tiny run with a cache and these entries of data.train."""
  config = tiny_config()
  with config.unlocked():
    config.data.cache.where = cache
    config.data.train.update(options)
  train(config, workdir)
  run = open_run(workdir)
  with run.checkpoints(read_only=True) as checkpoints:
    like = abstract_state(run.detector(), run.optimizer(), data_mesh())
    return jax.tree.leaves(checkpoints.restore(like, checkpoints.latest()).variables)


@pytest.mark.slow
def test_cached_images_train_to_the_same_bits(tmp_path):
  plain = trained(tmp_path / 'plain')
  for name, where in (('memory', 'memory'), ('folder', str(tmp_path / 'cache')),
                      ('again', str(tmp_path / 'cache'))):
    for a, b in zip(plain, trained(tmp_path / name, cache=where), strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_cache_of_other_images_is_refused_before_anything_is_written(tmp_path):
  trained(tmp_path / 'a', cache=str(tmp_path / 'cache'))
  with pytest.raises(InputError, match='holds a cache of something else'):
    trained(tmp_path / 'b', cache=str(tmp_path / 'cache'), num_images=11)
  assert not (tmp_path / 'b').exists()
