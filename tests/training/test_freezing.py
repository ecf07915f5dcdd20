"""Frozen parameters: bits, batch norm, state and cost."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import tiny_config

from ppn_jax.detection.structures import GroundTruth
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.errors import InputError
from ppn_jax.models.layers import ConvNorm
from ppn_jax.run import build_detector, optimizer_of
from ppn_jax.training.parameter_paths import frozen_modules, matches
from ppn_jax.training.train_step import (
  abstract_batch,
  abstract_state,
  jit_init,
  jit_train_step,
  train_step,
)

BLOCKS = ('backbone/conv2d_[0-2]',)


def config_of(*, dtype='float32', norm='batch', **optim):
  config = tiny_config().copy_and_resolve_references().unlock()
  config.model.num_classes = 5
  config.model.layers.dtype, config.model.layers.norm = dtype, norm
  config.optim.learning_rate = 0.5  # So that everything that is trained has moved after 3 steps.
  for key, value in optim.items():
    config.optim[key] = value
  return config.lock()


def batch_of(count):
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(0, 1, (count, 3, 2, 2)), axis=2).reshape(count, 3, 4)
  return rng.integers(0, 256, (count, 64, 64, 3), np.uint8), GroundTruth(
      corners.astype(np.float32), rng.integers(0, 5, (count, 3)).astype(np.int32),
      np.zeros((count, 3), bool), np.ones((count, 3), bool))


def states(config, *, batch_size=6, count=3):
  """Returns the states before and after a few steps, on the host, and the last metrics."""
  detector, mesh = build_detector(config), data_mesh()
  optimizer = optimizer_of(config, steps=10, batch_size=batch_size)
  state = jit_init(detector, optimizer, mesh)(0)
  before, metrics = jax.device_get(state), None
  step = jit_train_step(detector, optimizer, mesh)
  for _ in range(count):
    state, metrics = step(state, *batch_of(batch_size))
  return before, jax.device_get(state), metrics


def is_frozen(path):
  return re.match(r'(params|batch_stats)/backbone/conv2d_[0-2]/', '/'.join(path))


@pytest.mark.slow
@pytest.mark.parametrize('case', [
    {}, {'micro_batches': 3},
    {'optimizer': {'name': 'adamw'}, 'dtype': 'bfloat16', 'learning_rate': .01},
    {'shard_state': True, 'clip_norm': 1.0, 'rate_scale': {'head': .5}}],
    ids=['plain', 'micro_batches', 'adamw_bfloat16', 'sharded'])
def test_frozen_arrays_keep_their_bits_and_the_others_move(case):
  before, after, metrics = states(config_of(freeze=BLOCKS, ema_decay=.9, **case))
  assert np.isfinite(metrics.loss)
  for kind in ('variables', 'average'):
    then, now = (flatten_dict(getattr(state, kind)) for state in (before, after))
    assert {path for path in then if np.array_equal(then[path], now[path])} == {
        path for path in then if is_frozen(path)}
  held = {jax.tree_util.keystr(path) for path, _ in
          jax.tree_util.tree_leaves_with_path(after.opt_state)}
  assert not any('conv2d_0' in name for name in held) and any('conv2d_3' in name for name in held)


@pytest.mark.slow
def test_batch_norm_of_frozen_modules_uses_its_averages():
  """Compares with a step of a network whose frozen part is computed as for inference."""
  config = config_of(freeze=BLOCKS)
  detector = build_detector(config)
  variables = detector.init(jax.random.key(0))
  images, _ = batch_of(4)
  modules = frozen_modules(variables['params'], BLOCKS)
  # Statistics that are neither the initial ones nor the batch's.
  variables = {**variables, 'batch_stats': jax.tree.map(lambda x: x + .25,
                                                        variables['batch_stats'])}
  maps = {}

  def record(function, args, kwargs, context):
    out = function(*args, **kwargs)
    if isinstance(context.module, ConvNorm):
      maps.setdefault('/'.join(context.module.path), out)
    return out

  with nn.intercept_methods(record):
    detector.forward_train(variables, images, frozen=modules)
    trained, maps = maps, {}
    detector.forward(variables, images)
  same = {path for path in maps if np.array_equal(maps[path], trained[path])}
  assert same == {path for path in maps if re.match(r'backbone/conv2d_[0-2]', path)}


def test_only_whole_modules_are_in_eval_mode():
  params = jax.eval_shape(lambda: build_detector(config_of()).init(jax.random.key(0)))['params']
  assert frozen_modules(params, ('*kernel',)) == frozenset()
  assert frozen_modules(params, ('backbone/conv2d_1/depthwise/norm',)) == {
      ('backbone', 'conv2d_1', 'depthwise', 'norm')}
  assert ('backbone', 'conv2d_1') in frozen_modules(params, ('backbone/conv2d_1',))
  assert ('backbone',) not in frozen_modules(params, BLOCKS)


@pytest.mark.slow
def test_backward_stops_at_the_first_layer_that_is_trained():
  text = {}
  for freeze in ((), BLOCKS):
    config = config_of(freeze=freeze)
    detector, mesh = build_detector(config), data_mesh()
    optimizer = optimizer_of(config, steps=10, batch_size=4)
    lowered = jit_train_step(detector, optimizer, mesh).lower(
        abstract_state(detector, optimizer, mesh), *abstract_batch(4, 64, 8, mesh))
    program = lowered.compile()
    backward = {match[1] for name in re.findall(r'op_name="([^"]*)"', program.as_text())
                if 'transpose(' in name and (match := re.search(r'(conv2d_\d+)/', name))}
    text[freeze] = backward, program.cost_analysis()['flops']
  assert text[()][0] == {f'conv2d_{i}' for i in range(6)}
  assert text[BLOCKS][0] == {f'conv2d_{i}' for i in range(3, 6)}
  assert text[BLOCKS][1] < .8 * text[()][1]


@pytest.mark.slow
def test_norm_frozen_everywhere_trains_the_rest():
  before, after, _ = states(config_of(norm='frozen', ema_decay=.9, micro_batches=3))
  for kind in ('variables', 'average'):
    then, now = (flatten_dict(getattr(state, kind)) for state in (before, after))
    assert {path[0] for path in then if np.array_equal(then[path], now[path])} == {'batch_stats'}
    assert not any(np.array_equal(then[path], now[path]) for path in then if path[0] == 'params')


@pytest.mark.slow
def test_norm_frozen_computes_in_training_as_in_inference():
  detector = build_detector(config_of(norm='frozen'))
  variables, (images, _) = detector.init(jax.random.key(0)), batch_of(2)
  for a, b in zip(detector.forward(variables, images),
                  detector.forward_train(variables, images)[0], strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('freeze, message', [
    (('backbone/conv2d_9',), "'backbone/conv2d_9' matches no parameter.*near it: backbone/conv2d_"),
    (('bakbone',), 'near it: backbone'),
    (('backbone', 'nothing'), "'nothing' matches no parameter"),
    (('*',), 'matches all parameters')])
def test_wrong_patterns_are_named(freeze, message):
  config = config_of(freeze=freeze)
  with pytest.raises(InputError, match=message):
    abstract_state(build_detector(config), optimizer_of(config, steps=10, batch_size=4),
                   data_mesh())


@pytest.mark.parametrize('path, pattern, expected', [
    ('backbone/conv2d_3/depthwise/kernel', 'backbone/conv2d_[0-5]', True),
    ('backbone/conv2d_10/depthwise/kernel', 'backbone/conv2d_[0-5]', False),
    ('backbone/conv2d_1/norm/bias', '*/bias', True),
    ('backbone/conv2d_1/norm/bias', 'backbone/', True),
    ('backbone/conv2d_1/norm/bias', 'conv2d_1', False),
    ('backbone/conv2d_1/norm/bias', 'Backbone', False)])
def test_patterns(path, pattern, expected):
  assert matches(tuple(path.split('/')), pattern) is expected


class Stubborn(nn.Module):
  """Network whose batch norm ignores `train`."""
  network: nn.Module

  @nn.compact
  def __call__(self, images, *, train):
    outputs = self.network(images, train=train)
    scale = nn.BatchNorm(use_running_average=False, name='norm')(outputs.box_codes)
    return outputs._replace(box_codes=scale)


def test_a_module_that_cannot_be_frozen_is_named():
  detector = build_detector(config_of())
  detector = dataclasses.replace(detector, network=Stubborn(detector.network))
  optimizer = optimizer_of(config_of(freeze=('norm',)), steps=10, batch_size=4)
  state = abstract_state(detector, optimizer, data_mesh())
  with pytest.raises(InputError, match='norm is frozen, but updates its'):
    jax.eval_shape(functools.partial(train_step, detector, optimizer), state,
                   *abstract_batch(4, 64, 8, data_mesh()))
