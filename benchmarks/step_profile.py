"""Shows where the time of a training step goes on a CPU, by kind of work; the parts add up.

  python benchmarks/step_profile.py --json
  python benchmarks/step_profile.py --work=detect --batch=1 --top=20

Traces steps of PPN, or calls of the network or of detection, with JAX's profiler, which records
when each operation of the compiled program ran. The program's metadata tells the layer and the
primitive that an operation comes from, and thus its kind. At each moment, the operations that run
at the same time on several cores share the time equally, so the kinds and what is left ('between
operations') add up to the time of the steps. Some products of float32 run in threads that the
profiler does not see; while nothing else runs, their time is 'between operations' as well. Times of
operations inside loops count for themselves, not for the loop. XLA fuses operations of several
kinds into one; it counts as its last one.

`traced_over_untraced` compares with the same steps without the profiler. With --json the last line
is JSON.
"""

import argparse
import glob
import heapq
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import hardware
import jax
from jax.profiler import ProfileData
from train_step import set_up, set_up_inference

from ppn_jax.config import base_config

BETWEEN = 'between operations'
UNNAMED = 'operations that XLA added'
# The first expression that is found in an operation's path gives its kind.
KINDS = (
    ('batch norm and ReLU6', r'/norm\w*/|/clamp$|(pointwise|depthwise|conv2d_0|_tower)/select_n$'),
    ('depthwise convolutions', r'/depthwise/'),
    ('max pooling', r'/neck/'),
    ('matrix products, their patches and casts', r'dot_general|conv_general_dilated|/cond/branch'),
    ('other parts of the network', r'Network'),
    ('assignment and loss', r'jvp\('),
    ('decoding and suppression', r'^jit\(detect\)'),
    ('optimizer and averages', r'.'),
    (UNNAMED, r''))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--work', default='train', choices=('train', 'network', 'detect'))
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--image_size', type=int, default=300)
  parser.add_argument('--num_classes', type=int, default=90)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--matmul_dtype', default='same', choices=('same', 'bfloat16', 'auto'))
  parser.add_argument('--conv_form', default='auto', choices=('auto', 'native', 'shifted'))
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--top', type=int, default=0, help='also print this many operations')
  parser.add_argument('--json', action='store_true', help='print JSON as the last line')
  args = parser.parse_args()

  config = base_config()
  config.model.image_size, config.model.num_classes = args.image_size, args.num_classes
  config.model.layers.update(dtype=args.dtype, conv_form=args.conv_form,
                             matmul_dtype=args.matmul_dtype)
  if args.work == 'train':
    setup = set_up(config, args.batch)
    run, compiled = setup.train_step, setup.compiled
  else:
    run, compiled = set_up_inference(config, args.work, args.batch)
  untraced = timed(run, args.steps)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      timed(run, args.steps)
    by_operation, total = operation_times(folder, args.steps)
  paths = operation_paths(compiled.as_text())
  kinds = defaultdict(float)
  for operation, ms in by_operation.items():
    kinds[kind_of(operation, paths)] += ms
  assert abs(sum(kinds.values()) - total) < 1e-6 * total
  result = {
      'benchmark': 'step_profile', 'work': args.work, 'batch': args.batch,
      'image_size': args.image_size, 'num_classes': args.num_classes, 'dtype': args.dtype,
      'matmul_dtype': args.matmul_dtype, 'conv_form': args.conv_form, 'steps': args.steps,
      'step_ms': round(total, 1), 'traced_over_untraced': round(total / untraced, 3),
      'kinds_ms': {k: round(v, 1) for k, v in sorted(kinds.items(), key=lambda x: -x[1])},
      **hardware.describe()}
  for kind, ms in result['kinds_ms'].items():
    print(f'{kind:42} {ms:8.1f} ms {ms / total:6.1%}')
  print(f'{"step":42} {total:8.1f} ms; {untraced:.1f} ms without the profiler')
  for operation in heapq.nlargest(args.top, by_operation, key=by_operation.get):
    print(f'{by_operation[operation]:8.2f} ms  {kind_of(operation, paths):42} {operation}: '
          f'{paths.get(operation, "")}')
  if args.json:
    print(json.dumps(result))


def timed(step: Callable[[], object], steps: int) -> float:
  """Returns the milliseconds of a step, after three that are not timed."""
  for _ in range(3):
    step()
  with jax.profiler.TraceAnnotation('timed_steps'):
    started = time.perf_counter()
    for _ in range(steps):
      step()
    return 1000 * (time.perf_counter() - started) / steps


def operation_times(folder: str, steps: int) -> tuple[dict[str, float], float]:
  """Reads a trace.

  Returns:
    {operation: ms per step}, with what no operation takes under `BETWEEN`, and their sum, which is
    the time of a step.
  """
  file, = glob.glob(f'{folder}/plugins/profile/*/*.xplane.pb')
  lines = [line for plane in ProfileData.from_file(file).planes for line in plane.lines]
  (start, end), = [(e.start_ns, e.end_ns) for line in lines for e in line.events
                   if e.name == 'timed_steps']
  spans = [span for line in lines for span in innermost(
      (max(e.start_ns, start), min(e.end_ns, end), e.name) for e in line.events
      if any(key == 'hlo_op' for key, _ in e.stats) and e.end_ns > start and e.start_ns < end)]
  times = shared_times(spans, start, end)
  scale = 1e-6 / steps
  return {name: ns * scale for name, ns in times.items()}, (end - start) * scale


def innermost(events: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
  """Returns the spans (start, end, name) of one thread in which no inner event runs."""
  spans, open_events = [], []
  now = 0.0

  def advance(until):
    nonlocal now
    while open_events and open_events[-1][0] <= until:
      end, name = open_events.pop()
      if end > now:
        spans.append((now, end, name))
        now = end
    if open_events and until > now:
      spans.append((now, until, open_events[-1][1]))
    now = max(now, until)

  for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
    advance(start)
    open_events.append((end, name))
  advance(float('inf'))
  return [span for span in spans if span[1] > span[0]]


def shared_times(spans: list[tuple[float, float, str]], start: float, end: float
                 ) -> dict[str, float]:
  """Returns the time of each name, where names of the same moment share it equally."""
  changes = sorted([(begin, 1, name) for begin, _, name in spans]
                   + [(finish, -1, name) for _, finish, name in spans])
  times, running, now = defaultdict(float), defaultdict(int), start
  for moment, change, name in changes:
    count = sum(running.values())
    if count == 0:
      times[BETWEEN] += moment - now
    for other, number in running.items():
      times[other] += (moment - now) * number / max(count, 1)
    now = moment
    running[name] += change
    if not running[name]:
      del running[name]
  times[BETWEEN] += end - now
  return dict(times)


def operation_paths(program: str) -> dict[str, str]:
  """Returns {operation: path of its layer and primitive} of a compiled program's text."""
  return dict(re.findall(r'%?([\w.\-]+) = [^\n]*?metadata=\{[^}\n]*?op_name="([^"]*)"', program))


def kind_of(operation: str, paths: Mapping[str, str]) -> str:
  if operation == BETWEEN:
    return BETWEEN
  path = paths.get(operation, '')
  return next(kind for kind, pattern in KINDS if re.search(pattern, path))


if __name__ == '__main__':
  main()
