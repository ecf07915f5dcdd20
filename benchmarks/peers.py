"""Compares the speed of PPN with the same network in plain TensorFlow and in PyTorch.

  python benchmarks/peers.py --json
  python benchmarks/peers.py --dtypes=float32,bfloat16 --json
  python benchmarks/peers.py --device=cuda --json

Uses PPN on MobileNet-v1 at 300 px with 90 classes: the training step, the bare network (uint8
images to box codes and class logits), and detection with suppression (100 per class, 100 in all,
IoU 0.6).
Each side is a separate process (peers_sides/). For each workload, all sides start from the same
weights, images and ground truth, and their results are compared; only sides that agree are timed.
They take turns in rounds, with the order rotating, while the others are checked to be idle. Times
are medians over rounds of the medians within a round. `ratio_to_best_peer` is the time of ppn_jax
divided by that of the best peer in the same round; below 1 ppn_jax is faster.

In bfloat16 on a CPU, ppn_jax has `layers.matmul_dtype='bfloat16'`, PyTorch autocast, and TensorFlow
oneDNN's automatic mixed precision. With both dtypes, the peers take turns in float32 as well, and
`ratio_to_best_float32_peer` compares with the best of them.

The peers are installed in --env by pip on the first run (TensorFlow takes 1 GB; PyTorch 1 GB as CPU
wheel, 5 GB as default wheel. `--torch_requirements=torch==VERSION+cpu` selects the former, which
does not work with torchvision's default wheel, so that suppression is then written in PyTorch). On
a GPU, TensorFlow is left out, and PyTorch is that of --torch_python or of this interpreter. For
inference, peers have batch norm folded into their kernels (unless --keep_batch_norm). Suppression
in PyTorch considers the best 512 pairs, and more until the result is that of all pairs. If the
sides do not fit into a GPU's memory together, each runs by itself, which the JSON records. On a
GPU, XLA's counts of bytes and FLOPs per second are printed beside the rates of a large copy and a
large product.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np
import platformdirs

SIDES = ('ours', 'tensorflow', 'torch', 'torch_compiled')
KINDS = ('train', 'network', 'detect')
FOLDER = pathlib.Path(__file__).resolve().parent / 'peers_sides'
SCRIPTS = {'ours': 'ours.py', 'tensorflow': 'in_tensorflow.py', 'torch': 'in_torch.py'}
# Ending of the names of peers that stay in float32 in a workload of bfloat16.
FLOAT32 = '_float32'
NUM_CLASSES, IMAGES = 90, 64  # Larger batches repeat the images.
# Settings of glibc that keep freed memory, as in `ppn train`. They speed up the peers too.
MALLOC = ':'.join(f'glibc.malloc.{name}' for name in (
    'mmap_max=0', 'arena_max=1', 'trim_threshold=18446744073709551615', 'top_pad=268435456'))

# Allowed differences. In float32, PyTorch's channels-last batch norm has errors of up to 7e-4 in
# the variances of the first layers, and thus some percent in the gradients; its contiguous form and
# ppn_jax do not, compared with float64. TensorFlow's updates agree with PyTorch's to half a
# percent, so it may have the same errors. In float64, PyTorch's loss equals that of ppn_jax to
# 1e-7, its gradient to 0.2%.
TOLERANCES = {
    'float32': {'outputs': 2e-3, 'outputs_mean': 2e-4, 'loss': 3e-4, 'update': 0.3,
                'head_update': 0.02, 'averages': 2e-3, 'scores': 1e-3,
                'scores_mean': 1e-4, 'boxes': 1e-3, 'unmatched': 0.02},
    # Peers keep activations in bfloat16 too, with random weights, and the largest difference is one
    # of 200,000 outputs or 800 scores. float32 tells whether they compute the same.
    'bfloat16': {'outputs': 5.0, 'outputs_mean': 0.6, 'loss': 2e-2, 'update': 1.0,
                 'head_update': 0.4, 'averages': 5e-2, 'scores': 0.3,
                 'scores_mean': 0.05, 'boxes': 0.1, 'unmatched': 1.0}}


class SideFailed(Exception):
  """Raised if a side fails; `out_of_memory` tells whether for lack of memory."""

  def __init__(self, text: str, out_of_memory: bool = False):
    super().__init__(text)
    self.out_of_memory = out_of_memory


class Side:
  """Process of a side, which answers commands."""

  def __init__(self, name: str, python: str, task: Mapping, log: pathlib.Path):
    self.name, self._log = name, log
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    if task['device'] == 'cpu':
      environment |= {'GLIBC_TUNABLES': MALLOC, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    else:
      environment['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # The others need memory too.
    if name == 'ours':
      environment.pop('GLIBC_TUNABLES', None)
      environment['PYTHONPATH'] = os.pathsep.join(
          filter(None, (str(FOLDER.parents[1]), os.environ.get('PYTHONPATH'))))
    else:
      environment.pop('PYTHONPATH', None)
    self._process = subprocess.Popen(
        [python, FOLDER / SCRIPTS[_framework(name)], json.dumps(task)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=log.open('w'), text=True, env=environment)

  def ask(self, line: str) -> dict:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(line + '\n')
      self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      tail = self._log.read_text(errors='replace').strip().splitlines()[-1:]
      code = self._process.wait()
      raise SideFailed(f'ended with {code}: {" ".join(tail)[:300]}', out_of_memory=code == -9)
    answer = json.loads(answer)
    if 'error' in answer:
      raise SideFailed(answer['error'], answer['out_of_memory'])
    return answer

  def cpu_seconds(self) -> float:
    """Returns the CPU time that all threads have used so far."""
    fields = pathlib.Path(f'/proc/{self._process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

  def end(self) -> None:
    self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


def main() -> None:
  args = parse()
  with tempfile.TemporaryDirectory() as folder:
    result = measure(args, pathlib.Path(folder))
  for name, workload in result['workloads'].items():
    for ratio in ('ratio_to_best_peer', 'ratio_to_best_float32_peer'):
      if ratio in workload:
        print(name, ratio, workload[ratio] or 'unknown')
    for side, results in workload['sides'].items():
      print(f'  {side:23}', results.get('error') or
            f'{results["ms"]["median"]:9.1f} ms ({results["ms"]["fastest"]:.1f} to '
            f'{results["ms"]["slowest"]:.1f}), {results["images_per_s"]} images/s')
  if args.json:
    print(json.dumps(result))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
  parser.add_argument('--workloads', default=','.join(KINDS), help='some of train,network,detect')
  parser.add_argument('--sides', default='', help=f'some of {",".join(SIDES)}')
  parser.add_argument('--batch', default='', metavar='N,N',
                      help='default: on cpu 8 to train, 1,8 else; on cuda 64,256,1024')
  parser.add_argument('--dtypes', default='', help='float32,bfloat16; default on cpu the former')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=1.0, help='of each side in a round')
  parser.add_argument('--max_boxes', type=int, default=100, help='boxes, padding included')
  parser.add_argument('--keep_batch_norm', action='store_true', help='do not fold it in peers')
  parser.add_argument('--torch_mode', default='', help="torch.compile's mode")
  parser.add_argument('--env', default=str(platformdirs.user_cache_path('ppn_jax') / 'peers'),
                      metavar='FOLDER', help="environments of the peers")
  parser.add_argument('--tensorflow_python', default='', help='an interpreter that has it')
  parser.add_argument('--torch_python', default='', help='an interpreter that has it')
  parser.add_argument('--tensorflow_requirements', default='tensorflow-cpu')
  parser.add_argument('--torch_requirements', default='torch torchvision')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args(arguments)
  cuda = args.device == 'cuda'
  args.workloads = _chosen(parser, '--workloads', args.workloads, KINDS)
  args.sides = _chosen(parser, '--sides', args.sides or ','.join(
      s for s in SIDES if not (cuda and s == 'tensorflow')), SIDES)
  args.dtypes = _chosen(parser, '--dtypes', args.dtypes or (
      'float32,bfloat16' if cuda else 'float32'), ('float32', 'bfloat16'))
  if cuda and 'tensorflow' in args.sides:
    parser.error('--sides=tensorflow is for --device=cpu')
  try:
    args.batch = [int(n) for n in filter(None, args.batch.split(','))]
  except ValueError:
    parser.error(f'--batch={args.batch} must be integers separated by commas')
  for name, least in (('rounds', 1), ('max_boxes', 20), ('seconds', 0)):
    if not getattr(args, name) >= least:
      parser.error(f'--{name}={getattr(args, name)} must be at least {least}')
  if any(n < 1 for n in args.batch):
    parser.error('--batch must be at least 1')
  if 'ours' not in args.sides:
    parser.error("--sides must include 'ours', with which the others are compared")
  return args


def _chosen(parser, flag: str, text: str, legal: Sequence[str]) -> list[str]:
  names = text.split(',')
  for name in names:
    if name not in legal:
      parser.error(f'{flag}={text}: {name!r} is not one of {", ".join(legal)}')
  return [name for name in legal if name in names]


def measure(args: argparse.Namespace, folder: pathlib.Path) -> dict:
  pythons = {side: interpreter(args, side) for side in args.sides}
  in_float32 = {side + FLOAT32: python for side, python in pythons.items()
                if args.device == 'cpu' and len(args.dtypes) > 1 and side != 'ours'}
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(
      filter(None, (str(FOLDER.parents[1]), os.environ.get('PYTHONPATH'))))}
  batches = {kind: args.batch or ([64, 256, 1024] if args.device == 'cuda' else
                                  [8] if kind == 'train' else [1, 8]) for kind in KINDS}
  most = max(max(batches[kind]) for kind in args.workloads)
  subprocess.run([sys.executable, FOLDER / 'material.py', folder, str(NUM_CLASSES),
                  str(min(most, IMAGES)), str(args.max_boxes)], check=True, env=environment)
  workloads, described = {}, {}
  for kind in args.workloads:
    for dtype in args.dtypes:
      for batch in batches[kind]:
        task = {'kind': kind, 'batch': batch, 'dtype': dtype, 'device': args.device,
                'threads': len(os.sched_getaffinity(0)), 'folder': str(folder)}
        name = f'{kind}_{batch}' + ('' if args.dtypes == ['float32'] else f'_{dtype}')
        print(f'{name} ...', file=sys.stderr, flush=True)
        sides = pythons | (in_float32 if dtype == 'bfloat16' else {})
        workloads[name] = run_workload(args, sides, task, folder, described)
  ours = described.pop('ours', {})
  result = {'benchmark': 'peers', 'rounds': args.rounds, 'max_boxes': args.max_boxes,
            'batch_norm_folded': not args.keep_batch_norm, 'tolerances': TOLERANCES,
            'load_average': os.getloadavg()[0], 'workloads': workloads,
            'versions': {side: d['versions'] for side, d in described.items()},
            'suppression': {side: d.get('nms') for side, d in described.items()},
            **ours.get('hardware', {})}
  if args.device == 'cuda':
    result['ceilings'] = ceilings(pythons['ours'], folder)
  return result


def _framework(side: str) -> str:
  return side.partition('_')[0]


def interpreter(args: argparse.Namespace, side: str) -> str:
  """Returns a Python with the side's framework, installed if necessary."""
  if side == 'ours':
    return sys.executable
  name = _framework(side)
  given = getattr(args, f'{name}_python') or (sys.executable if args.device == 'cuda' else '')
  if given:
    return given
  env = pathlib.Path(args.env) / name
  python, complete = env / 'bin' / 'python', env / 'complete'
  requirements = getattr(args, f'{name}_requirements')
  if not complete.exists() or complete.read_text() != requirements:
    print(f'installing {requirements} to {env}', file=sys.stderr, flush=True)
    subprocess.run([sys.executable, '-m', 'venv', env], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', 'numpy',
                    *requirements.split()], check=True, stdout=sys.stderr)
    complete.write_text(requirements)
  return str(python)


def run_workload(args, pythons: Mapping[str, str], task: dict, folder: pathlib.Path,
                 described: dict) -> dict:
  """Times all sides in turns, or one after the other if they do not fit into memory together."""
  groups, together = [list(pythons)], True
  while True:
    results, times = {}, {}
    for side in pythons:
      (folder / f'{side}.npz').unlink(missing_ok=True)  # Of the previous workload.
    try:
      for group in groups:
        time_group(args, {s: pythons[s] for s in group}, task, folder, together, results, times,
                   described)
    except SideFailed:
      groups, together = [[side] for side in pythons], False
      continue
    return {'alternating': together, 'sides': results, **ratios(times)}


def time_group(args, pythons: Mapping[str, str], task: dict, folder: pathlib.Path, together: bool,
               results: dict, times: dict, described: dict) -> None:
  """Starts, compares and times the sides of a group; fills `results`, `times` and `described`.

  Raises:
    SideFailed: If sides that run together on a GPU exhaust its memory.
  """
  def failed(side: str, e: SideFailed) -> None:
    if e.out_of_memory and together and task['device'] == 'cuda' and len(pythons) > 1:
      raise e
    print(f'  {side}: {e}', file=sys.stderr, flush=True)
    results[side] = {'error': str(e), 'out_of_memory': e.out_of_memory}
    running.pop(side).end()

  running = {}
  try:
    counts = {}
    for side, python in pythons.items():
      own = {'options': _options(args, side, task)}
      if side.endswith(FLOAT32):
        own['dtype'] = 'float32'
      running[side] = Side(side, python, {**task, **own}, folder / f'{side}.log')
      try:
        prepared = running[side].ask(f'prepare {folder}/{side}.npz')
        results[side] = {'prepare_s': round(prepared['prepare_s'], 1)}
        if side != 'ours':
          results[side]['differences'] = compare(folder, side, task)
        once = running[side].ask('run 1')['seconds'][0]
        counts[side] = int(np.clip(args.seconds / once, 1, 50))
      except SideFailed as e:
        failed(side, e)
    idle = _idle_shares(running)
    names = list(running)
    for turn in range(args.rounds):
      shift = turn % max(1, len(names))
      for side in names[shift:] + names[:shift]:
        if side in running:
          try:
            seconds = running[side].ask(f'run {counts[side]}')['seconds']
            times.setdefault(side, []).append(1000 * float(np.median(seconds)))
          except SideFailed as e:
            times.pop(side, None)
            failed(side, e)
    for side, process in running.items():
      description = process.ask('describe')
      described[side] = description
      results[side] |= {'ms': summary(times[side]), 'idle_cpu': idle[side],
                        'images_per_s': round(1000 * task['batch'] / np.median(times[side]), 1),
                        **description['memory'], **achieved(description, times[side])}
  finally:
    for process in running.values():
      process.end()


def _options(args, side: str, task: Mapping) -> dict:
  options = {'fold': not args.keep_batch_norm}
  if side.startswith('torch_compiled'):
    options['compile'] = args.torch_mode or (
        'default' if task['device'] == 'cpu' else 'reduce-overhead')
  return options


def _idle_shares(running: Mapping[str, Side]) -> dict[str, float]:
  """Returns the number of CPUs that each side uses while it waits."""
  time.sleep(0.5)
  before = {side: p.cpu_seconds() for side, p in running.items()}
  time.sleep(1)
  return {side: round(p.cpu_seconds() - before[side], 2) for side, p in running.items()}


def compare(folder: pathlib.Path, side: str, task: Mapping) -> dict[str, float]:
  """Returns the largest differences between a side's results and those of ppn_jax.

  Raises:
    SideFailed: If a difference exceeds its tolerance.
  """
  if not (folder / 'ours.npz').exists():
    raise SideFailed('not timed: there are no results of ppn_jax to compare with')
  a, b = (dict(np.load(folder / f'{name}.npz')) for name in ('ours', side))
  if task['kind'] == 'network':
    apart = [np.abs(a[name] - b[name]) for name in a]
    found = {'outputs': max(float(x.max()) for x in apart),
             'outputs_mean': max(float(x.mean()) for x in apart)}
  elif task['kind'] == 'detect':
    found = detection_differences(a, b)
  else:
    found = step_differences(a, b, dict(np.load(folder / 'weights.npz')))
  tolerances = TOLERANCES[task['dtype']]
  for name, value in found.items():
    if not value <= tolerances[name]:
      raise SideFailed(f'not timed: {name} differ by {value:.3g} from those of ppn_jax, and '
                       f'{tolerances[name]} is allowed')
  return {name: float(f'{value:.3g}') for name, value in found.items()}


def step_differences(a: Mapping, b: Mapping, before: Mapping) -> dict[str, float]:
  """Compares training steps.

  Returns:
    Relative differences of the loss, of the change of the parameters (Euclidean norm), of that in
    the last layers alone, and of batch norm's averages (relative to the largest of a layer).
  """
  def update(prefix: str) -> float:
    names = [name for name in before if name.startswith(prefix)]
    change = [np.concatenate([np.ravel(x[n] - before[n]) for n in names]) for x in (a, b)]
    return float(np.linalg.norm(change[1] - change[0]) / np.linalg.norm(change[0]))

  return {'loss': abs(float(b['loss'] / a['loss']) - 1), 'update': update('params/'),
          'head_update': max(update(f'params/head/{name}') for name in ('box', 'class')),
          'averages': max(float(np.abs(a[n] - b[n]).max() / np.abs(a[n]).max())
                          for n in before if n.startswith('batch_stats/'))}


def detection_differences(a: Mapping, b: Mapping) -> dict[str, float]:
  """Compares detections.

  Rounding can move an overlap across the threshold, and another detection then takes the place.

  Returns:
    Largest differences of the sorted scores and of matching boxes, and the share of detections
    without a matching box.
  """
  unmatched, furthest = 0, 0.0
  for i in range(len(a['scores'])):
    mine = a['boxes'][i][a['valid'][i]]
    others = b['boxes'][i][b['valid'][i]]
    apart = np.abs(mine[:, None] - others[None]).max(-1)
    same = a['labels'][i][a['valid'][i]][:, None] == b['labels'][i][b['valid'][i]][None]
    nearest = np.where(same, apart, np.inf).min(1, initial=np.inf)
    matched = nearest < 0.01
    unmatched += int((~matched).sum()) + abs(len(mine) - len(others))
    furthest = max(furthest, float(nearest[matched].max(initial=0)))
  apart = np.abs(a['scores'] - b['scores'])
  return {'scores': float(apart.max()), 'scores_mean': float(apart.mean()), 'boxes': furthest,
          'unmatched': unmatched / max(1, int(a['valid'].sum()))}


def summary(times: Sequence[float]) -> dict[str, float]:
  """Returns median, fastest and slowest time."""
  return {'median': round(float(np.median(times)), 3), 'fastest': round(min(times), 3),
          'slowest': round(max(times), 3)}


def ratios(times: Mapping[str, Sequence[float]]) -> dict:
  """Returns the time of ppn_jax over that of the peer with the lowest median, by round.

  Peers that stay in float32 are compared separately.
  """
  in_float32 = [side for side in times if side.endswith(FLOAT32)]
  peers = [side for side in times if side != 'ours' and side not in in_float32]
  return {**_ratio(times, peers, 'best_peer'),
          **(_ratio(times, in_float32, 'best_float32_peer') if in_float32 else {})}


def _ratio(times: Mapping[str, Sequence[float]], peers: Sequence[str], name: str) -> dict:
  if not peers or 'ours' not in times:
    return {name: None, f'ratio_to_{name}': None}
  best = min(peers, key=lambda side: np.median(times[side]))
  return {name: best, f'ratio_to_{name}': summary(
      [a / b for a, b in zip(times['ours'], times[best], strict=True)])}


def achieved(description: Mapping, times: Sequence[float]) -> dict[str, float]:
  """Returns XLA's counts for the program divided by the median time."""
  seconds, program = float(np.median(times)) / 1000, description.get('program') or {}
  names = {'flops': ('tflop_per_s', 1e12), 'bytes': ('gb_per_s', 1e9)}
  return {names[key][0]: round(count / seconds / names[key][1], 3)
          for key, count in program.items() if count and count > 0}


def ceilings(python: str, folder: pathlib.Path) -> dict[str, float]:
  """Measures TFLOP/s of a large product by dtype, and GB/s, read and written, of a large copy."""
  done = subprocess.run([python, FOLDER / 'ceilings.py'], check=True, text=True,
                        stdout=subprocess.PIPE, cwd=folder)
  return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
  main()
