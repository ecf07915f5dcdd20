"""Checks that all forms of the convolutions train alike, to within rounding.

  python benchmarks/form_equality.py --json

Trains the quickstart's model at 64 px with 'native' convolutions, the plain XLA operations, and
also takes each step with every other form (`model.layers.conv_form`), from the same weights on the
same batch. The distance of the loss is |loss - native's| / native's, and that of the update, a
vector over all parameters, is |update - native's| / |native's|. They are compared with yardsticks
that differ from 'native' only by rounding: the images of each batch in another order. A form is
`within_rounding` if the largest distance of its steps is at most --tolerance times that of the
yardsticks, for losses and for updates. A loss may always differ by 1e-6.

Each form is also trained separately. Training doubles the smallest difference every few steps until
all runs diverge, the yardsticks included, so these distances are printed but not tested.

  python benchmarks/form_equality.py --variants model.layers.norm_decay=0.95 \\
      'model.layers.conv_form=shifted model.layers.norm_epsilon=0.001'

compares other entries of the config instead of the forms; each quoted argument is a variant. The
exit code is 1 if a variant is not within rounding. With --json the last line is JSON.
"""

import argparse
import json
import pathlib
import time

import hardware
import jax
import jax.numpy as jnp
import numpy as np

from ppn_jax.config_files import load_config, override
from ppn_jax.data.source import build_source
from ppn_jax.distributed.sharding import data_mesh
from ppn_jax.errors import InputError
from ppn_jax.run import build_detector, optimizer_of, resolve_classes
from ppn_jax.telemetry.host_memory import keep_freed_memory
from ppn_jax.training.input_pipeline import build_input_pipeline
from ppn_jax.training.train_step import jit_init, jit_train_step

CONFIG = pathlib.Path(__file__).resolve().parents[1] / 'configs' / 'quickstart.py'
# With more pixels or the quickstart's own learning rate, runs diverge within a few steps.
SMALLER = ('model.image_size=64', 'model.neck.num_levels=3', 'data.train.image_size=64',
           'train.batch_size=8', 'optim.rate_batch_size=8', 'optim.learning_rate=0.01',
           'optim.warmup_factor=0.1', 'optim.warmup_fraction=0.25')
FORMS = ('native', 'shifted', 'dense')
NATIVE = 'model.layers.conv_form=native'
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # Steps whose `worst` is reported.
_compiled = {}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--orders', type=int, default=2, help='orders of the images, as yardsticks')
  parser.add_argument('--variants', nargs='+', metavar="'KEY=VALUE ...'",
                      help='entries of the config to compare instead of the forms')
  parser.add_argument('--tolerance', type=float, default=3.0)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()
  if args.steps < 1 or args.orders < 1:
    parser.error('--steps and --orders must be at least 1')

  keep_freed_memory()
  variants = args.variants or [f'model.layers.conv_form={f}' for f in FORMS if f != 'native']
  try:
    base = resolve(with_entries(load_config(str(CONFIG), []),
                                *SMALLER, f'train.steps={args.steps}'))
    configs = {v: with_entries(base, NATIVE, *v.split()) for v in variants}
    batches = load_batches(base, args.steps)
    native = with_entries(base, NATIVE)
    orders = {f'images in order {k}': k for k in range(1, args.orders + 1)}
    free = {'native': losses(native, batches, 'native')}
    free |= {name: losses(native, batches, name, order=k) for name, k in orders.items()}
    free |= {v: losses(c, batches, v) for v, c in configs.items()}
    steps = same_weights(native, configs, batches, orders)
  except InputError as e:
    parser.error(str(e))

  result = {'benchmark': 'form_equality', 'steps': args.steps, 'config': CONFIG.name,
            'smaller': SMALLER, **compare(steps, free, list(orders), args.tolerance),
            **hardware.describe()}
  print_table(result)
  if args.json:
    print(json.dumps(result))
  if not all(v['within_rounding'] for v in result['variants'].values()):
    raise SystemExit(1)


def with_entries(config, *entries: str):
  return override(config, [f'--config.{entry}' for entry in entries])


def resolve(config):
  """Sets the number of classes to that of the data."""
  return resolve_classes(config, _source(config).categories)


def _source(config):
  return build_source(config.data.train.to_dict(), key='data.train')


def load_batches(config, steps: int) -> list:
  """The first batches of training, on the device."""
  pipeline = build_input_pipeline(config, _source(config), data_mesh())
  with pipeline.open(0, None) as batches:
    return [next(batches) for _ in range(steps)]


def losses(config, batches: list, name: str, *, order: int = 0) -> np.ndarray:
  """Trains and returns the loss of each step, f64 [steps]; `order` as in `in_order`."""
  started = time.perf_counter()
  first, step = compiled(config, len(batches))
  state, taken = jax.tree.map(jnp.copy, first), []  # A step donates its state.
  for batch in batches:
    state, metrics = step(state, *in_order(batch, order))
    taken.append(metrics.loss)
  taken = np.array(jax.device_get(taken), np.float64)
  print(f'{name}: loss {taken[0]:.6f} to {taken[-1]:.6f}, in {time.perf_counter() - started:.0f} s',
        flush=True)
  return taken


def in_order(batch, order: int):
  """Shuffles the images of a batch with a seed; 0 keeps their order."""
  rows = np.arange(len(batch[0]))
  if order:
    np.random.default_rng(order).shuffle(rows)
  return jax.tree.map(lambda x: x[rows], batch)


def same_weights(native, configs: dict, batches: list, orders: dict[str, int]) -> dict:
  """Takes each step with all forms from native's weights.

  Returns:
    {name: distances [steps, 2] of loss and update from native's}.
  """
  state, native_step = compiled(native, len(batches))
  steps = {name: (native_step, k) for name, k in orders.items()}
  steps |= {name: (compiled(c, len(batches))[1], 0) for name, c in configs.items()}
  found = {name: [] for name in steps}
  for batch in batches:
    following, loss, direction = _take(native_step, state, batch, 0)
    for name, (step, order) in steps.items():
      _, other_loss, other = _take(step, state, batch, order)
      found[name].append((abs(other_loss - loss) / loss,
                          np.linalg.norm(other - direction) / np.linalg.norm(direction)))
    state = following
  return {name: np.array(distances) for name, distances in found.items()}


def _take(step, state, batch, order: int) -> tuple:
  new, metrics = step(jax.tree.map(jnp.copy, state), *in_order(batch, order))
  return new, float(metrics.loss), update(state, new)


def update(before, after) -> np.ndarray:
  """Returns the change of the parameters in a step as one vector."""
  old, new = (jax.tree.leaves(jax.device_get(s.variables['params'])) for s in (before, after))
  return np.concatenate([(n.astype(np.float64) - o).ravel() for o, n in zip(old, new, strict=True)])


def compiled(config, steps: int) -> tuple:
  """Returns the first state and the jitted step of a config, which are cached."""
  key = config.to_json()
  if key not in _compiled:
    detector, mesh = build_detector(config), data_mesh()
    optimizer = optimizer_of(config, steps=steps, batch_size=config.train.batch_size)
    _compiled[key] = (jit_init(detector, optimizer, mesh)(config.seed),
                      jit_train_step(detector, optimizer, mesh))
  return _compiled[key]


def compare(steps: dict, free: dict, yardsticks: list[str], tolerance: float) -> dict:
  """Returns the results for the JSON."""
  runs = {}
  for name, distances in steps.items():
    runs[name] = {'loss': summary(distances[:, 0]), 'update': summary(distances[:, 1]),
                  'alone': largest_distances(free[name], free['native'])}
  rounding = {kind: max(runs[name][kind]['worst'] for name in yardsticks)
              for kind in ('loss', 'update')}
  allowed = {'loss': max(tolerance * rounding['loss'], 1e-6),
             'update': tolerance * rounding['update']}
  for name in runs.keys() - set(yardsticks):
    runs[name]['within_rounding'] = all(runs[name][kind]['worst'] <= allowed[kind]
                                        for kind in allowed)
  return {'losses': {'first': free['native'][0], 'last': free['native'][-1]},
          'rounding': rounding, 'tolerance': tolerance,
          'yardsticks': {name: runs.pop(name) for name in yardsticks}, 'variants': runs}


def summary(distances: np.ndarray) -> dict[str, float]:
  finite = np.where(np.isfinite(distances), distances, np.inf)
  return {'median': significant(np.median(finite)), 'worst': significant(finite.max())}


def largest_distances(losses: np.ndarray, reference: np.ndarray) -> dict[str, float]:
  """Returns the largest distance of two runs' losses up to each of the steps `SHOWN`."""
  d = np.abs(losses - reference) / np.abs(reference)
  d = np.where(np.isfinite(d), d, np.inf)
  return {str(s): significant(d[:s].max()) for s in SHOWN if s <= len(d)}


def significant(x: float) -> float:
  return float(f'{x:.3g}')


def print_table(result: dict) -> None:
  print('\ndistance from native, same weights: loss median, worst; update median, worst')
  for name, run in (result['yardsticks'] | result['variants']).items():
    verdict = {None: '', True: 'within rounding', False: 'NOT within rounding'}[
        run.get('within_rounding')]
    print(f'{name[:40]:40}' + ''.join(f'{run[kind][k]:9.1e}' for kind in ('loss', 'update')
                                      for k in ('median', 'worst')), verdict)


if __name__ == '__main__':
  main()
