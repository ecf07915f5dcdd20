"""Tests of the whole network: sizes, counts, order of rows, and what it rejects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.errors import InputError
from ppn_jax.models.heads import PerLevelBoxPredictor, SharedBoxPredictor
from ppn_jax.models.layers import LayerPolicy
from ppn_jax.models.mobilenet_v1 import MobileNetV1
from ppn_jax.models.necks import ConvPyramid, FeaturePyramid, PoolingPyramid
from ppn_jax.models.network import build_network


def build(*, backbone=(), neck=(), head=(), num_classes=3, anchors_per_cell=(2,),
          policy=None):
  return build_network(
      backbone={'name': 'mobilenet_v1', **dict(backbone)},
      neck={'name': 'pooling_pyramid', **dict(neck)},
      head={'name': 'shared_box_predictor', **dict(head)},
      num_classes=num_classes, anchors_per_cell=anchors_per_cell, policy=policy or LayerPolicy())


def small(**options):
  return build(backbone={'depth_multiplier': 0.125, 'last_block': 6}, neck={'num_levels': 3},
               head={'depth': 16}, **options)


def pixels(batch, side, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (batch, side, side, 3)),
                     jnp.uint8)


def shapes(network, side, batch=1):
  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
  variables = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0),
                             images)
  return images, variables


def initialise(network, images):
  return jax.jit(functools.partial(network.init, train=False))(jax.random.key(0), images)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_ppn_at_300_pixels_has_the_references_sizes_and_counts():
  network = build(num_classes=91, anchors_per_cell=(6,) * 6)  # 90 and the background.
  images, variables = shapes(network, 300, batch=2)
  pyramid = jax.eval_shape(
      functools.partial(network.apply, train=False, method='pyramid'), variables, images)
  assert [level.shape for level in pyramid] == [(2, n, n, 512) for n in (19, 10, 5, 3, 2, 1)]
  outputs = jax.eval_shape(functools.partial(network.apply, train=False), variables, images)
  assert outputs.box_codes.shape == (2, 3000, 4)
  assert outputs.class_logits.shape == (2, 3000, 91)
  assert count(variables['params']) == 2_173_818
  assert count(variables) == 2_194_682


def test_backbone_returns_the_last_map_of_each_stride():
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  for last, expected in ((11, {2: 64, 4: 128, 8: 256, 16: 512}),
                         (13, {2: 64, 4: 128, 8: 256, 16: 512, 32: 1024})):
    features, variables = jax.eval_shape(functools.partial(
        MobileNetV1(last_block=last).init_with_output, train=False), jax.random.key(0), x)
    assert {s: f.shape for s, f in features.items()} == {
        s: (1, 64 // s, 64 // s, depth) for s, depth in expected.items()}
    assert variables['params']['conv2d_1']['depthwise']['kernel'].shape == (3, 3, 1, 32)
  narrow = jax.eval_shape(functools.partial(
      MobileNetV1(depth_multiplier=0.1).init_with_output, train=False), jax.random.key(0), x)[0]
  assert [f.shape[-1] for f in narrow.values()] == [8, 12, 25, 51]


@pytest.mark.slow
@pytest.mark.usefixtures('float64')
def test_forms_of_the_whole_network_agree_in_float64():
  images = pixels(4, 72)
  networks = [small(policy=LayerPolicy(dtype=jnp.float64, conv_form=form))
              for form in ('native', 'shifted')]
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initialise(networks[0], images))

  def loss(network, params):
    outputs, updates = network.apply({**variables, 'params': params}, images, train=True,
                                     mutable=['batch_stats'])
    return jnp.mean(outputs.box_codes**2) + jnp.mean(outputs.class_logits**2), updates

  plain, fast = (jax.jit(jax.value_and_grad(functools.partial(loss, network), has_aux=True))(
      variables['params']) for network in networks)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), fast, plain)


def head_outputs(levels, *, train=False, **options):
  head = SharedBoxPredictor(num_classes=3, anchors_per_cell=(2,), depth=8, **options)
  variables = head.init(jax.random.key(0), levels, train=False)
  return variables, head.apply(variables, levels, train=train,
                               mutable=['batch_stats'] if train else False)


@pytest.mark.slow
def test_rows_are_ordered_by_level_y_x_anchor():
  levels = (jnp.zeros((1, 3, 3, 4)), jnp.zeros((1, 2, 2, 4)))
  _, base = head_outputs(levels)
  for level, y, x, first in ((0, 0, 0, 0), (0, 1, 2, 10), (1, 0, 0, 18), (1, 1, 0, 22)):
    lit = [m.at[0, y, x].set(1.0) if i == level else m for i, m in enumerate(levels)]
    _, outputs = head_outputs(tuple(lit))
    for before, after in zip(base, outputs, strict=True):
      rows = np.flatnonzero(np.any(np.asarray(before != after)[0], axis=-1))
      assert list(rows) == [first, first + 1]


def test_head_equals_two_plain_convolutions_level_by_level():
  rng = np.random.default_rng(0)
  levels = tuple(jnp.asarray(rng.normal(size=(2, n, n, 4)), jnp.float32) for n in (3, 1))
  variables, outputs = head_outputs(levels)
  p = jax.tree.map(np.asarray, variables['params'])
  for field, name, width in (('box_codes', 'box', 4), ('class_logits', 'class', 3)):
    rows = []
    for level in levels:
      tower = np.asarray(level).reshape(2, -1, 4) @ p['tower_kernel'][0, 0] / np.sqrt(1.001)
      y = np.clip(tower, 0, 6) @ p[f'{name}_kernel'][0, 0] + p[f'{name}_bias']
      rows.append(y.reshape(2, -1, width))
    np.testing.assert_allclose(getattr(outputs, field), np.concatenate(rows, 1), atol=1e-5)


@pytest.mark.parametrize('per_level', [True, False])
def test_head_normalises_each_level_alone_or_all_together(per_level):
  levels = (jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 4)), jnp.float32),
            jnp.full((4, 1, 1, 4), 5.0))
  variables, (_, updates) = head_outputs(levels, train=True, norm_per_level=per_level)
  names = {'norm_0', 'norm_1'} if per_level else {'norm'}
  assert set(updates['batch_stats']) == names
  tower = [np.asarray(m).reshape(-1, 4) @ np.asarray(variables['params']['tower_kernel'])[0, 0]
           for m in levels]
  expected = dict(zip(('norm_0', 'norm_1'), tower, strict=True)) if per_level else {
      'norm': np.concatenate(tower)}
  for name, rows in expected.items():
    np.testing.assert_allclose(updates['batch_stats'][name]['mean'], 0.03 * rows.mean(0),
                               rtol=1e-4, atol=1e-6)


def test_class_probability_starts_at_the_prior():
  _, outputs = head_outputs((jnp.zeros((1, 2, 2, 4)),), prior=0.05)
  np.testing.assert_allclose(jax.nn.sigmoid(outputs.class_logits), 0.05, rtol=1e-5)
  np.testing.assert_array_equal(outputs.box_codes, 0)


@pytest.mark.slow
def test_bfloat16_network_has_float32_parameters_and_outputs():
  images = pixels(2, 64)
  wide, narrow = (small(policy=LayerPolicy(dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16))
  variables = initialise(narrow, images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  expected, outputs = (jax.jit(functools.partial(n.apply, train=False))(variables, images)
                       for n in (wide, narrow))
  for a, b in zip(outputs, expected, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(b - b.mean()).max()))


def test_pixels_are_scaled_to_minus_one_to_one():
  class Identity(MobileNetV1):
    def __call__(self, x, *, train):
      return {16: x}

  network = small().clone(backbone=Identity(), neck=PoolingPyramid(num_levels=1))
  images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
  (level,) = network.apply({}, images, train=False, method='pyramid')
  np.testing.assert_allclose(level.ravel(), [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize('neck, features, sides', [
    (PoolingPyramid(num_levels=0), {16: 5}, [5, 3, 2, 1]),
    (PoolingPyramid(num_levels=0), {16: 1}, [1]),
    (FeaturePyramid(num_levels=0, depth=4), {16: 6, 32: 3}, [6, 3, 2, 1])])
def test_zero_levels_means_all_down_to_one_cell(neck, features, sides):
  maps = {stride: jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
          for stride, side in features.items()}
  levels, _ = jax.eval_shape(functools.partial(neck.init_with_output, train=False),
                             jax.random.key(0), maps)
  assert [level.shape[1] for level in levels] == sides


@pytest.mark.parametrize('neck, features', [
    (PoolingPyramid(num_levels=5, repeat_1x1=True), {16: 4}),
    (FeaturePyramid(num_levels=5, depth=4, repeat_1x1=True), {16: 4, 32: 2}),
    (ConvPyramid(depths=(4, 4, 4), repeat_1x1=True), {16: 4, 32: 2})])
def test_levels_after_one_of_one_cell(neck, features):
  maps = {stride: jnp.arange(16.0 * side * side).reshape(1, side, side, 16)
          for stride, side in features.items()}
  levels, _ = neck.init_with_output(jax.random.key(0), maps, train=False)
  assert [level.shape[1] for level in levels] == [4, 2, 1, 1, 1]
  if isinstance(neck, PoolingPyramid):
    np.testing.assert_array_equal(levels[4], maps[16].max((1, 2), keepdims=True))
  with pytest.raises(InputError, match='1x1 after 3 levels'):
    neck.clone(repeat_1x1=False).init(jax.random.key(0), maps, train=False)


def test_neck_pools_and_projects():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 8)), jnp.float32)
  levels = PoolingPyramid(num_levels=4).apply({}, {16: x}, train=False)
  assert [level.shape[1] for level in levels] == [5, 3, 2, 1]
  np.testing.assert_array_equal(levels[3][0, 0, 0], x[0].max((0, 1)))
  levels, variables = PoolingPyramid(num_levels=2, projection=6).init_with_output(
      jax.random.key(0), {16: x}, train=False)
  assert [level.shape for level in levels] == [(1, 5, 5, 6), (1, 3, 3, 6)]
  assert variables['params']['projection']['kernel'].shape == (1, 1, 8, 6)


def test_ssd_at_300_pixels_has_the_references_sizes_and_counts():
  network = build(backbone={'last_block': 13}, neck={'name': 'conv_pyramid'},
                  head={'name': 'per_level_box_predictor'}, num_classes=91,
                  anchors_per_cell=(3, 6, 6, 6, 6, 6))
  images, variables = shapes(network, 300)
  pyramid = jax.eval_shape(
      functools.partial(network.apply, train=False, method='pyramid'), variables, images)
  assert [level.shape[1:] for level in pyramid] == [
      (19, 19, 512), (10, 10, 1024), (5, 5, 512), (3, 3, 256), (2, 2, 256), (1, 1, 128)]
  outputs = jax.eval_shape(functools.partial(network.apply, train=False), variables, images)
  assert outputs.class_logits.shape == (1, 1917, 91)
  assert count(variables['params']) == 6_819_839 and count(variables) == 6_845_183


def test_fpn_at_300_pixels_has_ppns_grids_and_one_depth():
  network = build(backbone={'last_block': 13}, neck={'name': 'feature_pyramid'},
                  anchors_per_cell=(6,) * 6)
  images, variables = shapes(network, 300)
  pyramid = jax.eval_shape(
      functools.partial(network.apply, train=False, method='pyramid'), variables, images)
  assert [level.shape for level in pyramid] == [(1, n, n, 256) for n in (19, 10, 5, 3, 2, 1)]


@pytest.mark.slow
def test_conv_pyramid_is_the_maps_and_convolutions_of_the_last():
  rng = np.random.default_rng(0)
  maps = {16: jnp.asarray(rng.normal(size=(1, 6, 6, 4)), jnp.float32),
          32: jnp.asarray(rng.normal(size=(1, 3, 3, 6)), jnp.float32)}
  neck = ConvPyramid(depths=(8, 4))
  levels, variables = neck.init_with_output(jax.random.key(0), maps, train=False)
  assert [level.shape[1:] for level in levels] == [(6, 6, 4), (3, 3, 6), (2, 2, 8), (1, 1, 4)]
  np.testing.assert_array_equal(levels[0], maps[16])
  np.testing.assert_array_equal(levels[1], maps[32])
  p = variables['params']['extra_2']
  x = np.clip(np.asarray(maps[32]) @ p['reduce']['kernel'][0, 0] / np.sqrt(1.001), 0, 6)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  first = np.einsum('ijc,ijcd->d', padded[0, :3, :3], p['shrink']['kernel']) / np.sqrt(1.001)
  np.testing.assert_allclose(levels[2][0, 0, 0], np.clip(first, 0, 6), atol=1e-5)


def test_feature_pyramid_adds_the_upsampled_coarser_map():
  """With identity kernels, level 0 is lateral 0 plus lateral 1 at the nearest cells."""
  rng = np.random.default_rng(0)
  maps = {16: jnp.asarray(rng.uniform(size=(1, 5, 5, 4)), jnp.float32),
          32: jnp.asarray(rng.uniform(size=(1, 3, 3, 4)), jnp.float32)}
  neck = FeaturePyramid(num_levels=3, depth=4)
  variables = neck.init(jax.random.key(0), maps, train=False)
  params = jax.tree.map(np.array, variables['params'])
  for i in range(2):
    params[f'lateral_{i}']['kernel'][:] = np.eye(4)
    params[f'smooth_{i}']['kernel'][:] = 0
    params[f'smooth_{i}']['kernel'][1, 1] = np.eye(4)
  fine, coarse, last = neck.apply({**variables, 'params': params}, maps, train=False)
  scale = np.sqrt(1.001)
  np.testing.assert_allclose(coarse, maps[32] / scale**2, rtol=1e-5)
  for y, x in ((0, 0), (1, 2), (4, 4), (3, 0)):
    expected = (maps[16][0, y, x] + maps[32][0, y // 2, x // 2]) / scale**2
    np.testing.assert_allclose(fine[0, y, x], expected, rtol=1e-5)
  assert last.shape == (1, 2, 2, 4)


def test_per_level_head_equals_plain_convolutions_of_each_level():
  rng = np.random.default_rng(0)
  levels = tuple(jnp.asarray(rng.normal(size=(2, n, n, d)), jnp.float32)
                 for n, d in ((3, 4), (1, 5)))
  head = PerLevelBoxPredictor(num_classes=3, anchors_per_cell=(2, 4))
  outputs, variables = head.init_with_output(jax.random.key(0), levels, train=False)
  for field, name, width in (('box_codes', 'box', 4), ('class_logits', 'class', 3)):
    rows = []
    for i, level in enumerate(levels):
      p = variables['params'][f'level_{i}']
      y = np.asarray(level) @ p[f'{name}_kernel'][0, 0] + p[f'{name}_bias']
      rows.append(y.reshape(2, -1, width))
    np.testing.assert_allclose(getattr(outputs, field), np.concatenate(rows, 1), atol=1e-5)
  with pytest.raises(InputError, match='1 levels, but anchors_per_cell'):
    head.init(jax.random.key(0), levels[:1], train=False)


@pytest.mark.parametrize(('blocks', 'words'), [
    ({'backbone': {'name': 'mobilenet_v4'}}, "unknown backbone.*did you mean 'mobilenet_v"),
    ({'backbone': {'depth_multiplyer': 1.0}}, "did you mean 'depth_multiplier'"),
    ({'backbone': {'depth_multiplier': 0.0}}, 'depth_multiplier 0.0'),
    ({'backbone': {'last_block': 14}}, 'last_block 14'),
    ({'neck': {'num_level': 3}}, "did you mean 'num_levels'"),
    ({'neck': {'num_levels': -1}}, 'num_levels -1'),
    ({'neck': {'projection': -1}}, 'projection -1'),
    ({'head': {'norm_per_levels': True}}, "did you mean 'norm_per_level'"),
    ({'head': {'depth': 0}}, 'depth 0'),
    ({'head': {'prior': 1.0}}, 'prior 1.0'),
    ({'head': {'num_classes': 5}}, 'has no option'),
    ({'num_classes': 0}, 'num_classes 0'),
    ({'anchors_per_cell': (2, 0)}, 'anchors_per_cell'),
    ({'anchors_per_cell': (3, 6, 6)}, 'reduce_lowest_level=False'),
    ({'neck': {'name': 'conv_pyramid', 'strides': (16, 64)}}, 'must double'),
    ({'neck': {'name': 'conv_pyramid', 'depths': (1,)}}, 'must be at least 2'),
    ({'neck': {'name': 'feature_pyramid', 'num_levels': 1}}, 'num_levels 1 is below'),
    ({'head': {'name': 'per_level_box_predictor', 'side': 2}}, 'side 2'),
])
def test_build_rejects_with_one_line(blocks, words):
  with pytest.raises(InputError, match=words) as caught:
    build(**blocks)
  assert '\n' not in str(caught.value)


def test_dotted_path_names_a_component():
  network = build(backbone={'name': 'ppn_jax.models.mobilenet_v1:MobileNetV1', 'last_block': 5})
  assert network.backbone.last_block == 5


@pytest.mark.parametrize(('neck', 'words'), [
    ({'stride': 32}, 'no map of stride 32; it has 2, 4, 8, 16'),
    ({'num_levels': 5}, '4x4 map is 1x1 after 3 levels; set model.neck.num_levels=3, or 0'),
    ({'name': 'conv_pyramid'}, 'no map of stride 32; it has 2, 4, 8, 16'),
    ({'name': 'conv_pyramid', 'strides': (16,), 'depths': (8,) * 4},
     '4x4 map is 1x1 after 3 levels'),
    ({'name': 'feature_pyramid', 'strides': (8, 16), 'num_levels': 6},
     '8x8 map is 1x1 after 4 levels'),
])
def test_neck_that_does_not_fit_is_rejected_before_compiling(neck, words):
  with pytest.raises(InputError, match=words):
    shapes(build(neck=neck), 64)


@pytest.mark.parametrize('images', [np.zeros((1, 64, 64, 3), np.float32),
                                    np.zeros((64, 64, 3), np.uint8),
                                    np.zeros((1, 64, 64, 4), np.uint8)])
def test_images_that_are_not_uint8_rgb_are_rejected(images):
  with pytest.raises(InputError, match=r'uint8 \[B, S, S, 3\]'):
    small().init(jax.random.key(0), images, train=False)
