"""Forms for CPUs and TPUs equal the native ones in value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.models import convolution, layers
from ppn_jax.processor import multiplies_bfloat16

SIZES = ((7, 8), *(pytest.param(size, marks=pytest.mark.slow) for size in ((8, 8), (9, 6), (1, 2))))


def random(shape, seed=0, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def value_and_gradients(op, *operands):
  """Returns the value, and gradients for a fixed random cotangent."""
  y, vjp = jax.vjp(op, *operands)
  return y, *vjp(random(y.shape, 9).astype(y.dtype))


def assert_forms_agree(op, *operands, tolerance):
  results = [jax.jit(functools.partial(value_and_gradients, functools.partial(op, form=form)))(
      *operands) for form in ('native', 'shifted', 'dense')]
  for plain, *others in zip(*results, strict=True):
    for other in others:
      assert other.dtype == plain.dtype
      scale = float(jnp.max(jnp.abs(plain)))
      np.testing.assert_allclose(np.asarray(other, np.float64), np.asarray(plain, np.float64),
                                 rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('side', 'stride'), [
    (3, 1), (3, 2), *(pytest.param(5, s, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize('size', SIZES)
def test_depthwise_forms_agree(size, side, stride):
  x, kernel = random((2, *size, 5)), random((side, side, 1, 5), 1)
  op = functools.partial(convolution.depthwise_conv, stride=stride)
  assert_forms_agree(op, x, kernel, tolerance=1e-12)
  assert_forms_agree(op, x.astype(jnp.float32), kernel.astype(jnp.float32), tolerance=1e-5)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('side', 'stride'), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize('size', SIZES)
def test_conv_forms_agree(size, side, stride):
  x, kernel = random((2, *size, 4)), random((side, side, 4, 6), 1)
  op = functools.partial(convolution.conv, stride=stride)
  assert_forms_agree(op, x, kernel, tolerance=1e-12)
  assert_forms_agree(op, x.astype(jnp.float32), kernel.astype(jnp.float32), tolerance=1e-5)


@pytest.mark.parametrize('fast', [False, True])
def test_large_products_of_bfloat16_sum_in_float32(monkeypatch, fast):
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: fast)
  x = random((2, 5, 6, 128), dtype=np.float32).astype(jnp.bfloat16)
  kernel = random((1, 1, 128, 130), 1, np.float32)
  op = functools.partial(convolution.conv, form='shifted')
  found = value_and_gradients(op, x, kernel)
  rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
  y, vjp = jax.vjp(op, x.astype(jnp.float32), rounded)
  exact = (y, *vjp(random(y.shape, 9).astype(jnp.bfloat16).astype(jnp.float32)))
  for a, b in zip(found, exact, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize('stride', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_shifted_bfloat16_sums_in_float32_and_rounds_once(stride):
  x = random((2, 19, 19, 8), dtype=np.float32).astype(jnp.bfloat16)
  for op, shape in ((convolution.depthwise_conv, (3, 3, 1, 8)), (convolution.conv, (3, 3, 8, 8))):
    kernel = random(shape, 1, np.float32).astype(jnp.bfloat16)
    op = functools.partial(op, stride=stride, form='shifted')
    ours = jax.jit(functools.partial(value_and_gradients, op))(x, kernel)
    y, vjp = jax.vjp(op, x.astype(jnp.float32), kernel.astype(jnp.float32))
    # Both use a cotangent that bfloat16 represents.
    exact = (y, *vjp(random(y.shape, 9).astype(jnp.bfloat16).astype(jnp.float32)))
    for a, b in zip(ours, exact, strict=True):
      assert a.dtype == jnp.bfloat16
      np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize(('side', 'depth'), [(1, 128), (3, 16)])
def test_rounded_products_agree_and_equal_those_of_rounded_operands(monkeypatch, side, depth, fast):
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: fast)
  x = random((2, 5, 6, depth), dtype=np.float32)
  kernel = random((side, side, depth, 130), 1, np.float32)
  op = functools.partial(convolution.conv, matmul_dtype='bfloat16')
  assert_forms_agree(op, x, kernel, tolerance=1e-5)
  rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
  found = value_and_gradients(functools.partial(op, form='shifted'), x, kernel)
  y, vjp = jax.vjp(functools.partial(convolution.conv, form='native'), rounded(x), rounded(kernel))
  for a, b in zip(found, (y, *vjp(rounded(random(y.shape, 9, np.float32)))), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
  plain = convolution.conv(x, kernel, form='shifted')
  assert 1e-5 < float(jnp.abs(found[0] - plain).max() / jnp.abs(plain).max()) < 2**-7


@pytest.mark.parametrize(('images', 'rows', 'most', 'chunks'), [
    (1, 61, 6000, 1), (1, 60, 20, 3), (1, 70, 7, 10), (2, 62, 59, 4), (6, 16, 40, 3)])
def test_kernel_gradients_by_chunks_of_rows(monkeypatch, images, rows, most, chunks):
  monkeypatch.setattr(convolution, '_CHUNK_ROWS', most)
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: True)
  assert convolution._num_chunks(images, rows) == chunks
  x = random((images, 1, rows, 128), 0, np.float32)
  kernel = random((1, 1, 128, 130), 1, np.float32)
  op = functools.partial(convolution.conv, matmul_dtype='bfloat16', form='shifted')
  y, *gradients = value_and_gradients(op, x, kernel)
  rounded = lambda a: np.asarray(jnp.bfloat16(a), np.float64)
  g = rounded(random(y.shape, 9, np.float32)).reshape(-1, 130)
  expected = g @ rounded(kernel)[0, 0].T, rounded(x).reshape(-1, 128).T @ g
  for found, exact in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(found.reshape(exact.shape), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(('images', 'rows', 'chunks'), [
    (8, 361, 1), (16, 361, 1), (32, 361, 2), (8, 22_500, 32), (8, 5625, 8), (7, 1444, 7), (1, 1, 1),
    (1, 6007, 1), (3, 12_014, 3)])  # The last two have no useful divisor.
def test_chunks_are_whole_images_or_parts_of_one(images, rows, chunks):
  assert convolution._num_chunks(images, rows) == chunks


def test_gradients_multiply_in_bfloat16_where_the_product_does():
  if not multiplies_bfloat16():
    pytest.skip('the processor has no instructions for products of bfloat16')
  x, kernel = jnp.ones((4, 8, 8, 128)), jnp.ones((1, 1, 128, 256))
  op = functools.partial(convolution.conv, matmul_dtype='bfloat16', form='shifted')

  def products(function):
    text = jax.jit(function).lower(x, kernel).compile().as_text()
    types = dict(re.findall(r'(%[\w.\-]+) = (\w+)\[', text))
    return [{types[name] for name in (a, b)} for a, b in re.findall(
        r' dot\((?:\S+ )?(%[\w.\-]+), (?:\S+ )?(%[\w.\-]+)\)', text)]

  if products(op) != [{'bf16'}]:
    pytest.skip('this version of XLA widens products of bfloat16')
  assert products(lambda x, k: jax.vjp(op, x, k)[1](jnp.ones((4, 8, 8, 256)))) == [{'bf16'}] * 2


def test_kernel_gradients_of_rounded_products_stay_float32_on_tpus():
  x, kernel = jnp.zeros((1, 4, 4, 128), jnp.bfloat16), jnp.zeros((1, 1, 128, 130))
  gradient = jax.jit(jax.grad(lambda k: convolution.conv(
      x, k, form='dense', matmul_dtype='bfloat16').sum().astype(jnp.float32)))
  text = gradient.trace(kernel).lower(lowering_platforms=('tpu',)).as_text()
  products = [line for line in text.splitlines() if 'stablehlo.convolution' in line]
  assert products[-1].endswith('tensor<1x1x128x130xf32>'), products


@pytest.mark.parametrize('fast', [False, True])
def test_auto_rounds_where_the_processor_multiplies_bfloat16(monkeypatch, fast):
  monkeypatch.setattr(convolution, 'multiplies_bfloat16', lambda: fast)
  x, kernel = jnp.zeros((1, 4, 4, 128)), jnp.zeros((1, 1, 128, 128))
  convolve = jax.jit(functools.partial(convolution.conv, matmul_dtype='auto'))
  traced = convolve.trace(x, kernel)
  assert ('bf16' in traced.lower(lowering_platforms=('cpu',)).as_text()) is fast
  for platform in ('tpu', 'cuda'):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'bf16' not in text and 'reduce_precision' not in text
  # Small products stay as they are.
  assert 'bf16' not in convolve.trace(x, kernel[..., :24]).lower().as_text()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('size', SIZES)
def test_max_pool_forms_agree_even_on_ties(size, dtype):
  x = random((2, *size, 3), dtype=np.float32)
  ties = jnp.round(x).clip(-1, 0)  # Two values: nearly every window has several maxima.
  images = jnp.concatenate([x, ties, -jnp.ones_like(x)])
  assert_forms_agree(convolution.max_pool, images.astype(dtype), tolerance=0)


def test_max_pool_gives_a_tie_to_the_first_maximum():
  x = jnp.array([[1., 2.], [2., 2.]])[None, :, :, None]
  gradient = jax.grad(lambda x: convolution.max_pool(x).sum())(x)
  np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1], [0, 0]])


@pytest.mark.parametrize('size, stride, expected',
                         [(300, 2, (0, 1)), (75, 2, (1, 1)), (38, 2, (0, 1)), (19, 2, (1, 1)),
                          (19, 1, (1, 1)), (1, 2, (1, 1))])
def test_same_padding_is_tensorflows(size, stride, expected):
  assert convolution.same_padding(size, stride) == expected


def test_auto_follows_the_platform_of_the_lowering():
  x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))
  traced = jax.jit(jax.grad(lambda x, k: convolution.depthwise_conv(x, k).sum(), (0, 1))).trace(
      x, kernel)
  assert 'stablehlo.convolution' in traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'stablehlo.convolution' not in traced.lower(lowering_platforms=('cpu',)).as_text()
  both = jax.export.export(jax.jit(convolution.depthwise_conv), platforms=('cpu', 'tpu'))(x, kernel)
  assert both.call(x + 1, kernel + 1)[0, 4, 4, 0] == 9


@pytest.mark.parametrize('channels, groups', [(64, 1), (65, 65)])
def test_a_tpu_convolves_few_channels_densely(channels, groups):
  x, kernel = jnp.zeros((1, 8, 8, channels)), jnp.zeros((3, 3, 1, channels))
  text = jax.jit(convolution.depthwise_conv).trace(x, kernel).lower(
      lowering_platforms=('tpu',)).as_text()
  assert f'feature_group_count = {groups} ' in text


def test_relu6_has_no_gradient_at_its_corners_and_keeps_nan():
  x = jnp.array([-1., 0., 3., 6., 7., jnp.nan])
  np.testing.assert_array_equal(layers.relu6(x), [0, 0, 3, 6, 6, np.nan])
  np.testing.assert_array_equal(jax.vmap(jax.grad(layers.relu6))(x)[:5], [0, 0, 1, 0, 0])
