"""Measures the peak rates of the device: TFLOP/s of a large product and GB/s of a large copy."""

import json
import time

import jax
import jax.numpy as jnp


def seconds(function, *arguments) -> float:
  """Returns the seconds of the fastest of ten calls."""
  times = []
  for _ in range(12):
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - started)
  return min(times[2:])


def main() -> None:
  large = jax.default_backend() != 'cpu'
  side, length = (8192, 1 << 30) if large else (1024, 1 << 24)
  found = {}
  for dtype in ('float32', 'bfloat16'):
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    found[f'product_{dtype}_tflop_per_s'] = 2e-12 * side**3 / seconds(jax.jit(jnp.dot), a, a)
  x = jnp.ones(length, jnp.float32)
  found['copy_gb_per_s'] = 8e-9 * length / seconds(jax.jit(lambda x: x + 1), x)
  print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == '__main__':
  main()
