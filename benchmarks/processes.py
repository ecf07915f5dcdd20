"""Checks that several processes compute what one does, and resume what fewer have started.

  python benchmarks/processes.py --json

Trains a small PPN on the synthetic shapes with 1, 2 and 4 processes of two virtual devices each,
with real collectives on localhost: in float64 for all steps, so that sums in another order differ
by rounding only, and in float32 for the loss of the first step. Then 2 processes take half of the
steps and save, and 4 processes take the rest. Losses, parameters, COCO's metrics and the image ids
of every batch are compared with those of one process. Exits with 1 if more than rounding differs.
With --json the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

DEVICES = 2
BATCH = 8  # One row per device of the largest run.
ROUNDING = 1e-6  # Relative, for float64 after all steps, which amplify the first difference.
UNINTERRUPTED = (1, 2, 4)  # Numbers of processes of the uninterrupted runs.


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  parser.add_argument('--out', help='internal: file that the first process of a run writes')
  parser.add_argument('--workdir', help='internal: workdir to resume from and save to')
  parser.add_argument('--until', type=int, default=0, help='internal: the last step')
  parser.add_argument('--dtype', default='float64', help='internal: dtype of the activations')
  parser.add_argument('--entry', action='append', default=[],
                      help="internal: 'block.key=value' of the config")
  parser.add_argument('--joined', nargs=argparse.REMAINDER, default=[],
                      help='internal: process flags of ppn')
  args = parser.parse_args()
  if args.out:
    return run_process(args)
  with tempfile.TemporaryDirectory() as folder:
    measured = measure(pathlib.Path(folder), args.steps)
  for name, value in measured.items():
    print(f'{name}: {value}')
  if args.json:
    print(json.dumps(measured))
  return 0 if measured['ok'] else 1


def measure(folder: pathlib.Path, steps: int) -> dict:
  """Runs everything and returns the differences."""
  import numpy as np
  runs = {f'{n}': run(folder, n, steps, until=steps) for n in UNINTERRUPTED}
  run(folder, 2, steps, until=steps // 2, workdir='broken')
  runs['2 then 4'] = run(folder, 4, steps, until=steps, workdir='broken')
  first = {f'{n}': run(folder, n, steps, until=1, dtype='float32') for n in UNINTERRUPTED}
  one = runs.pop('1')
  measured = {'steps': steps, 'devices_of_each': DEVICES, 'batch': BATCH,
              'loss': [float(one['losses'][0]), float(one['losses'][-1])],
              'figures': json.loads(str(one['figures']))['metrics'],
              'detections': json.loads(str(one['figures']))['num_detections'], 'against_1': {}}
  for name, other in runs.items():
    taken = len(other['losses'])
    measured['against_1'][name] = {
        'losses': differ(one['losses'][-taken:], other['losses']),
        'parameters': max(differ(one[key], other[key]) for key in one if key.startswith('state')),
        'figures': differ(figures(one), figures(other)),
        'order': bool(np.array_equal(one['ids'][-taken:], other['ids']))}
  measured['float32_first_loss'] = max(differ(first['1']['losses'], first[n]['losses'])
                                       for n in first)
  measured['ok'] = measured['float32_first_loss'] < 1e-5 and all(
      max(d['losses'], d['parameters'], d['figures']) < ROUNDING and d['order']
      for d in measured['against_1'].values())
  return measured


def figures(result: dict):
  return list(json.loads(str(result['figures']))['metrics'].values())


def differ(one, other) -> float:
  """Returns the largest difference, relative to the largest value."""
  import numpy as np
  one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
  return float(np.max(np.abs(one - other)) / max(float(np.max(np.abs(one))), 1e-30))


def run(folder: pathlib.Path, processes: int, steps: int, *, until: int, workdir: str = '',
        dtype: str = 'float64', entries: Sequence[str] = ()) -> dict:
  """Runs several processes together; returns the arrays that the first one writes.

  Args:
    folder: for what they write.
    processes: number of processes.
    steps: steps of the run.
    until: step after which they end.
    workdir: name of the workdir, to resume from and save to; '' for one of their own.
    dtype: dtype of the activations.
    entries: 'block.key=value', changes of the config.
  """
  import numpy as np
  out = folder / f'{processes}_{until}_{dtype}_{workdir}.npz'
  with socket.socket() as probe:
    probe.bind(('', 0))
    port = probe.getsockname()[1]
  command = [sys.executable, __file__, f'--steps={steps}', f'--out={out}', f'--until={until}',
             f'--dtype={dtype}', f'--workdir={folder / (workdir or out.stem)}',
             *(f'--entry={entry}' for entry in entries), '--joined',
             f'--local_devices={DEVICES}']
  together = [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
  # Most of the time is compilation, which does not matter here.
  environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_PLATFORMS': 'cpu'}
  children = [subprocess.Popen(
      command + ([*together, f'--process_id={i}'] if processes > 1 else []), env=environment,
      stdout=subprocess.DEVNULL) for i in range(processes)]
  codes = [child.wait() for child in children]
  if any(codes):
    raise SystemExit(f'{processes} processes ended with {codes}')
  return dict(np.load(out))


def run_process(args: argparse.Namespace) -> int:
  """Runs one process of a run, from the newest checkpoint or the start to step `until`."""
  import jax
  jax.config.update('jax_enable_x64', args.dtype == 'float64')
  from ppn_jax.cli import flags
  parser = argparse.ArgumentParser()
  flags.add_process_flags(parser)
  flags.join_processes(parser.parse_args(args.joined))
  import numpy as np
  from tiny import tiny_config

  from ppn_jax.config_files import override
  from ppn_jax.data.source import build_source
  from ppn_jax.distributed import sharding
  from ppn_jax.jobs.evaluator import build_evaluator
  from ppn_jax.run import create_run
  from ppn_jax.training.train_step import jit_train_step

  config = tiny_config(steps=args.steps, batch_size=BATCH).copy_and_resolve_references().unlock()
  config.model.layers.dtype = args.dtype
  config.model.backbone.last_block, config.model.neck.stride, config.model.neck.num_levels = 3, 4, 2
  config.data.eval.num_images = 16
  config.eval.batch_size = BATCH
  source = build_source({'name': 'synthetic_shapes', 'num_images': 20, 'image_size': 64})
  run = create_run(args.workdir, override(config, args.entry), source.categories)
  if jax.process_index() == 0:
    run.save()
  detector, optimizer, mesh = run.detector(), run.optimizer(), sharding.data_mesh()
  with run.checkpoints(read_only=False) as checkpoints:
    start, state = first_state(detector, optimizer, mesh, checkpoints)
    state, losses, ids = train(jit_train_step(detector, optimizer, mesh), state, source, mesh,
                               start, args.until)
    checkpoints.save(args.until, state)
  evaluator = build_evaluator(run, detector, mesh)
  scores = evaluator.score(evaluator.rows(state.best_variables()))
  leaves = jax.tree_util.tree_leaves_with_path(sharding.to_host(state.variables))
  if jax.process_index() == 0:
    np.savez(args.out, losses=losses, ids=ids, figures=json.dumps(scores._asdict()),
             **{'state/' + jax.tree_util.keystr(path, simple=True, separator='/'): leaf
                for path, leaf in leaves})
  return 0


def first_state(detector, optimizer, mesh, checkpoints):
  """Returns the newest saved step and its state, or a new state; in float64 if that is enabled."""
  import jax
  import jax.numpy as jnp

  from ppn_jax.training.train_step import abstract_state, jit_init

  def wide(x):
    return jnp.float64 if jax.config.jax_enable_x64 and x.dtype == jnp.float32 else x.dtype

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x), sharding=x.sharding),
                      abstract_state(detector, optimizer, mesh))
  if checkpoints.latest() is not None:
    return checkpoints.restore_newest(like)
  widen = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(wide(x)), tree),
                  out_shardings=jax.tree.map(lambda x: x.sharding, like))
  return 0, widen(jit_init(detector, optimizer, mesh)(0))


def train(step, state, source, mesh, start: int, until: int):
  """Trains; returns the state, losses [steps] and, on the first process, image ids [steps, B]."""
  import numpy as np

  from ppn_jax.data.loader import train_batches
  from ppn_jax.distributed import coordination, sharding
  rows = sharding.local_rows(BATCH, mesh)
  batches = train_batches(source, transforms=(), image_size=64, max_boxes=8, batch_size=BATCH,
                          seed=0, start_step=start, rows=rows)
  losses, own, compiled = [], [], None
  for batch, _ in zip(batches, range(start, until), strict=False):
    placed = sharding.to_global((batch.images, batch.ground_truth), mesh, BATCH)
    if compiled is None:
      compiled = step.lower(state, *placed).compile()
      coordination.wait_for_all()
    state, metrics = compiled(state, *placed)
    losses.append(float(metrics.loss))
    own.append(batch.image_id)
  pieces = coordination.gather(np.stack([rows, *own]).astype(np.int64).tobytes())
  if not pieces:
    return state, losses, None
  table = np.concatenate([np.frombuffer(piece, np.int64).reshape(1 + len(own), -1)
                          for piece in pieces], axis=1)
  return state, losses, table[1:, np.argsort(table[0])]


if __name__ == '__main__':
  sys.exit(main())
