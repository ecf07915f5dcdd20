"""Our detector beside the same network in plain TensorFlow and in PyTorch, in one run, in turns.

  python benchmarks/peers.py --json
  python benchmarks/peers.py --device=cuda --json

PPN on MobileNet-v1 at 300 px with 90 classes: the training step, the bare network (uint8 images to
box codes and class logits), and detection with suppression (100 of a class, 100 in all, IoU .6).
Each side is a process of its own (peers_sides/). For each workload all are started from the same
weights, images and truth, and what they compute is compared; only sides that agree are timed. Then
they take turns, round by round, the order turning too; those that wait are seen to be idle.
Figures are medians over rounds of the medians within one, and `ratio_to_best_peer` is our time over
that of the best peer of the same round: below 1 we are faster.

Peers live in --env, which pip fills on the first run (TensorFlow 1 GB; PyTorch 1 GB as its CPU
wheel, 5 GB as the default one; `--torch_requirements=torch==VERSION+cpu` names the former, which
torchvision's default wheel does not fit, so suppression is then written in PyTorch). On a GPU
there is no TensorFlow, and PyTorch is that of --torch_python or of this interpreter. Peers at
inference have batch norm folded into their kernels (--keep_batch_norm leaves it), suppression in
PyTorch looks at the best 512 pairs and at more until the result is that of all of them. Where all
sides do not fit into a GPU's memory together, each runs by itself, which the JSON says. On a GPU
XLA's count of bytes and FLOPs over our time is put beside a large copy and a large product.
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
SCRIPTS = {'ours': 'ours.py', 'tensorflow': 'in_tensorflow.py', 'torch': 'in_torch.py',
           'torch_compiled': 'in_torch.py'}
NUM_CLASSES, IMAGES = 90, 64  # More images than IMAGES are these again.
# glibc as `ppn train` sets it for itself: freed memory is kept. Peers gain by it as well.
MALLOC = ':'.join(f'glibc.malloc.{name}' for name in (
    'mmap_max=0', 'arena_max=1', 'trim_threshold=18446744073709551615', 'top_pad=268435456'))

# What may differ. In float32 PyTorch's channels-last batch norm has the first layers' variances off
# by up to 7e-4, and with them the gradients by some percent; its contiguous form has not, nor have
# we, by float64. TensorFlow's updates are PyTorch's to half a percent, so it may be the same there.
# In float64 PyTorch's loss is ours to 1e-7, its gradient to .2%.
TOLERANCES = {
    'float32': {'outputs': 2e-3, 'loss': 3e-4, 'update': 0.3, 'head_update': 0.02,
                'averages': 2e-3, 'scores': 1e-3, 'boxes': 1e-3, 'unmatched': 0.02},
    'bfloat16': {'outputs': 1.0, 'loss': 2e-2, 'update': 1.0, 'head_update': 0.2,
                 'averages': 5e-2, 'scores': 0.1, 'boxes': 0.1, 'unmatched': 1.0}}


class SideFailed(Exception):
  """A side could not do what it was asked; `out_of_memory` says whether for want of memory."""

  def __init__(self, text: str, out_of_memory: bool = False):
    super().__init__(text)
    self.out_of_memory = out_of_memory


class Side:
  """A process that obeys lines."""

  def __init__(self, name: str, python: str, task: Mapping, log: pathlib.Path):
    self.name, self._log = name, log
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    if task['device'] == 'cpu':
      environment |= {'GLIBC_TUNABLES': MALLOC, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    else:
      environment['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # Others need memory, too.
    if name == 'ours':
      environment.pop('GLIBC_TUNABLES', None)
      environment['PYTHONPATH'] = os.pathsep.join(
          filter(None, (str(FOLDER.parents[1]), os.environ.get('PYTHONPATH'))))
    else:
      environment.pop('PYTHONPATH', None)
    self._process = subprocess.Popen(
        [python, FOLDER / SCRIPTS[name], json.dumps(task)], stdin=subprocess.PIPE,
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
    """Used so far by all of its threads."""
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
    print(name, f"({workload['ratio_to_best_peer'] or 'no ratio'})")
    for side, figures in workload['sides'].items():
      print(f'  {side:15}', figures.get('error') or
            f'{figures["ms"]["median"]:9.1f} ms ({figures["ms"]["fastest"]:.1f} to '
            f'{figures["ms"]["slowest"]:.1f}), {figures["images_per_s"]} images/s')
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
  parser.add_argument('--seconds', type=float, default=1.0, help='a side has in each round')
  parser.add_argument('--max_boxes', type=int, default=100, help='truth boxes, padding included')
  parser.add_argument('--keep_batch_norm', action='store_true', help='peers do not fold it')
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
  if not cuda and 'bfloat16' in args.dtypes:
    parser.error('--dtypes=bfloat16 is for --device=cuda')
  try:
    args.batch = [int(n) for n in filter(None, args.batch.split(','))]
  except ValueError:
    parser.error(f'--batch={args.batch} must be whole numbers with commas between')
  for name, least in (('rounds', 1), ('max_boxes', 20), ('seconds', 0)):
    if not getattr(args, name) >= least:
      parser.error(f'--{name}={getattr(args, name)} must be at least {least}')
  if any(n < 1 for n in args.batch):
    parser.error('--batch must be at least 1')
  if 'ours' not in args.sides:
    parser.error("--sides must have 'ours' among them, with which the others are compared")
  return args


def _chosen(parser, flag: str, text: str, legal: Sequence[str]) -> list[str]:
  names = text.split(',')
  for name in names:
    if name not in legal:
      parser.error(f'{flag}={text}: {name!r} is none of {", ".join(legal)}')
  return [name for name in legal if name in names]


def measure(args: argparse.Namespace, folder: pathlib.Path) -> dict:
  pythons = {side: interpreter(args, side) for side in args.sides}
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
        workloads[name] = run_workload(args, pythons, task, folder, described)
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


def interpreter(args: argparse.Namespace, side: str) -> str:
  """Python with the side's framework, made where there is none."""
  if side == 'ours':
    return sys.executable
  name = side.partition('_')[0]
  given = getattr(args, f'{name}_python') or (sys.executable if args.device == 'cuda' else '')
  if given:
    return given
  env = pathlib.Path(args.env) / name
  python, complete = env / 'bin' / 'python', env / 'complete'
  wanted = getattr(args, f'{name}_requirements')
  if not complete.exists() or complete.read_text() != wanted:
    print(f'installing {wanted} to {env}', file=sys.stderr, flush=True)
    subprocess.run([sys.executable, '-m', 'venv', env], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', 'numpy',
                    *wanted.split()], check=True, stdout=sys.stderr)
    complete.write_text(wanted)
  return str(python)


def run_workload(args, pythons: Mapping[str, str], task: dict, folder: pathlib.Path,
                 described: dict) -> dict:
  """All sides beside each other; where they do not fit into memory, one after the other."""
  groups, together = [list(pythons)], True
  while True:
    figures, times = {}, {}
    for side in pythons:
      (folder / f'{side}.npz').unlink(missing_ok=True)  # Of the workload before.
    try:
      for group in groups:
        time_group(args, {s: pythons[s] for s in group}, task, folder, together, figures, times,
                   described)
    except SideFailed:
      groups, together = [[side] for side in pythons], False
      continue
    return {'alternating': together, 'sides': figures, **ratios(times)}


def time_group(args, pythons: Mapping[str, str], task: dict, folder: pathlib.Path, together: bool,
               figures: dict, times: dict, described: dict) -> None:
  """Starts the sides of a group, compares and times them; fills the last three.

  Raises:
    SideFailed: out of memory, while sides ran together on one GPU.
  """
  def failed(side: str, e: SideFailed) -> None:
    if e.out_of_memory and together and task['device'] == 'cuda' and len(pythons) > 1:
      raise e
    print(f'  {side}: {e}', file=sys.stderr, flush=True)
    figures[side] = {'error': str(e), 'out_of_memory': e.out_of_memory}
    running.pop(side).end()

  running = {}
  try:
    counts = {}
    for side, python in pythons.items():
      running[side] = Side(side, python, {**task, 'options': _options(args, side, task)},
                           folder / f'{side}.log')
      try:
        prepared = running[side].ask(f'prepare {folder}/{side}.npz')
        figures[side] = {'prepare_s': round(prepared['prepare_s'], 1)}
        if side != 'ours':
          figures[side]['differences'] = compare(folder, side, task)
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
      said = process.ask('describe')
      described[side] = said
      figures[side] |= {'ms': spread(times[side]), 'idle_cpu': idle[side],
                        'images_per_s': round(1000 * task['batch'] / np.median(times[side]), 1),
                        **said['memory'], **achieved(said, times[side])}
  finally:
    for process in running.values():
      process.end()


def _options(args, side: str, task: Mapping) -> dict:
  options = {'fold': not args.keep_batch_norm}
  if side == 'torch_compiled':
    options['compile'] = args.torch_mode or (
        'default' if task['device'] == 'cpu' else 'reduce-overhead')
  return options


def _idle_shares(running: Mapping[str, Side]) -> dict[str, float]:
  """CPUs that each side uses while it waits."""
  time.sleep(0.5)
  before = {side: p.cpu_seconds() for side, p in running.items()}
  time.sleep(1)
  return {side: round(p.cpu_seconds() - before[side], 2) for side, p in running.items()}


def compare(folder: pathlib.Path, side: str, task: Mapping) -> dict[str, float]:
  """The largest differences between a side's results and ours.

  Raises:
    SideFailed: one is beyond its tolerance.
  """
  if not (folder / 'ours.npz').exists():
    raise SideFailed('not timed: there is nothing of ours to compare with')
  a, b = (dict(np.load(folder / f'{name}.npz')) for name in ('ours', side))
  if task['kind'] == 'network':
    found = {'outputs': max(float(np.abs(a[name] - b[name]).max()) for name in a)}
  elif task['kind'] == 'detect':
    found = detection_differences(a, b)
  else:
    found = step_differences(a, b, dict(np.load(folder / 'weights.npz')))
  tolerances = TOLERANCES[task['dtype']]
  for name, value in found.items():
    if not value <= tolerances[name]:
      raise SideFailed(f'not timed: {name} differ by {value:.3g} from ours, and '
                       f'{tolerances[name]} is allowed')
  return {name: float(f'{value:.3g}') for name, value in found.items()}


def step_differences(a: Mapping, b: Mapping, before: Mapping) -> dict[str, float]:
  """Of the loss (relative), the parameters' change (Euclidean, relative; also of the last layers
  alone) and batch norm's averages (of a layer's largest)."""
  def update(prefix: str) -> float:
    names = [name for name in before if name.startswith(prefix)]
    change = [np.concatenate([np.ravel(x[n] - before[n]) for n in names]) for x in (a, b)]
    return float(np.linalg.norm(change[1] - change[0]) / np.linalg.norm(change[0]))

  return {'loss': abs(float(b['loss'] / a['loss']) - 1), 'update': update('params/'),
          'head_update': max(update(f'params/head/{name}') for name in ('box', 'class')),
          'averages': max(float(np.abs(a[n] - b[n]).max() / np.abs(a[n]).max())
                          for n in before if n.startswith('batch_stats/'))}


def detection_differences(a: Mapping, b: Mapping) -> dict[str, float]:
  """Of the sorted scores, of the boxes that find their like, and the share of those that do not.

  Rounding may let an overlap pass the threshold and another detection take a place.
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
  return {'scores': float(np.abs(a['scores'] - b['scores']).max()), 'boxes': furthest,
          'unmatched': unmatched / max(1, int(a['valid'].sum()))}


def spread(times: Sequence[float]) -> dict[str, float]:
  return {'median': round(float(np.median(times)), 3), 'fastest': round(min(times), 3),
          'slowest': round(max(times), 3)}


def ratios(times: Mapping[str, Sequence[float]]) -> dict:
  """Our time over the best peer's, round by round; the best is the one with the lowest median."""
  peers = {side: t for side, t in times.items() if side != 'ours'}
  if not peers or 'ours' not in times:
    return {'best_peer': None, 'ratio_to_best_peer': None}
  best = min(peers, key=lambda side: np.median(peers[side]))
  return {'best_peer': best, 'ratio_to_best_peer': spread(
      [a / b for a, b in zip(times['ours'], peers[best], strict=True)])}


def achieved(said: Mapping, times: Sequence[float]) -> dict[str, float]:
  """What XLA counts of the program, over the median time."""
  seconds, program = float(np.median(times)) / 1000, said.get('program') or {}
  names = {'flops': ('tflop_per_s', 1e12), 'bytes': ('gb_per_s', 1e9)}
  return {names[key][0]: round(count / seconds / names[key][1], 3)
          for key, count in program.items() if count and count > 0}


def ceilings(python: str, folder: pathlib.Path) -> dict[str, float]:
  """A large product's TFLOP/s by dtype and a large copy's GB/s, read and written."""
  done = subprocess.run([python, FOLDER / 'ceilings.py'], check=True, text=True,
                        stdout=subprocess.PIPE, cwd=folder)
  return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
  main()
