"""Order on the device: every epoch has every example once, for any number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppn_jax.device_data.shuffle import example_at, permute


@pytest.fixture(scope='module')
def permutations():
  """Returns a function from (number of examples, seed) to the permutation, compiled once."""
  @jax.jit
  def permuted(at, n, side, seed):
    return permute(at, n, side, jax.random.bits(jax.random.key(seed), (8,)))

  def call(n, seed, least=1024):
    at = np.arange(max(n, least), dtype=np.uint32) % n
    side = int(np.ceil(np.sqrt(n)))
    side += side**2 < n
    return np.asarray(permuted(at, n, side, seed))[:n]
  return call


def test_a_permutation_of_any_number(permutations):
  for n in range(1, 1025):
    assert (np.sort(permutations(n, n)) == np.arange(n)).all(), n


@pytest.mark.parametrize('n', [118_287, 2**17 - 1, 2**17, 2**17 + 1])
def test_a_permutation_of_large_numbers(permutations, n):
  assert (np.sort(permutations(n, 0, n)) == np.arange(n)).all()


def test_numbers_near_the_limit_stay_in_range():
  at = np.uint32([0, 1, 2**30, 2**31 - 1])
  out = np.asarray(permute(at, 2**31, 46341, np.arange(8, dtype=np.uint32)))
  assert len(set(out.tolist())) == 4 and (out < 2**31).all()


def test_every_epoch_has_every_example_once_in_another_order():
  n, epochs = 37, 5
  draw = jax.jit(lambda positions: example_at(positions, n, jax.random.key(0)))
  # A batch of 10 straddles epochs.
  out = [draw(jnp.arange(first, first + 10, dtype=jnp.uint32)) for first in range(0, 190, 10)]
  epoch, index = (np.concatenate([np.asarray(o[i]) for o in out])[:n * epochs] for i in (0, 1))
  assert (epoch == np.repeat(np.arange(epochs), n)).all()
  orders = index.reshape(epochs, n)
  assert (np.sort(orders, axis=1) == np.arange(n)).all()
  assert len({tuple(o) for o in orders}) == epochs
  other, = [np.asarray(example_at(jnp.arange(n, dtype=jnp.uint32), n, jax.random.key(1))[1])]
  assert (other != orders[0]).any()


@pytest.mark.parametrize('n', [5, 24])
def test_orders_are_uniform(n):
  """Tests an example's positions and successors by chi-square, one false alarm in 10,000."""
  stats = pytest.importorskip('scipy.stats')
  epochs = 4000
  _, index = jax.jit(lambda p: example_at(p, n, jax.random.key(3)))(
      jnp.arange(n * epochs, dtype=jnp.uint32))
  orders = np.asarray(index).reshape(epochs, n)
  place = np.argmax(orders == 0, axis=1)
  after = (orders[np.arange(epochs), (place + 1) % n])[place < n - 1]
  for values, kinds in ((place, n), (after - 1, n - 1), (orders[:, 0], n)):
    counts = np.bincount(values, minlength=kinds)
    assert len(counts) == kinds
    assert stats.chisquare(counts).pvalue > 1e-4, counts
